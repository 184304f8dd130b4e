"""Outputs of other people's methods -> predictions. Formats and rules are those of their producers; see `FORMATS`.

Maps smaller than the picture are resized bilinearly to its native size; then every pixel gets one class by the producer's own
background rule, which the metadata of the predictions records. A class that owns no pixel is predicted empty with score 0.
"""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from tqdm import tqdm

from genseg.artifacts import masks
from genseg.artifacts.files import read_json
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import read_predictions, write_predictions
from genseg.artifacts.resample import bilinear
from genseg.data.images import BadImage, open_image
from genseg.data.index_masks import read_indices
from genseg.errors import UserError
from genseg.interchange.labels import NOTHING, Background, ClassList, Labels, Numbering, class_list, images, paint
from genseg.interchange.unpickle import read_array, read_dict

FORMATS = {
    "irn": "folder of {name}.npy, a pickled dict: `keys` (classes from 0, without background), `high_res` [K, H, W]",
    "clip_es": "the same with `attn_highres`",
    "index_masks": "folder of {name}.png, one class number a pixel (palette or grey), 0 background, 255 ignored",
    "mmseg": "folder of {name}.npy or .npz, logits [C, H, W] of all foreground classes, or of background and these",
    "coco_results": "JSON list of {image_id, segmentation (RLE), score} with category_id, or with narrative_id and phrase_id",
    "png_masks": "CSV of image_id, narrative_id, phrase_id, file (, score): one binary or soft mask PNG a phrase",
    "predictions": "Parquet of image_id, narrative_id, phrase_id, mask (RLE counts at native size), score",
}
_CAMS = {"irn": ("high_res", Background("constant", 0.15)), "clip_es": ("attn_highres", Background("power", 1.0))}


@dataclass(frozen=True)
class Recipe:
    """How a source is read; None takes the format's own default."""

    format: str
    array: str | None = None
    """irn, clip_es: name of the maps in the dict."""
    background: Background | None = None
    """irn, clip_es, mmseg (without a channel of background), coco_results."""
    numbering: Numbering | None = None
    """index_masks: what the values are. coco_results: what `category_id` is."""
    probabilities: bool = False
    """mmseg: the maps are probabilities already; else logits, of which the softmax is taken."""
    threshold: float | None = None
    """png_masks: from which value, in [0, 1], a soft mask is foreground."""
    allow_missing: bool = False
    """Images without a file (phrases without a row) get no prediction, which scores count as IoU 0."""


_OPTIONS = {
    "irn": {"array", "background"},
    "clip_es": {"array", "background"},
    "index_masks": {"numbering"},
    "mmseg": {"background", "probabilities"},
    "coco_results": {"background", "numbering"},
    "png_masks": {"threshold"},
    "predictions": set(),
}
_FILES = ("coco_results", "png_masks", "predictions")
ROUNDING = 1e-3
"""By which a producer's probabilities in half precision may leave [0, 1]."""


@dataclass(frozen=True)
class Target:
    """A phrase table of the study, and where predictions for it go."""

    table: Path
    out: Path


