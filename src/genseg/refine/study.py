"""Refine a study's baselines with all of their refiners, in shards, and gather the results; up-to-date files are kept."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from genseg.artifacts import masks
from genseg.artifacts.files import read_json, write_json
from genseg.artifacts.manifest import has_facts, times_path, write_manifest
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import hash_unit, read_phrases
from genseg.artifacts.predictions import write_predictions, write_with_maps
from genseg.artifacts.resample import Map
from genseg.artifacts.reuse import prune, with_maps
from genseg.artifacts.seeds import derive_seed
from genseg.baselines.registry import Baseline, baselines_dir, find_baseline, study_baselines
from genseg.errors import UserError
from genseg.interchange.labels import Labels
from genseg.models.device import DTYPES, choose_device, describe
from genseg.models.source import chosen_backbone
from genseg.models.text_to_image import TextToImage
from genseg.params import Params
from genseg.refine import crf, labelling, layout
from genseg.refine.coarse import CoarsePredictions, RefinementInputs
from genseg.refine.g4seg import LOG_SECONDS, random_control, refine_predictions
from genseg.refine.g4seg_steps import PhraseBlock, Trace, load_traces
from genseg.refine.inputs import join_phrases
from genseg.refine.layout import G4SEG, RANDOM, Keys, find_variant, refined_path, refiner_passes, refiners
from genseg.refine.trained import Refiner, train_refiner


def train_network(params: Params) -> None:
    """Write the trained control to `results/<study>/refined/network`, unless it is up to date or not in `refine.controls`."""
    data, folder = params.data_dir / "phrases.parquet", layout.network_dir(params)
    key, outputs = layout.network_key(params), []
    if "trained" not in params.refine.controls:
        print("refine: no trained control in refine.controls", flush=True)
    elif _network_is_trained(params):
        print(f"refine: {folder} is up to date", flush=True)
        return
    else:
        choose_device("cpu", params.resources.refine.threads)
        settings, outputs = params.refine.trained, [folder]
        losses = train_refiner(read_phrases(data), folder, **settings.model_dump(), seed=params.seed)
        last_log = time.monotonic()
        for step, loss in enumerate(losses, start=1):
            if step == settings.steps or time.monotonic() - last_log > LOG_SECONDS:
                last_log = time.monotonic()
                print(f"refine: trained control, step {step} of {settings.steps}, loss {loss:.4f}", flush=True)
    write_manifest(layout.network_manifest(params), "refine", params, [data], outputs, key=key)


def _network_is_trained(params: Params) -> bool:
    return has_facts(layout.network_manifest(params), params, {"key": layout.network_key(params)})


def refine_shard(params: Params, shard: int, shards: int) -> None:
    """Refine every `shards`-th baseline, starting with number `shard`, with all of its refiners. The marker is written last.

    Raises UserError if `shard` is out of range, a baseline's predictions are missing, or `refine.sensitivity.baselines` has
    an unknown name.
    """
    if not 0 <= shard < shards:
        raise UserError(f"--shard {shard}: expected a number from 0 to {shards - 1}, as there are {shards} shards")
    baselines = study_baselines(params)
    for name in params.refine.sensitivity.baselines:
        find_baseline(params, name, baselines)
    study = StudyRefiner(params)
    for baseline in baselines[shard::shards]:
        for refiner in refiners(params, baseline.name):
            study.refine(baseline, refiner)
    names = [baseline.name for baseline in baselines[shard::shards]]
    write_json(layout.shard_marker(params, shard, shards), {"baselines": names, "keys": study.refined_keys})


def gather_refined(params: Params) -> None:
    """Write the manifest and remove unlisted files. Raises UserError if a file is missing or was made from other inputs."""
    # 1. Check that all predictions are up to date, and list them.
    folder, shards, baselines = layout.refined_dir(params), params.resources.refine.shards, study_baselines(params)
    inputs = RefinementInputs(params)
    keys, entries, times = Keys(params, inputs.rule), [], {}
    outputs: list[Path] = []
    for baseline in baselines:
        coarse = {classes: str(path) for classes, path in layout.coarse_paths(params, baseline).items()}
        if False in coarse:
            outputs.append(layout.discrepancy_path(params, baseline.name))
        for refiner in refiners(params, baseline.name):
            paths = {classes: refined_path(params, refiner, baseline.name, classes) for classes in coarse}
            if not keys.is_refined(baseline, refiner):
                for shard in range(shards):  # or Snakemake would consider the job done
                    layout.shard_marker(params, shard, shards).unlink(missing_ok=True)
                path = refined_path(params, refiner, baseline.name, False)
                raise UserError(f"{path}: missing or made from other inputs; run `genseg refine`")
            outputs += paths.values()
            refined = {classes: str(path) for classes, path in paths.items()}
            entry: dict[str, Any] = {"refiner": refiner, "baseline": baseline.name, "label": baseline.label}
            entry |= {"real": baseline.real, "passes": refiner_passes(params.refine, refiner)}
            entry |= {"predictions": refined.get(False), "class_predictions": refined.get(True)}
            entries.append(entry | {"coarse": coarse.get(False), "coarse_classes": coarse.get(True)})
            timing_file = layout.timing_path(params, refiner, baseline.name)
            timing = read_json(timing_file) if timing_file.exists() else {}
            if timing.pop("key", None) == keys.key(baseline, refiner):
                times[f"{refiner}/{baseline.name}"] = timing

    # 2. Remove files that are not listed, and empty folders.
    outputs = with_maps(outputs)
    if "trained" in params.refine.controls:
        outputs += sorted(layout.network_dir(params).iterdir())
    prune(folder, [*outputs, layout.network_manifest(params), folder / "manifest.json"], "refine")

    # 3. Write the times and the manifest.
    write_json(times_path(params, "refine"), times)
    manifests = [baselines_dir(params) / "manifest.json"]
    if params.sample.runs:
        manifests.append(params.results_dir / "predictions" / "manifest.json")
    facts: dict[str, Any] = {"weights": keys.weights, "images": inputs.images, "refined": entries}
    write_manifest(folder / "manifest.json", "refine", params, manifests, outputs, **facts)
    print(f"refine: {len(entries)} refined predictions of {len(baselines)} baselines", flush=True)


class StudyRefiner:
    """Runs the refiners of a study; the inputs and networks that they share are loaded once."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.inputs = RefinementInputs(params)
        self.keys = Keys(params, self.inputs.rule)
        self._evidences: dict[int, Map] = {}
        self.refined_keys: dict[str, str] = {}  # keys of all `<refiner>/<baseline>` that are up to date

    @cached_property
    def model(self) -> TextToImage:
        source, revision, _ = chosen_backbone(self.params, self.params.refine)
        device = choose_device(self.params.device, self.params.resources.refine.threads)
        print(f"refine: device {describe(device)}", flush=True)
        return TextToImage(source, revision, device, DTYPES[self.params.refine.precision])

    @cached_property
    def network(self) -> Refiner:
        folder = layout.network_dir(self.params)
        if not _network_is_trained(self.params):
            raise UserError(f"{folder}: no trained control for these params; run `genseg refine --train`")
        choose_device("cpu", self.params.resources.refine.threads)
        return Refiner(folder)

    def refine(self, baseline: Baseline, refiner: str) -> None:
        """Write a baseline's refined predictions and their timing, unless they are up to date."""
        key = self.refined_keys[f"{refiner}/{baseline.name}"] = self.keys.key(baseline, refiner)
        if self.keys.is_refined(baseline, refiner):
            return
        coarse, device_facts = self.inputs.coarse(baseline), self._load(refiner)
        start_time = time.monotonic()
        for classes in sorted(coarse, reverse=True):  # the phrases' file last, so that it implies both
            self._write(baseline, refiner, classes, self._refined(baseline, refiner, coarse[classes]))
        seconds = time.monotonic() - start_time
        count = sum(len(each.predictions) for each in coarse.values())
        images = len({image for each in coarse.values() for image in each.predictions["image_id"]})
        timing = {"key": key, "seconds": round(seconds, 3), "masks": count, "images": images, **device_facts}
        write_json(layout.timing_path(self.params, refiner, baseline.name), timing)
        print(f"refine: {refiner}: {baseline.name}: {count} masks in {seconds:.1f} s", flush=True)

    def _load(self, refiner: str) -> dict[str, Any]:
        """Load a refiner's networks, so that its time excludes loading; return its device and batch size."""
        if refiner == "trained":
            _ = self.network
        if refiner in ("crf", "trained"):
            return {"device": describe(torch.device("cpu")), "batch": 1}
        return {"device": describe(self.model.device), "batch": self.params.refine.batch}

    def _write(self, baseline: Baseline, refiner: str, classes: bool, frame: pd.DataFrame) -> None:
        key, passes = self.keys.key(baseline, refiner), refiner_passes(self.params.refine, refiner, classes)
        path = refined_path(self.params, refiner, baseline.name, classes)
        write_predictions(frame, path, key=key, method=refiner, evaluations=str(passes))

    def _refined(self, baseline: Baseline, refiner: str, coarse: CoarsePredictions) -> pd.DataFrame:
        """Return refined predictions in key order."""
        if refiner == "crf":
            return crf.refine_predictions(coarse.phrases, coarse.predictions, self.params.refine.crf, coarse.classes)
        if refiner == "trained":
            side = self.params.refine.feature_size if coarse.classes else None
            frame, soft = self.network.refine_predictions(coarse.phrases, coarse.predictions, side)
            return frame if soft is None else self.inputs.label_maps(coarse, soft)
        if refiner in (G4SEG, RANDOM):
            g4seg, random = self._with_g4seg(baseline, coarse)
            if refiner == RANDOM:
                return random
            if RANDOM in refiners(self.params, baseline.name):
                self._write(baseline, RANDOM, coarse.classes, random)
            return g4seg
        return self._refined_classes(refiner, coarse) if coarse.classes else self._refined_alone(refiner, coarse)[0]

    def _refined_alone(
        self, method: str, coarse: CoarsePredictions, observe: Callable[[Trace], None] | None = None
    ) -> tuple[pd.DataFrame, Map | None]:
        """Refine each mask alone; soft maps [N, side, side] of class masks, on the feature grid, are also returned."""
        refine, maps = self.params.refine, coarse.binary_maps if coarse.classes else None
        refine = refine.model_copy(update={"maps": refine.feature_size})
        return refine_predictions(
            coarse.phrases, coarse.predictions, self.model, refine, self.params.seed, method, maps, observe
        )

    def _refined_classes(self, method: str, coarse: CoarsePredictions) -> pd.DataFrame:
        """Refine the labelling of each image, or without `evidence_timesteps` one class at a time."""
        refine, seed = find_variant(self.params.refine, method), self.params.seed
        if not refine.evidence_timesteps:
            soft = self._refined_alone(method, coarse)[1]
            assert soft is not None
            return self.inputs.label_maps(coarse, soft)
        table = join_phrases(coarse.phrases, coarse.predictions, "phrase")
        background = self.inputs.rule.kind != "none"

        def label(rows: NDArray[np.int64]) -> Labels:
            labels, count, side = coarse.labels(rows), len(rows) + background, refine.feature_size
            if background:
                labels = np.where(labels < 0, len(rows), labels)
            block = PhraseBlock(load_traces(table.iloc[rows[:1]]), self.model, refine, seed)
            evidence = self._evidence(block, table["phrase"].iloc[rows].tolist()) if refine.generation else None
            cells = labelling.coarse_cells(labels, count, side)
            updated = labelling.update_labels(cells, evidence, labelling.alignment(block))
            return labelling.read_out_labels(updated.reshape(count, side, side), block.traces[0].picture, refine)

        return self.inputs.label_images(coarse, label)

    def _evidence(self, block: PhraseBlock, phrases: list[str]) -> Map:
        """Return `class_evidence`, computed once per image: it depends on no baseline and no variant with evidence."""
        image_id = block.traces[0].key[0]
        if image_id not in self._evidences:
            self._evidences[image_id] = labelling.class_evidence(block, phrases, self.params.seed)
        return self._evidences[image_id]

    def _with_g4seg(self, baseline: Baseline, coarse: CoarsePredictions) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return G4Seg's predictions and the random control's, and write G4Seg's by-products."""
        if coarse.classes:
            refined = replace(coarse, predictions=self._refined_classes(G4SEG, coarse))

            def shuffle(rows: NDArray[np.int64]) -> Labels:
                seed = derive_seed(self.params.seed, "random labels", coarse.predictions["image_id"].iloc[rows[0]])
                return labelling.shuffle_changes(coarse.labels(rows), refined.labels(rows), seed)

            return refined.predictions, self.inputs.label_images(coarse, shuffle)
        by_products = G4SegByProducts(self.params)
        g4seg, _ = self._refined_alone(G4SEG, coarse, by_products.observe)
        path = layout.discrepancy_path(self.params, baseline.name)
        by_products.write_discrepancy(path, self.keys.key(baseline, G4SEG))
        return g4seg, coarse.predictions[[*KEY, "score"]].assign(mask=by_products.random_masks)


