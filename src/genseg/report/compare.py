"""The table of a sweep: scores of each variant over its trainings, and its paired difference from the baseline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.files import read_json, write_json
from genseg.artifacts.manifest import read_manifest, write_record
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.scores import read_per_phrase
from genseg.diffusion.guidance import count_evaluations
from genseg.errors import UserError
from genseg.metrics.bootstrap import describe_difference, trainings_difference
from genseg.metrics.recall import Floats
from genseg.metrics.refinement import RefinedPart, Statistics
from genseg.metrics.semantic import ClassPhrases, mean_iou
from genseg.params import Params, digest
from genseg.params.text import flow
from genseg.phases import PHASES, module_hash
from genseg.refine.layout import G4SEG
from genseg.report.render import Column, Table, plural, to_points, write_table
from genseg.report.scores import SEEDS_KEYS, SPLITS, ScoredRun, read_scored_run
from genseg.report.tables import parts
from genseg.sweeps import BASELINE, Sweep, Training, training_samples

MOST_KEYS = 4
"""Maximum number of changed params that have printed columns. The CSV has a column for each."""
_MOST_LETTERS = 24
_DIFFERENCES = [
    Column("difference", "Δ", "signed", over="AR − baseline"),
    Column("difference", "95 % CI", "interval", over="AR − baseline"),
    Column("miou_difference", "Δ", "signed", over="mIoU − baseline"),
    Column("miou_difference", "95 % CI", "interval", over="mIoU − baseline"),
]


def compare(sweep: Sweep) -> Path:
    """Write `<sweep>.csv`, `.tex` and `.md` and then the manifest of a sweep, and return their folder.

    If the baseline is the study itself with several trainings, also write `seeds.json`, which the study's own tables read.
    Raises UserError if the baseline has no scores, or scores were made with other params or of other phrases.
    """
    folder, path_of = sweep.folder, _refined_path if sweep.compared == "refinement" else _main_path
    finished = [training for training in sweep.trainings if path_of(training).exists()]
    missing = list(dict.fromkeys(training.variant for training in sweep.trainings if training not in finished))
    if BASELINE in missing:
        [path, *_] = [path_of(training) for training in sweep.trainings if training not in finished]
        raise UserError(f"{path}: no such file; run `snakemake --cores all --config sweep={sweep.file}`")
    members = {
        variant: [training for training in finished if training.variant == variant]
        for variant in sweep.variants
        if variant not in missing
    }
    for training in finished:
        _check_params(training.params, "refine" if sweep.compared == "refinement" else "train")
    table = refinement_table(sweep, members) if sweep.compared == "refinement" else masks_table(sweep, members)
    if missing:
        table.notes.append(f"Not run: {', '.join(missing)}.")
    (folder / "manifest.json").unlink(missing_ok=True)
    outputs = write_table(table, folder)
    (folder / "seeds.json").unlink(missing_ok=True)
    if len(sweep.document.seeds) > 1 and not sweep.document.baseline and not sweep.selects:
        outputs.append(folder / "seeds.json")
        write_json(outputs[-1], _seeds_summary(sweep, table.frame.iloc[0], members[BASELINE]))
    facts = {"params": {"sweep": sweep.document.model_dump(mode="json"), **sweep.base.subtree("study", "seed", "score")}}
    inputs = [path_of(training) for training in finished]
    write_record(folder / "manifest.json", facts | {"code": module_hash("report.compare")}, inputs, outputs)
    return folder


def _check_params(params: Params, phase: str) -> None:
    """Raise UserError if a study's model or refined masks were made with other params than the sweep's."""
    path = Path(PHASES[phase].manifests[0].format(study=params.study))
    if read_json(path)["params"] != params.subtree(*PHASES[phase].keys):
        raise UserError(f"{path}: made with other params than the sweep's; run the sweep again")


# ---------------------------------------------------------------------------------------------------------------- masks
@dataclass(frozen=True)
class _Scores:
    """Scores of a variant's trainings: `runs` of the main row, and sums by image [trainings, images, ...] for the bootstrap."""

    runs: list[ScoredRun]
    recall: Floats
    """[trainings, images, 2]: sum of the IoU of phrases, and their number."""
    pixels: NDArray[np.generic]
    """[trainings, images, 3, classes], see `metrics.semantic.PixelCounts`."""
    phrases: str
    """Hash of the scored phrases and of the areas of their ground truths."""


