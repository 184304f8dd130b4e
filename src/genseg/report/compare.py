"""Compare the trainings of a sweep from their scores: AR against evaluations per mask."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from genseg.artifacts.files import read_json
from genseg.artifacts.manifest import code_hash, write_manifest
from genseg.artifacts.parquet import KEY
from genseg.artifacts.scores import read_per_phrase
from genseg.errors import UserError
from genseg.metrics.bootstrap import paired_difference
from genseg.params import Cell, Params, Point, digest
from genseg.report.figures.evaluations import draw_evaluations
from genseg.report.render import Column, Table, write_table
from genseg.report.scores import ScoredRun, read_scored_run
from genseg.report.tables.parts import (
    DIFFERENCE_COLUMNS,
    EVALUATION_NOTE,
    build_frame,
    describe_phrases,
    describe_study,
    difference_columns,
    measured_columns,
)
from genseg.sweeps import Choice, Sweep

_REMEDY = "run `genseg sweep`"
_POINT_COLUMNS = [
    Column("point", "Operating point", "text"),
    Column("evaluations", "Eval.", "count"),
    Column("threshold", "at", "number"),
    Column("val_ar", "Val"),
]
_TEST_COLUMNS = [Column("overall", "Test"), Column("ci", "95 % CI", "interval")]


@dataclass(frozen=True)
class Entry:
    """One training, the study's own (first) or a variant's, at the operating point chosen on val."""

    name: str
    group: str
    params: Params
    choice: Choice
    val_ar: float
    """AR on val as a fraction."""
    test: ScoredRun | None
    """None if another variant of its group was better on val, or if test was not scored yet."""


def compare(sweep: Sweep) -> Path:
    """Write the tables (CSV, LaTeX, Markdown) and the figure of a sweep, and return their folder.

    Raises:
        UserError: scores are missing, were made with other params, or are of other phrases than the study's.
    """
    start_time = time.time()

    # 1. Read the scores and build the tables.
    entries, missing = read_entries(sweep)
    picks = choose_picks(sweep, entries)
    tables = [variants_table(sweep, entries, missing), points_table(sweep, entries)]
    if picks:
        tables += picks_tables(sweep, entries[0], picks)

    # 2. Write the tables and the figure.
    folder = sweep.folder
    (folder / "manifest.json").unlink(missing_ok=True)
    outputs = [path for table in tables for path in write_table(table, folder)]
    points = tables[0].frame.rename(columns={"variant": "role"})
    draw_evaluations(points, folder / "evaluations.png", sweep.base.tables.dpi)
    outputs.append(folder / "evaluations.png")

    # 3. Remove tables of picks that the document no longer has.
    for stale in {path for path in folder.iterdir() if path.is_file()} - set(outputs):
        stale.unlink()

    # 4. Write the manifest.
    test_paths = [entry.test.path for entry in entries if entry.test]
    write_manifest(
        folder / "manifest.json",
        phase="sweep",
        params={"sweep": sweep.document.model_dump(mode="json"), **sweep.base.subtree("study", "seed", "score.bootstrap")},
        inputs=[
            *(file for path in test_paths for file in (path, path.with_suffix(".parquet"))),
            *(_points_path(entry.params) for entry in entries),
        ],
        outputs=outputs,
        started=start_time,
        code=code_hash("artifacts", "metrics", "report", "sweeps.py", "params.py"),
    )
    return folder


# -------------------------------------------------------------------------------------------------------------- reading
def read_entries(sweep: Sweep) -> tuple[list[Entry], list[str]]:
    """Read the study's own training and every variant whose operating points were scored on val.

    Returns:
        The study's own entry and those of the variants in the document's order, and the names of the other variants.

    Raises:
        UserError: scores are missing, were made with other params, or are of other phrases than the study's.
    """
    # 1. The study's own training, whose phrases all variants share.
    base = sweep.base
    main = read_scored_run(base.results_dir / "scores" / "main.json")
    point = _point(base, base.sample.main)
    choice = Choice(base.sample.main, base.sample.threshold)
    entries = [Entry(base.study, base.study, base, choice, point["ar"], main)]
    phrases = {"test": _phrases_digest(main.path), "val": _phrases_digest(Path(point["scores"]))}

    # 2. The variants. A group has no winner until all of its variants were scored on val.
    missing = [name for name, params in sweep.variants.items() if not _points_path(params).exists()]
    for group, members in sweep.groups().items():
        scored = [name for name in members if name not in missing]
        winner = sweep.best_of(scored) if len(scored) == len(members) else None
        entries += [_read_variant(sweep, name, group, name == winner, phrases) for name in scored]

    order = [base.study, *sweep.variants]
    return sorted(entries, key=lambda entry: order.index(entry.name)), missing


def _read_variant(sweep: Sweep, name: str, group: str, is_winner: bool, phrases: dict[str, str]) -> Entry:
    """Read one variant's scores and check them against the sweep.

    Args:
        is_winner: the variant is the best of its group on val, so its scores on test are read.
        phrases: digests of the study's phrases by split.
    """
    params, (choice, val_ar) = sweep.variants[name], sweep.choose(name)
    _check_training(params)
    point = _point(params, choice.cell)

    # Check that test was scored at the chosen point.
    path = params.results_dir / "scores" / "main.json"
    test = read_scored_run(path) if is_winner and path.exists() else None
    if test and (Cell.of(test.entry), point["threshold"]) != (choice.cell, choice.threshold):
        raise UserError(f"{path}: not at the point chosen on val ({choice.cell}, at {choice.threshold:g}); {_REMEDY}")

    # Check that the phrases are those of the study.
    paths = {"val": Path(point["scores"])} | ({"test": test.path} if test else {})
    for split, scores_path in paths.items():
        if _phrases_digest(scores_path) != phrases[split]:
            raise UserError(
                f"{scores_path}: other {split} phrases than study {sweep.base.study}; variants must share the study's data"
            )
    return Entry(name, group, params, choice, val_ar, test)


def _points_path(params: Params) -> Path:
    return params.results_dir / "scores" / "operating_points.json"


def _point(params: Params, cell: Cell) -> dict[str, Any]:
    """Return an operating point's scores on val.

    Raises:
        UserError: the point was not scored.
    """
    path = _points_path(params)
    points: list[dict[str, Any]] = read_json(path)["points"]
    for point in points:
        if Cell.of(point) == cell:
            return point
    raise UserError(f"{path}: no point {cell}; {_REMEDY}")


def _check_training(params: Params) -> None:
    path = params.results_dir / "model" / "manifest.json"
    if read_json(path)["params"] != params.subtree("seed", "train", "latents"):
        raise UserError(f"{path}: trained with other params than the sweep's; {_REMEDY}")


def _phrases_digest(path: Path) -> str:
    """Return a hash of the scored phrases and the areas of their ground truths."""
    frame = read_per_phrase(path)[[*KEY, "is_thing", "is_plural", "area"]]
    return digest(frame.sort_values(KEY).to_csv(index=False))


# --------------------------------------------------------------------------------------------------------------- tables
def variants_table(sweep: Sweep, entries: list[Entry], missing: list[str]) -> Table:
    """Show every training at the point chosen on val, and the lead of the study's main row on test."""
    study_entry = entries[0]
    assert study_entry.test is not None
    rows = []
    for entry in entries:
        row = _row(entry)
        if entry.test and entry is not study_entry:
            row |= _difference(sweep, study_entry.test, entry.test)
        rows.append(row)
    notes = [
        f"Test: {describe_phrases(sweep.base, study_entry.test)}. Every variant was trained on as many samples as the "
        "study, including its stages. Its operating point and threshold are those with the highest AR on a part of val (the "
        "study's are given by its params); only that point was sampled on test. A dash: another variant of its group was "
        "better on val, or some variants of the group were not run.",
        f"Δ: AR of the main row of {study_entry.name} minus that of the variant, paired bootstrap over images. "
        f"{EVALUATION_NOTE}",
    ]
    if missing:
        notes.append(f"Not run: {', '.join(missing)}.")
    return Table(
        name="variants",
        caption=f"Average recall (points) across trainings of equal budget, measured here on {describe_study(sweep.base)}.",
        frame=_build_frame(rows),
        columns=[Column("variant", "Variant", "text"), *_POINT_COLUMNS, *_TEST_COLUMNS, *DIFFERENCE_COLUMNS],
        notes=notes,
        small=True,
    )