class G4SegByProducts:
    """Results that G4Seg's forward passes give in addition to its masks, collected phrase by phrase.

    These are the random control's masks, and for the figure the discrepancy maps of the `refine.pictures` phrases with the
    smallest hashes.
    """

    def __init__(self, params: Params) -> None:
        self.params = params
        self.random_masks: list[bytes] = []
        self.examples: list[tuple[float, Trace]] = []  # hash in [0, 1) and trace of each phrase for the figure, by hash

    def observe(self, trace: Trace) -> None:
        self.random_masks.append(masks.encode(random_control(trace, self.params.seed).mask))
        if trace.updates:
            self.examples.append((hash_unit(self.params.seed, "refine picture", *trace.key), trace))
            self.examples = sorted(self.examples, key=lambda item: (item[0], item[1].key))[: self.params.refine.pictures]

    def write_discrepancy(self, path: Path, key: str) -> None:
        """Write predictions of the phrases for the figure; their soft maps are the first iteration's discrepancy."""
        side = self.params.refine.feature_size
        traces = sorted((trace for _, trace in self.examples), key=lambda trace: trace.key)
        frame = pd.DataFrame([trace.key for trace in traces], columns=KEY)
        frame["mask"] = [masks.encode(trace.result.mask) for trace in traces]
        frame["score"] = np.zeros(len(frame), np.float32)
        maps = [trace.updates[0].discrepancy.float().cpu().numpy() for trace in traces]
        soft = np.reshape(maps, (len(maps), side, side)).astype(np.float32)
        write_with_maps(frame.astype({"image_id": np.int64, "phrase_id": np.int64}), soft, path, key=key)