def import_predictions(recipe: Recipe, source: Path, phrases: Target, class_phrases: Target) -> dict[Path, Counter[str]]:
    """Convert `source` once and write predictions for the study's test phrases, its class phrases, or both: maps, index masks
    and COCO instances are of classes; rows that name their phrase tell themselves what they are for.

    Returns:
        By predictions file: `predictions` and `images` written, `missing` images (of rows that name their phrase: phrases),
        `other_split` rows of the source.

    Raises:
        UserError: an option that the format does not have, or a file that is missing, malformed, of another size or for
            unknown ids; nothing is written then.
    """
    for name, value in vars(recipe).items():
        if value not in (None, False) and name not in {"format", "allow_missing"} | _OPTIONS[recipe.format]:
            raise UserError(f"--{name}: format {recipe.format} has no such option; leave it out")
    if not (source.is_file() if recipe.format in _FILES else source.is_dir()):
        raise UserError(f"{source}: no such file or folder; give --source what {recipe.format} is: {FORMATS[recipe.format]}")
    tables = [read_phrases(target.table) for target in (phrases, class_phrases)]
    every = pd.concat(tables, ignore_index=True)
    tests = [table[table["split"] == "test"] for table in tables]
    chosen, classes = every[every["split"] == "test"], tests[1]
    counts: Counter[str] = Counter()
    absent: list[str] = []
    applied: dict[str, Any] = {"format": recipe.format, "source": str(source)}
    if recipe.format == "predictions":
        rows = _predictions(source, every, chosen, counts)
    elif recipe.format == "png_masks":
        applied["threshold"] = 0.5 if recipe.threshold is None else recipe.threshold
        rows = _png_masks(source, applied["threshold"], every, chosen, counts)
    elif recipe.format == "coco_results":
        rows = _coco_results(recipe, source, every, classes, str(class_phrases.table), absent, counts, applied)
    else:
        rows = _class_maps(recipe, source, classes, str(class_phrases.table), absent, applied)
    found = pd.DataFrame(list(rows), columns=[*KEY, "mask", "score"])
    parts = [(target, test, found[_among(found, test)]) for target, test in zip((phrases, class_phrases), tests, strict=True)]
    absent = absent or [
        f"mask for phrase {key} (image_id, narrative_id, phrase_id)"
        for _, test, part in parts
        if len(part)
        for key in sorted(_keys(test[~_is_background(test)]) - _keys(part))
    ]
    if absent and not recipe.allow_missing:
        more = f", nor {len(absent) - 1} others" if len(absent) > 1 else ""
        raise UserError(f"{source}: no {absent[0]}{more}; make them, or accept IoU 0 there with --allow-missing")
    if found.empty:
        raise UserError(f"{source}: nothing in it is for a test phrase of {phrases.table} or {class_phrases.table}")
    written = {}
    for target, _, part in parts:
        if len(part):
            write_predictions(part, target.out, imported=json.dumps(applied, sort_keys=True))
            written[target.out] = counts | Counter(
                predictions=len(part), images=part["image_id"].nunique(), missing=len(absent)
            )
    return written


def _keys(frame: pd.DataFrame) -> set[Key]:
    return set(frame[KEY].itertuples(index=False, name=None))


def _among(frame: pd.DataFrame, table: pd.DataFrame) -> NDArray[np.bool_]:
    return pd.MultiIndex.from_frame(frame[KEY]).isin(pd.MultiIndex.from_frame(table[KEY]))


def _is_background(table: pd.DataFrame) -> NDArray[np.bool_]:
    return np.array([tags is not None and "background" in list(tags) for tags in table["tags"]], bool)


Key = tuple[int, str, int]
Row = tuple[int, str, int, bytes, float]


# ------------------------------------------------------------------------------------- maps and index masks, one file an image
def _class_maps(
    recipe: Recipe, source: Path, chosen: pd.DataFrame, origin: str, absent: list[str], applied: dict[str, Any]
) -> Iterator[Row]:
    classes = class_list(chosen, origin)
    suffixes = {"index_masks": (".png",), "mmseg": (".npy", ".npz")}.get(recipe.format, (".npy",))
    numbering = recipe.numbering or "class_id"
    if recipe.format in _CAMS:
        key, rule = _CAMS[recipe.format]
        key, rule = recipe.array or key, recipe.background or rule
        applied |= {"array": key, "background": str(rule)}
    elif recipe.format == "mmseg":
        applied |= {"background": str(recipe.background or "channel"), "probabilities": recipe.probabilities}
    else:
        applied |= {"numbering": numbering}
    for _, name, height, width, rows in tqdm(list(images(chosen)), desc="import", disable=None):
        there = [path for path in (source / f"{name}{suffix}" for suffix in suffixes) if path.exists()]
        if not there:
            absent.append(f"{name}{suffixes[0]}")
            continue
        if len(there) > 1:
            raise UserError(f"{there[0]}: {there[1].name} lies beside it; keep one of them")
        if recipe.format in _CAMS:
            labels, values = _cams(there[0], key, rule, classes, height, width)
        elif recipe.format == "mmseg":
            labels, values = _logits(there[0], recipe, classes, height, width)
        else:
            labels, values = _index_mask(there[0], classes.values(numbering), height, width), None
        yield from _rows(rows, labels, values)


def _rows(rows: pd.DataFrame, labels: Labels, values: NDArray[np.floating] | None) -> Iterator[Row]:
    """A prediction for every class phrase of an image; the score is the mean of `values` [H, W] on its mask, or 1."""
    for row in rows.itertuples():
        mask = labels == row.phrase_id
        score = 0.0 if not mask.any() else 1.0 if values is None else float(np.clip(values[mask].mean(dtype=np.float64), 0, 1))
        yield *(getattr(row, name) for name in KEY), masks.encode(mask), score


