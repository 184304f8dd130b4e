"""The table of baselines: names, what they are called in tables, where their predictions lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from genseg.errors import UserError
from genseg.params import Params

INEXACT = "inexact_"


@dataclass(frozen=True)
class Baseline:
    """One set of coarse masks: of the test phrases, and of the class phrases that mIoU is computed from.

    family: attention (made by `genseg baseline` with the backbone's attention), inexact (made from ground truth) or run (made
    by `genseg sample`, only pointed to). label: its row in tables. real: False where the ground truth was looked at.
    """

    name: str
    family: Literal["attention", "inexact", "run"]
    label: str
    run: str | None = None
    class_run: str | None = None

    @property
    def real(self) -> bool:
        return self.family != "inexact"

    def predictions(self, study: Params) -> Path:
        """Predictions for the test phrases."""
        return self._path(study, self.run, self.name)

    def class_predictions(self, study: Params) -> Path:
        """Predictions for the class phrases of test, with soft maps beside them where the method has some."""
        return self._path(study, self.class_run, f"{self.name}_class_phrases")

    def _path(self, study: Params, run: str | None, name: str) -> Path:
        if run is not None:
            return study.results_dir / "predictions" / run / "predictions.parquet"
        return baselines_dir(study) / f"{name}.parquet"


def baselines_dir(study: Params) -> Path:
    return study.results_dir / "baselines"


ATTENTION = (
    Baseline("cross_attention", "attention", "Cross-attention maps"),
    Baseline("diffpng_cross", "attention", "DiffPNG, cross-attention (reimplemented)"),
    Baseline("diffpng_cross_self", "attention", "DiffPNG, cross- and self-attention (reimplemented)"),
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


def study_baselines(study: Params) -> list[Baseline]:
    """All baselines of a study, in the order of tables; inexact ones as far as `baselines.inexact` gives them a target."""
    inexact = [Baseline(INEXACT + kind, "inexact", INEXACT_LABELS[kind]) for kind in study.baselines.inexact]
    return [*ATTENTION, *RUNS, *inexact]


def find_baseline(study: Params, name: str) -> Baseline:
    """The baseline of this name. Raises UserError where there is none."""
    known = {baseline.name: baseline for baseline in study_baselines(study)}
    if name not in known:
        raise UserError(f"{name}: no baseline of study {study.study}; there are {', '.join(known)}")
    return known[name]