def masks_table(sweep: Sweep, members: dict[str, list[Training]]) -> Table:
    """Build the table of a sweep that compares the main row: AR and mIoU, mean and standard deviation over trainings."""
    score, seed = sweep.base.score, sweep.base.seed
    scores = {variant: _read_scores(trainings) for variant, trainings in members.items()}
    baseline, rows = scores[BASELINE], []
    for variant, trainings in members.items():
        own = scores[variant]
        if own.phrases != baseline.phrases:
            raise UserError(f"{own.runs[0].path}: other test phrases than the baseline's, so its scores are not comparable")
        row = _variant_columns(sweep, variant) | _point_columns(own.runs, trainings)
        for split in SPLITS:
            row |= _spread(split, [run.summary["ar"][split] for run in own.runs])
        row |= _spread("miou", [(run.summary.get("miou") or {}).get("mean") for run in own.runs])
        if variant == BASELINE:
            comparisons = [dict.fromkeys(("n", "difference", "ci_low", "ci_high"))] * 2
        else:
            shared = [training.seed for training in trainings]
            rows_of = [index for index, training in enumerate(members[BASELINE]) if training.seed in shared]
            comparisons = [
                trainings_difference(_average_recall, own.recall, baseline.recall[rows_of], score.bootstrap, seed),
                trainings_difference(mean_iou, own.pixels, baseline.pixels[rows_of], score.bootstrap, seed),
            ]
        row |= parts.difference_columns(comparisons[0]) | parts.difference_columns(comparisons[1], "miou_difference")
        rows.append(row)
    frame = parts.build_frame(rows)
    columns = [*_key_columns(sweep), *([Column("point", "Operating point", "text")] if sweep.selects else [])]
    columns += [Column(split, split, "spread", over="Average recall", best=True) for split in SPLITS]
    columns += [Column("miou", "mIoU", "spread", best=True), *_DIFFERENCES]
    caption = f"Variants of {parts.describe_study(sweep.base)}: average recall and mIoU (points)."
    return Table(sweep.name, caption, frame, columns, _masks_notes(sweep, baseline.runs[0], members), small=True)


def _main_path(training: Training) -> Path:
    return training.params.results_dir / "scores" / "main.json"


def _read_scores(trainings: Sequence[Training]) -> _Scores:
    runs, recall, pixels, phrases = [], [], [], set()
    for training in trainings:
        params = training.params
        runs.append(read_scored_run(_main_path(training)))
        frame = read_per_phrase(runs[-1].path).sort_values(KEY)
        recall.append(frame.assign(n=1.0).groupby("image_id", sort=True)[["iou", "n"]].sum().to_numpy(np.float64))
        phrases.add(digest(frame[[*KEY, "is_thing", "is_plural", "area"]].to_csv(index=False)))
        pixels.append(ClassPhrases(params).count(params.results_dir / "predictions/class_phrases/predictions.parquet").counts)
    if len(phrases) > 1:
        raise UserError(f"{runs[-1].path}: other test phrases than {runs[0].path}; run the sweep again")
    return _Scores(runs, np.stack(recall), np.stack(pixels), phrases.pop())


def _average_recall(sums: NDArray[Any]) -> Floats:
    return np.asarray(sums[..., 0] / sums[..., 1], np.float64)


def _point_columns(runs: Sequence[ScoredRun], trainings: Sequence[Training]) -> dict[str, Any]:
    """Return the columns of the trainings: their seeds, budget and operating points."""
    points = [run.point for run in runs if run.point]
    epochs, samples = training_samples(trainings[0].params)
    return {
        "seeds": ", ".join(str(training.seed) for training in trainings),
        "trainings": len(trainings),
        "epochs": epochs or None,
        "samples": samples or None,
        "point": " / ".join(dict.fromkeys(point.label for point in points)),
        "evaluations": max(map(count_evaluations, points), default=None),
        "protocol": runs[0].summary["protocol"],
        "n": runs[0].phrases,
        "images": runs[0].images,
        "scores": "; ".join(str(run.path) for run in runs),
    }


def _masks_notes(sweep: Sweep, run: ScoredRun, members: dict[str, list[Training]]) -> list[str]:
    seeds = sweep.document.seeds
    count = plural(len(seeds), "training")
    spread = f"Mean ± standard deviation of {count}, which differ in their seed." if len(seeds) > 1 else "One training each."
    drawn = "images and trainings" if len(seeds) > 1 else "images"
    if sweep.selects:
        selection = "The operating point and the threshold of each training, baseline included, have the highest AR on val."
    else:
        selection = "The operating point and the threshold are those of the params."
    notes = [
        f"Test: {parts.describe_phrases(sweep.base, run)}. {spread} {selection}",
        f"Δ: variant minus baseline, plus is better; paired bootstrap over {drawn}. {parts.EVALUATION_NOTE}",
    ]
    budget = training_samples(members[BASELINE][0].params)
    others = [variant for variant, (training, *_) in members.items() if training_samples(training.params) != budget]
    if others:
        notes.append(f"Trained on another number of samples than the baseline: {', '.join(others)}.")
    return notes


def _seeds_summary(sweep: Sweep, row: pd.Series, trainings: Sequence[Training]) -> dict[str, Any]:
    """Return the scores of the study's own main row over trainings, in points, for the study's tables."""
    values = {name: [row[name], row[f"{name}_sd"]] for name in (*SPLITS, "miou")}
    return {
        "version": 1,
        "seeds": [training.seed for training in trainings],
        "params": sweep.base.subtree(*SEEDS_KEYS),
        "points": {name: None if pd.isna(mean) else [float(mean), float(sd)] for name, (mean, sd) in values.items()},
        "scores": row["scores"].split("; "),
    }


