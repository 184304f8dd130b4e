"""A study with invented scores: everything that `genseg tables` reads, without training or sampling anything."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from PIL import Image
from safetensors.numpy import save_file

from genseg.artifacts.files import write_json
from genseg.artifacts.manifest import times_path
from genseg.artifacts.masks import encode
from genseg.artifacts.phrases import write_phrases
from genseg.artifacts.predictions import write_maps, write_predictions
from genseg.artifacts.scores import write_scores
from genseg.baselines.registry import Baseline, study_baselines
from genseg.diffusion.guidance import count_evaluations
from genseg.metrics.soft_maps import operating_points
from genseg.params import OperatingPoint, Params, validate_params
from genseg.report.page import manifest_paths
from genseg.sampling.runs import base_run, point_path, sample_times_path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("results/made_up")
SPLITS = ["overall", "things", "stuff", "singulars", "plurals"]
MANIFEST = {"params": {"seed": 0}, "code": "c0de", "device": "a device", "outputs": {}}
NASTY_CLASS = "50%_off & $5 #1 {a~b^c\\d} <road|way>"
NASTY_PHRASE = "the $x_t$ & 100% of a very long phrase that goes on and on past what a caption has room for, and further still"


def build_study(root: Path) -> None:
    """Write a params file and every input of `genseg tables` for the study `made_up`."""
    # 1. Params and published rows.
    document = yaml.safe_load((ROOT / "params.yaml").read_text())
    document["study"] = "made_up"
    document["tables"]["dpi"] = 60
    sample = document["sample"]
    sample["main"] |= {"num_inference_steps": 2, "ensemble_size": 1, "mirror": False}
    sample["base"]["num_inference_steps"] = 50
    sample["grid"]["num_inference_steps"] = [30, 20]
    sample["operating_points"] = [
        {"num_inference_steps": 1, "guidance_scale": 1.0},
        {"num_inference_steps": 1, "guidance_scale": 1.5},
        {"num_inference_steps": 2, "guidance_scale": 1.5},
        {"num_inference_steps": 4, "guidance_scale": 1.5},
        {"num_inference_steps": 4, "guidance_scale": 1.5, "sampler": "dpmpp"},
        {"num_inference_steps": 4, "guidance_scale": 1.5, "guidance_interval": [0.0, 0.5]},
        {"num_inference_steps": 2, "guidance_scale": 1.0, "ensemble_size": 4, "mirror": True},
    ]
    (root / "params.yaml").write_text(yaml.safe_dump(document))
    shutil.copytree(ROOT / "data" / "published", root / "data" / "published")
    params = validate_params(document)

    # 2. Scores, phrases, predictions, refinement.
    _write_scores(root, params)
    _write_predictions(root, params)

    # 3. Manifests of the phases.
    for path in manifest_paths(params).values():
        write_json(root / path, MANIFEST)
    entry = {
        "refiner": "g4seg",
        "baseline": "gs",
        "label": "GS",
        "coarse": str(RESULTS / "predictions/main/predictions.parquet"),
    }
    write_json(root / RESULTS / "refined" / "manifest.json", MANIFEST | {"refined": [entry]})
    times = {f"g4seg/{baseline.name}": timed(40 + index) for index, baseline in enumerate(study_baselines(params))}
    write_json(root / times_path(params, "refine"), times | {"crf/gs": timed(2, batch=1)})
    for shard, seconds in enumerate((30, 90)):  # two shards of 60 masks
        write_json(root / sample_times_path(params, base_run(params).name, shard, 2), timed(seconds))


def timed(seconds: float, batch: int = 16) -> dict[str, Any]:
    return {"seconds": seconds, "masks": 60, "images": 5, "device": "a device", "batch": batch}


# ----------------------------------------------------------------------------------------------------------------- scores
def _write_scores(root: Path, params: Params) -> None:
    scores = root / params.results_dir / "scores"
    frame = per_phrase()

    def score(name: str, content: dict[str, Any]) -> None:
        write_scores(frame, content, scores / f"{name}.json")

    def score_other_protocols(entry: dict[str, Any], overall: float) -> None:
        for index, protocol in enumerate(params.score.protocols[1:], start=1):
            score(f"protocols/{entry['name']}.{protocol}", summary(entry, overall - 0.1 * index, protocol))

    # 1. The main row, its controls, and both methods under the other protocols.
    classes = {"mean": 0.5, "interval": [0.4, 0.6], "per_class": {NASTY_CLASS: 0.25, "sky": 0.75, "absent": None}}
    main_point, base_point = params.sample.main, params.sample.base
    score("main", summary(run_entry("main", "main", main_point), 0.7, miou=classes))
    score("text_permuted", summary(run_entry("text_permuted", "control", main_point), 0.3, n=32))
    score("discriminative", summary(run_entry("discriminative", "control"), 0.65, miou=classes))
    score("discriminative_mirrored", summary(run_entry("discriminative_mirrored", "control"), 0.66))
    score("colour_threshold", summary(run_entry("colour_threshold", "control"), 0.2))
    for name, overall in (("main", 0.7), ("discriminative", 0.65)):
        score_other_protocols(run_entry(name, "main"), overall)
    pairs = [f"main - {name}" for name in ("text_permuted", "discriminative", "discriminative_mirrored", "colour_threshold")]

    # 2. The grid, starting with the base point.
    names = {cell: f"grid/{point_path(cell)}" for cell in params.sample.test_subset_points()}
    for index, (cell, name) in enumerate(names.items()):
        entry = run_entry(name, "grid", cell)
        score(name, summary(entry, 0.72 - 0.01 * index, n=10, calibration=calibration(0.02 + 0.01 * index)))
    base, *other_names = names.values()
    ensembles = [(cell, cell.single) for cell in names if cell.ensemble_size > 1]

    # 3. The operating points on val.
    points = []
    for index, cell in enumerate(params.sample.val_points()):
        name = f"val/{point_path(cell)}"
        score(name, summary(run_entry(name, "val", cell), 0.6 + 0.01 * index, n=20, split="val"))
        entry = {"name": name, "point": cell.model_dump(mode="json"), "evaluations": count_evaluations(cell)}
        points.append(entry | {"ar": 0.6 + 0.01 * index, "ci_low": 0.5, "ci_high": 0.7, "ece": 0.03, "best_threshold": 0.45})
        points[-1] |= {"best_ar": 0.61 + 0.01 * index, "scores": f"results/made_up/scores/{name}.json"}
    write_json(scores / "operating_points.json", operating_points(points, points[0]["name"]))

    # 4. The read-outs, and every comparison.
    for readout in ("nearest", "vae"):
        score(f"readouts/{readout}", summary(run_entry(f"readouts/{readout}", "readout", base_point), 0.6, n=10))
        pairs.append(f"readouts/{readout} - {base}")
    pairs += [f"main - {base}", *(f"{name} - {base}" for name in other_names)]
    pairs += [f"{names[ensemble]} - {names[single]}" for ensemble, single in ensembles]
    keys = [*(key for pair in pairs for key in (pair, f"{pair} (things)")), "main - discriminative (miou)"]
    comparison = {"n": 10, "difference": -0.0123, "ci_low": -0.03, "ci_high": 0.01}
    write_json(scores / "comparisons.json", dict.fromkeys(keys, comparison))

    # 5. The baselines, before and after refinement.
    for baseline in study_baselines(params):
        if baseline.family != "run":
            entry = run_entry(f"baselines/{baseline.name}", "baseline") | {"label": baseline.label, "real": baseline.real}
            score(f"baselines/{baseline.name}", summary(entry | {"imported": False}, 0.5))
            if baseline.real:
                score_other_protocols(entry | {"imported": False}, 0.5)
    write_json(scores / "refinement.json", refinement_scores(study_baselines(params)))


def per_phrase(count: int = 40) -> pd.DataFrame:
    """Return a scores table of four phrases per image with IoUs spread evenly over [0, 1]."""
    index = np.arange(count)
    return pd.DataFrame(
        {
            "image_id": index // 4,
            "narrative_id": "0",
            "phrase_id": index % 4,
            "is_thing": index % 2 == 0,
            "is_plural": False,
            "iou": np.linspace(0, 1, count)[(index * 7) % count],
            "boundary_iou": 0.4,
            "area": 100,
        }
    )


def run_entry(name: str, role: str, point: OperatingPoint | None = None) -> dict[str, Any]:
    phrases = "grid" if role in ("grid", "readout") else "test"
    entry = {"name": name, "role": role, "method": "gs", "phrases": phrases, "readout": "bilinear"}
    return entry | {"point": None if point is None else point.model_dump(mode="json")}


def summary(run: dict[str, Any], overall: float, protocol: str = "native", n: int = 40, **other: Any) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "split": "test",
        "run": run,
        "ar": splits(overall, things=overall - 0.05, plurals=None),
        "interval": {split: [overall - 0.02, overall + 0.02] for split in SPLITS} | {"plurals": None},
        "ceiling": splits(1.0 if protocol == "native" else 0.85, plurals=None),
        "ceiling_latent": splits(0.91, plurals=None),
        "ar_by_size": {"small": 0.2, "medium": 0.5, "large": None},
        "boundary_iou": splits(0.4, plurals=None),
        "miou": None,
        "counts": {"phrases": n, "images": 12, "narratives": 12, "missing": 0, "empty_union": 0, "left_out": 0},
        "tags": {"compositional": {"n": 7, "overall": 0.44}},
        **other,
    }


def splits(overall: float, **other: float | None) -> dict[str, float | None]:
    return dict.fromkeys(SPLITS, overall) | other


def calibration(ece: float) -> dict[str, Any]:
    """Return calibration scores with all pixels in three of the 15 bins."""
    filled = [0.05 * (index + 1) if index in (0, 3, 14) else None for index in range(15)]
    pixels = [10 if value else 0 for value in filled]
    return {"ece": ece, "interval": [0.0, 0.1], "pixels": pixels, "probability": filled, "frequency": filled}


def refinement_scores(baselines: list[Baseline]) -> dict[str, Any]:
    """Return scores in which G4Seg improves baseline i by 0.01 i and other refiners by half; `alpha=1` has one baseline."""
    refiners = {"g4seg": baselines, "crf": baselines, "random": baselines, "alpha=1": baselines[:1]}
    rows, means = [], []
    for refiner, refined in refiners.items():
        refiner_rows = []
        for index, baseline in enumerate(refined):
            value = change(0.01 * index * (1 if refiner == "g4seg" else 0.5))
            facts = {"baseline": baseline.name, "label": baseline.label, "real": baseline.real, "passes": 7}
            refiner_rows.append({"refiner": refiner, **facts, **dict.fromkeys(("ar", "boundary_iou", "miou"), value)})
        for over in ("all", "real"):
            members = [row for row in refiner_rows if row["real"] or over == "all"]
            value = change(float(np.mean([row["miou"]["difference"] for row in members])))
            names = [row["baseline"] for row in members]
            quantities = dict.fromkeys(("ar", "boundary_iou", "miou"), value)
            means.append({"refiner": refiner, "over": over, "baselines": names, **quantities})
        rows += refiner_rows
    gain = [
        {"by": by, "low": low, "high": low + 1, "n": 5, "difference": 0.1, "ci_low": 0.0, "ci_high": 0.2}
        for by in ("iou", "complexity")
        for low in (0.0, 1.0)
    ]
    return {"version": 1, "protocol": "native", "split": "test", "background_threshold": None} | {
        "counts": {"images": 5, "phrases": 20, "replicates": 10},
        "rows": rows,
        "means": means,
        "gain": gain,
    }


def change(difference: float) -> dict[str, Any]:
    bounds = {"ci_low": difference - 0.01, "ci_high": difference + 0.01}
    return {"before": 0.5, "after": 0.5 + difference, "difference": difference} | bounds


# -------------------------------------------------------------------------------------------------- phrases, predictions
def _write_predictions(root: Path, params: Params) -> None:
    """Write the phrase table with its images, predictions without the first phrase, the evolution, and one refined mask."""
    frame, results = per_phrase(), root / params.results_dir
    masks = frame.assign(mask=[encode(np.eye(24, 32) > 0)] * len(frame))
    table = phrase_table(root, frame)
    write_phrases(table, root / params.data_dir / "phrases.parquet")
    write_phrases(table.iloc[::4].assign(narrative_id="class"), root / params.data_dir / "class_phrases.parquet")
    write_predictions(masks.iloc[1:].assign(score=0.5), results / "predictions" / "main" / "predictions.parquet")
    write_predictions(masks.assign(score=0.5), results / "predictions" / "discriminative" / "predictions.parquet")

    maps = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)
    header = {"evolution": '{"timesteps": [999, 499, 19], "keys": [[0, "0", 0], [1, "0", 2]]}'}
    tensors = {"x0": maps, "xt": maps, "unguided": maps[:, 0], "decoded": maps.repeat(4, axis=2).repeat(4, axis=3)[:, 0]}
    save_file(tensors, results / "predictions" / "evolution.safetensors", metadata=header)

    refined = results / "refined" / "discrepancy" / "gs.parquet"
    write_predictions(masks.iloc[[2]].assign(score=0.0), refined)
    write_maps(np.full((1, 16, 16), 0.5, np.float32), refined)


def phrase_table(root: Path, frame: pd.DataFrame) -> pd.DataFrame:
    folder = root / "data" / "made_up" / "images"
    folder.mkdir(parents=True)
    for image_id in frame["image_id"].unique():
        Image.fromarray(np.full((24, 32, 3), 20 * image_id, np.uint8)).save(folder / f"{image_id}.png")
    truth = np.zeros((24, 32), bool)
    truth[4:12, 6:20] = True
    return frame[["image_id", "narrative_id", "phrase_id", "is_thing", "is_plural"]].assign(
        split="test",
        file_name=[f"data/made_up/images/{image_id}.png" for image_id in frame["image_id"]],
        height=24,
        width=32,
        caption=None,
        phrase=[NASTY_PHRASE if phrase_id == 0 else "the red circle" for phrase_id in frame["phrase_id"]],
        class_id=None,
        segment_ids=[[1, 2] if index < 4 else [1] for index in range(len(frame))],
        mask=[encode(truth)] * len(frame),
        tags=None,
    )
