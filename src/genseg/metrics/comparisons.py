"""Paired differences between the runs of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from genseg.metrics.bootstrap import paired_difference, paired_miou_difference, paired_statistic_difference
from genseg.metrics.calibration import calibration_error
from genseg.metrics.recall import group_members
from genseg.metrics.runs import ScoredRun
from genseg.metrics.semantic import PixelCounts
from genseg.params import Cell, Params


def compare_runs(
    params: Params, scored_runs: Sequence[ScoredRun], pixel_counts: Mapping[str, PixelCounts]
) -> dict[str, dict[str, Any]]:
    """Return paired differences with 95 % intervals, by name.

    * "<a> - <b>" and "<a> - <b> (things)", in AR: the main row minus each control and minus the base cell of the grid; each
      other cell and each read-out minus the base cell; each ensemble minus its first sample. Pairs of runs without a common
      phrase are left out.
    * "main - discriminative (miou)", in mIoU.
    * "<a> - <b> (ece)", in expected calibration error: each ensemble minus its first sample.

    Args:
        pixel_counts: `runs.count_class_runs`, by method.
    """
    replicates, seed = params.score.bootstrap, params.seed
    runs = [scored.run for scored in scored_runs]
    by_name = {scored.run["name"]: scored for scored in scored_runs}
    ensembles = _ensemble_pairs(runs)
    differences: dict[str, dict[str, Any] | None] = {}

    # 1. Average recall.
    for first, second in [*_pairs(params, runs), *ensembles]:
        a, b = by_name[first].per_phrase, by_name[second].per_phrase
        differences[f"{first} - {second}"] = paired_difference(a, b, replicates, seed)
        a_things, b_things = a[group_members(a)["things"]], b[group_members(b)["things"]]
        differences[f"{first} - {second} (things)"] = paired_difference(a_things, b_things, replicates, seed)

    # 2. mIoU.
    if {"gs", "discriminative"} <= pixel_counts.keys():
        counts = pixel_counts["gs"].counts, pixel_counts["discriminative"].counts
        differences["main - discriminative (miou)"] = paired_miou_difference(*counts, replicates, seed)

    # 3. Calibration error.
    for ensemble, single in ensembles:
        ensemble_counts, single_counts = by_name[ensemble].calibration, by_name[single].calibration
        if ensemble_counts is not None and single_counts is not None:
            differences[f"{ensemble} - {single} (ece)"] = paired_statistic_difference(
                calibration_error, ensemble_counts, single_counts, replicates, seed
            )
    return {name: difference for name, difference in differences.items() if difference is not None}


def _pairs(params: Params, runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Names of the pairs of runs whose AR is compared, except for the ensembles."""
    names: dict[str, list[str]] = {role: [] for role in ("main", "control", "grid", "readout")}
    for run in runs:
        names.setdefault(run["role"], []).append(run["name"])
    base = [run["name"] for run in runs if run["role"] == "grid" and Cell.of(run) == params.sample.base]
    pairs = [(main, other) for main in names["main"] for other in [*names["control"], *base]]
    return pairs + [(name, cell) for cell in base for name in [*names["grid"], *names["readout"]] if name != cell]


def _ensemble_pairs(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Names of each ensemble in the grid and of the run of its first sample alone, if the study has both."""
    names = {Cell.of(run): run["name"] for run in runs if run["role"] == "grid"}
    single_cells = {cell: cell.model_copy(update={"ensemble": 1}) for cell in names if cell.ensemble > 1}
    return [(names[cell], names[single]) for cell, single in single_cells.items() if single in names]
