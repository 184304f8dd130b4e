"""The command `genseg baseline`: predictions of the baselines, thresholds and amounts chosen, finished ones kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from genseg.artifacts import masks
from genseg.artifacts.files import file_sha256
from genseg.artifacts.manifest import code_hash, write_manifest
from genseg.artifacts.parquet import KEY, read_metadata
from genseg.artifacts.phrases import hash_unit, read_phrases, row_mask
from genseg.artifacts.predictions import maps_path, read_predictions, write_predictions, write_with_maps
from genseg.artifacts.resample import bilinear
from genseg.baselines.attend import METHODS, SOME, Attended, Maps
from genseg.baselines.inexact import find_amount, inexact_masks
from genseg.baselines.registry import INEXACT, Baseline, baselines_dir, find_baseline, import_paths, imports, own_baselines
from genseg.data.images import load_image
from genseg.errors import UserError
from genseg.models.device import DTYPES, choose_device, describe
from genseg.models.text_to_image import TextToImage
from genseg.models.vae import image_tensor
from genseg.params import Params, digest
from genseg.training.prepare import chosen_backbone

CODE = ("params.py", "artifacts", "data/images.py", "models", "baselines", "training/prepare.py")
KEYS = {
    "cross_attention": ("cross_attention",),
    "diffpng_cross": ("diffpng",),
    "diffpng_cross_self": ("diffpng",),
    "diffseg": ("diffseg",),
}
"""What of `baselines` each method reads beside what all of them read."""
SHARED = ("size", "precision", "batch", "prompt", "visible", "val_images", "thresholds")
BACKGROUND = "background"


def make_baselines(params: Params, names: Sequence[str] = ()) -> None:
    """Write `results/<study>/baselines/<name>.parquet` for the phrases of test and `<name>_class_phrases.parquet` for its
    class phrases, for every baseline or the named ones that are not there yet; without names also, last, the manifest.

    Raises:
        UserError: an unknown name, or the name of a run of another phase; data or backbone missing; a target out of reach; an
            import for other phrases.
    """
    started = time.time()
    every = [*own_baselines(params), *imports(params)]
    wanted = [find_baseline(params, name, every) for name in names] or [b for b in every if b.family != "run"]
    for baseline in wanted:
        if baseline.family == "run":
            raise UserError(f"{baseline.name}: its predictions are made by the phase sample: run `genseg sample`")
    keys = {baseline.name: baseline_key(params, baseline) for baseline in wanted}
    missing = [baseline for baseline in wanted if not is_made(params, baseline, keys[baseline.name])]
    print(f"baseline: {len(missing)} of {len(wanted)} to make", flush=True)
    phrases = read_phrases(params.data_dir / "phrases.parquet")
    classes = read_phrases(params.data_dir / "class_phrases.parquet")
    test, classes = phrases[phrases["split"] == "test"], classes[classes["split"] == "test"]
    classes = classes[[tags is None or BACKGROUND not in tags for tags in classes["tags"]]]
    for baseline in missing:
        if baseline.family == "inexact":
            _make_inexact(params, baseline, keys[baseline.name], test, classes)
        if baseline.family == "imported":
            _take_imported(params, baseline, keys[baseline.name], test, classes)
    attention = [baseline for baseline in missing if baseline.family == "attention"]
    device = choose_device(params.device, params.resources["baselines"].threads)
    if attention:
        print(f"baseline: device {describe(device)}", flush=True)
        _make_attention(params, attention, keys, phrases[phrases["split"] == "val"], test, classes, device)
    if not names:
        _write_manifest(params, every, started, device)


def baseline_key(params: Params, baseline: Baseline) -> str:
    """Hash of everything a baseline's bytes depend on: predictions that carry it need not be made again."""
    settings = params.baselines
    data = [file_sha256(params.data_dir / f"{name}.parquet") for name in ("phrases", "class_phrases")]
    facts = [baseline.name, params.seed, *data, code_hash(*CODE)]
    if baseline.family == "imported":
        files = [path for path in import_paths(params, baseline.name) if path.exists()]
        return digest([*facts, [[path.name, file_sha256(path)] for path in files]])
    if baseline.family == "inexact":
        return digest([*facts, settings.inexact[baseline.name.removeprefix(INEXACT)]])  # type: ignore[index]
    values = settings.model_dump(mode="json", include={*SHARED, *KEYS[baseline.name]})
    return digest([*facts, values, chosen_backbone(params, params.baselines)[2]])


def is_made(params: Params, baseline: Baseline, key: str) -> bool:
    paths = [baseline.predictions(params), baseline.class_predictions(params)]
    if baseline.family == "imported":
        there = [path.exists() for path in import_paths(params, baseline.name)]
        return there == [path.exists() for path in paths] and all(
            read_metadata(path).get("key") == key for path in paths if path.exists()
        )
    if baseline.name in METHODS and METHODS[baseline.name].chosen and not all(maps_path(path).exists() for path in paths):
        return False
    return all(read_metadata(path).get("key") == key for path in paths)


