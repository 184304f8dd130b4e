"""Refinement as a phase: every baseline of a study by G4Seg and by what it is compared with, on a fixed part of test.

`results/<study>/refined/<refiner>/<baseline>.parquet` holds the refined masks of the phrases and
`<baseline>_class_phrases.parquet` those of the class phrases, with soft maps beside them where the baseline has some.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts import masks
from genseg.artifacts.files import file_sha256, read_json, write_json
from genseg.artifacts.manifest import code_hash, write_manifest
from genseg.artifacts.parquet import KEY, read_metadata
from genseg.artifacts.phrases import choose_images, hash_unit, read_phrases
from genseg.artifacts.predictions import maps_path, maps_shape, read_maps, read_predictions, write_with_maps
from genseg.artifacts.resample import area_reduce, bilinear
from genseg.baselines.registry import CLASSES, Baseline, baselines_dir, find_baseline, study_baselines
from genseg.errors import UserError
from genseg.interchange.labels import Background, class_list, paint
from genseg.models.device import DTYPES, choose_device, describe
from genseg.models.text_to_image import TextToImage
from genseg.params import Params, Refine, digest
from genseg.refine import crf
from genseg.refine.files import CODE, backbone, variant_facts
from genseg.refine.g4seg import RANDOM, Maps, Trace, at_random, passes, refine_predictions, sensitivity, variants
from genseg.refine.trained import Refiner, train_refiner

G4SEG = "g4seg"
CODE_HERE = (*CODE, "baselines/registry.py", "interchange/labels.py")
KEYS = ("seed", *(f"refine.{name}" for name in Refine.model_fields if name != "shards"), "score.background_threshold")


def coarse_paths(study: Params, baseline: Baseline) -> dict[bool, Path]:
    """A baseline's predictions files by whether they are of class phrases; an imported one may lack one of them."""
    paths = {False: baseline.predictions(study), True: baseline.class_predictions(study)}
    return {classes: path for classes, path in paths.items() if baseline.family != "imported" or path.exists()}


def refined_dir(study: Params) -> Path:
    return study.results_dir / "refined"


def refined_path(study: Params, refiner: str, baseline: str, classes: bool) -> Path:
    return refined_dir(study) / refiner / f"{baseline}{CLASSES if classes else ''}.parquet"


def discrepancy_path(study: Params, baseline: str) -> Path:
    """Predictions file of the phrases that the figure may show, with G4Seg's discrepancy as their soft maps."""
    return refined_dir(study) / "discrepancy" / f"{baseline}.parquet"


def refiners(study: Params, baseline: str) -> list[str]:
    """What refines a baseline: G4Seg, the controls, and its sensitivity where the params name the baseline."""
    refine = study.refine
    chosen = [*refine.controls, *(refine.sensitivity.controls if baseline in refine.sensitivity.baselines else [])]
    known = [G4SEG, *(name for name in chosen if name not in ("gate", "no_gate") or name in variants(refine))]
    if baseline in refine.sensitivity.baselines:
        known += sensitivity(refine)
    return list(dict.fromkeys(known))


def refiner_passes(refine: Refine, refiner: str) -> int:
    """U-Net passes for one mask."""
    if refiner in ("crf", "trained"):
        return 0
    return passes(variants(refine)[G4SEG if refiner == "g4seg_crf" else refiner])


def test_images(study: Params, phrases: pd.DataFrame) -> list[int]:
    """The fixed part of test that is refined: images chosen by hash."""
    test = phrases.loc[phrases["split"] == "test", "image_id"].to_numpy()
    return sorted(choose_images(test, study.refine.test_fraction, study.seed, "refine"))


# ------------------------------------------------------------------------------------------------ the trained control
def network_dir(study: Params) -> Path:
    return refined_dir(study) / "network"


def network_manifest(study: Params) -> Path:
    return refined_dir(study) / "network.json"


