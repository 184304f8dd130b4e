"""Refine a study's baselines with all of their refiners, in shards, and gather the results; up-to-date files are kept."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from genseg.artifacts import masks
from genseg.artifacts.files import atomic_path, read_json, write_json
from genseg.artifacts.manifest import has_facts, times_path, write_manifest
from genseg.artifacts.parquet import KEY
from genseg.artifacts.parts import PROGRESS_SECONDS, Parts, Piece, make_parts
from genseg.artifacts.phrases import hash_unit, read_phrases
from genseg.artifacts.predictions import as_levels, write_in_pieces
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
from genseg.refine.g4seg import random_control, refine_predictions
from genseg.refine.g4seg_steps import PhraseBlock, Trace, load_traces
from genseg.refine.inputs import join_phrases
from genseg.refine.layout import G4SEG, RANDOM, Keys, find_variant, refined_path, refiner_passes, refiners
from genseg.refine.trained import Refiner, train_refiner

DISCREPANCY = "discrepancy"
"""Name of G4Seg's discrepancy maps among the files that are made with its masks."""


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
            if step == settings.steps or time.monotonic() - last_log > PROGRESS_SECONDS:
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
        finished: list[Parts] = []
        seconds = 0.0
        for classes in sorted(coarse, reverse=True):  # the phrases' file last, so that it implies both
            parts, groups = self._parts(baseline, refiner, classes), coarse[classes].groups()
            make = partial(self._refined_group, refiner, coarse[classes], groups, list(parts))
            make_parts(parts, groups, make, f"refine: {refiner}: {baseline.name}: group of images")
            for name in sorted(parts, key=lambda name: name == refiner):  # by-products first
                self._write(baseline, name, classes, parts[name])
            seconds += parts[refiner].seconds(groups)
            finished += parts.values()
        count = sum(len(each.predictions) for each in coarse.values())
        images = len({image for each in coarse.values() for image in each.predictions["image_id"]})
        timing = {"key": key, "seconds": round(seconds, 3), "masks": count, "images": images, **device_facts}
        write_json(layout.timing_path(self.params, refiner, baseline.name), timing)
        for each in finished:
            each.remove()
        print(f"refine: {refiner}: {baseline.name}: {count} masks in {seconds:.1f} s", flush=True)

    def _parts(self, baseline: Baseline, refiner: str, classes: bool) -> dict[str, Parts]:
        """Return the parts of a refiner's file; G4Seg also makes the random control's file and the figure's."""
        names = [refiner]
        if refiner == G4SEG:
            names += [RANDOM] if RANDOM in refiners(self.params, baseline.name) else []
            names += [] if classes else [DISCREPANCY]
        keys = {name: self.keys.key(baseline, G4SEG if name == DISCREPANCY else name) for name in names}
        folders = {name: layout.parts_dir(self.params, self._path(baseline, name, classes)) for name in names}
        return {name: Parts(folders[name], keys[name]) for name in names}

    def _path(self, baseline: Baseline, name: str, classes: bool) -> Path:
        if name == DISCREPANCY:
            return layout.discrepancy_path(self.params, baseline.name)
        return refined_path(self.params, name, baseline.name, classes)

    def _load(self, refiner: str) -> dict[str, Any]:
        """Load a refiner's networks, so that its time excludes loading; return its device and batch size."""
        if refiner == "trained":
            _ = self.network
        if refiner in ("crf", "trained"):
            return {"device": describe(torch.device("cpu")), "batch": 1}
        return {"device": describe(self.model.device), "batch": self.params.refine.batch}

    def _write(self, baseline: Baseline, name: str, classes: bool, parts: Parts) -> None:
        path = self._path(baseline, name, classes)
        if name == DISCREPANCY:
            write_examples(parts, path, self.params)
            return
        passes = refiner_passes(self.params.refine, name, classes)
        parts.gather(path, method=name, evaluations=str(passes))

    def _refined_group(
        self, refiner: str, coarse: CoarsePredictions, groups: dict[int, NDArray[np.int64]], names: list[str], group: int
    ) -> dict[str, Piece]:
        """Return the refined predictions of a group of images, and the files `names` that are made with them."""
        part = coarse.part(groups[group])
        if refiner not in (G4SEG, RANDOM):
            return {refiner: (self._refined(refiner, part), None)}
        pieces = self._with_g4seg(part)
        return {name: pieces[name] for name in names}

    def _refined(self, refiner: str, coarse: CoarsePredictions) -> pd.DataFrame:
        """Return refined predictions in key order."""
        if refiner == "crf":
            return crf.refine_predictions(coarse.phrases, coarse.predictions, self.params.refine.crf, coarse.classes)
        if refiner == "trained":
            side = self.params.refine.feature_size if coarse.classes else None
            frame, soft = self.network.refine_predictions(coarse.phrases, coarse.predictions, side)
            return frame if soft is None else self.inputs.label_maps(coarse, soft)
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
        path = layout.evidence_path(self.params, self.keys.evidence, block.traces[0].key[0])
        if not path.exists():
            for other in path.parent.parent.glob("*") if not path.parent.exists() else ():
                shutil.rmtree(other, ignore_errors=True)  # evidence with another key
            with atomic_path(path) as temporary, open(temporary, "wb") as handle:
                np.save(handle, labelling.class_evidence(block, phrases, self.params.seed))
        return np.asarray(np.load(path, allow_pickle=False), np.float32)

    def _with_g4seg(self, coarse: CoarsePredictions) -> dict[str, Piece]:
        """Return G4Seg's predictions, the random control's and, for phrases, those of the figure."""
        if coarse.classes:
            refined = replace(coarse, predictions=self._refined_classes(G4SEG, coarse))

            def shuffle(rows: NDArray[np.int64]) -> Labels:
                seed = derive_seed(self.params.seed, "random labels", coarse.predictions["image_id"].iloc[rows[0]])
                return labelling.shuffle_changes(coarse.labels(rows), refined.labels(rows), seed)

            return {G4SEG: (refined.predictions, None), RANDOM: (self.inputs.label_images(coarse, shuffle), None)}
        by_products = G4SegByProducts(self.params)
        g4seg, _ = self._refined_alone(G4SEG, coarse, by_products.observe)
        random = coarse.predictions[[*KEY, "score"]].assign(mask=by_products.random_masks)
        return {G4SEG: (g4seg, None), RANDOM: (random, None), DISCREPANCY: by_products.examples()}


