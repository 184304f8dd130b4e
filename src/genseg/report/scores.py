"""A study's scores as the report reads them: every run that the params call for, and the comparisons between runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genseg.artifacts.files import read_json
from genseg.baselines.registry import study_baselines
from genseg.errors import UserError
from genseg.params import Cell, Params, Readout

SPLITS = ("overall", "things", "stuff", "singulars", "plurals")

_REQUIRED = ("protocol", "split", "run", "ar", "interval", "ceiling", "ceiling_latent", "boundary_iou", "counts")
_REMEDY = "run `genseg score` with this study's params"


@dataclass(frozen=True)
class ScoredRun:
    """The summary of one scored run and the file it was read from; AR is given as fractions."""

    path: Path
    summary: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.entry["name"])

    @property
    def entry(self) -> dict[str, Any]:
        """The run's name, role, method and sampling settings."""
        entry: dict[str, Any] = self.summary["run"]
        return entry

    @property
    def phrases(self) -> int:
        """Number of scored phrases."""
        return int(self.summary["counts"]["phrases"])

    @property
    def images(self) -> int:
        """Number of images with scored phrases."""
        return int(self.summary["counts"]["images"])


@dataclass(frozen=True)
class StudyScores:
    main: ScoredRun
    text_permuted: ScoredRun
    discriminative: ScoredRun
    colour_threshold: ScoredRun
    cells: dict[Cell, ScoredRun]
    """The sampling grid, in the order of `params.sample.grid_cells()`, base first."""
    val: dict[Cell, ScoredRun]
    """The operating points on val, main first."""
    ranking: dict[str, Any]
    """The ranking of the operating points (`metrics.operating`)."""
    ranking_path: Path
    readouts: dict[Readout, ScoredRun]
    """The base cell's maps by read-out; the study's own read-out is the base cell itself."""
    protocols: dict[tuple[str, str], ScoredRun]
    """(run, protocol) -> scores of the runs main and discriminative, for every protocol of the study, its own first."""
    baselines: list[ScoredRun]
    """The baselines that are not sampled runs, in the order of the registry."""
    refinement: dict[str, Any]
    """Baselines before and after refinement (`metrics.refinement.score_refinement`)."""
    refinement_path: Path
    comparisons: dict[str, dict[str, Any]]
    """"A - B" or "A - B (quantity)" -> paired difference of two runs."""
    comparisons_path: Path

    def paths(self) -> list[Path]:
        """Return every file that was read, sorted."""
        singles = [self.main, self.text_permuted, self.discriminative, self.colour_threshold, *self.baselines]
        groups = (self.cells, self.val, self.readouts, self.protocols)
        run_paths = {run.path for run in [*singles, *(run for group in groups for run in group.values())]}
        return sorted(run_paths | {self.comparisons_path, self.ranking_path, self.refinement_path})

    def base(self) -> ScoredRun:
        """Return the base cell of the grid."""
        return next(iter(self.cells.values()))

    def ensembles(self) -> list[tuple[Cell, Cell]]:
        """Return (ensemble, single sample) for each ensemble on the grid; both have calibration scores."""
        pairs = [(cell, cell.model_copy(update={"ensemble": 1})) for cell in self.cells if cell.ensemble > 1]
        calibrated = {cell for cell, run in self.cells.items() if run.summary.get("calibration")}
        return [(ensemble, single) for ensemble, single in pairs if {ensemble, single} <= calibrated]

    def comparison(self, a: ScoredRun, b: ScoredRun, split: str = "overall") -> dict[str, Any]:
        """Return the paired difference a - b in AR (fractions) with its 95 % interval.

        All values are null where a run has no phrase of the split.

        Raises:
            UserError: the two runs were not compared.
        """
        key = f"{a.name} - {b.name}" + ("" if split == "overall" else f" ({split})")
        if a.summary["ar"][split] is None or b.summary["ar"][split] is None:
            return dict.fromkeys(("n", "difference", "ci_low", "ci_high"))
        if key not in self.comparisons:
            raise UserError(f"{self.comparisons_path}: no comparison {key!r}; {_REMEDY}")
        return self.comparisons[key]


def read_study_scores(params: Params) -> StudyScores:
    """Read `results/<study>/scores`.

    Raises:
        UserError: a run that the params call for was not scored, or a file lacks a field; the message names it.
    """
    if not params.sample.is_whole():
        raise UserError(f"study {params.study}: tables need main, controls, grid and val in sample.runs; add the missing ones")
    folder = params.results_dir / "scores"
    cells = _read_cells(folder / "grid", params.sample.grid_cells())
    main, discriminative = read_scored_run(folder / "main.json"), read_scored_run(folder / "discriminative.json")

    # The study's own protocol comes first; its scores are the main files.
    own_protocol: str = params.score.protocol
    protocols = {("main", own_protocol): main, ("discriminative", own_protocol): discriminative}
    for protocol in params.score.also:
        if protocol != own_protocol:
            for name in ("main", "discriminative"):
                protocols[name, protocol] = read_scored_run(folder / "protocols" / f"{name}.{protocol}.json")

    return StudyScores(
        main=main,
        text_permuted=read_scored_run(folder / "text_permuted.json"),
        discriminative=discriminative,
        colour_threshold=read_scored_run(folder / "colour_threshold.json"),
        cells=cells,
        val=_read_cells(folder / "val", params.sample.operating_points()),
        ranking=_read_object(folder / "operating_points.json"),
        ranking_path=folder / "operating_points.json",
        readouts={params.sample.readout: cells[params.sample.base]}
        | {name: read_scored_run(folder / "readouts" / f"{name}.json") for name in params.other_readouts()},
        protocols=protocols,
        baselines=[
            read_scored_run(folder / "baselines" / f"{baseline.name}.json")
            for baseline in study_baselines(params)
            if baseline.family != "run"
        ],
        refinement=_read_object(folder / "refinement.json"),
        refinement_path=folder / "refinement.json",
        comparisons=_read_object(folder / "comparisons.json"),
        comparisons_path=folder / "comparisons.json",
    )


def _read_cells(folder: Path, cells: list[Cell]) -> dict[Cell, ScoredRun]:
    """Read the scores of the given cells. Cells are recognized by their sampling settings, not by file name."""
    runs = [read_scored_run(path) for path in sorted(folder.rglob("*.json"))]
    by_cell = {Cell.of(run.entry): run for run in runs}
    for cell in cells:
        if cell not in by_cell:
            raise UserError(
                f"{folder}: no scores of the cell {cell}; run `genseg sample` and `genseg score` with this study's params"
            )
    return {cell: by_cell[cell] for cell in cells}


def read_scored_run(path: Path) -> ScoredRun:
    """Read the summary of one run.

    Raises:
        UserError: the file is missing or lacks a key that the tables read.
    """
    summary = _read_object(path)
    missing_keys = [key for key in _REQUIRED if key not in summary]
    if missing_keys:
        raise UserError(f"{path}: no {', '.join(missing_keys)} in the scores; {_REMEDY}")
    for key in ("ar", "interval", "ceiling", "ceiling_latent", "boundary_iou"):
        if key == "ceiling_latent" and summary[key] is None:
            continue
        missing_splits = [split for split in SPLITS if split not in (summary[key] or {})]
        if missing_splits:
            raise UserError(f"{path}: {key} has no {', '.join(missing_splits)}; {_REMEDY}")
    return ScoredRun(path, summary)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path}: no such file; {_REMEDY}")
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}; {_REMEDY}")
    return content
