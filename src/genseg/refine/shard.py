"""Refining: every n-th baseline of a study by all of its refiners, finished ones kept."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from genseg.artifacts import masks
from genseg.artifacts.files import write_json
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import hash_unit
from genseg.artifacts.predictions import maps_path, read_predictions, write_with_maps
from genseg.baselines.registry import Baseline, find_baseline, study_baselines
from genseg.errors import UserError
from genseg.models.device import DTYPES, choose_device, describe
from genseg.models.text_to_image import TextToImage
from genseg.params import Params
from genseg.refine import crf
from genseg.refine.coarse import CoarseMasks, Part
from genseg.refine.g4seg import RANDOM, Maps, Trace, at_random, passes, refine_predictions
from genseg.refine.keys import Keys
from genseg.refine.layout import (
    G4SEG,
    discrepancy_path,
    refined_path,
    refiner_passes,
    refiners,
    shard_marker,
    timing_path,
)
from genseg.refine.trained import Refiner
from genseg.refine.trained_control import load_network
from genseg.training.prepare import chosen_backbone


def refine_shard(params: Params, shard: int, shards: int) -> None:
    """Refine every `shards`-th baseline, from number `shard`, by all of its refiners; finished files with the right key are
    kept. The marker `work/<study>/refined/shard=...json` is written last.

    Raises:
        UserError: a baseline's predictions are missing, or `refine.sensitivity.baselines` names one that there is not.
    """
    if not 0 <= shard < shards:
        raise UserError(f"--shard {shard}: there are {shards} shards, counted from 0")
    every = study_baselines(params)
    for name in params.refine.sensitivity.baselines:
        find_baseline(params, name, every)
    work = _Work(params)
    baselines = every[shard::shards]
    for baseline in baselines:
        for name in refiners(params, baseline.name):
            work.refine(baseline, name)
    names = [baseline.name for baseline in baselines]
    write_json(shard_marker(params, shard, shards), {"baselines": names, "keys": work.made})


class _Work:
    """What the refiners of one job share."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.masks = CoarseMasks(params)
        self.keys = Keys(params, self.masks.rule)
        self.made: dict[str, str] = {}

    @cached_property
    def model(self) -> TextToImage:
        params = self.params
        source, revision, _ = chosen_backbone(params, params.refine)
        device = choose_device(params.device, params.resources["refine"].threads)
        print(f"refine: device {describe(device)}", flush=True)
        return TextToImage(source, revision, device, DTYPES[params.refine.precision])

    @cached_property
    def network(self) -> Refiner:
        return load_network(self.params)

    def refine(self, baseline: Baseline, refiner: str) -> None:
        """Write a baseline's refined predictions, unless they are there."""
        key = self.made[f"{refiner}/{baseline.name}"] = self.keys.key(baseline, refiner)
        if self.keys.is_made(baseline, refiner):
            return
        if refiner == "g4seg_crf" and not self.keys.is_made(baseline, G4SEG):
            self.refine(baseline, G4SEG)
        parts, where = self.masks.parts(baseline), self._ready(refiner)
        started = time.monotonic()
        made = refiner_passes(self.params.refine, refiner)
        facts = {"key": key, "method": refiner, "evaluations": str(made)}
        for classes in sorted(parts, reverse=True):  # the phrases' file last: it says that both are there
            path = refined_path(self.params, refiner, baseline.name, classes)
            part = parts[classes]
            frame, soft = self._refined(baseline, refiner, part, classes)
            write_with_maps(frame, soft, path, **facts)
        seconds = time.monotonic() - started
        count = sum(len(part.coarse) for part in parts.values())
        images = len({image for part in parts.values() for image in part.coarse["image_id"]})
        measured = {"key": key, "seconds": round(seconds, 3), "masks": count, "images": images, **where}
        write_json(timing_path(self.params, refiner, baseline.name), measured)
        print(f"refine: {refiner}: {baseline.name}: {count} masks in {seconds:.1f} s", flush=True)

    def _ready(self, refiner: str) -> dict[str, Any]:
        """Load what a refiner needs, so that its seconds are those of refining; on which device and in which batch it works."""
        if refiner in ("crf", "g4seg_crf", "trained"):
            if refiner == "trained":
                _ = self.network
            return {"device": describe(torch.device("cpu")), "batch": 1}
        return {"device": describe(self.model.device), "batch": self.params.refine.batch}

    # --------------------------------------------------------------------------------------------------- refiners
    def _refined(self, baseline: Baseline, refiner: str, part: Part, classes: bool) -> tuple[pd.DataFrame, Maps | None]:
        params = self.params
        if refiner == "crf":
            return crf.refine_predictions(part.table, part.coarse, params.refine.crf, disjoint=classes), None
        if refiner == "g4seg_crf":
            path = refined_path(params, G4SEG, baseline.name, classes)
            frame = read_predictions(path)
            if classes:
                beside = path if maps_path(path).exists() else None
                frame = self.masks.labelled(replace(part, coarse=frame, soft=beside, rows=np.arange(len(frame))))
            return crf.refine_predictions(part.table, frame, params.refine.crf, disjoint=classes), None
        side = self.masks.side(part)
        if refiner == "trained":
            frame, soft = self.network.refine_predictions(part.table, part.coarse, side if classes else None)
            return self.masks.apart(part, frame, soft)
        refine = params.refine.model_copy(update={"maps": side})
        maps = part.labels if classes else None
        method, keeper = (refiner, None) if refiner not in (G4SEG, RANDOM) else (G4SEG, _Keeper(params, part, side))
        observe = keeper.observe if keeper else None
        frame, soft = refine_predictions(part.table, part.coarse, self.model, refine, params.seed, method, maps, observe)
        if keeper is not None and RANDOM in refiners(params, baseline.name):
            key = self.keys.key(baseline, RANDOM)
            facts = {"key": key, "method": RANDOM, "evaluations": str(passes(refine))}
            maps_ = np.stack(keeper.random_maps) if keeper.random_maps else None
            dealt = self.masks.apart(part, frame.assign(mask=keeper.random), maps_)
            if refiner == RANDOM:
                return dealt
            write_with_maps(dealt[0], dealt[1], refined_path(params, RANDOM, baseline.name, classes), **facts)
        if keeper is not None and not classes:
            keeper.write(discrepancy_path(params, baseline.name), self.keys.key(baseline, G4SEG))
        return self.masks.apart(part, frame, soft)