def network_key(study: Params) -> str:
    trained = study.refine.trained.model_dump(mode="json")
    data = file_sha256(study.data_dir / "phrases.parquet")
    return digest([trained, study.seed, data, code_hash("artifacts", "data/images.py", "refine/trained.py")])


def train_network(study: Params) -> None:
    """Write the weights of the trained control to `results/<study>/refined/network`; finished ones are kept."""
    started, key, folder = time.time(), network_key(study), network_dir(study)
    if "trained" not in study.refine.controls:
        print("refine: no trained control in refine.controls", flush=True)
    elif _network_is_made(study, key):
        print(f"refine: {folder} is there already", flush=True)
        return
    else:
        choose_device("cpu", study.resources["refine"].threads)
        params = study.refine.trained
        phrases = read_phrases(study.data_dir / "phrases.parquet")
        settings: dict[str, Any] = params.model_dump()
        last = time.monotonic()
        for step, loss in enumerate(train_refiner(phrases, folder, **settings, seed=study.seed), start=1):
            if step == params.steps or time.monotonic() - last > 10:
                last = time.monotonic()
                print(f"refine: trained control, step {step} of {params.steps}, loss {loss:.4f}", flush=True)
    outputs = [folder] if "trained" in study.refine.controls else []
    inputs = [study.data_dir / "phrases.parquet"]
    write_manifest(
        network_manifest(study),
        "refine",
        study.subtree("seed", "refine.trained"),
        inputs,
        outputs,
        started,
        code=code_hash(*CODE_HERE),
        key=key,
    )


def _network_is_made(study: Params, key: str) -> bool:
    path = network_manifest(study)
    return path.exists() and (network_dir(study) / "refiner.safetensors").exists() and read_json(path).get("key") == key


# ------------------------------------------------------------------------------------------------------- one shard
@dataclass
class Part:
    """The phrases or the class phrases of the refined images: their table, and one baseline's coarse predictions.

    Of class phrases the masks are the pixels that each class wins by the baseline's own background rule: what is refined is
    the labelling whose mIoU is measured, one class at a time.
    """

    table: pd.DataFrame
    coarse: pd.DataFrame
    soft: Path | None
    """Predictions file that has soft maps beside it; None: hard masks."""
    rows: NDArray[np.int64]
    """Of `coarse`, in that file."""
    classes: bool

    def maps(self, chosen: NDArray[np.int64]) -> Maps:
        """Soft maps [n, h, w] of some rows of `coarse`."""
        assert self.soft is not None
        return np.concatenate([read_maps(self.soft, slice(row, row + 1)) for row in self.rows[chosen]])

    def labels(self, chosen: NDArray[np.int64]) -> Maps:
        """Masks [n, H, W] of some rows of `coarse`, of one image, as probabilities 0 and 1: P^0 of the classes on one scale,
        whatever the baseline's maps are on, so that the classes' refined P compete by argmax."""
        sizes = self.coarse.iloc[chosen].merge(self.table, on=KEY, suffixes=("", "_"))[["mask", "height", "width"]]
        return np.stack([masks.decode(*row) for row in sizes.itertuples(index=False)]).astype(np.float32)


def refine_shard(study: Params, shard: int, shards: int) -> None:
    """Refine every `shards`-th baseline, from number `shard`, by all of its refiners; finished files with the right key are
    kept. The marker `work/<study>/refined/shard=...json` is written last.

    Raises:
        UserError: a baseline's predictions are missing, or `refine.sensitivity.baselines` names one that there is not.
    """
    if not 0 <= shard < shards:
        raise UserError(f"--shard {shard}: there are {shards} shards, counted from 0")
    every = study_baselines(study)
    for name in study.refine.sensitivity.baselines:
        find_baseline(study, name, every)
    work = _Work(study)
    baselines = every[shard::shards]
    for baseline in baselines:
        for name in refiners(study, baseline.name):
            work.refine(baseline, name)
    names = [baseline.name for baseline in baselines]
    write_json(shard_marker(study, shard, shards), {"baselines": names, "keys": work.keys})