class G4SegByProducts:
    """Results that G4Seg's forward passes give in addition to its masks, collected phrase by phrase.

    These are the random control's masks, and for the figure the discrepancy maps of the `refine.pictures` phrases with the
    smallest hashes.
    """

    def __init__(self, params: Params) -> None:
        self.params = params
        self.random_masks: list[bytes] = []
        self._traces: list[Trace] = []

    def observe(self, trace: Trace) -> None:
        self.random_masks.append(masks.encode(random_control(trace, self.params.seed).mask))
        if trace.updates:
            self._traces = sorted([*self._traces, trace], key=lambda trace: _picture_order(self.params, trace.key))
            del self._traces[self.params.refine.pictures :]

    def examples(self) -> Piece:
        """Return predictions of the phrases for the figure; their soft maps are the first iteration's discrepancy."""
        side = self.params.refine.feature_size
        traces = sorted(self._traces, key=lambda trace: trace.key)
        frame = pd.DataFrame([trace.key for trace in traces], columns=KEY)
        frame["mask"] = [masks.encode(trace.result.mask) for trace in traces]
        frame["score"] = np.zeros(len(frame), np.float32)
        maps = [trace.updates[0].discrepancy.float().cpu().numpy() for trace in traces]
        soft = np.reshape(maps, (len(maps), side, side)).astype(np.float32)
        return frame.astype({"image_id": np.int64, "phrase_id": np.int64}), as_levels(soft)


def write_examples(parts: Parts, path: Path, params: Params) -> None:
    """Write the predictions for the figure: of the phrases of all groups, the `refine.pictures` with the smallest hashes."""
    side = params.refine.feature_size
    best: list[tuple[pd.DataFrame, NDArray[np.uint8]]] = []
    for frame, levels in parts.pieces():
        best += [(frame.iloc[[row]], levels[[row]]) for row in range(len(frame)) if levels is not None]
        best = sorted(best, key=lambda item: _picture_order(params, _key(item[0])))[: params.refine.pictures]
    best = sorted(best, key=lambda item: _key(item[0]))
    write_in_pieces(best, (len(best), side, side), path, key=parts.key)


def _key(row: pd.DataFrame) -> tuple[Any, ...]:
    return next(row[KEY].itertuples(index=False, name=None))


def _picture_order(params: Params, key: tuple[Any, ...]) -> tuple[float, tuple[Any, ...]]:
    """Order in which phrases are chosen for the figure: by a hash in [0, 1)."""
    return hash_unit(params.seed, "refine picture", *key), key