class _Keeper:
    """What else comes of G4Seg's work on a baseline: the random control, and for the figure the discrepancy of a few phrases,
    those with the smallest hash."""

    def __init__(self, params: Params, part: Part, side: int) -> None:
        self.params, self.part, self.side = params, part, side
        self.random: list[bytes] = []
        self.random_maps: list[Maps] = []
        self.kept: list[tuple[float, tuple[Any, ...], Trace]] = []

    def observe(self, trace: Trace) -> None:
        dealt = at_random(trace, self.params.seed)
        if self.part.classes:
            before = trace.coarse.astype(np.float32)
            self.random_maps.append(dealt.applied(before, self.side))
        self.random.append(masks.encode(dealt.mask))
        if not trace.steps:
            return
        self.kept.append((hash_unit(self.params.seed, "refine picture", *trace.key), trace.key, trace))
        self.kept = sorted(self.kept, key=lambda item: item[:2])[: self.params.refine.pictures]

    def write(self, path: Path, key: str) -> None:
        side = self.params.refine.grid
        kept = sorted(self.kept, key=lambda item: item[1])
        frame = pd.DataFrame([key_ for _, key_, _ in kept], columns=KEY)
        frame["mask"] = [masks.encode(trace.refined) for *_, trace in kept]
        frame["score"] = np.zeros(len(frame), np.float32)
        maps = [trace.steps[0].discrepancy.float().cpu().numpy().reshape(side, side) for *_, trace in kept]
        soft = np.stack(maps) if maps else np.zeros((0, side, side), np.float32)
        write_with_maps(frame.astype({"image_id": np.int64, "phrase_id": np.int64}), soft, path, key=key)
