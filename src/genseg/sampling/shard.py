"""One sampling job (one shard of every run at one image size), and the gathering of all shards.

The phrases of a run are divided into blocks of `sample.batch` in key order, and a shard is every n-th block. The blocks do not
depend on the number of shards, and so neither do the gathered predictions. A job writes its blocks in parts.
"""

import shutil
from functools import cache
from pathlib import Path

import pandas as pd
import torch

from genseg.artifacts import masks
from genseg.artifacts.files import file_sha256, read_json, write_json
from genseg.artifacts.latents import LatentStore
from genseg.artifacts.manifest import write_manifest
from genseg.artifacts.parquet import KEY, read_metadata
from genseg.artifacts.parts import Parts, Piece, make_parts
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import Levels, as_levels, as_maps, read_levels
from genseg.artifacts.reuse import has_key, prune, with_maps
from genseg.baselines.colour import choose_threshold, fit_colours, predict_colours
from genseg.diffusion.pipeline import GSPipeline, load_pipeline
from genseg.diffusion.sampling import phrase_generators
from genseg.errors import UserError
from genseg.latents import Texts, image_store, text_store
from genseg.models.device import DTYPES, choose_device, describe
from genseg.params import Params, digest
from genseg.params.sample import OperatingPoint
from genseg.phases import code_hash
from genseg.sampling.evolution import evolution_key, evolution_path, has_evolution, write_evolution
from genseg.sampling.readout import VaeReadout, read_mask
from genseg.sampling.runs import Run, base_run, predictions_path, run_rows, sample_times_path, study_runs


def run_parts(params: Params, run: Run) -> Parts:
    """Return the parts of a run, whose units are the numbers of blocks."""
    return Parts(params.work_dir / "samples" / run.name, run_key(params, run))


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
        {"grid": sample.grid_fraction, "val": sample.select_fraction, "class_phrases": params.score.miou}.get(run.phrases),
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
        _sample_run(sampler, run, run_rows(params, run, phrases, class_phrases), phrases, shard, shards)

    # 3. Record the evolution of the base run (Fig. 5).
    if "grid" in params.sample.runs and shard == 0 and size == params.sample.base.size:
        key, path = evolution_key(run_key(params, base_run(params))), evolution_path(params.work_dir / "samples")
        if not has_evolution(path, key) and not has_evolution(evolution_path(params.results_dir / "predictions"), key):
            write_evolution(path, params, sampler.pipeline("gs"), sampler.texts, phrases, key)
    marker = {"keys": {run.name: keys[run] for run in runs}, "device": describe(device)}
    write_json(params.work_dir / "samples" / f"size={size:04d}.shard={shard}-of-{shards}.json", marker)