def _write_manifest(params: Params, every: list[Baseline], started: float, device: torch.device) -> None:
    folder = baselines_dir(params)
    made = [baseline for baseline in every if baseline.family != "run"]
    outputs = [path for b in made for path in (b.predictions(params), b.class_predictions(params))]
    outputs = [path for path in outputs if path.exists()]
    outputs += [maps_path(path) for path in outputs if maps_path(path).exists()]
    for stale in sorted({*folder.glob("*.parquet"), *folder.glob("*.safetensors")} - set(outputs)):
        stale.unlink()
        print(f"baseline: removed {stale}, which the study no longer has", flush=True)
    entries = []
    for baseline in every:
        entry: dict[str, Any] = {"name": baseline.name, "label": baseline.label, "real": baseline.real}
        entry["imported"] = baseline.family == "imported"
        for which, path in (
            ("predictions", baseline.predictions(params)),
            ("class_predictions", baseline.class_predictions(params)),
        ):
            entry[which] = None if entry["imported"] and not path.exists() else str(path)
        metadata = read_metadata(baseline.predictions(params)) if baseline in made else {}
        entries.append(entry | {name: float(metadata[name]) for name in ("threshold", "amount", "iou") if name in metadata})
    write_manifest(
        folder / "manifest.json",
        "baselines",
        params.subtree("seed", "baselines"),
        [params.data_dir / "phrases.parquet", params.data_dir / "class_phrases.parquet"],
        outputs,
        started,
        describe(device),
        code=code_hash(*CODE),
        weights=chosen_backbone(params, params.baselines)[2],
        baselines=entries,
    )


# ----------------------------------------------------------------------------------------------- from ground truth
def _make_inexact(params: Params, baseline: Baseline, key: str, test: pd.DataFrame, classes: pd.DataFrame) -> None:
    kind: Any = baseline.name.removeprefix(INEXACT)
    amount, reached = find_amount(test, kind, params.baselines.inexact[kind], params.seed)
    facts = {"key": key, "amount": str(amount), "iou": str(reached)}
    for rows, path in ((classes, baseline.class_predictions(params)), (test, baseline.predictions(params))):
        write_predictions(inexact_masks(rows, kind, amount, params.seed), path, **facts)
    print(f"baseline: {baseline.name}: amount {amount:.3f}, mean IoU {reached:.3f}", flush=True)


# ------------------------------------------------------------------------------------------------------- imported
def _take_imported(params: Params, baseline: Baseline, key: str, test: pd.DataFrame, classes: pd.DataFrame) -> None:
    """Copy what `genseg import` read, if it is for the phrases that the study has now; of two files one may be missing."""
    out = baseline.predictions(params), baseline.class_predictions(params)
    for source, rows, path in zip(import_paths(params, baseline.name), (test, classes), out, strict=True):
        if not source.exists():
            path.unlink(missing_ok=True)
            continue
        frame = read_predictions(source)
        unknown = ~pd.MultiIndex.from_frame(frame[KEY]).isin(pd.MultiIndex.from_frame(rows[KEY]))
        if unknown.any():
            one = tuple(frame[KEY].iloc[int(unknown.argmax())])
            raise UserError(
                f"{source}: {one} (image_id, narrative_id, phrase_id) is no phrase of test ({unknown.sum()} such rows): the "
                f"data have changed since; run `genseg import {baseline.name}` again, or remove the file"
            )
        write_predictions(frame, path, key=key, imported=read_metadata(source).get("imported", "{}"))
        print(f"baseline: {baseline.name}: {len(frame)} masks of {source}", flush=True)