# ----------------------------------------------------------------------------------------------------------- refinement
def refinement_table(sweep: Sweep, members: dict[str, list[Training]]) -> Table:
    """Build the table of a sweep that compares refinement: means of AR and mIoU over the real baselines after G4Seg.

    If the study has no real baselines, the means are over all baselines.
    """
    measured = {variant: _measure_refinement(trainings[0].params) for variant, trainings in members.items()}
    common = set.intersection(*(set(statistics) for statistics, _, _ in measured.values()))
    baseline, images, _ = measured[BASELINE]
    real = [name for name in baseline if name in common and name[1]]
    names = real or [name for name in baseline if name in common]
    rows = []
    for variant, (statistics, own_images, path) in measured.items():
        if own_images != images:
            raise UserError(f"{path}: other images than the baseline's, so its scores are not comparable")
        row = _variant_columns(sweep, variant) | {"baselines": len(names), "images": len(images), "scores": str(path)}
        for key, column in (("ar", "difference"), ("miou", "miou_difference")):
            value = {side: _mean([statistics[name][side][key] for name in names]) for side in ("before", "after")}
            row |= {f"{key}_before": to_points(value["before"][0]), key: to_points(value["after"][0])}
            reference = _mean([baseline[name]["after"][key] for name in names])
            difference = describe_difference(value["after"][0] - reference[0], value["after"][1] - reference[1])
            empty = dict.fromkeys(("difference", "ci_low", "ci_high"))
            row |= parts.difference_columns({"n": len(images)} | (empty if variant == BASELINE else difference), column)
        rows.append(row)
    columns = [*_key_columns(sweep)]
    for key, head in (("ar", "AR"), ("miou", "mIoU")):
        columns += [Column(f"{key}_before", "before", over=head), Column(key, "after", over=head, best=True)]
    which = "baselines made without ground truth" if real else "baselines"
    caption = f"Variants of G4Seg on {parts.describe_study(sweep.base)}: means over {len(names)} {which} (points)."
    notes = [
        f"{plural(len(images), 'image')}: {', '.join(name for name, _ in names)}. AR: native protocol.",
        "Δ: after refinement, variant minus baseline, plus is better; paired bootstrap over images.",
    ]
    return Table(sweep.name, caption, parts.build_frame(rows), [*columns, *_DIFFERENCES], notes, small=True)


def _refined_path(training: Training) -> Path:
    return training.params.results_dir / "refined" / "manifest.json"


def _measure_refinement(params: Params) -> tuple[dict[tuple[str, bool], dict[str, Statistics]], list[int], Path]:
    """Return (name, whether it is real) of each baseline -> statistics before and after G4Seg; the images, and the manifest."""
    path = params.results_dir / "refined" / "manifest.json"
    manifest = read_manifest(path)
    images = [int(image) for image in manifest["images"]]
    part = RefinedPart(params, read_phrases(params.data_dir / "phrases.parquet"), images)
    measured = {
        (entry["baseline"], bool(entry["real"])): {
            "before": part.measure(entry["coarse"], entry["coarse_classes"])[1],
            "after": part.measure(entry["predictions"], entry["class_predictions"])[1],
        }
        for entry in manifest["refined"]
        if entry["refiner"] == G4SEG
    }
    return measured, images, path


def _mean(statistics: list[tuple[float, Floats]]) -> tuple[float, Floats]:
    """Return the mean of a quantity over the baselines that have it, with its replicates."""
    known = [(value, replicates) for value, replicates in statistics if not np.isnan(value)]
    if not known:
        return statistics[0]
    values, replicates = zip(*known, strict=True)
    return float(np.mean(values)), np.mean(replicates, axis=0)


# ----------------------------------------------------------------------------------------------------- columns of params
def _variant_columns(sweep: Sweep, variant: str) -> dict[str, Any]:
    """Return the name of a variant and its values of all changed params."""
    params = next(training.params for training in sweep.trainings if training.variant == variant)
    return {"variant": variant} | {key: flow(value) for key, value in params.subtree(*sweep.keys).items()}


def _key_columns(sweep: Sweep) -> list[Column]:
    """Return the printed columns of the changed params, or that of the variants' names if there are too many or long values."""
    values = {key: [_variant_columns(sweep, variant)[key] for variant in sweep.variants] for key in sweep.keys}
    is_short = all(len(text) <= _MOST_LETTERS for texts in values.values() for text in texts)
    if not sweep.keys or len(sweep.keys) > MOST_KEYS or not is_short or sweep.document.variants:
        return [Column("variant", "Variant", "text")]
    heads = [key.rpartition(".")[2] for key in sweep.keys]
    return [Column(key, head if heads.count(head) == 1 else key, "text") for key, head in zip(sweep.keys, heads, strict=True)]


def _spread(name: str, fractions: Sequence[float | None]) -> dict[str, Any]:
    """Return the columns `name` and `<name>_sd`: mean and standard deviation (n - 1) in points; null without a value."""
    known = [100 * fraction for fraction in fractions if fraction is not None]
    return {
        name: float(np.mean(known)) if known else None,
        f"{name}_sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
    }