def _sample_run(sampler: "Sampler", run: Run, rows: pd.DataFrame, phrases: pd.DataFrame, shard: int, shards: int) -> None:
    """Write the missing parts of one shard of a run, and the time that the shard took if it was sampled."""
    params, point, parts = sampler.params, run.point, run_parts(sampler.params, run)
    total = -(-len(rows) // params.sample.batch)
    blocks = shard_blocks(rows, params.sample.batch, shard, shards)
    is_sampled_now = point is not None and sampler.stored_maps(run) is None
    if point is None:
        model = fit_colours(phrases[phrases["split"] == "train"], params.seed)
        threshold = choose_threshold(model, phrases[phrases["split"] == "val"])
    elif is_sampled_now:
        sampler.pipeline(run.method)  # before the clock starts

    def sample(block: int) -> dict[Run, Piece]:
        if point is None:
            return {run: (predict_colours(model, blocks[block], threshold), None)}
        return {run: sampler.predict(run, point, block, blocks[block])}

    make_parts({run: parts}, blocks, sample, f"sample: {run.name}: block", total)
    if not total:
        parts.write({}, 0.0, total)
    count, seconds = sum(map(len, blocks.values())), parts.seconds(blocks)
    if is_sampled_now:  # the read-out of stored maps does not replace the time of their sampling
        times = {"seconds": round(seconds, 3), "masks": count, "device": describe(sampler.device)}
        write_json(sample_times_path(params, run.name, shard, shards), times | {"batch": params.sample.batch})
    cost = "no network" if run.evaluations is None else f"evaluations per mask: {run.evaluations}"
    print(f"sample: {run.name}: {count} masks, {cost}, {count / max(seconds, 1e-9):.1f} masks/s", flush=True)


def is_sampled(params: Params, run: Run, key: str, shard: int, shards: int) -> bool:
    """Return whether a shard of a run is finished: its blocks or the gathered predictions have this key."""
    if has_key(key, predictions_path(params, run)):
        return True
    parts = run_parts(params, run)
    return parts.total is not None and all(block in parts for block in range(shard, parts.total, shards))


def shard_blocks(rows: pd.DataFrame, batch: int, shard: int, shards: int) -> dict[int, pd.DataFrame]:
    """Divide rows in key order into numbered blocks of `batch`, and return every n-th from `shard` on, for n = `shards`."""
    rows = rows.sort_values(KEY, kind="stable", ignore_index=True)
    return {low // batch: rows.iloc[low : low + batch] for low in range(shard * batch, len(rows), shards * batch)}


class Sampler:
    """Predicts blocks of phrases. Each model is loaded once."""

    def __init__(self, params: Params, device: torch.device) -> None:
        self.params, self.device = params, device
        self.texts = Texts(text_store(params), device)
        self._pipelines: dict[str, GSPipeline] = {}
        self._images = cache(lambda size: LatentStore(image_store(params, size)))
        self.stored_maps = cache(self._stored_maps)

    def pipeline(self, method: str) -> GSPipeline:
        """Return the pipeline of a model, "gs" or "discriminative"."""
        if method not in self._pipelines:
            sample = self.params.sample
            pipeline = load_pipeline(self.params.model_dir(method), DTYPES[sample.precision])
            pipeline.configure_sampling(sample.timestep_spacing, sample.clip_sample)
            self._pipelines[method] = pipeline.to(self.device)
        return self._pipelines[method]

    def predict(self, run: Run, point: OperatingPoint, block: int, rows: pd.DataFrame) -> Piece:
        """Return the predictions of a block and their soft maps [B, h, w]."""
        levels = self._levels(run, point, block, rows)
        soft = as_maps(levels)
        pictures = VaeReadout(self.pipeline(run.method).vae, point.size)(2 * soft - 1) if run.readout == "vae" else soft
        predictions = []
        shapes = rows[["height", "width"]].to_numpy()
        for key, (height, width), picture in zip(rows[KEY].itertuples(index=False), shapes, pictures, strict=True):
            mask, score = read_mask(picture, run.readout, int(height), int(width), self.params.sample.threshold)
            predictions.append((*key, masks.encode(mask), score))
        return pd.DataFrame(predictions, columns=[*KEY, "mask", "score"]), levels

    def _levels(self, run: Run, point: OperatingPoint, block: int, rows: pd.DataFrame) -> Levels:
        """Return the soft maps [B, h, w] of a block as they are stored. Stored maps are reused."""
        stored = self.stored_maps(run)
        if isinstance(stored, Path):
            start = block * self.params.sample.batch
            return read_levels(stored, slice(start, start + len(rows)))
        if stored is not None:
            levels = stored.read(block)[1]
            assert levels is not None
            return levels
        pipeline, images = self.pipeline(run.method), self._images(point.size)
        latents = torch.stack([images[image_id]["latent"] for image_id in rows["image_id"]]).to(self.device)
        keys = list(zip(*(rows[name] for name in KEY), strict=True))
        texts = [self.texts[text] for text in rows["text"]]
        generators = phrase_generators(self.params.seed, keys, point)
        return as_levels(pipeline.label_maps(latents, texts, generators, point).mean(0).float().cpu().numpy())

    def _stored_maps(self, run: Run) -> Path | Parts | None:
        """Return where this run's soft maps (for a read-out, the base run's) are: gathered predictions, parts, or nowhere."""
        source = base_run(self.params) if run.role == "readout" else run
        gathered = predictions_path(self.params, source)
        if read_metadata(gathered).get("maps") == maps_key(self.params, source):
            return gathered
        return run_parts(self.params, source) if run.role == "readout" else None


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
    """Write the predictions of a run from its parts, unless they are up to date."""
    key, path = run_key(params, run), predictions_path(params, run)
    if has_key(key, path):
        return
    parts = run_parts(params, run)
    missing = [block for block in range(parts.total or 0) if block not in parts]
    if missing or parts.total is None:
        what = f"block {missing[0]} of {parts.total} is" if missing else "all blocks are"
        raise UserError(
            f"{parts.folder}: {what} missing or sampled with other params; run `snakemake -- sample`, which samples first"
        )
    count = parts.gather(path, **({} if run.point is None else {"maps": maps_key(params, run)}))
    print(f"sample: {run.name}: {count} masks", flush=True)
