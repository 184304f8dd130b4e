"""Compare the trainings of a sweep from their scores: AR against evaluations per mask."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from genseg.artifacts.files import read_json
from genseg.artifacts.manifest import write_record
from genseg.artifacts.parquet import KEY
from genseg.artifacts.scores import read_per_phrase
from genseg.diffusion.guidance import count_evaluations
from genseg.errors import UserError
from genseg.metrics.bootstrap import paired_difference
from genseg.params import OperatingPoint, Params, digest
from genseg.phases import module_hash
from genseg.report.figures.evaluations import draw_evaluations
from genseg.report.render import Column, Table, write_table
from genseg.report.scores import ScoredRun, read_scored_run
from genseg.report.tables import parts
from genseg.sweeps import Choice, Sweep

_REMEDY = "run `genseg sweep`"
_VARIANT = Column("variant", "Variant", "text")
_POINT_COLUMNS = [
    Column("point", "Operating point", "text"),
    Column("evaluations", "Eval.", "count"),
    Column("threshold", "Thr.", "number"),
    Column("val_ar", "Val"),
]
_TEST_COLUMNS = [Column("overall", "Test"), Column("ci", "95 % CI", "interval")]


@dataclass(frozen=True)
class Entry:
    """One training, the study's own (first) or a variant's, at the operating point chosen on val. `val_ar` is a fraction."""

    name: str
    group: str
    params: Params
    choice: Choice
    val_ar: float
    test: ScoredRun | None
    """None if another variant of its group was better on val, or if test was not scored yet."""


def compare(sweep: Sweep) -> Path:
    """Write the tables (CSV, LaTeX, Markdown) and the figure of a sweep, and return their folder.

    Raises UserError if scores are missing, were made with other params, or are of other phrases than the study's.
    """
    # 1. Read the scores and build the tables.
    entries, missing = read_entries(sweep)
    picks = choose_picks(sweep, entries)
    tables = [variants_table(sweep, entries, missing), points_table(sweep, entries), *picks_tables(sweep, entries[0], picks)]

    # 2. Write the tables and the figure, and remove tables of picks that the document no longer has.
    folder = sweep.folder
    (folder / "manifest.json").unlink(missing_ok=True)
    outputs = [path for table in tables for path in write_table(table, folder)]
    outputs.append(folder / "evaluations.png")
    draw_evaluations(tables[0].frame.rename(columns={"variant": "role"}), outputs[-1], sweep.base.tables.dpi)
    for stale in {path for path in folder.iterdir() if path.is_file()} - set(outputs):
        stale.unlink()

    # 3. Write the manifest.
    inputs = [path for entry in entries if entry.test for path in (entry.test.path, entry.test.path.with_suffix(".parquet"))]
    inputs += [_points_path(entry.params) for entry in entries]
    values = {"sweep": sweep.document.model_dump(mode="json"), **sweep.base.subtree("study", "seed", "score.bootstrap")}
    write_record(folder / "manifest.json", {"params": values, "code": module_hash("report.compare")}, inputs, outputs)
    return folder


# -------------------------------------------------------------------------------------------------------------- reading
def read_entries(sweep: Sweep) -> tuple[list[Entry], list[str]]:
    """Return the entries of the study and of the variants scored on val, in order, and the names of the other variants."""
    base = sweep.base
    main = read_scored_run(base.results_dir / "scores" / "main.json")
    point = _point(base, base.sample.main)
    entries = [Entry(base.study, base.study, base, Choice(base.sample.main, base.sample.threshold), point["ar"], main)]
    phrases = {"test": _phrases_digest(main.path), "val": _phrases_digest(Path(point["scores"]))}

    # A group has no winner until all of its variants were scored on val.
    missing = [name for name, params in sweep.variants.items() if not _points_path(params).exists()]
    for group, members in sweep.groups().items():
        winner = None if set(members) & set(missing) else sweep.best_of(members)
        entries += [_read_variant(sweep, name, group, name == winner, phrases) for name in members if name not in missing]
    order = [base.study, *sweep.variants]
    return sorted(entries, key=lambda entry: order.index(entry.name)), missing


def _read_variant(sweep: Sweep, name: str, group: str, is_winner: bool, phrases: dict[str, str]) -> Entry:
    """Read one variant's scores, on test only if it is its group's best. `phrases` are digests of the study's phrases."""
    # 1. Check that the model was trained with the sweep's params.
    params, (choice, val_ar) = sweep.variants[name], sweep.choose(name)
    path = params.model_dir("gs") / "manifest.json"
    if read_json(path)["params"] != params.subtree("seed", "train", "latents"):
        raise UserError(f"{path}: trained with other params than the sweep's; {_REMEDY}")

    # 2. Check that test was scored at the chosen point.
    point = _point(params, choice.point)
    path = params.results_dir / "scores" / "main.json"
    test = read_scored_run(path) if is_winner and path.exists() else None
    if test and (test.point, point["threshold"]) != (choice.point, choice.threshold):
        raise UserError(f"{path}: not at the point chosen on val ({choice.point}, at {choice.threshold:g}); {_REMEDY}")

    # 3. Check that the phrases are those of the study.
    for split, scores in {"val": Path(point["scores"]), "test": test and test.path}.items():
        if scores and _phrases_digest(scores) != phrases[split]:
            raise UserError(f"{scores}: other {split} phrases than study {sweep.base.study}; variants must share its data")
    return Entry(name, group, params, choice, val_ar, test)