# --------------------------------------------------------------------------------------------------- by attention
def _make_attention(
    params: Params,
    baselines: list[Baseline],
    keys: dict[str, str],
    val: pd.DataFrame,
    test: pd.DataFrame,
    classes: pd.DataFrame,
    device: torch.device,
) -> None:
    source, revision, _ = chosen_backbone(params, params.baselines)
    model = TextToImage(source, revision, device, DTYPES[params.baselines.precision], params.baselines.visible)
    thresholds = choose_thresholds(params, model, [b.name for b in baselines], val)
    both = pd.concat([test.assign(exclusive=False), classes.assign(exclusive=True)], ignore_index=True)
    found: dict[tuple[str, bool], list[tuple[pd.DataFrame, list[float], list[bytes], Maps]]] = {}
    last, count = time.monotonic(), both["image_id"].nunique()
    for done, (image, rows) in enumerate(attended_images(params, model, both), start=1):
        for baseline in baselines:
            name = baseline.name
            for exclusive, part in rows.groupby("exclusive"):
                ordered, maps = narrative_maps(image, name, part, bool(exclusive))
                codes, scores = zip(*(_read(soft, *image.native, thresholds[name]) for soft in maps), strict=True)
                kept = maps if METHODS[name].chosen else maps[:, :0, :0]
                found.setdefault((name, bool(exclusive)), []).append((ordered[KEY], list(scores), list(codes), kept))
        if time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"baseline: image {done} of {count}", flush=True)
    for baseline in baselines:
        for exclusive, path in ((True, baseline.class_predictions(params)), (False, baseline.predictions(params))):
            parts = found[baseline.name, exclusive]
            frame = pd.concat([keys_ for keys_, *_ in parts], ignore_index=True)
            frame["score"] = [score for _, scores, *_ in parts for score in scores]
            frame["mask"] = [code for *_, codes, _ in parts for code in codes]
            order = frame.sort_values(KEY, kind="stable").index.to_numpy()
            soft = np.concatenate([maps for *_, maps in parts])[order] if METHODS[baseline.name].chosen else None
            threshold = str(thresholds[baseline.name])
            write_with_maps(frame.iloc[order], soft, path, key=keys[baseline.name], threshold=threshold)
        print(f"baseline: {baseline.name}: {len(frame)} masks, threshold {thresholds[baseline.name]:g}", flush=True)


def attended_images(params: Params, model: TextToImage, rows: pd.DataFrame) -> Iterator[tuple[Attended, pd.DataFrame]]:
    """Each image of `rows`, encoded once, with its rows in key order."""
    settings = params.baselines
    for image_id, group in rows.sort_values(KEY, kind="stable").groupby("image_id", sort=True):
        first = group.iloc[0]
        latent = model.encode(image_tensor(load_image(first["file_name"]), settings.size)[None]).float()
        texts = sorted(set(group["phrase"]))
        native = int(first["height"]), int(first["width"])
        yield Attended(model, settings, latent, native, texts, (params.seed, image_id)), group


def narrative_maps(image: Attended, name: str, rows: pd.DataFrame, exclusive: bool) -> tuple[pd.DataFrame, Maps]:
    """The rows narrative by narrative, and a method's soft map for each."""
    ordered, maps = [], []
    for _, narrative in rows.groupby("narrative_id", sort=True):
        texts = list(dict.fromkeys(narrative["phrase"]))
        soft = dict(zip(texts, METHODS[name].maps(image, texts, exclusive), strict=True))
        ordered.append(narrative)
        maps += [soft[phrase] for phrase in narrative["phrase"]]
    return pd.concat(ordered), np.stack(maps)


def _read(soft: Maps, height: int, width: int, threshold: float) -> tuple[bytes, float]:
    """Mask and score: the mean of the up-sampled map inside the mask, 0 for an empty one."""
    large = bilinear(soft[None], height, width)[0]
    mask = large >= threshold
    return masks.encode(mask), float(large[mask].mean()) if mask.any() else 0.0


def choose_thresholds(params: Params, model: TextToImage, names: Sequence[str], val: pd.DataFrame) -> dict[str, float]:
    """For each method the threshold with the highest mean IoU on some images of val; the first of equals."""
    chosen = [name for name in names if METHODS[name].chosen]
    thresholds = dict.fromkeys(names, SOME)
    candidates = np.sort(np.array(params.baselines.thresholds, np.float32))
    totals = {name: np.zeros(len(candidates)) for name in chosen}
    for image, rows in attended_images(params, model, threshold_rows(params, val)) if chosen else ():
        for name in chosen:
            ordered, maps = narrative_maps(image, name, rows, False)
            for (_, row), soft in zip(ordered.iterrows(), maps, strict=True):
                totals[name] += threshold_ious(bilinear(soft[None], *image.native)[0], row_mask(row), candidates)
    return thresholds | {name: float(f"{candidates[int(total.argmax())]:.6g}") for name, total in totals.items()}


def threshold_rows(params: Params, val: pd.DataFrame) -> pd.DataFrame:
    """The phrases of val that thresholds are chosen on: all of some images, chosen by hash."""
    ids = sorted(val["image_id"].unique(), key=lambda image_id: hash_unit(params.seed, "baseline val", image_id))
    return val[val["image_id"].isin(ids[: params.baselines.val_images])]


def threshold_ious(soft: NDArray[np.float32], truth: NDArray[np.bool_], thresholds: NDArray[np.float32]) -> NDArray[np.float64]:
    """IoU of {soft >= threshold} with the truth for every one of ascending thresholds, in one go over the pixels."""
    level = np.searchsorted(thresholds, soft, side="right")  # how many thresholds a pixel reaches
    counts = [np.bincount(level[where], minlength=len(thresholds) + 1) for where in (truth, ~truth)]
    hit, miss = (count[::-1].cumsum()[::-1][1:] for count in counts)
    return hit / np.maximum(1, truth.sum() + miss)
