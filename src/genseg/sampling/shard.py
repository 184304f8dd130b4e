"""One job of sampling: the blocks of one shard, for every run at one size.

A run's phrases are cut into fixed blocks of `sample.batch` in key order, the last one shorter; a shard is every n-th block.
So a block is the same computation whatever the number of shards, and the gathered bytes do not depend on it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from genseg.artifacts import masks
from genseg.artifacts.files import atomic_path, file_sha256, read_json, write_json
from genseg.artifacts.latents import LatentStore
from genseg.artifacts.manifest import code_hash
from genseg.artifacts.parquet import KEY, read_metadata
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import maps_path, read_maps, read_predictions, write_maps, write_predictions
from genseg.baselines.colour import choose_threshold, fit_colours, predict_colours
from genseg.diffusion.pipeline import GSPipeline, load_pipeline
from genseg.errors import UserError
from genseg.latents import Texts, image_store, text_store
from genseg.models.device import DTYPES, choose_device, describe
from genseg.params import Params, canonical_json, digest
from genseg.sampling.readout import VaeReadout, quantise, read_mask
from genseg.sampling.runs import Run, base_run, run_rows, study_runs

Maps = NDArray[np.float32]
CODE = ("params.py", "artifacts", "latents.py", "models", "diffusion", "baselines/colour.py", "sampling")
EVOLUTION_PHRASES = 4


def part_path(params: Params, run: Run, shard: int, shards: int) -> Path:
    return params.work_dir / "samples" / run.name / f"part-{shard:03d}-of-{shards:03d}.parquet"


def predictions_path(params: Params, run: Run) -> Path:
    return params.results_dir / "predictions" / run.name / "predictions.parquet"


def run_key(params: Params, run: Run) -> str:
    """Hash of everything a run's bytes depend on: a prediction that carries it need not be made again."""
    threshold = None if run.method == "colour_threshold" else params.sample.threshold
    return digest([maps_key(params, run), run.readout, threshold])


def maps_key(params: Params, run: Run) -> str:
    """Hash of everything a run's soft maps depend on; another threshold or read-out of them needs no sampling."""
    folder = "control" if run.method == "discriminative" else "model"
    sample = params.sample
    facts = [
        run.entry() | {"name": None, "role": None, "readout": None},
        file_sha256(params.data_dir / "phrases.parquet"),
        file_sha256(params.data_dir / "class_phrases.parquet") if run.phrases == "class_phrases" else None,
        params.subtree("seed", "latents"),
        {"grid": sample.grid_fraction, "val": sample.select_fraction}.get(run.phrases),
        code_hash(*CODE),
    ]
    if run.method != "colour_threshold":
        facts += [read_json(params.results_dir / folder / "manifest.json")["weights"]]
        facts += [sample.spacing, sample.clip_x_0, sample.batch, sample.precision]
    return digest(facts)


def runs_of_job(params: Params, size: int) -> list[Run]:
    """Runs whose cells have this size; what has no size goes with the main one. Read-outs follow their base cell."""
    return [run for run in study_runs(params) if (run.size or params.sample.main.size) == size]


