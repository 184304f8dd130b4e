"""The baselines of a study: their names, their labels in tables and the paths of their predictions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from genseg.artifacts.parquet import read_metadata
from genseg.errors import UserError
from genseg.params import Params

INEXACT = "inexact_"
CLASSES = "_class_phrases"
"""Suffix of the names of files with predictions for class phrases."""


@dataclass(frozen=True)
class Baseline:
    """A method with predictions for the test phrases, and for the class phrases that mIoU is computed from.

    family: attention or inexact (`genseg baseline` makes it from the backbone's attention or from ground truth), run (`genseg
        sample` makes it) or imported (`genseg import` reads it; one of the two files may be absent).
    label: name in tables. run, class_run: for family run, the names of the sampling runs.
    """

    name: str
    family: Literal["attention", "inexact", "run", "imported"]
    label: str
    run: str | None = None
    class_run: str | None = None

    @property
    def real(self) -> bool:
        """Whether the predictions were made without ground truth."""
        return self.family != "inexact"

    def paths(self, params: Params) -> dict[bool, Path]:
        """Return the files of the predictions for the test phrases (False) and, if mIoU is scored, for class phrases (True).

        Soft maps are next to them. Of an imported baseline, one of the two files may be absent.
        """
        if self.run is not None and self.class_run is not None:
            folder = params.results_dir / "predictions"
            paths = {False: folder / self.run / "predictions.parquet", True: folder / self.class_run / "predictions.parquet"}
        else:
            folder = baselines_dir(params)
            paths = {False: folder / f"{self.name}.parquet", True: folder / f"{self.name}{CLASSES}.parquet"}
        return paths if params.score.miou else {False: paths[False]}


def baselines_dir(params: Params) -> Path:
    """Return the folder of the predictions that `genseg baseline` writes."""
    return params.results_dir / "baselines"


ATTENTION = (
    Baseline("cross_attention", "attention", "Cross-attention maps"),
    Baseline("diffpng_cross", "attention", "DiffPNG, cross-attention (reimplemented)"),
    Baseline("diffpng_cross_self", "attention", "DiffPNG, cross- and self-attention (reimplemented)"),
    Baseline("diffpng_sam", "attention", "DiffPNG with SAM's masks (reimplemented)"),
    Baseline("diffseg", "attention", "DiffSeg (our adaptation)"),
)
RUNS = (
    Baseline("gs", "run", "GS", run="main", class_run="class_phrases"),
    Baseline("discriminative", "run", "Discriminative control", run="discriminative", class_run="discriminative_class_phrases"),
)
INEXACT_LABELS = {
    "box": "Ground truth's box",
    "dilated": "Ground truth, dilated",
    "eroded": "Ground truth, eroded",
    "shifted": "Ground truth, shifted",
    "scribble": "Hull of a scribble in the ground truth",
}


def study_baselines(params: Params) -> list[Baseline]:
    """Return all baselines of a study in the order of tables, with the imported ones that `genseg baseline` has copied."""
    paths = sorted(path for path in baselines_dir(params).glob("*.parquet") if "imported" in read_metadata(path))
    return [*own_baselines(params), *_from_paths(params, paths)]


def own_baselines(params: Params) -> list[Baseline]:
    """Return the baselines that this program makes: attention-based methods, runs if there are any, and inexact masks."""
    attention = [baseline for baseline in ATTENTION if baseline.name in params.baselines.attention]
    inexact = [Baseline(INEXACT + kind, "inexact", INEXACT_LABELS[kind]) for kind in params.baselines.inexact]
    return [*attention, *(RUNS if params.sample.runs else ()), *inexact]


def imported_baselines(params: Params) -> list[Baseline]:
    """Return the baselines that `genseg import` has written to `data/imported/<study>`, by name."""
    return _from_paths(params, sorted(params.imported_dir.glob("*.parquet")))


def _from_paths(params: Params, paths: Sequence[Path]) -> list[Baseline]:
    paths = [path for path in paths if params.score.miou or not path.stem.endswith(CLASSES)]
    return [Baseline(name, "imported", name) for name in sorted({path.stem.removesuffix(CLASSES) for path in paths})]


def import_paths(params: Params, name: str) -> tuple[Path, Path]:
    """Return the paths of imported predictions for the phrases and for the class phrases.

    Raises UserError if the name is not a valid file name, or belongs to a baseline of the study.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name) or name.endswith(CLASSES):
        raise UserError(f"{name}: use letters, digits and . _ + -, starting with a letter or digit and not ending in {CLASSES}")
    reserved = {text.lower() for baseline in (*ATTENTION, *RUNS) for text in (baseline.name, baseline.label)}
    reserved |= {text.lower() for kind, label in INEXACT_LABELS.items() for text in (INEXACT + kind, label)}
    if name.lower() in reserved:
        raise UserError(f"{name}: this is the name of one of the study's own baselines; choose another name")
    return params.imported_dir / f"{name}.parquet", params.imported_dir / f"{name}{CLASSES}.parquet"


def find_baseline(params: Params, name: str, baselines: Sequence[Baseline]) -> Baseline:
    """Return the baseline with this name. Raises UserError if there is none."""
    by_name = {baseline.name: baseline for baseline in baselines}
    if name not in by_name:
        raise UserError(f"{name}: not a baseline of study {params.study}; choose from {', '.join(by_name)}")
    return by_name[name]