def points_table(sweep: Sweep, entries: list[Entry]) -> Table:
    """Show every operating point of every variant on val, at its best threshold."""
    rows = [
        {
            "variant": entry.name,
            "point": str(Point.model_validate({key: point[key] for key in Point.model_fields})),
            "evaluations": point["evaluations"],
            "threshold": point["best_threshold"],
            "val_ar": 100 * point["best_ar"],
            "chosen": Cell.of(point) == entry.choice.cell,
            "n": point["phrases"],
            "scores": point["scores"],
        }
        for entry in entries
        for point in read_json(_points_path(entry.params))["points"]
    ]
    return Table(
        name="points",
        caption=f"Operating points on val: AR (points) at the best threshold of each, {describe_study(sweep.base)}.",
        frame=build_frame(rows),
        columns=[
            Column("variant", "Variant", "text"),
            *_POINT_COLUMNS,
            Column("n", "n", "count"),
            Column("chosen", "Main", "flag"),
        ],
        group_by="variant",
    )


def choose_picks(sweep: Sweep, entries: list[Entry]) -> dict[str, Entry]:
    """Return, for each pick of the document, the candidate that is best on val among those scored on test.

    A pick without such a candidate is left out.
    """
    picks = {}
    for name, pick in sweep.document.picks.items():
        low, high = pick.evaluations or (1, np.inf)
        candidates = [
            entry
            for entry in entries
            if entry.test
            and (pick.variants is None or entry.name in pick.variants)
            and low <= entry.choice.cell.evaluations <= high
        ]
        if candidates:
            picks[name] = max(candidates, key=lambda entry: entry.val_ar)
    return picks