def sample_shard(params: Params, size: int, shard: int, shards: int) -> None:
    """Write the parts of every run at `size` that are not there yet, and last the job's small JSON.

    Raises:
        UserError: no run at this size, model or latents are missing, the disk is full, no GPU for `device: cuda`.
    """
    started = time.time()
    runs = runs_of_job(params, size)
    if not runs:
        raise UserError(f"--size {size}: no cell of sample.grid, sample.base or sample.main has it")
    if not 0 <= shard < shards:
        raise UserError(f"--shard {shard}: must be between 0 and {shards - 1}")
    device = choose_device(params.device, params.resources["sample"].threads)
    print(f"sample: device {describe(device)}, size {size}, shard {shard} of {shards}", flush=True)
    keys = {run: run_key(params, run) for run in runs}
    missing = [run for run in runs if not is_made(params, run, keys[run], shard, shards)]
    print(f"sample: {len(missing)} of {len(runs)} runs to make", flush=True)
    phrases = read_phrases(params.data_dir / "phrases.parquet")
    class_phrases = read_phrases(params.data_dir / "class_phrases.parquet")
    sampler = Sampler(params, device)
    for run in missing:
        begun = time.monotonic()
        rows = run_rows(params, run, phrases, class_phrases)
        blocks = shard_blocks(rows, params.sample.batch, shard, shards)
        if run.method == "colour_threshold":
            frame, maps = _colour_predictions(params, phrases, pd.concat(blocks) if blocks else rows.iloc[:0]), None
        else:
            frame, maps = sampler.predict(run, blocks, (shard, shards))
        path = part_path(params, run, shard, shards)
        if maps is not None:
            write_maps(maps, path)
        write_predictions(frame, path, key=keys[run], shard=f"{shard}/{shards}")
        seconds = time.monotonic() - begun
        cost = f"{run.evaluations} evaluations a mask" if run.evaluations else "no network"
        print(f"sample: {run.name}: {len(frame)} masks, {cost}, {len(frame) / max(seconds, 1e-9):.1f} masks/s", flush=True)
    if "grid" in params.sample.runs and shard == 0 and size == params.sample.base.size:
        _write_evolution(params, sampler, phrases)
    target = params.work_dir / "samples" / f"size={size:04d}.shard={shard}-of-{shards}.json"
    write_json(
        target, {"keys": {run.name: keys[run] for run in runs}, "device": describe(device), "seconds": time.time() - started}
    )


def is_made(params: Params, run: Run, key: str, shard: int, shards: int) -> bool:
    """Whether this shard of a run is finished: as a part, or in the gathered predictions."""
    gathered = predictions_path(params, run)
    part = part_path(params, run, shard, shards)
    if read_metadata(gathered).get("key") == key:
        return True
    return read_metadata(part).get("key") == key and (run.method == "colour_threshold" or maps_path(part).exists())


def shard_blocks(rows: pd.DataFrame, batch: int, shard: int, shards: int) -> list[pd.DataFrame]:
    """Every n-th block of `batch` rows in key order."""
    rows = rows.sort_values(KEY, kind="stable", ignore_index=True)
    return [rows.iloc[low : low + batch] for low in range(shard * batch, len(rows), shards * batch)]


class Sampler:
    """Loads each model once and predicts blocks of phrases with it."""

    def __init__(self, params: Params, device: torch.device) -> None:
        self.params, self.device = params, device
        self.texts = Texts(text_store(params), device)
        self._pipelines: dict[str, GSPipeline] = {}

    def pipeline(self, method: str) -> GSPipeline:
        if method not in self._pipelines:
            folder = self.params.results_dir / ("control" if method == "discriminative" else "model")
            sample = self.params.sample
            pipeline = load_pipeline(folder, DTYPES[sample.precision])
            pipeline.sample_by(sample.spacing, sample.clip_x_0)
            self._pipelines[method] = pipeline.to(self.device)
        return self._pipelines[method]

    def predict(self, run: Run, blocks: list[pd.DataFrame], shard: tuple[int, int]) -> tuple[pd.DataFrame, Maps]:
        """Predictions, and soft maps [N, h, w] in the same (key) order."""
        frames, maps = [], []
        for rows, soft in self._maps(run, blocks, shard):
            decoded = soft
            if run.readout == "vae":
                decoded = VaeReadout(self.pipeline(run.method).vae, run.size or 0)(soft)
            found = []
            shapes = rows[["height", "width"]].to_numpy()
            for key, (height, width), picture in zip(rows[KEY].itertuples(index=False), shapes, decoded, strict=True):
                mask, score = read_mask(picture, run.readout, int(height), int(width), self.params.sample.threshold)
                found.append((*key, masks.encode(mask), score))
            frames.append(pd.DataFrame(found, columns=[*KEY, "mask", "score"]))
            maps.append(soft)
        if not frames:
            return pd.DataFrame({name: [] for name in [*KEY, "mask", "score"]}), np.zeros((0, 1, 1), np.float32)
        return pd.concat(frames, ignore_index=True), np.concatenate(maps)

    def _maps(self, run: Run, blocks: list[pd.DataFrame], shard: tuple[int, int]) -> Iterator[tuple[pd.DataFrame, Maps]]:
        """Soft maps [B, h, w] of each block, as they are stored."""
        if stored := self._stored(run, shard):
            maps = read_maps(stored)
            keys = read_predictions(stored)[KEY].itertuples(index=False, name=None)
            places = {key: place for place, key in enumerate(keys)}
            for rows in blocks:
                yield rows, maps[[places[key] for key in rows[KEY].itertuples(index=False, name=None)]]
            return
        pipeline = self.pipeline(run.method)
        images = LatentStore(image_store(self.params, run.size or 0))
        last = time.monotonic()
        for number, rows in enumerate(blocks):
            latents = torch.stack([images[image_id]["latent"] for image_id in rows["image_id"]]).to(self.device)
            soft = pipeline.label_maps(
                latents,
                [self.texts[text] for text in rows["text"]],
                list(zip(*(rows[name] for name in KEY), strict=True)),
                run.size or 0,
                run.steps,
                run.guidance,
                self.params.seed,
                rule=run.rule or "ddim",
                interval=run.guidance_interval,
                ensemble=run.ensemble or 1,
            )
            if time.monotonic() - last > 10:
                last = time.monotonic()
                print(f"sample: {run.name}: block {number + 1} of {len(blocks)}", flush=True)
            yield rows, quantise(soft.float().cpu().numpy())

    def _stored(self, run: Run, shard: tuple[int, int]) -> Path | None:
        """Predictions that hold this run's soft maps already: its own of another threshold; for a read-out the base cell's."""
        source = base_run(self.params) if run.role == "readout" else run
        gathered = predictions_path(self.params, source)
        if read_metadata(gathered).get("maps") == maps_key(self.params, source):
            return gathered
        return part_path(self.params, source, *shard) if run.role == "readout" else None


