"""The command `genseg baseline`: chooses thresholds and amounts, and writes the predictions that are not up to date."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from genseg.artifacts import masks
from genseg.artifacts.files import file_sha256, read_json, write_json
from genseg.artifacts.manifest import write_manifest
from genseg.artifacts.masks import Mask
from genseg.artifacts.parquet import KEY, read_metadata
from genseg.artifacts.parts import Parts, Piece, make_parts
from genseg.artifacts.phrases import hash_unit, is_background, miou_phrases, read_phrases, row_mask
from genseg.artifacts.predictions import as_levels, read_predictions, write_predictions
from genseg.artifacts.resample import bilinear
from genseg.artifacts.reuse import has_key, has_maps, prune, with_maps
from genseg.baselines.attend import ANY_POSITIVE, METHODS, ImageAttention, Maps
from genseg.baselines.captions import queries
from genseg.baselines.inexact import find_amount, inexact_masks
from genseg.baselines.registry import (
    INEXACT,
    Baseline,
    baselines_dir,
    find_baseline,
    import_paths,
    imported_baselines,
    own_baselines,
)
from genseg.baselines.sam import read_sam_masks, select_masks
from genseg.data.images import load_image
from genseg.errors import UserError
from genseg.models.device import DTYPES, choose_device, describe
from genseg.models.source import chosen_backbone
from genseg.models.text_to_image import TextToImage
from genseg.models.vae import image_tensor
from genseg.params import Params, digest
from genseg.phases import code_hash


def make_baselines(params: Params, names: Sequence[str] = ()) -> None:
    """Write the predictions of the named baselines that are not up to date.

    Without names, make all baselines of the study, remove the files of baselines that it no longer has, and write the manifest.

    Raises:
        UserError: a name is unknown or belongs to a sampling run, data or backbone are missing, the target of an inexact
            baseline is out of reach, or imported predictions are for other phrases.
    """
    # 1. Find the baselines to make.
    baselines = [*own_baselines(params), *imported_baselines(params)]
    if not baselines:
        remedy = "import one with `genseg import`, or list some in baselines.attention or baselines.inexact"
        raise UserError(f"study {params.study}: no baseline to refine; {remedy}")
    chosen = [find_baseline(params, name, baselines) for name in names] or [b for b in baselines if b.family != "run"]
    for baseline in chosen:
        if baseline.family == "run":
            raise UserError(f"{baseline.name}: its predictions come from sampling; run `genseg sample`")
    keys = {baseline: baseline_key(params, baseline) for baseline in chosen}
    missing = {baseline: key for baseline, key in keys.items() if not is_up_to_date(params, baseline, key)}
    print(f"baseline: {len(missing)} of {len(chosen)} to make", flush=True)

    # 2. Read the phrases.
    phrases = read_phrases(params.data_dir / "phrases.parquet")
    classes = read_phrases(params.data_dir / "class_phrases.parquet")
    test = phrases[phrases["split"] == "test"]
    foreground = miou_phrases(params, classes)
    foreground = foreground[~is_background(foreground)]

    # 3. Make the baselines.
    for baseline, key in missing.items():
        if baseline.family == "inexact":
            _make_inexact(params, baseline, key, test, foreground)
        if baseline.family == "imported":
            _copy_imported(params, baseline, key, test, classes[classes["split"] == "test"])
    attention = {baseline: key for baseline, key in missing.items() if baseline.family == "attention"}
    device = choose_device(params.device, params.resources.baselines.threads)
    if attention:
        print(f"baseline: device {describe(device)}", flush=True)
        _make_attention(params, attention, phrases, foreground, device)

    # 4. Write the manifest.
    if not names:
        _write_manifest(params, baselines, device)


def baseline_key(params: Params, baseline: Baseline) -> str:
    """Return a hash of everything that a baseline's predictions depend on; files with this hash are up to date."""
    settings = params.baselines
    data = [file_sha256(params.data_dir / f"{name}.parquet") for name in ("phrases", "class_phrases")]
    facts = [baseline.name, params.seed, params.score.miou, *data, code_hash("baselines")]
    if baseline.family == "imported":
        files = [path for path in import_paths(params, baseline.name) if path.exists()]
        return digest([*facts, [[path.name, file_sha256(path)] for path in files]])
    if baseline.family == "inexact":
        return digest([*facts, settings.inexact[baseline.name.removeprefix(INEXACT)]])  # type: ignore[index]
    other_sections = {method.section for method in METHODS.values()} - {METHODS[baseline.name].section}
    values = settings.model_dump(mode="json", exclude={"backbone", "revision", "attention", "inexact", *other_sections})
    sam = settings.diffpng.sam if METHODS[baseline.name].sam else None
    sam_files = [[path.name, file_sha256(path)] for path in sorted(Path(sam).glob("*.json"))] if sam else []
    return digest([*facts, values, chosen_backbone(params, settings).weights_hash, sam_files])