def picks_tables(sweep: Sweep, study_entry: Entry, picks: dict[str, Entry]) -> list[Table]:
    """Build the table of the picks and, if there are two or more, the table of their pairwise differences on test."""
    # 1. The picks.
    assert study_entry.test is not None
    note = f"Each pick is the best of its candidates on val. Test: {describe_phrases(sweep.base, study_entry.test)}."
    tables = [
        Table(
            name="picks",
            caption=f"Picks on val across trainings: average recall (points), measured here on {describe_study(sweep.base)}.",
            frame=_build_frame([{"pick": name} | _row(entry) for name, entry in picks.items()]),
            columns=[Column("pick", "Pick", "text"), Column("variant", "Variant", "text"), *_POINT_COLUMNS, *_TEST_COLUMNS],
            notes=[note],
            small=True,
        )
    ]

    # 2. The difference of each pair.
    pairs = []
    for (a_name, a), (b_name, b) in combinations(picks.items(), 2):
        assert a.test
        assert b.test
        names = {"a": a_name, "b": b_name, "a_variant": a.name, "b_variant": b.name, "scores": str(a.test.path)}
        pairs.append(names | _difference(sweep, a.test, b.test))
    if pairs:
        tables.append(
            Table(
                name="differences",
                caption=f"Differences of AR (points) on test between the picks, {describe_study(sweep.base)}.",
                frame=build_frame(pairs),
                columns=[Column("a", "Pick", "text"), Column("b", "minus", "text"), *DIFFERENCE_COLUMNS],
                notes=[f"{note} Paired bootstrap over images."],
            )
        )
    return tables


# ----------------------------------------------------------------------------------------------------------------- rows
def _row(entry: Entry) -> dict[str, Any]:
    """Return an entry's operating point, its settings of training, AR on val and, if it was scored, AR on test."""
    cell = entry.choice.cell
    row: dict[str, Any] = {
        "variant": entry.name,
        "group": entry.group,
        "point": str(Point.model_validate(cell.model_dump(exclude={"size"}))),
        **cell.model_dump(),
        "prediction": entry.params.train.prediction,
        "label": entry.params.train.label,
        "lr": entry.params.train.optimizer.lr,
        "threshold": entry.choice.threshold,
        "val_ar": 100 * entry.val_ar,
        "overall": None,
        "ci_low": None,
        "ci_high": None,
        "scores": str(_points_path(entry.params)),
    }
    if entry.test:
        row |= measured_columns(entry.params, entry.test)
    return row | {"evaluations": cell.evaluations}


def _difference(sweep: Sweep, a: ScoredRun, b: ScoredRun) -> dict[str, Any]:
    """Return the columns of the paired difference a - b in AR."""
    comparison = paired_difference(
        read_per_phrase(a.path), read_per_phrase(b.path), sweep.base.score.bootstrap, sweep.base.seed
    )
    assert comparison is not None  # the phrases are the same
    return difference_columns(comparison)


def _build_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Build a frame that has the columns of a difference even if nothing was compared."""
    names = dict.fromkeys(name for row in rows for name in row)
    difference = ("difference_n", "difference", "difference_low", "difference_high")
    empty = {name: None for name in difference if name not in names}
    return build_frame([row | empty for row in rows])