def shard_marker(study: Params, shard: int, shards: int) -> Path:
    return study.work_dir / "refined" / f"shard={shard}-of-{shards}.json"


class _Work:
    """What the refiners of one job share."""

    def __init__(self, study: Params) -> None:
        self.study = study
        self.keys: dict[str, str] = {}
        self._hash = cache(file_sha256)
        phrases = read_phrases(study.data_dir / "phrases.parquet")
        images = test_images(study, phrases)
        every_class = read_phrases(study.data_dir / "class_phrases.parquet")
        found = class_list(every_class, str(study.data_dir / "class_phrases.parquet"))
        self.rule = Background("none")
        if found.background is not None:
            self.rule = Background("threshold", study.score.background_threshold)
        test = every_class[(every_class["split"] == "test") & every_class["image_id"].isin(images)]
        self.tables = {
            False: phrases[(phrases["split"] == "test") & phrases["image_id"].isin(images)],
            True: test[test["phrase_id"] != (-1 if found.background is None else found.background)],
        }
        self._parts: tuple[str, dict[bool, Part]] | None = None
        data = [file_sha256(study.data_dir / f"{name}.parquet") for name in ("phrases", "class_phrases")]
        self._facts = [study.seed, study.refine.test_fraction, str(self.rule), data, code_hash(*CODE_HERE)]

    @cached_property
    def model(self) -> TextToImage:
        study = self.study
        source, revision, _ = backbone(study)
        device = choose_device(study.device, study.resources["refine"].threads)
        print(f"refine: device {describe(device)}", flush=True)
        return TextToImage(source, revision, device, DTYPES[study.refine.precision])

    @cached_property
    def weights(self) -> str:
        return backbone(self.study)[2]

    @cached_property
    def network(self) -> Refiner:
        if not _network_is_made(self.study, network_key(self.study)):
            raise UserError(f"{network_dir(self.study)}: the trained control is not trained; run `genseg refine --train`")
        choose_device("cpu", self.study.resources["refine"].threads)
        return Refiner(network_dir(self.study))

    def key(self, baseline: Baseline, refiner: str) -> str:
        """Hash of everything that one refiner's bytes for a baseline depend on."""
        refine = self.study.refine
        coarse = coarse_paths(self.study, baseline)
        for path in coarse.values():
            if not path.exists():
                raise UserError(f"{path}: no such file; run `genseg {'sample' if baseline.family == 'run' else 'baseline'}`")
        soft = [maps_path(path) for classes, path in coarse.items() if classes and maps_path(path).exists()]
        facts: list[Any] = [*self._facts, refiner, [[path.name, self._hash(path)] for path in (*coarse.values(), *soft)]]
        if refiner in ("crf", "g4seg_crf"):
            facts.append(refine.crf.model_dump(mode="json"))
        if refiner == "trained":
            facts += [network_key(self.study), refine.maps, refine.grid]
        if refiner not in ("crf", "trained"):
            facts += [variant_facts(refine, G4SEG if refiner == "g4seg_crf" else refiner), self.weights]
        if refiner == G4SEG:
            facts.append(refine.pictures)
        return digest(facts)

    def is_made(self, baseline: Baseline, refiner: str) -> bool:
        key, coarse = self.key(baseline, refiner), coarse_paths(self.study, baseline)
        paths = {classes: refined_path(self.study, refiner, baseline.name, classes) for classes in coarse}
        written = list(paths.values())
        if refiner == G4SEG and False in coarse:
            written.append(discrepancy_path(self.study, baseline.name))
        if not all(read_metadata(path).get("key") == key for path in written):
            return False
        soft = True in coarse and maps_path(coarse[True]).exists() and not refiner.endswith("crf")
        return True not in coarse or maps_path(paths[True]).exists() == soft

    def refine(self, baseline: Baseline, refiner: str) -> None:
        """Write a baseline's refined predictions, unless they are there."""
        key = self.keys[f"{refiner}/{baseline.name}"] = self.key(baseline, refiner)
        if self.is_made(baseline, refiner):
            return
        if refiner == "g4seg_crf" and not self.is_made(baseline, G4SEG):
            self.refine(baseline, G4SEG)
        started, parts = time.monotonic(), self.parts(baseline)
        made = refiner_passes(self.study.refine, refiner)
        facts = {"key": key, "method": refiner, "evaluations": str(made)}
        for classes in sorted(parts, reverse=True):  # the phrases' file last: it says that both are there
            path = refined_path(self.study, refiner, baseline.name, classes)
            part = parts[classes]
            frame, soft = self._refined(baseline, refiner, part, classes)
            write_with_maps(frame, soft, path, **facts)
        seconds = time.monotonic() - started
        count = sum(len(part.coarse) for part in parts.values())
        write_json(_timing_path(self.study, refiner, baseline.name), {"key": key, "seconds": round(seconds, 3), "masks": count})
        print(f"refine: {refiner}: {baseline.name}: {count} masks in {seconds:.1f} s", flush=True)

    def parts(self, baseline: Baseline) -> dict[bool, Part]:
        if self._parts is None or self._parts[0] != baseline.name:
            coarse = coarse_paths(self.study, baseline)
            self._parts = (baseline.name, {classes: self._part(path, classes) for classes, path in coarse.items()})
        return self._parts[1]

    def _part(self, path: Path, classes: bool) -> Part:
        predictions, table = read_predictions(path), self.tables[classes]
        shape = maps_shape(path) if classes else None
        if shape is not None and shape[0] != len(predictions):
            raise UserError(f"{maps_path(path)}: {shape[0]} soft maps for {len(predictions)} predictions; make both again")
        numbered = predictions.assign(row=np.arange(len(predictions)))
        coarse = numbered.merge(table[KEY], on=KEY).sort_values(KEY, kind="stable", ignore_index=True)
        rows = coarse["row"].to_numpy(np.int64)
        part = Part(table, coarse[[*KEY, "score", "mask"]], None if shape is None else path, rows, classes)
        return replace(part, coarse=self._labelled(part)) if classes else part

    def _labelled(self, part: Part) -> pd.DataFrame:
        """The coarse predictions with the pixels that each wins as its mask."""
        found = part.coarse.copy()
        for rows, height, width in _images(part):
            group = part.coarse.iloc[rows]
            if part.soft is not None:
                winner = self.rule.winner(bilinear(part.maps(rows), height, width))
            else:
                winner = paint(
                    [masks.decode(code, height, width) for code in group["mask"]], list(group["score"]), height, width
                )
            found.loc[group.index, "mask"] = [masks.encode(winner == index) for index in range(len(rows))]
        return found

    # --------------------------------------------------------------------------------------------------- refiners
    def _refined(self, baseline: Baseline, refiner: str, part: Part, classes: bool) -> tuple[pd.DataFrame, Maps | None]:
        study = self.study
        if refiner == "crf":
            return crf.refine_predictions(part.table, part.coarse, study.refine.crf, disjoint=classes), None
        if refiner == "g4seg_crf":
            path = refined_path(study, G4SEG, baseline.name, classes)
            frame = read_predictions(path)
            if classes:
                beside = path if maps_path(path).exists() else None
                frame = self._labelled(replace(part, coarse=frame, soft=beside, rows=np.arange(len(frame))))
            return crf.refine_predictions(part.table, frame, study.refine.crf, disjoint=classes), None
        if refiner == "trained":
            return self._by_network(part)
        refine = study.refine.model_copy(update={"maps": self._side(part)})
        maps = part.labels if classes else None
        method, keeper = (refiner, None) if refiner not in (G4SEG, RANDOM) else (G4SEG, _Keeper(self, part))
        observe = keeper.observe if keeper else None
        frame, soft = refine_predictions(part.table, part.coarse, self.model, refine, study.seed, method, maps, observe)
        if keeper is not None and RANDOM in refiners(study, baseline.name):
            key = self.key(baseline, RANDOM)
            facts = {"key": key, "method": RANDOM, "evaluations": str(passes(refine))}
            maps_ = np.stack(keeper.random_maps) if keeper.random_maps else None
            dealt = self._apart(part, frame.assign(mask=keeper.random), maps_)
            if refiner == RANDOM:
                return dealt
            write_with_maps(dealt[0], dealt[1], refined_path(study, RANDOM, baseline.name, classes), **facts)
        if keeper is not None and not classes:
            keeper.write(discrepancy_path(study, baseline.name), self.key(baseline, G4SEG))
        return self._apart(part, frame, soft)

    def _side(self, part: Part) -> int:
        """Of refined soft maps: a study needs some wherever the coarse masks have some, or mIoU would be read otherwise."""
        own = maps_shape(part.soft) if part.soft is not None else None
        return self.study.refine.maps or (own[2] if own else self.study.refine.grid)

    def _apart(self, part: Part, frame: pd.DataFrame, soft: Maps | None) -> tuple[pd.DataFrame, Maps | None]:
        """Hard class masks shared no pixel when they were coarse, and share none afterwards: a pixel goes to the class with the
        highest refined probability, if a class claims it or, without a background class, one had it. They need no soft maps;
        others, which cover every pixel by argmax, stay as they are."""
        if part.soft is not None or soft is None:
            return frame, soft
        found = frame.copy()
        for rows, height, width in _images(replace(part, coarse=frame)):
            own = np.stack([masks.decode(code, height, width) for code in frame["mask"].iloc[rows]])
            owned = own.any(0) | (part.labels(rows).any(0) if self.rule.kind == "none" else False)
            winner = np.where(owned, bilinear(soft[rows], height, width).argmax(0), -1)
            found.loc[frame.index[rows], "mask"] = [masks.encode(winner == index) for index in range(len(own))]
        return found, None

    def _by_network(self, part: Part) -> tuple[pd.DataFrame, Maps | None]:
        """Masks by the trained control; of class phrases its probabilities compete, as those of G4Seg."""
        found, soft, done = [], [], 0
        for image, rows, coarse in crf.images_of(part.table, part.coarse):
            probability = self.network.probability(image, coarse)
            there = coarse.any((1, 2), keepdims=True)
            mask = (probability > 0.5) & there
            keys = rows[[*KEY, "score"]].itertuples(index=False)
            found += [(*row, masks.encode(one)) for row, one in zip(keys, mask, strict=True)]
            if part.classes:
                after = np.where(there, probability, 0)
                side = self._side(part)
                soft.append(np.stack([area_reduce(one, side, side) for one in after]))
            done += len(rows)
        frame = pd.DataFrame(found, columns=[*KEY, "score", "mask"])
        return self._apart(part, frame, np.concatenate(soft) if soft else None)


