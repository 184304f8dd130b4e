"""One sampling job (one shard of every run at one image size), and the gathering of all shards.

The phrases of a run are divided into blocks of `sample.batch` in key order, and a shard is every n-th block. The blocks do not
depend on the number of shards, and so neither do the gathered predictions.
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from genseg.artifacts import masks
from genseg.artifacts.files import file_sha256, read_json, write_json
from genseg.artifacts.latents import LatentStore
from genseg.artifacts.manifest import write_manifest
from genseg.artifacts.parquet import KEY, read_metadata
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import maps_path, read_maps, read_predictions, write_maps, write_predictions
from genseg.artifacts.reuse import has_key, has_maps, prune, with_maps
from genseg.baselines.colour import choose_threshold, fit_colours, predict_colours
from genseg.diffusion.pipeline import GSPipeline, load_pipeline
from genseg.errors import UserError
from genseg.latents import Texts, image_store, text_store
from genseg.models.device import DTYPES, choose_device, describe
from genseg.params import Params, digest
from genseg.params.sample import OperatingPoint
from genseg.phases import code_hash
from genseg.sampling.evolution import evolution_key, evolution_path, has_evolution, write_evolution
from genseg.sampling.readout import VaeReadout, quantise, read_mask
from genseg.sampling.runs import Run, base_run, predictions_path, run_rows, sample_times_path, study_runs

Maps = NDArray[np.float32]
PROGRESS_SECONDS = 10
"""Minimum time between progress lines."""


def part_path(params: Params, run: Run, shard: int, shards: int) -> Path:
    """Return the path of the predictions of one shard of a run."""
    return params.work_dir / "samples" / run.name / f"part-{shard:03d}-of-{shards:03d}.parquet"


def run_key(params: Params, run: Run) -> str:
    """Return the hash of everything that the predictions of a run depend on. Predictions with this key are reused."""
    threshold = None if run.method == "colour_threshold" else params.sample.threshold
    return digest([maps_key(params, run), run.readout, threshold])


def maps_key(params: Params, run: Run) -> str:
    """Return the hash of everything that the soft maps of a run depend on. Threshold and read-out do not change them."""
    sample = params.sample
    facts = [
        run.model_dump(mode="json", include={"method", "phrases", "point"}),
        file_sha256(params.data_dir / "phrases.parquet"),
        file_sha256(params.data_dir / "class_phrases.parquet") if run.phrases == "class_phrases" else None,
        params.subtree("seed", "latents"),
        {"grid": sample.grid_fraction, "val": sample.select_fraction}.get(run.phrases),
        code_hash("sample"),
    ]
    if run.point is not None:
        facts += [read_json(params.model_dir(run.method) / "manifest.json")["weights"]]
        facts += [sample.timestep_spacing, sample.clip_sample, sample.batch, sample.precision]
    return digest(facts)


def sample_shard(params: Params, size: int, shard: int, shards: int) -> None:
    """Write the missing parts of every run at an image size, and then the job's marker file.

    Raises UserError if no run has this size, the model or latents are missing, the disk is full, or `device: cuda` has no GPU.
    """
    # 1. Find the missing parts. Runs without a network are part of the jobs of the main size.
    runs = [run for run in study_runs(params) if (run.point or params.sample.main).size == size]
    if not runs:
        raise UserError(f"--size {size}: not the size of an operating point in sample.main, sample.base or sample.grid")
    if not 0 <= shard < shards:
        raise UserError(f"--shard {shard}: must be between 0 and {shards - 1}")
    device = choose_device(params.device, params.resources.sample.threads)
    print(f"sample: device {describe(device)}, size {size}, shard {shard} of {shards}", flush=True)
    keys = {run: run_key(params, run) for run in runs}
    missing = [run for run in runs if not is_sampled(params, run, keys[run], shard, shards)]
    print(f"sample: {len(missing)} of {len(runs)} runs are missing", flush=True)

    # 2. Sample them.
    phrases = read_phrases(params.data_dir / "phrases.parquet")
    class_phrases = read_phrases(params.data_dir / "class_phrases.parquet")
    sampler = Sampler(params, device)
    for run in missing:
        is_sampled_now = run.point is not None and not sampler.stored_maps(run, (shard, shards))
        if is_sampled_now:
            sampler.pipeline(run.method)  # before the clock starts
        start_time = time.monotonic()
        rows = run_rows(params, run, phrases, class_phrases)
        blocks = shard_blocks(rows, params.sample.batch, shard, shards)
        part = part_path(params, run, shard, shards)
        if run.point is None:
            model = fit_colours(phrases[phrases["split"] == "train"], params.seed)
            threshold = choose_threshold(model, phrases[phrases["split"] == "val"])
            frame = predict_colours(model, pd.concat(blocks) if blocks else rows.iloc[:0], threshold)
        else:
            frame, maps = sampler.predict(run, run.point, blocks, (shard, shards))
            write_maps(maps, part)
        write_predictions(frame, part, key=keys[run], shard=f"{shard}/{shards}")
        seconds = time.monotonic() - start_time
        if is_sampled_now:  # the read-out of stored maps does not replace the time of their sampling
            times = {
                "seconds": round(seconds, 3),
                "masks": len(frame),
                "device": describe(device),
                "batch": params.sample.batch,
            }
            write_json(sample_times_path(params, run.name, shard, shards), times)
        rate = len(frame) / max(seconds, 1e-9)
        cost = "no network" if run.evaluations is None else f"evaluations per mask: {run.evaluations}"
        print(f"sample: {run.name}: {len(frame)} masks, {cost}, {rate:.1f} masks/s", flush=True)

    # 3. Record the evolution of the base run (Fig. 5).
    if "grid" in params.sample.runs and shard == 0 and size == params.sample.base.size:
        key, path = evolution_key(run_key(params, base_run(params))), evolution_path(params.work_dir / "samples")
        if not has_evolution(path, key) and not has_evolution(evolution_path(params.results_dir / "predictions"), key):
            write_evolution(path, params, sampler.pipeline("gs"), sampler.texts, phrases, key)
    marker = {"keys": {run.name: keys[run] for run in runs}, "device": describe(device)}
    write_json(params.work_dir / "samples" / f"size={size:04d}.shard={shard}-of-{shards}.json", marker)


def is_sampled(params: Params, run: Run, key: str, shard: int, shards: int) -> bool:
    """Return whether a shard of a run is finished: its part or the gathered predictions have this key."""
    part = part_path(params, run, shard, shards)
    return has_key(key, predictions_path(params, run)) or (has_key(key, part) and (run.point is None or has_maps(part)))


def shard_blocks(rows: pd.DataFrame, batch: int, shard: int, shards: int) -> list[pd.DataFrame]:
    """Divide rows in key order into blocks of `batch`, and return every n-th block from block `shard` on, for n = `shards`."""
    rows = rows.sort_values(KEY, kind="stable", ignore_index=True)
    return [rows.iloc[low : low + batch] for low in range(shard * batch, len(rows), shards * batch)]


class Sampler:
    """Predicts blocks of phrases. Each model is loaded once."""

    def __init__(self, params: Params, device: torch.device) -> None:
        self.params, self.device = params, device
        self.texts = Texts(text_store(params), device)
        self._pipelines: dict[str, GSPipeline] = {}

    def pipeline(self, method: str) -> GSPipeline:
        """Return the pipeline of a model, "gs" or "discriminative"."""
        if method not in self._pipelines:
            sample = self.params.sample
            pipeline = load_pipeline(self.params.model_dir(method), DTYPES[sample.precision])
            pipeline.configure_sampling(sample.timestep_spacing, sample.clip_sample)
            self._pipelines[method] = pipeline.to(self.device)
        return self._pipelines[method]

    def predict(
        self, run: Run, point: OperatingPoint, blocks: list[pd.DataFrame], shard: tuple[int, int]
    ) -> tuple[pd.DataFrame, Maps]:
        """Return the predictions of the blocks and their soft maps [N, h, w], in key order. `shard`: (number, count)."""
        frames, maps = [], []
        for rows, soft in self._soft_maps(run, point, blocks, shard):
            pictures = VaeReadout(self.pipeline(run.method).vae, point.size)(2 * soft - 1) if run.readout == "vae" else soft
            predictions = []
            shapes = rows[["height", "width"]].to_numpy()
            for key, (height, width), picture in zip(rows[KEY].itertuples(index=False), shapes, pictures, strict=True):
                mask, score = read_mask(picture, run.readout, int(height), int(width), self.params.sample.threshold)
                predictions.append((*key, masks.encode(mask), score))
            frames.append(pd.DataFrame(predictions, columns=[*KEY, "mask", "score"]))
            maps.append(soft)
        if not frames:
            return pd.DataFrame({name: [] for name in [*KEY, "mask", "score"]}), np.zeros((0, 1, 1), np.float32)
        return pd.concat(frames, ignore_index=True), np.concatenate(maps)

    def _soft_maps(
        self, run: Run, point: OperatingPoint, blocks: list[pd.DataFrame], shard: tuple[int, int]
    ) -> Iterator[tuple[pd.DataFrame, Maps]]:
        """Yield each block with its soft maps [B, h, w], rounded to the stored precision. Stored maps are reused."""
        if stored := self.stored_maps(run, shard):
            maps = read_maps(stored)
            keys = read_predictions(stored)[KEY].itertuples(index=False, name=None)
            row_of = {key: row for row, key in enumerate(keys)}
            for rows in blocks:
                yield rows, maps[[row_of[key] for key in rows[KEY].itertuples(index=False, name=None)]]
            return
        pipeline, images = self.pipeline(run.method), LatentStore(image_store(self.params, point.size))
        last_line = time.monotonic()
        for number, rows in enumerate(blocks):
            latents = torch.stack([images[image_id]["latent"] for image_id in rows["image_id"]]).to(self.device)
            keys_of_rows = list(zip(*(rows[name] for name in KEY), strict=True))
            texts = [self.texts[text] for text in rows["text"]]
            soft = pipeline.label_maps(latents, texts, keys_of_rows, point, self.params.seed)
            if time.monotonic() - last_line > PROGRESS_SECONDS:
                last_line = time.monotonic()
                print(f"sample: {run.name}: block {number + 1} of {len(blocks)}", flush=True)
            yield rows, quantise(soft.float().cpu().numpy())

    def stored_maps(self, run: Run, shard: tuple[int, int]) -> Path | None:
        """Return the path of predictions with this run's soft maps (its own, or the base run's for a read-out), or None."""
        source = base_run(self.params) if run.role == "readout" else run
        gathered = predictions_path(self.params, source)
        if read_metadata(gathered).get("maps") == maps_key(self.params, source):
            return gathered
        return part_path(self.params, source, *shard) if run.role == "readout" else None


def gather(params: Params) -> None:
    """Write `results/<study>/predictions/<run>/` for every run from its parts, remove other runs, and write the manifest.

    Raises UserError if a part is missing or was sampled with other params.
    """
    folder, runs = params.results_dir / "predictions", study_runs(params)
    for run in runs:
        _gather_run(params, run)
    outputs = with_maps(predictions_path(params, run) for run in runs)
    if "grid" in params.sample.runs:
        if evolution_path(params.work_dir / "samples").exists():
            evolution_path(folder).unlink(missing_ok=True)  # it may be a hard link of a sweep
            shutil.copyfile(evolution_path(params.work_dir / "samples"), evolution_path(folder))
        outputs.append(evolution_path(folder))
    prune(folder, [*outputs, folder / "manifest.json"], "sample")
    write_manifest(
        folder / "manifest.json",
        "sample",
        params,
        sorted({params.model_dir(run.method) / "manifest.json" for run in runs if run.point is not None}),
        outputs,
        runs=[run.model_dump(mode="json") for run in runs],
    )


def _gather_run(params: Params, run: Run) -> None:
    """Concatenate the parts of a run in key order, unless its predictions are up to date."""
    key, path, shards = run_key(params, run), predictions_path(params, run), params.resources.sample.shards
    if has_key(key, path):
        return
    parts = [part_path(params, run, shard, shards) for shard in range(shards)]
    for part in parts:
        if not has_key(key, part):
            raise UserError(f"{part}: missing or sampled with other params; run `snakemake -- sample`, which samples it first")
    frame = pd.concat([read_predictions(part) for part in parts], ignore_index=True)
    metadata = {"key": key}
    if maps_path(parts[0]).exists():
        metadata["maps"] = maps_key(params, run)
        order = frame.sort_values(KEY, kind="stable").index.to_numpy()
        maps = [read_maps(part) for part in parts]
        write_maps(np.concatenate([part for part in maps if len(part)])[order], path)
    write_predictions(frame, path, **metadata)
    print(f"sample: {run.name}: {len(frame)} masks", flush=True)
