"""Gathering: the shards' parts become the predictions; cells that the study no longer has are removed."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pandas as pd

from genseg.artifacts.manifest import code_hash, write_manifest
from genseg.artifacts.parquet import KEY, read_metadata
from genseg.artifacts.predictions import maps_path, read_maps, read_predictions, write_maps, write_predictions
from genseg.errors import UserError
from genseg.params import Params
from genseg.sampling.runs import Run, study_runs
from genseg.sampling.shard import CODE, maps_key, part_path, predictions_path, run_key

NEEDED = (
    *("seed", "latents", "sample.runs", "sample.main", "sample.base", "sample.grid", "sample.grid_fraction", "sample.points"),
    *(
        "sample.select_fraction",
        "sample.spacing",
        "sample.clip_x_0",
        "sample.readout",
        "sample.threshold",
        "sample.batch",
        "sample.precision",
    ),
)


def gather(params: Params) -> None:
    """Write `results/<study>/predictions/<run>/` for every run, remove other runs, write the manifest last.

    Raises:
        UserError: a part is missing or was made of something else.
    """
    started = time.time()
    folder = params.results_dir / "predictions"
    runs = study_runs(params)
    for run in runs:
        _gather_run(params, run)
    made, evolution = params.work_dir / "samples" / "evolution.safetensors", folder / "evolution.safetensors"
    if "grid" not in params.sample.runs:
        evolution.unlink(missing_ok=True)
    elif made.exists():
        shutil.copyfile(made, evolution)
    wanted = {predictions_path(params, run).parent for run in runs}
    for path in sorted(folder.rglob("predictions.parquet")):
        if path.parent not in wanted:
            shutil.rmtree(path.parent)
            print(f"sample: removed {path.parent}, which the study no longer has", flush=True)
    for empty in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(empty.iterdir()):
            empty.rmdir()
    outputs = [path for run in runs for path in _files(params, run)]
    models = sorted({"control" if run.method == "discriminative" else "model" for run in runs})
    write_manifest(
        folder / "manifest.json",
        "sample",
        params.subtree(*NEEDED),
        [params.results_dir / model / "manifest.json" for model in models],
        [*outputs, *([evolution] if "grid" in params.sample.runs else [])],
        started,
        code=code_hash(*CODE),
        runs=[run.entry() for run in runs],
    )


def _files(params: Params, run: Run) -> list:
    path = predictions_path(params, run)
    return [path, *([maps_path(path)] if maps_path(path).exists() else [])]


def _gather_run(params: Params, run: Run) -> None:
    key, path, shards = run_key(params, run), predictions_path(params, run), params.sample.shards
    if read_metadata(path).get("key") == key:
        return
    parts = [part_path(params, run, shard, shards) for shard in range(shards)]
    for part in parts:
        if read_metadata(part).get("key") != key:
            raise UserError(f"{part}: missing or made with other params; run `snakemake -- sample`, which samples it first")
    frame = pd.concat([read_predictions(part) for part in parts], ignore_index=True)
    order = frame.sort_values(KEY, kind="stable").index.to_numpy()
    metadata = {"key": key}
    if maps_path(parts[0]).exists():
        metadata["maps"] = maps_key(params, run)
        maps = [read_maps(part) for part in parts]
        write_maps(np.concatenate([part for part in maps if len(part)])[order], path)
    write_predictions(frame, path, **metadata)
    print(f"sample: {run.name}: {len(frame)} masks", flush=True)