def _images(part: Part) -> Iterator[tuple[NDArray[np.int64], int, int]]:
    """(rows of `part.coarse`, height, width) of every image."""
    first = part.table.drop_duplicates("image_id")
    sizes = dict(zip(first["image_id"], zip(first["height"], first["width"], strict=True), strict=True))
    for image_id, rows in part.coarse.groupby("image_id", sort=True).indices.items():
        height, width = sizes[image_id]
        yield np.asarray(rows, np.int64), int(height), int(width)


class _Keeper:
    """What else comes of G4Seg's work on a baseline: the random control, and for the figure the discrepancy of a few phrases,
    those with the smallest hash."""

    def __init__(self, work: _Work, part: Part) -> None:
        self.study, self.part, self.side = work.study, part, work._side(part)
        self.random: list[bytes] = []
        self.random_maps: list[Maps] = []
        self.kept: list[tuple[float, tuple[Any, ...], Trace]] = []

    def observe(self, trace: Trace) -> None:
        dealt = at_random(trace, self.study.seed)
        if self.part.classes:
            before = trace.coarse.astype(np.float32)
            self.random_maps.append(dealt.applied(before, self.side))
        self.random.append(masks.encode(dealt.mask))
        if not trace.steps:
            return
        self.kept.append((hash_unit(self.study.seed, "refine picture", *trace.key), trace.key, trace))
        self.kept = sorted(self.kept, key=lambda item: item[:2])[: self.study.refine.pictures]

    def write(self, path: Path, key: str) -> None:
        side = self.study.refine.grid
        kept = sorted(self.kept, key=lambda item: item[1])
        frame = pd.DataFrame([key_ for _, key_, _ in kept], columns=KEY)
        frame["mask"] = [masks.encode(trace.refined) for *_, trace in kept]
        frame["score"] = np.zeros(len(frame), np.float32)
        maps = [trace.steps[0].discrepancy.float().cpu().numpy().reshape(side, side) for *_, trace in kept]
        soft = np.stack(maps) if maps else np.zeros((0, side, side), np.float32)
        write_with_maps(frame.astype({"image_id": np.int64, "phrase_id": np.int64}), soft, path, key=key)