def _points_path(params: Params) -> Path:
    return params.results_dir / "scores" / "operating_points.json"


def _read_points(params: Params) -> dict[OperatingPoint, dict[str, Any]]:
    """Return the scores on val by operating point."""
    return {OperatingPoint.model_validate(row["point"]): row for row in read_json(_points_path(params))["points"]}


def _point(params: Params, cell: OperatingPoint) -> dict[str, Any]:
    """Return an operating point's scores on val. Raises UserError if it was not scored."""
    points = _read_points(params)
    if cell not in points:
        raise UserError(f"{_points_path(params)}: no point {cell}; {_REMEDY}")
    return points[cell]


def _phrases_digest(path: Path) -> str:
    """Return a hash of the scored phrases and the areas of their ground truths."""
    frame = read_per_phrase(path)[[*KEY, "is_thing", "is_plural", "area"]]
    return digest(frame.sort_values(KEY).to_csv(index=False))


def choose_picks(sweep: Sweep, entries: list[Entry]) -> dict[str, Entry]:
    """Return the best candidate on val of each pick, among those scored on test; picks without candidates are omitted."""
    picks = {}
    for name, pick in sweep.document.picks.items():
        low, high = pick.evaluations or (1, np.inf)
        candidates = [
            entry
            for entry in entries
            if entry.test
            and (pick.variants is None or entry.name in pick.variants)
            and low <= count_evaluations(entry.choice.point) <= high
        ]
        if candidates:
            picks[name] = max(candidates, key=lambda entry: entry.val_ar)
    return picks


# --------------------------------------------------------------------------------------------------------------- tables
def variants_table(sweep: Sweep, entries: list[Entry], missing: list[str]) -> Table:
    """Show every training at the point chosen on val, and its difference from the study's main row on test."""
    study_entry = entries[0]
    assert study_entry.test
    notes = [
        f"Test: {parts.describe_phrases(sweep.base, study_entry.test)}. Every variant was trained on as many samples as the "
        "study, including its stages. Its operating point and threshold are those with the highest AR on a part of val (the "
        "study's own are set by its params); only that point was sampled on test. A dash: another variant of its group was "
        "better on val, or some variants of the group were not run.",
        f"Δ: AR of the main row of {study_entry.name} minus that of the variant, paired bootstrap over images. "
        f"{parts.EVALUATION_NOTE}",
    ]
    if missing:
        notes.append(f"Not run: {', '.join(missing)}.")
    caption = f"Average recall (points) across trainings of equal budget, on {parts.describe_study(sweep.base)}."
    frame = parts.build_frame([_row(entry) | _difference(sweep, study_entry, entry) for entry in entries])
    columns = [_VARIANT, *_POINT_COLUMNS, *_TEST_COLUMNS, *parts.DIFFERENCE_COLUMNS]
    return Table("variants", caption, frame, columns, notes, small=True)