def writes_maps(name: str) -> bool:
    """Return whether the soft maps of one of `METHODS` are written: whether its masks are its thresholded maps."""
    return METHODS[name].choose_threshold and not METHODS[name].sam


def is_up_to_date(params: Params, baseline: Baseline, key: str) -> bool:
    """Return whether all files of a baseline exist and are up to date."""
    paths = baseline.paths(params).values()
    if baseline.family == "imported":
        sources = import_paths(params, baseline.name)[: len(paths)]
        same_files = [path.exists() for path in sources] == [path.exists() for path in paths]
        return same_files and has_key(key, *(path for path in paths if path.exists()))
    needs_maps = baseline.family == "attention" and writes_maps(baseline.name)
    return has_key(key, *paths) and (has_maps(*paths) or not needs_maps)


def _write_manifest(params: Params, baselines: list[Baseline], device: torch.device) -> None:
    folder = baselines_dir(params)
    own = [baseline for baseline in baselines if baseline.family != "run"]
    outputs = with_maps(path for baseline in own for path in baseline.paths(params).values() if path.exists())
    prune(folder, [*outputs, folder / "manifest.json"], "baseline")
    entries = []
    for baseline in baselines:
        entry: dict[str, Any] = {"name": baseline.name, "label": baseline.label, "real": baseline.real}
        entry["imported"] = baseline.family == "imported"
        paths = baseline.paths(params)
        for is_class, which in ((False, "predictions"), (True, "class_predictions")):
            absent = is_class not in paths or (entry["imported"] and not paths[is_class].exists())
            entry[which] = None if absent else str(paths[is_class])
        metadata = read_metadata(paths[False]) if baseline in own else {}
        entries.append(entry | {name: float(metadata[name]) for name in ("threshold", "amount", "iou") if name in metadata})
    write_manifest(
        folder / "manifest.json",
        "baselines",
        params,
        [params.data_dir / "phrases.parquet", params.data_dir / "class_phrases.parquet"],
        outputs,
        describe(device),
        weights=chosen_backbone(params, params.baselines).weights_hash,
        baselines=entries,
    )


# ---------------------------------------------------------------------------------- unfinished work, below `work/<study>`
def _work_dir(params: Params) -> Path:
    """Return the folder of the parts of unfinished baselines."""
    return params.work_dir / "baselines"


def _read_chosen(params: Params, baseline: Baseline, key: str) -> dict[str, float]:
    """Return the values that a killed job had chosen for a baseline with this key; empty if there are none."""
    path = _work_dir(params) / f"{baseline.name}.json"
    chosen = read_json(path) if path.exists() else {}
    return chosen["values"] if chosen.get("key") == key else {}


def _keep_chosen(params: Params, baseline: Baseline, key: str, values: dict[str, float]) -> dict[str, float]:
    """Write chosen values, such as a threshold, for the case that the job is killed, and return them."""
    write_json(_work_dir(params) / f"{baseline.name}.json", {"key": key, "values": values})
    return values


# ------------------------------------------------------------------------------------------- inexact masks and imports
def _make_inexact(params: Params, baseline: Baseline, key: str, test: pd.DataFrame, classes: pd.DataFrame) -> None:
    """Degrade the ground truth by the amount that gives the target IoU on the test phrases."""
    kind: Any = baseline.name.removeprefix(INEXACT)
    chosen = _read_chosen(params, baseline, key)
    if not chosen:
        amount, iou = find_amount(test, kind, params.baselines.inexact[kind], params.seed)
        chosen = _keep_chosen(params, baseline, key, {"amount": amount, "iou": iou})
    for is_class, path in baseline.paths(params).items():
        images, parts = _Images(classes if is_class else test), Parts(_work_dir(params) / path.stem, key)

        def degrade(image_id: int, images: _Images = images) -> dict[str, Piece]:
            return {kind: (inexact_masks(images[image_id], kind, chosen["amount"], params.seed), None)}

        make_parts({kind: parts}, images.ids, degrade, f"baseline: {path.stem}: image")
        parts.gather(path, **{name: str(value) for name, value in chosen.items()})
        parts.remove()
    print(f"baseline: {baseline.name}: amount {chosen['amount']:.3f}, mean IoU {chosen['iou']:.3f}", flush=True)


