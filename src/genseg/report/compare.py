"""A sweep's comparison, from scores alone: AR against evaluations per mask across trainings."""

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
from genseg.report.figures import draw_evaluations
from genseg.report.render import Column, Table, write_table
from genseg.report.study import Scored, read_scored
from genseg.report.tables import EVALUATION, data, difference, measured, where
from genseg.sweeps import Choice, Sweep

_REMEDY = "run `genseg sweep`"


@dataclass(frozen=True)
class Entry:
    """One training: the study's own (first) or a variant's, at the operating point that val chose."""

    name: str
    group: str
    params: Params
    choice: Choice
    val_ar: float
    test: Scored | None
    """None where another variant of its group was better on val."""


def compare(sweep: Sweep) -> Path:
    """Write tables (CSV, LaTeX, Markdown) and the figure of a sweep; returns their folder.

    Raises:
        UserError: scores are missing, of other params, or of other phrases than the study's.
    """
    started = time.time()
    entries, absent = read_entries(sweep)
    picks = choose_picks(sweep, entries)
    tables = [variants_table(sweep, entries, absent), points_table(sweep, entries)]
    if picks:
        tables += picks_tables(sweep, entries[0], picks)
    folder = sweep.folder
    (folder / "manifest.json").unlink(missing_ok=True)
    outputs = [path for table in tables for path in write_table(table, folder)]
    figure = tables[0].frame.rename(columns={"variant": "role"})
    draw_evaluations(figure, folder / "evaluations.png", sweep.base.tables.dpi)
    for stale in {path for path in folder.iterdir() if path.is_file()} - {*outputs, folder / "evaluations.png"}:
        stale.unlink()  # of questions that the document no longer asks
    read = [path for entry in entries if entry.test for path in (entry.test.path, entry.test.path.with_suffix(".parquet"))]
    write_manifest(
        folder / "manifest.json",
        phase="sweep",
        params={"sweep": sweep.document.model_dump(mode="json"), **sweep.base.subtree("study", "seed", "score.bootstrap")},
        inputs=[*read, *(_points_path(entry.params) for entry in entries)],
        outputs=[*outputs, folder / "evaluations.png"],
        started=started,
        code=code_hash("artifacts", "metrics", "report", "sweeps.py", "params.py"),
    )
    return folder


# ------------------------------------------------------------------------------------------------------------ reading
def read_entries(sweep: Sweep) -> tuple[list[Entry], list[str]]:
    """The study and every variant whose points were scored on val, in the document's order; and the variants without."""
    study = sweep.base
    own = read_scored(study.results_dir / "scores" / "main.json")
    point = _point(study, study.sample.main)
    entries = [Entry(study.study, study.study, study, Choice(study.sample.main, study.sample.threshold), point["ar"], own)]
    phrases = {"test": _phrases(own.path), "val": _phrases(Path(point["scores"]))}
    absent = [name for name, params in sweep.variants.items() if not _points_path(params).exists()]
    for group, members in sweep.groups().items():
        present = [name for name in members if name not in absent]
        if not present:
            continue
        best = sweep.best_of(present) if len(present) == len(members) else None  # before all are there, none has won
        for name in present:
            params, (choice, val_ar) = sweep.variants[name], sweep.choose(name)
            _check_training(params)
            path = params.results_dir / "scores" / "main.json"
            test = read_scored(path) if name == best and path.exists() else None
            if test and (Cell.of(test.summary["run"]), _point(params, choice.cell)["threshold"]) != (
                choice.cell,
                choice.threshold,
            ):
                raise UserError(
                    f"{path}: not at the point that val chooses ({choice.cell}, at {choice.threshold:g}); {_REMEDY}"
                )
            files = {"val": Path(_point(params, choice.cell)["scores"])} | ({"test": test.path} if test else {})
            for split, file in files.items():
                if _phrases(file) != phrases[split]:
                    raise UserError(f"{file}: other {split} phrases than study {study.study}; variants must share the data")
            entries.append(Entry(name, group, params, choice, val_ar, test))
    order = [study.study, *sweep.variants]
    return sorted(entries, key=lambda entry: order.index(entry.name)), absent


def _points_path(params: Params) -> Path:
    return params.results_dir / "scores" / "operating_points.json"


def _point(params: Params, cell: Cell) -> dict[str, Any]:
    """What is known on val of an operating point. Raises UserError when it was not scored."""
    path = _points_path(params)
    points: list[dict[str, Any]] = read_json(path)["points"]
    found = next((point for point in points if Cell.of(point) == cell), None)
    if found is None:
        raise UserError(f"{path}: no point {cell}; {_REMEDY}")
    return found


def _check_training(params: Params) -> None:
    path = params.results_dir / "model" / "manifest.json"
    if read_json(path)["params"] != params.subtree("seed", "train", "latents"):
        raise UserError(f"{path}: trained with other params than the sweep now gives; {_REMEDY}")


