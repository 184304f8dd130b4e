"""Gathering: all baselines and refiners that the params call for are there, nothing else is, and the manifest says so."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from genseg.artifacts.files import read_json
from genseg.artifacts.manifest import code_hash, write_manifest
from genseg.artifacts.predictions import maps_path
from genseg.baselines.registry import baselines_dir, study_baselines
from genseg.errors import UserError
from genseg.params import Params
from genseg.refine.coarse import CoarseMasks
from genseg.refine.keys import Keys
from genseg.refine.layout import (
    CODE_HERE,
    KEYS,
    coarse_paths,
    discrepancy_path,
    refined_dir,
    refined_path,
    refiner_passes,
    refiners,
    shard_marker,
    timing_path,
)
from genseg.refine.trained_control import network_dir, network_manifest


def gather_refined(params: Params) -> None:
    """Remove what no baseline and refiner of the params account for; write `results/<study>/refined/manifest.json`.

    Raises:
        UserError: a part is missing or was made of something else.
    """
    started, folder = time.time(), refined_dir(params)
    masks = CoarseMasks(params)
    keys, entries, timing = Keys(params, masks.rule), [], {}
    outputs: list[Path] = []
    for baseline in study_baselines(params):
        coarse = coarse_paths(params, baseline)
        outputs += [discrepancy_path(params, baseline.name)] if False in coarse else []
        for refiner in refiners(params, baseline.name):
            if not keys.is_made(baseline, refiner):
                for shard in range(params.refine.shards):  # or Snakemake would take the job for done
                    shard_marker(params, shard, params.refine.shards).unlink(missing_ok=True)
                path = refined_path(params, refiner, baseline.name, False)
                raise UserError(f"{path}: missing or made with other params; run again, it is made first")
            paths = {classes: str(refined_path(params, refiner, baseline.name, classes)) for classes in coarse}
            outputs += map(Path, paths.values())
            entry: dict[str, Any] = {"refiner": refiner, "baseline": baseline.name, "label": baseline.label}
            entry |= {"real": baseline.real, "predictions": paths.get(False), "class_predictions": paths.get(True)}
            for which, classes in (("coarse", False), ("coarse_classes", True)):
                entry[which] = str(coarse[classes]) if classes in coarse else None
            entries.append(entry | {"passes": refiner_passes(params.refine, refiner)})
            measured = timing_path(params, refiner, baseline.name)
            if measured.exists() and (found := read_json(measured))["key"] == keys.key(baseline, refiner):
                timing[f"{refiner}/{baseline.name}"] = {name: value for name, value in found.items() if name != "key"}
    outputs += [maps_path(path) for path in outputs if maps_path(path).exists()]
    if "trained" in params.refine.controls:
        outputs += sorted(network_dir(params).iterdir())
    else:
        shutil.rmtree(network_dir(params), ignore_errors=True)
    keep = {*outputs, network_manifest(params), folder / "manifest.json"}
    for stale in sorted(path for path in folder.rglob("*") if path.is_file() and path not in keep):
        stale.unlink()
        print(f"refine: removed {stale}, which the study no longer has", flush=True)
    for empty in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(empty.iterdir()):
            empty.rmdir()
    write_manifest(
        folder / "manifest.json",
        "refine",
        params.subtree(*KEYS),
        [params.results_dir / "predictions" / "manifest.json", baselines_dir(params) / "manifest.json"],
        outputs,
        started,
        code=code_hash(*CODE_HERE),
        weights=keys.weights,
        images=sorted(int(image) for image in masks.tables[False]["image_id"].unique()),
        refined=entries,
        timing=timing,
    )
    print(f"refine: {len(entries)} refined predictions of {len(study_baselines(params))} baselines", flush=True)