def _copy_imported(params: Params, baseline: Baseline, key: str, test: pd.DataFrame, classes: pd.DataFrame) -> None:
    """Copy the files of `genseg import`, of which one may be absent, after checking that they match the study's phrases."""
    sources = import_paths(params, baseline.name)
    for is_class, path in baseline.paths(params).items():
        source, rows = sources[is_class], classes if is_class else test
        if not source.exists():
            path.unlink(missing_ok=True)
            continue
        frame = read_predictions(source)
        unknown = ~pd.MultiIndex.from_frame(frame[KEY]).isin(pd.MultiIndex.from_frame(rows[KEY]))
        if unknown.any():
            example = tuple(frame[KEY].iloc[int(unknown.argmax())].tolist())
            named = f"{example} (image_id, narrative_id, phrase_id)"
            remedy = f"the data have changed: run `genseg import {baseline.name}` again, or remove the file"
            raise UserError(f"{source}: {named} is not a phrase of test ({unknown.sum()} such rows); {remedy}")
        write_predictions(frame, path, key=key, imported=read_metadata(source).get("imported", "{}"))
        print(f"baseline: {baseline.name}: {len(frame)} masks of {source}", flush=True)


# -------------------------------------------------------------------------------------------- attention baselines
def _make_attention(
    params: Params, keys: dict[Baseline, str], phrases: pd.DataFrame, classes: pd.DataFrame, device: torch.device
) -> None:
    """Write the predictions of attention baselines with their keys. They share the forward passes for an image."""
    # 1. Load the backbone and choose the thresholds.
    source, revision, _ = chosen_backbone(params, params.baselines)
    model = TextToImage(source, revision, device, DTYPES[params.baselines.precision])
    sam = params.baselines.diffpng.sam if any(METHODS[baseline.name].sam for baseline in keys) else None
    chosen = {baseline.name: _read_chosen(params, baseline, key) for baseline, key in keys.items()}
    unknown = [baseline for baseline in keys if not chosen[baseline.name]]
    found = choose_thresholds(params, model, [baseline.name for baseline in unknown], phrases[phrases["split"] == "val"])
    for baseline in unknown:
        chosen[baseline.name] = _keep_chosen(params, baseline, keys[baseline], {"threshold": found[baseline.name]})

    # 2. Predict all phrases (not exclusive) and class phrases (exclusive) of each image.
    test = phrases[phrases["split"] == "test"]
    images = _Images(pd.concat([test.assign(exclusive=False), classes.assign(exclusive=True)], ignore_index=True))
    paths = {(baseline, exclusive): path for baseline in keys for exclusive, path in baseline.paths(params).items()}
    parts = {output: Parts(_work_dir(params) / path.stem, keys[output[0]]) for output, path in paths.items()}

    def predict(image_id: int) -> dict[tuple[Baseline, bool], Piece]:
        image, rows = attend(params, model, images[image_id])
        proposals = read_sam_masks(sam, rows["file_name"].iloc[0], *image.native) if sam else None
        pieces = {}
        for baseline, exclusive in parts:
            selected = rows[rows["exclusive"] == exclusive]
            threshold = chosen[baseline.name]["threshold"]
            pieces[baseline, exclusive] = predict_image(image, baseline.name, selected, exclusive, threshold, proposals)
        return pieces

    make_parts(parts, images.ids, predict, "baseline: image")

    # 3. Write the predictions.
    for (baseline, exclusive), path in paths.items():
        threshold = chosen[baseline.name]["threshold"]
        count = parts[baseline, exclusive].gather(path, threshold=str(threshold))
        parts[baseline, exclusive].remove()
        print(f"baseline: {path.stem}: {count} masks, threshold {threshold:g}", flush=True)


def predict_image(
    image: ImageAttention, name: str, rows: pd.DataFrame, exclusive: bool, threshold: float, proposals: Mask | None
) -> Piece:
    """Predict the phrases of an image with one of `METHODS`, with its soft maps if they are written (`writes_maps`).

    The score is the mean of the soft map inside the mask, 0 for an empty mask. `proposals` [M, H, W] are SAM's masks of the
    image, for methods that select among them.
    """
    if rows.empty:  # an image with class phrases only
        return rows[KEY].assign(mask=None, score=0.0), None
    ordered, maps = narrative_maps(image, name, rows, exclusive)
    codes, scores = [], []
    for soft in maps:
        large = bilinear(soft[None], *image.native)[0]
        mask = large >= threshold
        if METHODS[name].sam and proposals is not None and mask.any():
            mask = select_masks(proposals, mask, image.params.diffpng.sam_overlap)
        codes.append(masks.encode(mask))
        scores.append(float(large[mask].mean()) if mask.any() else 0.0)
    return ordered[KEY].assign(mask=codes, score=scores), as_levels(maps) if writes_maps(name) else None