def _cams(
    path: Path, key: str, rule: Background, classes: ClassList, height: int, width: int
) -> tuple[Labels, NDArray[np.floating]]:
    found = read_dict(path)
    for name in ("keys", key):
        if name not in found:
            raise UserError(f"{path}: its dict has no {name!r}, only {', '.join(found)}; choose with --array")
    keys, maps = found["keys"], found[key]
    if keys.ndim != 1 or keys.dtype.kind not in "iu":
        raise UserError(f"{path}: keys is {list(keys.shape)} of {keys.dtype}, expected one whole number for each class")
    if maps.ndim != 3 or len(maps) != len(keys):
        raise UserError(f"{path}: {key} is {list(maps.shape)}, expected [{len(keys)}, height, width] as keys says")
    count = len(classes.foreground)
    strange = keys[(keys < 0) | (keys >= count)]
    if len(strange):
        raise UserError(f"{path}: key {strange[0]} is none of the study's {count} foreground classes, which count from 0")
    if len(np.unique(keys)) != len(keys):
        raise UserError(f"{path}: a class stands twice in keys {keys.tolist()}; keep one map a class")
    maps = _native(path, maps, height, width)
    if rule.kind == "power":
        _check_range(path, maps, f"--background {rule}")
    return _owners(rule, maps, [classes.foreground[index] for index in keys], classes.background)


def _logits(path: Path, recipe: Recipe, classes: ClassList, height: int, width: int) -> tuple[Labels, NDArray[np.floating]]:
    maps, count = read_array(path), len(classes.foreground)
    if maps.ndim != 3 or len(maps) not in (count, count + 1):
        raise UserError(
            f"{path}: {list(maps.shape)}, expected [{count}, height, width] for the study's foreground classes, or"
            f" [{count + 1}, ...] with background first"
        )
    maps = _native(path, maps, height, width).astype(np.float32, copy=False)
    if recipe.probabilities:
        _check_range(path, maps, "--probabilities")
    else:
        maps = np.exp(maps - maps.max(0))
        maps /= maps.sum(0)
    rest = NOTHING if classes.background is None else classes.background
    if len(maps) == count + 1:
        if recipe.background is not None:
            raise UserError(f"{path}: has a channel of background, so leave out --background")
        return _owners(Background("none"), maps, [rest, *classes.foreground], classes.background)
    if recipe.background is None:
        raise UserError(
            f"{path}: has no channel of background; name the producer's rule with --background, or --background none"
        )
    return _owners(recipe.background, maps, classes.foreground, classes.background)


def _check_range(path: Path, maps: NDArray[np.floating], option: str) -> None:
    low, high = float(maps.min(initial=0)), float(maps.max(initial=0))
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise UserError(
            f"{path}: values from {low:g} to {high:g}, but {option} is for values in [0, 1]; leave it out or scale them"
        )


def _owners(
    rule: Background, values: NDArray[np.floating], places: list[int], background: int | None
) -> tuple[Labels, NDArray[np.floating]]:
    """Labels, and the winning value of each pixel."""
    rest = NOTHING if background is None else background
    labels = np.array([*places, rest], np.int64)[rule.winner(values)]  # -1 takes the last
    return labels, values.max(0) if len(values) else np.zeros(labels.shape)


def _native(path: Path, maps: NDArray[Any], height: int, width: int) -> NDArray[np.floating]:
    """Maps at native size; those that have it keep their precision, so that ties fall as at their producer."""
    if maps.dtype.kind != "f":
        raise UserError(f"{path}: maps of {maps.dtype}, expected floating-point numbers")
    with np.errstate(over="ignore"):
        finite = np.isfinite(maps.astype(np.float32, copy=False)).all()
    if not finite:
        raise UserError(f"{path}: has values that are no finite numbers in single precision (NaN or infinite); make it again")
    if maps.shape[1:] == (height, width):
        return maps
    if maps.shape[1:] == (width, height) or 0 in maps.shape[1:]:
        raise UserError(f"{path}: {maps.shape[1]} x {maps.shape[2]} pixels, the picture has {height} x {width}; transpose it")
    return bilinear(maps, height, width)


def _index_mask(path: Path, values: dict[int, int], height: int, width: int) -> Labels:
    indices = read_indices(path)
    _same_size(path, indices.shape, height, width)
    strange = sorted(set(np.unique(indices).tolist()) - set(values))
    if strange:
        raise UserError(
            f"{path}: value {strange[0]} is no class of the study (--numbering says what values are), 0 or 255; relabel it"
        )
    table = np.full(int(indices.max()) + 1, NOTHING, np.int64)
    for value, place in values.items():
        table[value : value + 1] = place
    return table[indices]