def _colour_predictions(params: Params, phrases: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    model = fit_colours(phrases[phrases["split"] == "train"], params.seed)
    return predict_colours(model, rows, choose_threshold(model, phrases[phrases["split"] == "val"]))


def _write_evolution(params: Params, sampler: Sampler, phrases: pd.DataFrame) -> None:
    """The base cell's x_t and x_0 estimates over t for a few phrases of the grid (Fig. 5), one per image where possible."""
    base = params.sample.base
    run = base_run(params)
    key = digest([run_key(params, run), "evolution"])
    target = params.work_dir / "samples" / "evolution.safetensors"
    if key in (_evolution_key(target), _evolution_key(params.results_dir / "predictions" / target.name)):
        return
    rows = run_rows(params, run, phrases, phrases.iloc[:0]).sort_values(KEY)
    rows = pd.concat([rows.drop_duplicates("image_id"), rows]).drop_duplicates(KEY).head(EVOLUTION_PHRASES)
    images = LatentStore(image_store(params, base.size))
    latents = torch.stack([images[image_id]["latent"] for image_id in rows["image_id"]]).to(sampler.device)
    pipeline = sampler.pipeline("gs")
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    keys = list(zip(*(rows[name] for name in KEY), strict=True))
    pipeline.label_maps(
        latents,
        [sampler.texts[text] for text in rows["text"]],
        keys,
        base.size,
        base.steps,
        base.guidance,
        params.seed,
        observe=lambda t, x_t, x_0: seen.append((t, pipeline.soft_labels(x_t), pipeline.soft_labels(x_0))),
        rule=base.rule,
        interval=base.guidance_interval,
    )

    def stacked(states: list[torch.Tensor]) -> NDArray[np.uint8]:
        return np.rint(torch.stack(states, dim=1).cpu().numpy() * 255).astype(np.uint8)  # (K, T, h, w)

    facts = {
        "timesteps": [t for t, _, _ in seen],
        "keys": [[int(image_id), str(narrative_id), int(phrase_id)] for image_id, narrative_id, phrase_id in keys],
        "key": key,
    }
    metadata = {"evolution": canonical_json(facts)}  # one entry: safetensors writes several in any order
    with atomic_path(target) as temporary:
        save_file(
            {"xt": stacked([x_t for _, x_t, _ in seen]), "x0": stacked([x_0 for _, _, x_0 in seen])},
            temporary,
            metadata=metadata,
        )


def _evolution_key(path: Path) -> str | None:
    try:
        with safe_open(path, "np") as handle:
            return json.loads(handle.metadata()["evolution"])["key"]
    except (SafetensorError, OSError, KeyError, TypeError):
        return None
