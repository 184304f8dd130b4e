"""The scores of a study that the report reads: all runs that the params require, and the comparisons between runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genseg.artifacts.files import read_json
from genseg.baselines.registry import study_baselines
from genseg.errors import UserError
from genseg.params import OperatingPoint, Params
from genseg.params.sample import Readout

SEEDS_KEYS = (
    *("seed", "data", "backbone", "latents", "train", "score"),
    *(f"sample.{key}" for key in ("main", "threshold", "readout", "clip_sample", "timestep_spacing")),
)
"""Params that determine the main row's scores over several trainings."""
SPLITS = ("overall", "things", "stuff", "singulars", "plurals")

_REQUIRED = ("protocol", "split", "run", "ar", "interval", "ceiling", "ceiling_latent", "boundary_iou", "counts")
_REMEDY = "run `genseg score` with this study's params"


@dataclass(frozen=True)
class ScoredRun:
    """The summary of one scored run, with AR as fractions, the file it was read from, and its numbers of phrases and images."""

    path: Path
    summary: dict[str, Any]

    @property
    def entry(self) -> dict[str, Any]:
        """The run's fields in its manifest."""
        return self.summary["run"]

    @property
    def name(self) -> str:
        return self.entry["name"]

    @property
    def point(self) -> OperatingPoint | None:
        """Operating point; None for a baseline or a run without a network."""
        point = self.entry.get("point")
        return None if point is None else OperatingPoint.model_validate(point)

    @property
    def phrases(self) -> int:
        return self.summary["counts"]["phrases"]

    @property
    def images(self) -> int:
        return self.summary["counts"]["images"]


@dataclass(frozen=True)
class RefinementScores:
    """The scores that a study without runs (`sample.runs: []`) has."""

    folder: Path
    refinement: dict[str, Any]
    """Baselines before and after refinement (`metrics.refinement.score_refinement`)."""


@dataclass(frozen=True)
class StudyScores(RefinementScores):
    main: ScoredRun
    text_permuted: ScoredRun
    discriminative: ScoredRun
    discriminative_mirrored: ScoredRun | None
    """The control with two evaluations, of the image and of the mirrored image; None if no point mirrors."""
    colour_threshold: ScoredRun
    cells: dict[OperatingPoint, ScoredRun]
    """The sampling grid, in the order of `params.sample.test_subset_points()`, base first."""
    val: dict[OperatingPoint, ScoredRun]
    """The operating points on val, main first."""
    ranking: dict[str, Any]
    """The ranking of the operating points (`metrics.soft_maps`)."""
    readouts: dict[Readout, ScoredRun]
    """Scores of the base cell's maps by read-out; those of the study's own read-out are the base cell's."""
    measured: dict[str, dict[str, ScoredRun]]
    """Measured rows of Table 2: method -> protocol -> scores, for every protocol of the study, its own first. The methods are
    GS, the discriminative control, and the baselines made without ground truth."""
    baselines: list[ScoredRun]
    """The baselines that are not sampled runs."""
    seeds: dict[str, Any] | None
    """The main row over several trainings (`report.compare`), from a sweep of this study's params; None if there is none."""
    comparisons: dict[str, dict[str, Any]]
    """"A - B" or "A - B (quantity)" -> paired difference of two runs."""

    def paths(self) -> list[Path]:
        """Return every file that was read, sorted."""
        runs = [*self.controls(), *self.baselines]
        for group in (self.cells, self.val, self.readouts):
            runs += group.values()
        runs += [run for by_protocol in self.measured.values() for run in by_protocol.values()]
        others = {self.folder / f"{name}.json" for name in ("comparisons", "operating_points", "refinement")}
        others |= {Path(self.seeds["path"])} if self.seeds else set()
        return sorted({run.path for run in runs} | others)

    def controls(self) -> list[ScoredRun]:
        """Return the main run, and then the runs that it is compared with."""
        runs = [self.main, self.text_permuted, self.colour_threshold, self.discriminative, self.discriminative_mirrored]
        return [run for run in runs if run is not None]

    def base(self) -> ScoredRun:
        """Return the base cell of the grid."""
        return next(iter(self.cells.values()))

    def ensembles(self) -> list[tuple[OperatingPoint, OperatingPoint]]:
        """Return (ensemble, single sample) for each ensemble on the grid; both have calibration scores."""
        pairs = [(cell, cell.single) for cell in self.cells if cell.ensemble_size > 1]
        calibrated = {cell for cell, run in self.cells.items() if run.summary.get("calibration")}
        return [(ensemble, single) for ensemble, single in pairs if {ensemble, single} <= calibrated]

    def comparison(self, a: ScoredRun, b: ScoredRun, split: str = "overall") -> dict[str, Any]:
        """Return the paired difference a - b in AR (fractions) with its 95 % interval. Raises UserError if there is none.

        All values are null where a run has no phrase of the split.
        """
        key = f"{a.name} - {b.name}" + ("" if split == "overall" else f" ({split})")
        if a.summary["ar"][split] is None or b.summary["ar"][split] is None:
            return dict.fromkeys(("n", "difference", "ci_low", "ci_high"))
        if key not in self.comparisons:
            raise UserError(f"{self.folder / 'comparisons.json'}: no comparison {key!r}; {_REMEDY}")
        return self.comparisons[key]