def _same_size(where: object, shape: tuple[int, ...], height: int, width: int) -> None:
    if tuple(shape) != (height, width):
        raise UserError(
            f"{where}: {' x '.join(map(str, shape))} pixels, its picture has {height} x {width}; save it at native size"
        )


# ----------------------------------------------------------------------------------------------------------- COCO results
def _coco_results(
    recipe: Recipe,
    source: Path,
    every: pd.DataFrame,
    class_phrases: pd.DataFrame,
    origin: str,
    absent: list[str],
    counts: Counter[str],
    applied: dict[str, Any],
) -> Iterator[Row]:
    records = read_json(source)
    if not isinstance(records, list) or not records:
        raise UserError(
            f"{source}: holds {'no result' if records == [] else type(records).__name__}, expected a list of results"
        )
    first = every.drop_duplicates("image_id").set_index("image_id")
    sizes = dict(zip(first.index, zip(first["height"], first["width"], strict=True), strict=True))
    named = isinstance(records[0], dict) and {"narrative_id", "phrase_id"} <= set(records[0])
    needed = ("image_id", *(("narrative_id", "phrase_id") if named else ("category_id",)), "segmentation", "score")
    by_image: dict[int, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for number, record in enumerate(records):
        where = f"{source}: result {number}"
        if not isinstance(record, dict) or not set(needed) <= set(record):
            raise UserError(f"{where}: needs {', '.join(needed)}")
        _check_ids(where, record)
        if record["image_id"] not in sizes:
            raise UserError(f"{where}: image_id {record['image_id']!r} is no picture of the study; make it for its pictures")
        score = record["score"]
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 1:
            raise UserError(f"{where}: score {score!r} is no number in [0, 1]; give a confidence")
        if first.at[record["image_id"], "split"] != "test":
            counts["other_split"] += 1
            continue
        by_image[record["image_id"]].append((number, record))

    def mask(number: int, record: dict[str, Any]) -> NDArray[np.bool_]:
        return _rle(f"{source}: result {number}", record["segmentation"], *sizes[record["image_id"]])

    if named:
        if recipe.background or recipe.numbering:
            raise UserError(f"{source}: names its phrases, so leave out --background and --numbering")
        known, seen = _keys(every), set[Key]()
        for number, record in (item for found in by_image.values() for item in found):
            key = (record["image_id"], record["narrative_id"], record["phrase_id"])
            _check_key(f"{source}: result {number}", key, known, seen)
            yield *key, masks.encode(mask(number, record)), float(record["score"])
        return
    classes = class_list(class_phrases, origin)
    rule, numbering = recipe.background or Background("none"), recipe.numbering or "class_id"
    if rule.kind == "power":
        raise UserError("--background power: instances have no such rule; give threshold:V or none")
    applied |= {"background": str(rule), "numbering": numbering}
    places = {classes.number(place, numbering): place for place in range(len(classes.ids))}
    rest = NOTHING if classes.background is None else classes.background
    for image_id, name, height, width, rows in images(class_phrases):
        found = by_image[image_id]
        if not found:
            absent.append(f"result for picture {name}")
        for number, record in found:
            if record["category_id"] not in places:
                raise UserError(
                    f"{source}: result {number}: category_id {record['category_id']!r} is no class of the study"
                    " (--numbering says what it is)"
                )
        scores = [float(record["score"]) for _, record in found]
        index = paint([mask(*item) for item in found], scores, height, width)
        value = np.array([*scores, 0.0])[index]
        lost = (index == NOTHING) | (value <= rule.value if rule.kind == "constant" else value < rule.value)
        labels = np.array([*(places[record["category_id"]] for _, record in found), rest], np.int64)[index]
        yield from _rows(rows, np.where(lost, rest, labels), value)


def _check_key(where: str, key: Key, known: set[Key], seen: set[Key]) -> None:
    if key not in known:
        raise UserError(
            f"{where}: {key} (image_id, narrative_id, phrase_id) is no phrase of the study; take ids from its phrase tables"
        )
    if key in seen:
        raise UserError(f"{where}: {key} (image_id, narrative_id, phrase_id) stands twice; keep one of them")
    seen.add(key)


def _check_ids(where: str, record: dict[str, Any]) -> None:
    for name in ("image_id", "category_id", "phrase_id"):
        if not isinstance(record.get(name, 0), int) or isinstance(record.get(name), bool):
            raise UserError(f"{where}: {name} {record[name]!r} is no whole number; make it again")
    if not isinstance(record.get("narrative_id", ""), str):
        raise UserError(f"{where}: narrative_id {record['narrative_id']!r} is no text; write it as the phrase table does")


def _rle(where: str, segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Mask of a compressed or uncompressed run-length code."""
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= set(segmentation):
        raise UserError(
            f"{where}: segmentation is no run-length code; convert polygons with pycocotools' frPyObjects and merge"
        )
    if segmentation["size"] != [height, width]:
        raise UserError(
            f"{where}: segmentation of size {segmentation['size']}, its picture has [{height}, {width}]; make it again"
        )
    code = segmentation["counts"]
    try:
        if isinstance(code, list):
            code = coco_mask.frPyObjects({"size": [height, width], "counts": code}, height, width)["counts"]
        return masks.decode(code.encode() if isinstance(code, str) else code, height, width)
    except (UserError, TypeError, ValueError, OverflowError, UnicodeEncodeError) as error:
        raise UserError(f"{where}: segmentation: {' '.join(str(error).split())[:200]}; make it again") from None


# ------------------------------------------------------------------------------------------------------- mask PNGs and a CSV
def _png_masks(
    source: Path, threshold: float, every: pd.DataFrame, chosen: pd.DataFrame, counts: Counter[str]
) -> Iterator[Row]:
    columns = [*KEY, "file"]
    sizes = {image_id: (height, width) for image_id, _, height, width, _ in images(chosen)}
    wanted, known, seen = _keys(chosen), _keys(every), set[Key]()
    try:
        with open(source, newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            lacking = [name for name in columns if name not in (reader.fieldnames or [])]
            if lacking:
                raise UserError(f"{source}: no column {', '.join(lacking)}; it needs {', '.join(columns)}")
            records = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source}: cannot read the index ({error}); png_masks is: {FORMATS['png_masks']}") from None
    for number, record in enumerate(records, 2):
        where = f"{source}: line {number}"
        try:
            key = (int(record["image_id"]), record["narrative_id"], int(record["phrase_id"]))
            score = float(record["score"]) if record.get("score") else None
        except (TypeError, ValueError):
            raise UserError(f"{where}: image_id and phrase_id must be whole numbers, score a number") from None
        _check_key(where, key, known, seen)
        if score is not None and not 0 <= score <= 1:
            raise UserError(f"{where}: score {record['score']} is no number in [0, 1]; give a confidence")
        if key not in wanted:
            counts["other_split"] += 1
            continue
        soft = _soft_mask(source.parent / (record["file"] or ""), where)
        _same_size(f"{where}: {record['file']}", soft.shape, *sizes[key[0]])
        mask = soft >= threshold
        yield *key, masks.encode(mask), (float(soft[mask].mean()) if mask.any() else 0.0) if score is None else score


def _soft_mask(path: Path, where: str) -> NDArray[np.float32]:
    """Values [H, W] in [0, 1] of a mask PNG: grey of 8 or 16 bits, or, of a palette or 1-bit PNG, whether the index is 0."""
    if not path.is_file():
        raise UserError(f"{where}: {path}: no such file; give its name relative to the CSV's folder")
    picture, _ = open_image(path, "mask")
    if picture.mode in ("P", "1"):
        return (np.asarray(picture) != 0).astype(np.float32)
    if picture.mode != "L" and not picture.mode.startswith("I"):
        raise BadImage(
            "mask in colours", f"{path}: a mask has one value a pixel, this one has mode {picture.mode}; save it as grey"
        )
    values, full = np.asarray(picture, np.float32), 255 if picture.mode == "L" else 65535
    highest = values.max(initial=0)
    if 0 < highest <= (1 if full == 255 else 255):
        raise UserError(
            f"{where}: {path}: its highest value is {highest:g} of {full}, so it would be empty; save foreground as {full}"
        )
    return values / np.float32(full)


# ------------------------------------------------------------------------------------------------------------- predictions
def _predictions(source: Path, every: pd.DataFrame, chosen: pd.DataFrame, counts: Counter[str]) -> Iterator[Row]:
    wanted, known, seen = _keys(chosen), _keys(every), set[Key]()
    sizes = {image_id: (height, width) for image_id, _, height, width, _ in images(chosen)}
    for number, row in enumerate(read_predictions(source)[[*KEY, "mask", "score"]].itertuples(index=False, name=None)):
        where, key, (code, score) = f"{source}: row {number}", row[:3], row[3:]
        _check_key(where, key, known, seen)
        if not 0 <= score <= 1:
            raise UserError(f"{where}: score {score} is no number in [0, 1]; give a confidence")
        if key not in wanted:
            counts["other_split"] += 1
            continue
        try:
            yield *key, masks.encode(masks.decode(code, *sizes[key[0]])), score
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
