"""A study's scores as the tables need them: every run the params call for, the comparisons, the published rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from genseg.artifacts.files import read_json
from genseg.baselines.registry import study_baselines
from genseg.errors import UserError
from genseg.params import Cell, Params, Readout

SPLITS = ("overall", "things", "stuff", "singulars", "plurals")
PUBLISHED = {
    "table2": ("method", "citation", "venue", "diffusion", "ps_pretrain", *SPLITS, "source"),
    "table3_size": ("size", *SPLITS, "source"),
    "table4_steps": ("steps", *SPLITS, "source"),
    "table5_guidance": ("guidance", *SPLITS, "source"),
}
"""Files of `data/published/` and their columns; AR there is in points, as printed."""

_NEEDED = ("protocol", "split", "run", "ar", "interval", "ceiling", "ceiling_latent", "boundary_iou", "counts")
_REMEDY = "run `genseg score` with this study's params"


@dataclass(frozen=True)
class Scored:
    """One scored run: its summary (fractions) and the file it was read from."""

    path: Path
    summary: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.summary["run"]["name"])

    @property
    def phrases(self) -> int:
        return int(self.summary["counts"]["phrases"])


@dataclass(frozen=True)
class StudyScores:
    main: Scored
    text_permuted: Scored
    discriminative: Scored
    colour_threshold: Scored
    cells: dict[Cell, Scored]
    """The sampling grid, in the order of `params.sample.grid_cells()`, base first."""
    val: dict[Cell, Scored]
    """The operating points on val, main first."""
    ranking: dict[str, Any]
    """What the scores say of the operating points (`metrics.operating`)."""
    ranking_path: Path
    readouts: dict[Readout, Scored]
    """The base cell's maps by read-out; the study's own read-out is the base cell itself."""
    protocols: dict[tuple[str, str], Scored]
    """(run, protocol) for the runs main and discriminative and every protocol the study scores, its own first."""
    baselines: list[Scored]
    """The baselines that are no run of sampling, in the order of the registry."""
    refinement: dict[str, Any]
    """Baselines before and after refinement (`metrics.refinement.score_refinement`)."""
    refinement_path: Path
    comparisons: dict[str, dict[str, Any]]
    comparisons_path: Path

    def paths(self) -> list[Path]:
        """Every file that was read."""
        singles = (self.main, self.text_permuted, self.discriminative, self.colour_threshold)
        scored = [*singles, *self.cells.values(), *self.val.values(), *self.readouts.values(), *self.protocols.values()]
        others = {self.comparisons_path, self.ranking_path, self.refinement_path}
        return sorted({item.path for item in [*scored, *self.baselines]} | others)

    def base(self) -> Scored:
        return next(iter(self.cells.values()))

    def ensembles(self) -> list[tuple[Cell, Cell]]:
        """Each ensemble on the grid whose soft maps were scored for calibration, and its first sample alone."""
        pairs = [(cell, cell.model_copy(update={"ensemble": 1})) for cell in self.cells if cell.ensemble > 1]
        known = {cell for cell, scored in self.cells.items() if scored.summary.get("calibration")}
        return [(several, single) for several, single in pairs if {several, single} <= known]

    def comparison(self, a: Scored, b: Scored, split: str = "overall") -> dict[str, Any]:
        """Paired difference a - b in AR (fractions) with its 95 % interval; all null where a run has no phrase of the split.

        Raises:
            UserError: it was not scored.
        """
        key = f"{a.name} - {b.name}" + ("" if split == "overall" else f" ({split})")
        if a.summary["ar"][split] is None or b.summary["ar"][split] is None:
            return dict.fromkeys(("n", "difference", "ci_low", "ci_high"))
        if key not in self.comparisons:
            raise UserError(f"{self.comparisons_path}: no comparison {key!r}; {_REMEDY}")
        return self.comparisons[key]


def read_study(params: Params) -> StudyScores:
    """Read `results/<study>/scores`.

    Raises:
        UserError: a run that the params call for was not scored, or a file lacks a field; the message names it.
    """
    if not params.sample.is_whole():
        raise UserError(f"study {params.study}: tables need main, controls, grid and val in sample.runs; add what is missing")
    folder = params.results_dir / "scores"
    cells = _cells(folder / "grid", params.sample.grid_cells())
    main, discriminative = read_scored(folder / "main.json"), read_scored(folder / "discriminative.json")
    own: str = params.score.protocol
    protocols = {("main", own): main, ("discriminative", own): discriminative}
    for protocol in params.score.also:
        if protocol == own:
            continue
        for run in ("main", "discriminative"):
            protocols[run, protocol] = read_scored(folder / "protocols" / f"{run}.{protocol}.json")
    return StudyScores(
        main=main,
        text_permuted=read_scored(folder / "text_permuted.json"),
        discriminative=discriminative,
        colour_threshold=read_scored(folder / "colour_threshold.json"),
        cells=cells,
        val=_cells(folder / "val", params.sample.operating_points()),
        ranking=_read_json(folder / "operating_points.json"),
        ranking_path=folder / "operating_points.json",
        readouts={params.sample.readout: cells[params.sample.base]}
        | {name: read_scored(folder / "readouts" / f"{name}.json") for name in params.other_readouts()},
        protocols=protocols,
        baselines=[
            read_scored(folder / "baselines" / f"{baseline.name}.json")
            for baseline in study_baselines(params)
            if baseline.family != "run"
        ],
        refinement=_read_json(folder / "refinement.json"),
        refinement_path=folder / "refinement.json",
        comparisons=_read_json(folder / "comparisons.json"),
        comparisons_path=folder / "comparisons.json",
    )


def _cells(folder: Path, wanted: list[Cell]) -> dict[Cell, Scored]:
    """Scored cells by what they were sampled with, so that the naming of their files is not told twice."""
    scored = [read_scored(path) for path in sorted(folder.rglob("*.json"))]
    found = {Cell.of(item.summary["run"]): item for item in scored}
    for cell in wanted:
        if cell not in found:
            raise UserError(
                f"{folder}: no scores of the cell {cell}; run `genseg sample` and `genseg score` with this study's params"
            )
    return {cell: found[cell] for cell in wanted}


def read_scored(path: Path) -> Scored:
    """Raises UserError for a file that is missing or lacks what tables read."""
    summary = _read_json(path)
    missing = [key for key in _NEEDED if key not in summary]
    if missing:
        raise UserError(f"{path}: scores without {', '.join(missing)}; {_REMEDY}")
    for key in ("ar", "interval", "ceiling", "ceiling_latent", "boundary_iou"):
        lacking = [split for split in SPLITS if split not in (summary[key] or {})]
        if lacking and not (key == "ceiling_latent" and summary[key] is None):
            raise UserError(f"{path}: {key} without {', '.join(lacking)}; {_REMEDY}")
    return Scored(path, summary)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path}: no such file; {_REMEDY}")
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(found).__name__}; {_REMEDY}")
    return found


def published_path(name: str) -> Path:
    return Path("data/published") / f"{name}.csv"


def read_published(name: str) -> list[dict[str, Any]]:
    """Published rows (`PUBLISHED`, one mapping a row), AR in points. Raises UserError for a missing file, column or number."""
    path = published_path(name)
    try:
        frame = pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; restore it with `git checkout -- {path}`") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as CSV ({' '.join(str(error).split())}); restore it from git") from None
    for column in PUBLISHED[name]:
        if column not in frame:
            raise UserError(f"{path}: no column {column}; it has {', '.join(map(str, frame.columns))}")
        if column in SPLITS:
            numbers = pd.to_numeric(frame[column], errors="coerce")
            if numbers.isna().any():
                row = int(numbers.isna().to_numpy().argmax())
                raise UserError(
                    f"{path}: row {row}, column {column}: {frame.at[row, column]!r} is no number; restore it from git"
                )
            frame[column] = numbers
    return [dict(zip(PUBLISHED[name], row, strict=True)) for row in frame[list(PUBLISHED[name])].itertuples(index=False)]
