"""A sweep: variants of one study, trained from the same initial weights and compared at equal training budget.

The operating point and the threshold of each variant are selected on val. Test is scored once, at that point.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, field_validator

from genseg.artifacts.files import read_json
from genseg.diffusion.guidance import count_evaluations
from genseg.errors import UserError
from genseg.metrics.soft_maps import choose_point
from genseg.params import OperatingPoint, Params, read_document, validate_params
from genseg.params.base import Fraction, Section, validate


class Variant(Section):
    """One training that is compared."""

    params: dict[str, Any]
    """Values at dotted keys of the study's params. With `train.stages` but without `train.steps`, the first training is
    shortened by the steps of the stages."""
    evaluations: PositiveInt
    """Maximum number of evaluations per mask. More expensive points of `sample.operating_points` are omitted."""
    group: str | None = None
    """Name of the variant's group, of which only the variant with the highest AR on val is sampled on test."""

    @field_validator("params")
    @classmethod
    def _leaves_choices_to_val(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if f"{key}.".startswith(("study.", "sample.runs.", "sample.main.", "sample.threshold.")):
                raise ValueError(f"{key} is set by the sweep (main point and threshold are selected on val); remove it")
        return value


class Pick(Section):
    """A question that the table answers: which of these variants is best on val?"""

    variants: list[str] | None = None
    """Candidates; null: all variants and the study itself."""
    evaluations: tuple[PositiveInt, PositiveInt] | None = None
    """Minimum and maximum number of evaluations per mask of a candidate's point; null: any."""


class SweepDocument(Section):
    """The file that describes a sweep: variants and picks by name."""

    variants: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")], Variant], Field(min_length=1)]
    picks: dict[str, Pick]


@dataclass(frozen=True)
class Choice:
    """An operating point and the threshold of its soft maps."""

    point: OperatingPoint
    threshold: Fraction


class Sweep:
    """Variants of the study `base` as studies of their own, `<study>-<variant>`. Their comparison is written to `folder`."""

    def __init__(self, name: str, base: Params, document: SweepDocument, origin: str) -> None:
        self.base, self.document, self._origin = base, document, origin
        self.folder = base.results_dir / "sweeps" / name
        if base.study in document.variants:
            raise UserError(f"{origin}: variant {base.study} has the name of the study; rename it")
        self.variants = {variant: self.params(variant) for variant in document.variants}
        for variant, params in self.variants.items():
            if training_budget(params) != training_budget(base):
                raise UserError(
                    f"{origin}: variant {variant} trains on {_budget_text(params)} and study {base.study} on "
                    f"{_budget_text(base)}, stages included; their budgets must be equal"
                )
        for name, pick in document.picks.items():
            for unknown in set(pick.variants or []) - {*self.variants, base.study}:
                raise UserError(
                    f"{origin}: pick {name!r}: unknown variant {unknown}; the variants are {', '.join(self.variants)}"
                )

    def params(self, variant: str, choice: Choice | None = None) -> Params:
        """Return the params of a variant's study. It samples val only or, with a choice, also the main row.

        Raises UserError if a key or value is invalid, or all operating points cost more than the variant's evaluations.
        """
        entry, origin = self.document.variants[variant], f"{self._origin}: variant {variant}"
        document = copy.deepcopy(self.base.model_dump(mode="json"))
        for key, value in entry.params.items():
            _set_value(document, key, value, origin)
        if "train.stages" in entry.params and "train.steps" not in entry.params and self.base.train.steps:
            document["train"]["steps"] = self._steps_left_by_stages(validate_params(document, origin), origin)
        valid = validate_params(document, origin)
        points = [point for point in valid.sample.operating_points if count_evaluations(point) <= entry.evaluations]
        if not points:
            raise UserError(
                f"{origin}: no point of sample.operating_points costs at most {entry.evaluations} evaluations; add one"
            )
        document["study"] = f"{self.base.study}-{variant}"
        document["sample"] |= {
            "runs": ["main", "val"] if choice else ["val"],
            "operating_points": [point.model_dump(mode="json") for point in points],
            "main": (choice.point if choice else points[0]).model_dump(mode="json"),
            "threshold": choice.threshold if choice else valid.sample.threshold,
        }
        return validate_params(document, origin)

    def _steps_left_by_stages(self, variant: Params, origin: str) -> int:
        """Return the `train.steps` with which a variant's budget, stages included, equals that of the study."""
        train, (_, samples) = variant.train, training_budget(self.base)
        stage_samples = train.batch * sum(stage.steps for stage in train.stages)
        steps, remainder = divmod(samples - stage_samples, train.batch)
        if steps < 1 or remainder:
            raise UserError(
                f"{origin}: its stages use {stage_samples} of the {samples} samples of study {self.base.study}, and "
                f"the rest is not a positive multiple of train.batch ({train.batch}); set train.steps and shorten train.stages"
            )
        return steps

    def groups(self) -> dict[str, list[str]]:
        """Return the variants of each group. A variant without a group is a group of its own."""
        groups: dict[str, list[str]] = {}
        for variant, entry in self.document.variants.items():
            groups.setdefault(entry.group or variant, []).append(variant)
        return groups

    def choose(self, variant: str) -> tuple[Choice, float]:
        """Return the point and threshold with the highest AR on val, and that AR (0-1). Raises UserError without scores."""
        path = self.variants[variant].results_dir / "scores" / "operating_points.json"
        row = choose_point(read_json(path)["points"], self.document.variants[variant].evaluations)
        return Choice(OperatingPoint.model_validate(row["point"]), row["best_threshold"]), row["best_ar"]

    def best_of(self, group: list[str]) -> str:
        """Return the variant of a group with the highest AR on val, the first one if several are equal."""
        return max(group, key=lambda variant: self.choose(variant)[1])


def load_sweep(path: str | Path, params: Params) -> Sweep:
    """Read and validate a sweep and the params of its variants. Raises UserError if the file is missing or has a mistake."""
    document = validate(SweepDocument, read_document(path, "sweep"), str(path))
    return Sweep(Path(path).stem, params, document, str(path))


def training_budget(params: Params) -> tuple[int, int]:
    """Return the training budget: the epochs (0 if `train.steps` is set), and the samples of all steps, stages included."""
    train = params.train
    return train.epochs or 0, train.batch * ((train.steps or 0) + sum(stage.steps for stage in train.stages))


def _budget_text(params: Params) -> str:
    epochs, samples = training_budget(params)
    return " and ".join(f"{count} {unit}" for count, unit in ((epochs, "epochs"), (samples, "samples")) if count)


def _set_value(document: dict[str, Any], key: str, value: Any, origin: str) -> None:
    """Set the value at a dotted key. Unknown keys are set too: the validation names the nearest valid one."""
    *parents, last = key.split(".")
    node = document
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        if not isinstance(node := node[parent], dict):
            raise UserError(f"{origin}: {key}: {parent} is not a section; set its whole value")
    node[last] = value