def points_table(sweep: Sweep, entries: list[Entry]) -> Table:
    """Show every operating point of every variant on val, at its best threshold."""
    rows = [
        {
            "variant": entry.name,
            "point": point.label,
            "evaluations": row["evaluations"],
            "threshold": row["best_threshold"],
            "val_ar": 100 * row["best_ar"],
            "chosen": point == entry.choice.point,
            "n": row["phrases"],
            "scores": row["scores"],
        }
        for entry in entries
        for point, row in _read_points(entry.params).items()
    ]
    caption = f"Operating points on val: AR (points) at the best threshold of each, {parts.describe_study(sweep.base)}."
    columns = [_VARIANT, *_POINT_COLUMNS, Column("n", "n", "count"), Column("chosen", "Main", "flag")]
    return Table("points", caption, parts.build_frame(rows), columns, group_by="variant")


def picks_tables(sweep: Sweep, study_entry: Entry, picks: dict[str, Entry]) -> list[Table]:
    """Build the table of picks, if there is any pick, and the table of their pairwise differences on test, if there are two."""
    if not picks:
        return []
    assert study_entry.test
    note = f"Each pick is the best of its candidates on val. Test: {parts.describe_phrases(sweep.base, study_entry.test)}."
    study = parts.describe_study(sweep.base)
    caption = f"Picks on val across trainings: average recall (points), measured here on {study}."
    frame = parts.build_frame([{"pick": name} | _row(entry) for name, entry in picks.items()])
    columns = [Column("pick", "Pick", "text"), _VARIANT, *_POINT_COLUMNS, *_TEST_COLUMNS]
    tables = [Table("picks", caption, frame, columns, [note], small=True)]

    rows = []
    for (a_name, a), (b_name, b) in combinations(picks.items(), 2):
        assert a.test
        names = {"a": a_name, "b": b_name, "a_variant": a.name, "b_variant": b.name, "scores": str(a.test.path)}
        rows.append(names | _difference(sweep, a, b))
    if rows:
        caption = f"Differences of AR (points) on test between the picks, {study}."
        columns = [Column("a", "Pick", "text"), Column("b", "minus", "text"), *parts.DIFFERENCE_COLUMNS]
        notes = [f"{note} Paired bootstrap over images."]
        tables.append(Table("differences", caption, parts.build_frame(rows), columns, notes))
    return tables


# ----------------------------------------------------------------------------------------------------------------- rows
def _row(entry: Entry) -> dict[str, Any]:
    """Return an entry's operating point, training settings, AR on val and, if test was scored, AR on test."""
    point, train = entry.choice.point, entry.params.train
    row = {
        "variant": entry.name,
        "group": entry.group,
        "point": point.label,
        **parts.point_columns(point),
        "prediction": train.prediction_type,
        "label": train.label,
        "lr": train.optimizer.lr,
        "threshold": entry.choice.threshold,
        "val_ar": 100 * entry.val_ar,
        **dict.fromkeys(("overall", "ci_low", "ci_high")),
        "scores": str(_points_path(entry.params)),
    }
    test = parts.measured_columns(entry.params, entry.test) if entry.test else {}
    no_difference = dict.fromkeys(("difference_n", "difference", "difference_low", "difference_high"))
    return row | test | {"evaluations": count_evaluations(point)} | no_difference


def _difference(sweep: Sweep, a: Entry, b: Entry) -> dict[str, Any]:
    """Return the columns of the paired difference a - b in AR on test; empty if a is b or one has no scores on test."""
    if a is b or not a.test or not b.test:
        return {}
    phrases = read_per_phrase(a.test.path), read_per_phrase(b.test.path)
    comparison = paired_difference(*phrases, sweep.base.score.bootstrap, sweep.base.seed)
    assert comparison is not None  # the phrases are the same
    return parts.difference_columns(comparison)
