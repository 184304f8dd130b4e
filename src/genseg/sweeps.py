"""Sweeps: variants of one study, which differ from a baseline in some params and are compared with it.

Every training of every variant is a study of its own, `<study>-<sweep>-<variant>-seed<n>`. If the operating point is selected
on val, that study is preceded by one with the suffix `-val`, which samples the candidates on val only.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from genseg.artifacts.files import read_json
from genseg.errors import UserError
from genseg.metrics.soft_maps import choose_point
from genseg.params import Params, digest, read_document, validate_params
from genseg.params.base import Section, validate
from genseg.params.text import flow
from genseg.phases import PHASES

BASELINE = "baseline"
COMPARED = {
    "masks": ("data", "backbone", "latents", "train", "sample"),
    "refinement": ("baselines", "refine"),
}
"""Quantity that a sweep compares -> the phases whose params may differ. Masks are those of the main row on test."""
_UPSTREAM = {
    "data": ("data",),
    "backbone": ("data", "backbone"),
    "latents": ("data", "backbone", "latents"),
    "train": ("data", "backbone", "train"),
    "baselines": ("data", "backbone", "baselines"),
    "sample": ("data", "backbone", "latents", "train", "sample"),
}
"""Phases that two studies can share -> the phases whose params determine its outputs. (Training reads the images at its own
size only, so the params of other sizes, which belong to `latents`, do not affect it.)"""
_UNREAD = {
    "masks": ("sample.base", "sample.grid", "sample.grid_fraction"),
    "refinement": ("refine.controls", "refine.sensitivity", "refine.trained", "refine.pictures"),
}
"""Params of the compared phases that no compared run reads."""
_SET_BY_SWEEP = {
    "seed": "the evaluation is the same for all variants; list the seeds of training as `seeds`",
    "train.seed": "list the seeds of training as `seeds`",
    "sample.runs": "the sweep chooses the runs",
    "study": "the sweep names the studies",
    "refine.test_fraction": "all variants are scored on the same images",
}
_NAME = r"[a-z0-9][a-z0-9_.=-]*"


class SweepDocument(Section):
    """The file that describes a sweep. Params are values at dotted keys of the study's params."""

    baseline: dict[str, Any] = Field(default={})
    """Params in which the baseline differs from the study."""
    matrix: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default={})
    """Values of params. The baseline's own value may be listed."""
    mode: Literal["one-at-a-time", "product"] = "one-at-a-time"
    """Whether a variant of the matrix differs from the baseline in one key, or the variants are all combinations."""
    variants: dict[Annotated[str, Field(pattern=f"^{_NAME}$")], dict[str, Any]] = Field(default={})
    """Further variants by name, each with the params in which it differs from the baseline."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Seeds of training (`train.seed`), over which scores are averaged."""
    select: Literal["val", "fixed"] = "val"
    """val: the operating point, one of `sample.operating_points`, and the threshold with the highest AR on val, for baseline
    and variants alike. fixed: `sample.main` and `sample.threshold`."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must differ")
        if BASELINE in self.variants:
            raise ValueError(f"a variant cannot have the name {BASELINE}; rename it")
        return self


@dataclass(frozen=True)
class Training:
    """One training of a variant, and the study that holds its scores."""

    variant: str
    seed: int
    params: Params
    """With `select: val`, `sample.main` and `sample.threshold` are placeholders until `Sweep.choose`."""


class Sweep:
    """An expanded sweep of the study `base`: `variants` (name -> params that differ from the study, the baseline first)."""

    def __init__(self, path: str | Path, base: Params, document: SweepDocument) -> None:
        self.file, self.base, self.document = str(path), base, document
        self.name = Path(path).stem
        if not re.fullmatch(_NAME, self.name):
            raise UserError(f"{path}: the name is part of paths; use lower-case letters, digits and . _ = -")
        self.folder = base.results_dir / "sweeps" / self.name
        self.variants = {
            BASELINE: document.baseline,
            **{name: document.baseline | changes for name, changes in self._expand()},
        }
        if len(self.variants) == len(document.seeds) == 1:
            raise UserError(f"{path}: nothing to compare; add a matrix, variants or seeds")
        for variant in self.variants:
            self._validated(variant)
        self.keys = list(dict.fromkeys(key for changes in self.variants.values() for key in changes))
        self.compared = self._compared_quantity()
        self._check_keys()
        self.selects = document.select == "val" and self.compared == "masks"
        self.trainings = [
            Training(variant, seed, self._params(variant, seed)) for variant in self.variants for seed in document.seeds
        ]

    # -------------------------------------------------------------------------------------------------------- expansion
    def _expand(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the names and the params of all variants but the baseline. Raises UserError if two have the same name."""
        document, seen = self.document, {BASELINE}
        baseline = self._document(document.baseline, BASELINE)
        own = {key: _value(baseline, key) for key in document.matrix}
        if document.mode == "product":
            rows = [dict(zip(document.matrix, values, strict=True)) for values in product(*document.matrix.values())]
        else:
            rows = [{key: value} for key, values in document.matrix.items() for value in values]
        changed = ({key: value for key, value in row.items() if value != own[key]} for row in rows)
        matrix = (("-".join(_variant_name(*item) for item in row.items()), row) for row in changed if row)
        for name, changes in (*matrix, *document.variants.items()):
            if name in seen:
                raise UserError(f"{self.file}: two variants have the name {name}; rename one, or list its values once")
            seen.add(name)
            yield name, changes

    def _document(self, changes: dict[str, Any], variant: str) -> dict[str, Any]:
        document = copy.deepcopy(self.base.model_dump(mode="json"))
        for key, value in changes.items():
            _set_value(document, key, value, self._origin(variant))
        return document

    def _validated(self, variant: str) -> dict[str, Any]:
        """Return the complete params of a variant. Raises UserError if a key or a value is invalid."""
        document = self._document(self.variants[variant], variant)
        return validate_params(document, self._origin(variant)).model_dump(mode="json")

    def _origin(self, variant: str) -> str:
        return f"{self.file}: {variant if variant == BASELINE else f'variant {variant}'}"

    def _params(self, variant: str, seed: int) -> Params:
        """Return the params of one training. Raises UserError if val has no candidates to select from."""
        document, origin = self._validated(variant), self._origin(variant)
        document["study"] = f"{self.base.study}-{self.name}-{variant}-seed{seed}"
        document["train"]["seed"] = seed
        if self.compared == "refinement":
            document["train"]["seed"] = self.base.train.seed
            document["refine"] |= {"controls": [], "sensitivity": document["refine"]["sensitivity"] | {"baselines": []}}
        else:
            document["sample"]["runs"] = ["main"]
        if self.selects:
            if not document["sample"]["operating_points"]:
                raise UserError(f"{origin}: sample.operating_points is empty; list candidates, or set `select: fixed`")
            document["sample"]["main"] = document["sample"]["operating_points"][0]
        return validate_params(document, origin)

    # ----------------------------------------------------------------------------------------------------------- checks
    def _compared_quantity(self) -> str:
        """Return the quantity in which all changed params show. Raises UserError for a param that no compared phase reads."""
        readers = {key: [name for name, phases in COMPARED.items() if _is_read(key, phases)] for key in self.keys}
        for key in self.keys:
            if reason := next((text for name, text in _SET_BY_SWEEP.items() if _overlap(key, name)), None):
                raise UserError(f"{self.file}: {key} cannot differ between variants: {reason}")
            if not readers[key]:
                phases = "; ".join(f"for {name}, {', '.join(phases)}" for name, phases in COMPARED.items())
                raise UserError(f"{self.file}: {key} is read by none of the compared phases ({phases}); remove it")
        if all("masks" in names for names in readers.values()):
            return "masks"
        only_masks = next((key for key, names in readers.items() if "refinement" not in names), None)
        if only_masks is None:
            return "refinement"
        other = next(key for key, names in readers.items() if "masks" not in names)
        raise UserError(
            f"{self.file}: {only_masks} changes the masks of the main row and {other} only their refinement; write two sweeps"
        )

    def _check_keys(self) -> None:
        """Raise UserError for a param of a compared phase that no compared run reads, or that val selects."""
        document, phases = self.document, ", ".join(COMPARED[self.compared])
        unread = list(_UNREAD[self.compared])
        if self.compared == "masks" and document.select == "fixed":
            unread += ["sample.operating_points", "sample.select_fraction"]
        for key in self.keys:
            if any(_overlap(key, name) for name in unread):
                raise UserError(f"{self.file}: {key} is read by no run of the compared phases ({phases}); remove it")
            chosen = any(_overlap(key, name) for name in ("sample.main", "sample.threshold"))
            if chosen and self.compared == "masks" and document.select == "val":
                raise UserError(f"{self.file}: {key} is selected on val; remove it, or set `select: fixed`")
        if self.compared == "refinement" and document.seeds != [0]:
            raise UserError(f"{self.file}: seeds of training do not change refinement, which {self.keys[0]} does; remove them")

    # ---------------------------------------------------------------------------------------------------------- studies
    def studies(self) -> dict[str, Params]:
        """Return all studies by name: `base`, whose outputs are shared, and those of every training."""
        studies = {self.base.study: self.base}
        for training in self.trainings:
            params = training.params
            studies[params.study] = params
            if self.selects:
                update = {"study": f"{params.study}-val", "sample": params.sample.model_copy(update={"runs": ["val"]})}
                studies[f"{params.study}-val"] = params.model_copy(update=update)
        return studies

    def is_chosen(self, study: str) -> bool:
        """Return whether a study's operating point and threshold are selected on val."""
        return self.selects and any(training.params.study == study for training in self.trainings)

    def donors(self) -> dict[str, dict[str, str]]:
        """Return study -> phase -> the first study with the same params of that phase and of those before it, if it is another.

        The phase runs in that study only, and the others link its outputs.
        """
        owners: dict[tuple[str, str], str] = {}
        donors: dict[str, dict[str, str]] = {}
        for study, params in self.studies().items():
            for phase, upstream in _UPSTREAM.items():
                if phase not in COMPARED[self.compared] and self.compared == "masks":
                    continue
                values = params.subtree(*dict.fromkeys(key for name in upstream for key in PHASES[name].keys))
                if self.is_chosen(study) and phase == "sample":
                    values |= {"chosen": params.subtree("score")}
                owner = owners.setdefault((phase, digest(values)), study)
                if owner != study:
                    donors.setdefault(study, {})[phase] = owner
        return donors

    def choose(self, study: str) -> Params:
        """Return the params of a study with the operating point and threshold of the highest AR on val.

        Raises UserError if the study is not one of the sweep, or was not scored on val.
        """
        if not self.is_chosen(study):
            raise UserError(f"{study}: not a study of {self.file} whose operating point is selected on val")
        params = self.studies()[study]
        points = read_json(Path("results") / f"{study}-val" / "scores" / "operating_points.json")["points"]
        chosen = choose_point(points, max(point["evaluations"] for point in points))
        document = params.model_dump(mode="json")
        document["sample"] |= {"main": chosen["point"], "threshold": chosen["best_threshold"]}
        return validate_params(document, f"{self.file}: {study}")

    def describe(self) -> Iterator[str]:
        """Yield one line per variant: the params in which it differs from the study, and the phases that it runs and shares."""
        donors, count = self.donors(), len(self.document.seeds)
        for variant in self.variants:
            study = next(training.params.study for training in self.trainings if training.variant == variant)
            values = ((key, flow(value)) for key, value in self.variants[variant].items())
            changes = ", ".join(f"{key}: {text if len(text) <= 40 else f'{text[:39]}…'}" for key, text in values)
            shared = donors.get(study, {})
            runs = ", ".join(phase for phase in COMPARED[self.compared] if phase not in shared)
            links = ", ".join(f"{phase} of {owner}" for phase, owner in shared.items())
            trainings = f" ({count} seeds)" if count > 1 else ""
            yield f"{variant}{trainings}: {changes or 'the study itself'}; runs {runs}; shares {links or 'nothing'}"


def load_sweep(path: str | Path, params: Params) -> Sweep:
    """Read and expand a sweep. Raises UserError if the file is missing or has a mistake, or nothing is compared."""
    return Sweep(path, params, validate(SweepDocument, read_document(path, "sweep"), str(path)))


def training_samples(params: Params) -> tuple[int, int]:
    """Return the training budget: the epochs (0 if `train.steps` is set), and the samples of all steps, stages included."""
    train = params.train
    return train.epochs or 0, train.batch * ((train.steps or 0) + sum(stage.steps for stage in train.stages))


def _variant_name(key: str, value: Any) -> str:
    """Return the part of a variant's name for one changed key, e.g. "token_injection=false"."""
    text = flow(value)
    return f"{key.rpartition('.')[2]}={text if re.fullmatch(_NAME, text) else digest(value, 6)}"


def _overlap(key: str, other: str) -> bool:
    """Return whether one of two dotted keys contains the other."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _is_read(key: str, phases: tuple[str, ...]) -> bool:
    return any(_overlap(key, other) for phase in phases for other in PHASES[phase].keys)


def _value(document: dict[str, Any], key: str) -> Any:
    """Return the value at a dotted key; None if the key is unknown or in a section that is null."""
    node: Any = document
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


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