def _timing_path(study: Params, refiner: str, baseline: str) -> Path:
    return study.work_dir / "refined" / "seconds" / refiner / f"{baseline}.json"


# --------------------------------------------------------------------------------------------------------- gathering
def gather_refined(study: Params) -> None:
    """Remove what no baseline and refiner of the params account for; write `results/<study>/refined/manifest.json`.

    Raises:
        UserError: a part is missing or was made of something else.
    """
    started, folder = time.time(), refined_dir(study)
    work, entries, timing = _Work(study), [], {}
    outputs: list[Path] = []
    for baseline in study_baselines(study):
        coarse = coarse_paths(study, baseline)
        outputs += [discrepancy_path(study, baseline.name)] if False in coarse else []
        for refiner in refiners(study, baseline.name):
            if not work.is_made(baseline, refiner):
                for shard in range(study.refine.shards):  # or Snakemake would take the job for done
                    shard_marker(study, shard, study.refine.shards).unlink(missing_ok=True)
                path = refined_path(study, refiner, baseline.name, False)
                raise UserError(f"{path}: missing or made with other params; run again, it is made first")
            paths = {classes: str(refined_path(study, refiner, baseline.name, classes)) for classes in coarse}
            outputs += map(Path, paths.values())
            entry: dict[str, Any] = {
                "refiner": refiner,
                "baseline": baseline.name,
                "label": baseline.label,
                "real": baseline.real,
            }
            entry |= {"predictions": paths.get(False), "class_predictions": paths.get(True)}
            for which, classes in (("coarse", False), ("coarse_classes", True)):
                entry[which] = str(coarse[classes]) if classes in coarse else None
            entries.append(entry | {"passes": refiner_passes(study.refine, refiner)})
            measured = _timing_path(study, refiner, baseline.name)
            if measured.exists() and (found := read_json(measured))["key"] == work.key(baseline, refiner):
                timing[f"{refiner}/{baseline.name}"] = {"seconds": found["seconds"], "masks": found["masks"]}
    outputs += [maps_path(path) for path in outputs if maps_path(path).exists()]
    if "trained" in study.refine.controls:
        outputs += sorted(network_dir(study).iterdir())
    else:
        shutil.rmtree(network_dir(study), ignore_errors=True)
    keep = {*outputs, network_manifest(study), folder / "manifest.json"}
    for stale in sorted(path for path in folder.rglob("*") if path.is_file() and path not in keep):
        stale.unlink()
        print(f"refine: removed {stale}, which the study no longer has", flush=True)
    for empty in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(empty.iterdir()):
            empty.rmdir()
    write_manifest(
        folder / "manifest.json",
        "refine",
        study.subtree(*KEYS),
        [study.results_dir / "predictions" / "manifest.json", baselines_dir(study) / "manifest.json"],
        outputs,
        started,
        code=code_hash(*CODE_HERE),
        weights=work.weights,
        images=sorted(int(image) for image in work.tables[False]["image_id"].unique()),
        refined=entries,
        timing=timing,
    )
    print(f"refine: {len(entries)} refined predictions of {len(study_baselines(study))} baselines", flush=True)