def read_refinement_scores(params: Params) -> RefinementScores:
    """Read `results/<study>/scores` of a study without runs. Raises UserError if the file is missing."""
    folder = params.results_dir / "scores"
    return RefinementScores(folder, _read_object(folder / "refinement.json"))


def read_study_scores(params: Params) -> StudyScores:
    """Read `results/<study>/scores`. Raises UserError if a required run was not scored, or a file lacks a field."""
    if not params.sample.has_tables():
        raise UserError(f"study {params.study}: tables need main, controls, grid and val in sample.runs; add the missing ones")
    folder = params.results_dir / "scores"

    def read(name: str) -> ScoredRun:
        return read_scored_run(folder / f"{name}.json")

    cells = _read_cells(folder / "grid", params.sample.test_subset_points())
    main, discriminative = read("main"), read("discriminative")
    baselines = [read(f"baselines/{baseline.name}") for baseline in study_baselines(params) if baseline.family != "run"]
    methods = {"GS": main, "Discriminative": discriminative}
    methods |= {run.entry["label"]: run for run in baselines if run.entry["real"]}
    measured: dict[str, dict[str, ScoredRun]] = {}
    for label, run in methods.items():
        measured[label] = {params.score.protocol: run}
        measured[label] |= {protocol: read(f"protocols/{run.name}.{protocol}") for protocol in params.score.protocols[1:]}
    return StudyScores(
        folder=folder,
        main=main,
        text_permuted=read("text_permuted"),
        discriminative=discriminative,
        discriminative_mirrored=read("discriminative_mirrored") if params.sample.uses_mirror() else None,
        colour_threshold=read("colour_threshold"),
        cells=cells,
        val=_read_cells(folder / "val", params.sample.val_points()),
        ranking=_read_object(folder / "operating_points.json"),
        readouts={params.sample.readout: cells[params.sample.base]}
        | {name: read(f"readouts/{name}") for name in params.other_readouts()},
        measured=measured,
        baselines=baselines,
        refinement=_read_object(folder / "refinement.json"),
        seeds=_read_seeds(params),
        comparisons=_read_object(folder / "comparisons.json"),
    )


def _read_seeds(params: Params) -> dict[str, Any] | None:
    """Return the scores over the most trainings of exactly this study, with the `path` of the file, or None."""
    expected = params.subtree(*SEEDS_KEYS)
    found = [_read_object(path) | {"path": str(path)} for path in sorted((params.results_dir / "sweeps").glob("*/seeds.json"))]
    return max((seeds for seeds in found if seeds["params"] == expected), key=lambda seeds: len(seeds["seeds"]), default=None)


def _read_cells(folder: Path, cells: list[OperatingPoint]) -> dict[OperatingPoint, ScoredRun]:
    """Read the scores of operating points. They are found by their recorded values, not by file name."""
    runs = {run.point: run for run in map(read_scored_run, sorted(folder.rglob("*.json")))}
    for cell in cells:
        if cell not in runs:
            raise UserError(f"{folder}: no scores of the operating point {cell}; run `genseg sample` and `genseg score` again")
    return {cell: runs[cell] for cell in cells}


def read_scored_run(path: Path) -> ScoredRun:
    """Read the summary of one run. Raises UserError if the file is missing or lacks a key that the tables read."""
    summary = _read_object(path)
    missing_keys = [key for key in _REQUIRED if key not in summary]
    if missing_keys:
        raise UserError(f"{path}: no {', '.join(missing_keys)} in the scores; {_REMEDY}")
    for key in ("ar", "interval", "ceiling", "ceiling_latent", "boundary_iou"):
        missing_splits = [split for split in SPLITS if split not in (summary[key] or {})]
        if missing_splits and not (key == "ceiling_latent" and summary[key] is None):
            raise UserError(f"{path}: {key} has no {', '.join(missing_splits)}; {_REMEDY}")
    return ScoredRun(path, summary)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path}: no such file; {_REMEDY}")
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}; {_REMEDY}")
    return content
