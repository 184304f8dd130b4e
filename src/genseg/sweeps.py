"""A sweep: variants of one study, each trained anew, compared at equal training budget.

Of each variant val chooses the operating point and its threshold; test then sees that one, once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from genseg.artifacts.files import read_json
from genseg.errors import UserError
from genseg.metrics.operating import choose_point
from genseg.params import Cell, Fraction, Params, Positive, Section, read_document, validate, validate_params

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
_CHOSEN = ("study", "sample.runs", "sample.main", "sample.threshold")
"""What a sweep itself gives a variant."""


class Variant(Section):
    params: dict[str, Any]
    """Dotted keys of the study's params, and what the variant has there. With `train.stages` but no `train.steps`, the steps
    are what these stages leave of the study's budget."""
    evaluations: Positive
    """Most evaluations per mask of the operating point that val chooses among `sample.points`; dearer points are left out."""
    group: str | None = None
    """Variants of one group compete: only the one that is best on val is sampled on test."""

    @field_validator("params")
    @classmethod
    def leaves_choices_to_val(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if any(f"{key}.".startswith(f"{chosen}.") for chosen in _CHOSEN):
                raise ValueError(f"{key} is set by the sweep (main point and threshold by val); leave it out")
        return value


class Pick(Section):
    """A question to the table: of these variants, which is best on val?"""

    variants: list[str] | None = None
    """null: all, and the study itself."""
    evaluations: tuple[Positive, Positive] | None = None
    """Fewest and most evaluations per mask of its point; null: any."""


class SweepDocument(Section):
    variants: Annotated[dict[Name, Variant], Field(min_length=1)]
    picks: dict[str, Pick]


@dataclass(frozen=True)
class Choice:
    """An operating point and the threshold of its soft maps."""

    cell: Cell
    threshold: Fraction


class Sweep:
    """Variants of `base` as valid studies of their own, `<study>-<variant>`."""

    def __init__(self, name: str, base: Params, document: SweepDocument, origin: str) -> None:
        self.name, self.base, self.document, self._origin = name, base, document, origin
        if base.study in document.variants:
            raise UserError(f"{origin}: variant {base.study} has the name of the study; choose another")
        self.variants = {variant: self.params(variant) for variant in document.variants}
        for variant, params in self.variants.items():
            if budget(params) != budget(base):
                raise UserError(
                    f"{origin}: variant {variant}: trains {_told(budget(params))}, study {base.study} {_told(budget(base))} "
                    "(stages included); give both the same budget"
                )
        for pick, wanted in document.picks.items():
            for unknown in set(wanted.variants or []) - {*self.variants, base.study}:
                raise UserError(f"{origin}: pick {pick!r}: no variant {unknown}; it has {', '.join(self.variants)}")

    def params(self, variant: str, choice: Choice | None = None) -> Params:
        """The variant's study: only val's operating points, or with a choice these and the main row.

        Raises:
            UserError: a key is unknown, a value out of range, or no operating point within the variant's evaluations.
        """
        entry, origin = self.document.variants[variant], f"{self._origin}: variant {variant}"
        document = copy.deepcopy(self.base.model_dump(mode="json"))
        for key, value in entry.params.items():
            _set(document, key, value, origin)
        if "train.stages" in entry.params and "train.steps" not in entry.params and self.base.train.steps:
            document["train"]["steps"] = self._left_by_stages(validate_params(document, origin), origin)
        valid = validate_params(document, origin)
        points = [point for point in valid.sample.points if point.evaluations <= entry.evaluations]
        if not points:
            raise UserError(f"{origin}: no point of sample.points costs at most {entry.evaluations} evaluations; add one")
        cell = choice.cell if choice else Cell(size=valid.sample.main.size, **points[0].model_dump())
        document["study"] = f"{self.base.study}-{variant}"
        document["sample"] |= {
            "runs": ["main", "val"] if choice else ["val"],
            "points": [point.model_dump(mode="json") for point in points],
            "main": cell.model_dump(mode="json"),
            "threshold": choice.threshold if choice else valid.sample.threshold,
        }
        return validate_params(document, origin)

    def _left_by_stages(self, variant: Params, origin: str) -> int:
        """The `train.steps` that a variant's stages leave of the study's budget."""
        train, (_, samples) = variant.train, budget(self.base)
        taken = train.batch * sum(stage.steps for stage in train.stages)
        left, rest = divmod(samples - taken, train.batch)
        if left < 1 or rest:
            raise UserError(
                f"{origin}: its stages take {taken} of the {samples} samples that study {self.base.study} trains on, "
                f"which leaves no whole number of steps of {train.batch}; give train.steps and fewer steps in train.stages"
            )
        return left

    def groups(self) -> dict[str, list[str]]:
        """Variants that compete, by their group; one without is a group of its own."""
        found: dict[str, list[str]] = {}
        for variant, entry in self.document.variants.items():
            found.setdefault(entry.group or variant, []).append(variant)
        return found

    def choose(self, variant: str) -> tuple[Choice, float]:
        """The operating point and threshold that val chooses for a variant, and its AR there (a fraction).

        Raises:
            UserError: its points were not scored.
        """
        path = self.variants[variant].results_dir / "scores" / "operating_points.json"
        point = choose_point(read_json(path)["points"], self.document.variants[variant].evaluations)
        return Choice(Cell.of(point), point["best_threshold"]), point["best_ar"]

    def best_of(self, group: list[str]) -> str:
        """The variant of a group with the highest AR on val; of equals the first."""
        return max(group, key=lambda variant: self.choose(variant)[1])

    @property
    def folder(self) -> Path:
        """Where the comparison goes."""
        return self.base.results_dir / "sweeps" / self.name


def load_sweep(path: str | Path, params: Params) -> Sweep:
    """Read and validate a sweep document with all its variants.

    Raises:
        UserError: the file is missing or wrong, a key of a variant is unknown (the nearest valid one is named), or a variant
            trains on another number of samples than the study.
    """
    document = validate(SweepDocument, read_document(path, "sweep"), str(path))
    return Sweep(Path(path).stem, params, document, str(path))


def budget(params: Params) -> tuple[int, int]:
    """What training sees: epochs, and samples beside them, stages included."""
    train = params.train
    return train.epochs or 0, train.batch * ((train.steps or 0) + sum(stage.steps for stage in train.stages))


def _told(found: tuple[int, int]) -> str:
    parts = [f"{found[0]} epochs"] * bool(found[0]) + [f"{found[1]} samples"] * bool(found[1])
    return " and ".join(parts)


def _set(document: dict[str, Any], key: str, value: Any, origin: str) -> None:
    """Set a dotted key; one that is unknown is left to the validation, which names the nearest."""
    *parents, last = key.split(".")
    node = document
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"{origin}: {key}: {parent} holds no keys; give its whole value")
    node[last] = value
