"""The table of baselines: names, what they are called in tables, where their predictions lie."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Baseline:
    """One set of coarse masks: of the test phrases, and of the class phrases that mIoU is computed from.

    family: attention (made by `genseg baseline` with the backbone's attention), inexact (made from ground truth), run (made
    by `genseg sample`, only pointed to) or imported (another program's, read by `genseg import`; it may lack one of the two
    files). label: its row in tables. real: False where the ground truth was looked at.
    """

    name: str
    family: Literal["attention", "inexact", "run", "imported"]
    label: str
    run: str | None = None
    class_run: str | None = None

    @property
    def real(self) -> bool:
        return self.family != "inexact"

    def predictions(self, params: Params) -> Path:
        """Predictions for the test phrases."""
        return self._path(params, self.run, self.name)

    def class_predictions(self, params: Params) -> Path:
        """Predictions for the class phrases of test, with soft maps beside them where the method has some."""
        return self._path(params, self.class_run, f"{self.name}{CLASSES}")

    def _path(self, params: Params, run: str | None, name: str) -> Path:
        if run is not None:
            return params.results_dir / "predictions" / run / "predictions.parquet"
        return baselines_dir(params) / f"{name}.parquet"


def baselines_dir(params: Params) -> Path:
    return params.results_dir / "baselines"


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


def study_baselines(params: Params) -> list[Baseline]:
    """All baselines of a study, in the order of tables; imported ones as the phase baselines took them over."""
    paths = sorted(path for path in baselines_dir(params).glob("*.parquet") if "imported" in read_metadata(path))
    return [*own_baselines(params), *_imported(paths)]


def own_baselines(params: Params) -> list[Baseline]:
    """Those that this program makes; inexact ones as far as `baselines.inexact` gives them a target."""
    inexact = [Baseline(INEXACT + kind, "inexact", INEXACT_LABELS[kind]) for kind in params.baselines.inexact]
    return [*ATTENTION, *RUNS, *inexact]


def imports(params: Params) -> list[Baseline]:
    """Those that `genseg import` has put into `data/imported/<study>`, by name."""
    return _imported(sorted(params.imported_dir.glob("*.parquet")))


def _imported(paths: Sequence[Path]) -> list[Baseline]:
    return [Baseline(name, "imported", name) for name in sorted({path.stem.removesuffix(CLASSES) for path in paths})]


def import_paths(params: Params, name: str) -> tuple[Path, Path]:
    """Where imported predictions go, those of the phrases and those of the class phrases.

    Raises:
        UserError: a name that no file or no row of a table may have.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name) or name.endswith(CLASSES):
        raise UserError(f"{name}: give a name of letters, digits and . _ + -, which starts with a letter or digit")
    taken = {known.lower() for own in own_baselines(params) for known in (own.name, own.label)} | {
        INEXACT + k for k in INEXACT_LABELS
    }
    if name.lower() in taken:
        raise UserError(f"{name}: a baseline of the study itself is called so; choose another name")
    return params.imported_dir / f"{name}.parquet", params.imported_dir / f"{name}{CLASSES}.parquet"


def find_baseline(params: Params, name: str, baselines: Sequence[Baseline]) -> Baseline:
    """The baseline of this name. Raises UserError where there is none."""
    known = {baseline.name: baseline for baseline in baselines}
    if name not in known:
        raise UserError(f"{name}: no baseline of study {params.study}; there are {', '.join(known)}")
    return known[name]