def _phrases(summary: Path) -> str:
    """Hash of the phrases that were scored, and their ground truth's areas."""
    frame = read_per_phrase(summary)[[*KEY, "is_thing", "is_plural", "area"]]
    return digest(frame.sort_values(KEY).to_csv(index=False))


# ------------------------------------------------------------------------------------------------------------- tables
def _row(entry: Entry) -> dict[str, Any]:
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
    return row | (measured(entry.params, entry.test) if entry.test else {}) | {"evaluations": cell.evaluations}


def _minus(sweep: Sweep, a: Scored, b: Scored) -> dict[str, Any]:
    tables = [read_per_phrase(scored.path) for scored in (a, b)]
    found = paired_difference(tables[0], tables[1], sweep.base.score.bootstrap, sweep.base.seed)
    assert found is not None  # both hold the same phrases
    return difference(found)


_TESTED = [
    Column("point", "Operating point", "text"),
    Column("evaluations", "Eval.", "count"),
    Column("threshold", "at", "number"),
    Column("val_ar", "Val"),
    Column("overall", "Test"),
    Column("ci", "95 % CI", "interval"),
]


def variants_table(sweep: Sweep, entries: list[Entry], absent: list[str]) -> Table:
    """Every training at the point that val chose, and how far the study's main row is above it on test."""
    own = entries[0]
    assert own.test is not None
    rows = [_row(entry) | (_minus(sweep, own.test, entry.test) if entry.test and entry is not own else {}) for entry in entries]
    notes = [
        f"Test: {where(sweep.base, own.test)}. Every variant was trained on as many samples as the study, stages included. "
        "Its operating point and threshold are those with the highest AR on a part of val (the study's: as its params say); "
        "test saw only that point. A dash: another variant of its group was better on val, or some of the group were not run.",
        f"Δ: AR of {own.name}'s main row minus the variant's, paired bootstrap over images. {EVALUATION}",
    ]
    return Table(
        name="variants",
        caption=f"Average recall (points) across trainings of equal budget, measured here on {data(sweep.base)}.",
        frame=_frame(rows),
        columns=[
            Column("variant", "Variant", "text"),
            *_TESTED,
            Column("difference", "Δ", "signed"),
            Column("difference", "95 % CI", "interval"),
        ],
        notes=[*notes, *([f"Not run: {', '.join(absent)}."] if absent else [])],
        small=True,
    )


def points_table(sweep: Sweep, entries: list[Entry]) -> Table:
    """What val chose from: every operating point of every variant, at its best threshold."""
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
        caption=f"Operating points on val: AR (points) at the best threshold of each, {data(sweep.base)}.",
        frame=_frame(rows),
        columns=[
            Column("variant", "Variant", "text"),
            *_TESTED[:4],
            Column("n", "n", "count"),
            Column("chosen", "Main", "flag"),
        ],
        group_by="variant",
    )


def choose_picks(sweep: Sweep, entries: list[Entry]) -> dict[str, Entry]:
    """For each question of the document the tested training that is best on val; none where no candidate was tested."""
    found = {}
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
            found[name] = max(candidates, key=lambda entry: entry.val_ar)
    return found


def picks_tables(sweep: Sweep, own: Entry, picks: dict[str, Entry]) -> list[Table]:
    """The picks, and the difference of every two of them on test."""
    assert own.test is not None
    rows = [{"pick": name} | _row(entry) for name, entry in picks.items()]
    pairs = []
    for (a, first), (b, second) in combinations(picks.items(), 2):
        assert first.test
        assert second.test
        pair = {"a": a, "b": b, "a_variant": first.name, "b_variant": second.name, "scores": str(first.test.path)}
        pairs.append(pair | _minus(sweep, first.test, second.test))
    note = f"Each pick is the best on val of its candidates. Test: {where(sweep.base, own.test)}."
    tables = [
        Table(
            name="picks",
            caption=f"What val picks across trainings: average recall (points), measured here on {data(sweep.base)}.",
            frame=_frame(rows),
            columns=[Column("pick", "Pick", "text"), Column("variant", "Variant", "text"), *_TESTED],
            notes=[note],
            small=True,
        )
    ]
    if pairs:
        tables.append(
            Table(
                name="differences",
                caption=f"Differences of AR (points) on test between the picks, {data(sweep.base)}.",
                frame=_frame(pairs),
                columns=[
                    Column("a", "Pick", "text"),
                    Column("b", "minus", "text"),
                    Column("difference", "Δ", "signed"),
                    Column("difference", "95 % CI", "interval"),
                ],
                notes=[f"{note} Paired bootstrap over images."],
            )
        )
    return tables


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Counts stay whole numbers where some are missing; a difference has its columns also when nothing was compared."""
    frame = pd.DataFrame(rows)
    if "overall" in frame:
        frame = frame.reindex(columns=list(dict.fromkeys([*frame.columns, *difference(dict.fromkeys(_DIFFERENCE))])))
    for name in ("n", "images", "evaluations", "size", "steps", "difference_n"):
        if name in frame:
            frame[name] = frame[name].astype("Int64")
    return frame


_DIFFERENCE = ("n", "difference", "ci_low", "ci_high")
