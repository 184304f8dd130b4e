"""Score the baselines of a study on the whole of test: AR, boundary IoU and mIoU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from genseg.artifacts.predictions import read_predictions
from genseg.artifacts.scores import SCHEMA, write_scores
from genseg.metrics.class_phrases import ClassPhrases
from genseg.metrics.recall import PHRASE_GROUPS
from genseg.metrics.scoring import score_run
from genseg.metrics.semantic import mean_iou
from genseg.params import Params


def score_baselines(params: Params, phrases: pd.DataFrame, manifest: dict[str, Any]) -> list[Path]:
    """Write `scores/baselines/<name>.json` and `.parquet` for every baseline that is not a run of sampling.

    `manifest` is that of the baselines. Returns the written files.
    """
    classes = ClassPhrases(params)
    outputs: list[Path] = []
    for entry in manifest["baselines"]:
        paths = [Path(entry[key]) for key in ("predictions", "class_predictions") if entry[key] is not None]
        if any(path.parent != params.results_dir / "baselines" for path in paths):
            continue  # a run of sampling
        per_phrase, summary = _score_baseline(params, phrases, classes, entry)
        out = params.results_dir / "scores" / "baselines" / f"{entry['name']}.json"
        write_scores(per_phrase, summary, out)
        outputs += [out, out.with_suffix(".parquet")]
        values = {"AR": summary["ar"]["overall"], "mIoU": summary["miou"]["mean"]}
        text = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if value is not None)
        print(f"{out}: {text}", flush=True)
    return outputs


def _score_baseline(
    params: Params, phrases: pd.DataFrame, classes: ClassPhrases, entry: dict[str, Any]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Per-phrase table and summary of one baseline, of which phrases or class phrases may have no predictions."""
    path, class_path = entry["predictions"], entry["class_predictions"]
    if path is None:
        per_phrase, summary = _empty_scores(params)
    else:
        per_phrase, summary = score_run(
            phrases,
            read_predictions(path),
            params.score.protocol,
            boundary_ratio=params.score.boundary_ratio,
            replicates=params.score.bootstrap,
            seed=params.seed,
            origins=("phrase table", path),
        )
    miou = float("nan") if class_path is None else float(mean_iou(classes.count(Path(class_path)).counts.sum(0)))
    run = {"name": f"baselines/{entry['name']}", "role": "baseline"}
    run |= {key: entry[key] for key in ("label", "real", "imported")}
    return per_phrase, summary | {"run": run, "miou": {"mean": None if np.isnan(miou) else miou}}


def _empty_scores(params: Params) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Scores of a baseline that has predictions of class phrases only."""
    groups = dict.fromkeys(PHRASE_GROUPS)
    summary = {
        "protocol": params.score.protocol,
        "split": "test",
        "ar": groups,
        "interval": groups,
        "ceiling": groups,
        "ceiling_latent": None,
        "boundary_iou": groups,
        "counts": dict.fromkeys(("phrases", "images", "narratives", "missing"), 0),
    }
    return SCHEMA.empty_table().to_pandas(), summary