class _Images:
    """Rows of a table by image, in key order."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self._rows = rows.sort_values(KEY, kind="stable", ignore_index=True)
        self._positions = self._rows.groupby("image_id", sort=True).indices
        self.ids = [int(str(image_id)) for image_id in self._positions]

    def __getitem__(self, image_id: int) -> pd.DataFrame:
        return self._rows.iloc[self._positions[image_id]]


def attend(params: Params, model: TextToImage, rows: pd.DataFrame) -> tuple[ImageAttention, pd.DataFrame]:
    """Encode the image of some rows, once for all of their phrases. Return the rows with their queries in a column `query`.

    The rows must be in key order.
    """
    first = rows.iloc[0]
    latent = model.encode(image_tensor(load_image(first["file_name"]), params.baselines.size)[None]).float()
    native = int(first["height"]), int(first["width"])
    limit = min(tokenizer.model_max_length for tokenizer in model.tokenizers) - 2  # without the start and end tokens
    found = [
        query
        for _, narrative in rows.groupby("narrative_id", sort=True)
        for query in queries(narrative, params.baselines.prompt, lambda text: len(model.ids(text)), limit)
    ]
    image = ImageAttention(model, params.baselines, latent, native, sorted(set(found)), (params.seed, first["image_id"]))
    return image, rows.assign(query=pd.Series(found, index=rows.index, dtype=object))


def narrative_maps(image: ImageAttention, name: str, rows: pd.DataFrame, exclusive: bool) -> tuple[pd.DataFrame, Maps]:
    """Compute the soft map of one of `METHODS` for each phrase of an image, in one call for the phrases of a narrative.

    Args:
        exclusive: whether the phrases of a narrative exclude each other, as class phrases do.

    Returns:
        The rows, ordered by narrative, and their maps [K, h, w] in the same order; equal queries of a narrative share a map.
    """
    ordered, maps = [], []
    for _, narrative in rows.groupby("narrative_id", sort=True):
        unique = list(dict.fromkeys(narrative["query"]))
        soft = dict(zip(unique, METHODS[name].maps(image, unique, exclusive), strict=True))
        ordered.append(narrative)
        maps += [soft[query] for query in narrative["query"]]
    return pd.concat(ordered), np.stack(maps)


# ----------------------------------------------------------------------------------------------------- thresholds
def choose_thresholds(params: Params, model: TextToImage, names: Sequence[str], val: pd.DataFrame) -> dict[str, float]:
    """Return the threshold of each method: the one with the highest mean IoU on `threshold_rows` (the lowest on a tie), or
    `ANY_POSITIVE` for methods whose threshold is not chosen."""
    tuned = [name for name in names if METHODS[name].choose_threshold]
    thresholds = dict.fromkeys(names, ANY_POSITIVE)
    candidates = np.sort(np.array(params.baselines.thresholds, np.float32))
    totals = {name: np.zeros(len(candidates)) for name in tuned}
    images = _Images(threshold_rows(params, val))
    for image_id in images.ids if tuned else ():
        image, rows = attend(params, model, images[image_id])
        for name in tuned:
            ordered, maps = narrative_maps(image, name, rows, False)
            for (_, row), soft in zip(ordered.iterrows(), maps, strict=True):
                totals[name] += threshold_ious(bilinear(soft[None], *image.native)[0], row_mask(row), candidates)
    return thresholds | {name: float(f"{candidates[int(total.argmax())]:.6g}") for name, total in totals.items()}


def threshold_rows(params: Params, val: pd.DataFrame) -> pd.DataFrame:
    """Return the phrases that thresholds are chosen on: all phrases of `baselines.val_images` images of val, chosen by hash."""
    ids = sorted(val["image_id"].unique(), key=lambda image_id: hash_unit(params.seed, "baseline val", image_id))
    return val[val["image_id"].isin(ids[: params.baselines.val_images])]


def threshold_ious(soft: NDArray[np.float32], truth: NDArray[np.bool_], thresholds: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the IoU [T] of `soft >= threshold` with the ground truth for every threshold, 0 where both masks are empty.

    Args:
        soft, truth: soft map and ground-truth mask, both [H, W].
        thresholds: [T], ascending.
    """
    passed = np.searchsorted(thresholds, soft, side="right")  # [H, W], number of thresholds that a pixel reaches
    inside, outside = (np.bincount(passed[region], minlength=len(thresholds) + 1) for region in (truth, ~truth))
    true_positives, false_positives = (counts[::-1].cumsum()[::-1][1:] for counts in (inside, outside))
    return true_positives / np.maximum(1, truth.sum() + false_positives)
