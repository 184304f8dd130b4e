"""Formats with one file that lists all results: COCO results, predictions of this program, and mask PNGs listed in a CSV."""

import csv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from genseg.artifacts import masks
from genseg.artifacts.files import read_json
from genseg.artifacts.parquet import KEY
from genseg.artifacts.predictions import read_predictions
from genseg.data.images import BadImage, open_image
from genseg.errors import UserError
from genseg.interchange.importing.class_maps import class_rows
from genseg.interchange.importing.source import Key, Row, Source, check_score, check_size
from genseg.interchange.labels import NO_CLASS, Background, iterate_images, paint

ID_TYPES = {
    "image_id": (int, "an integer; make it again"),
    "category_id": (int, "an integer; make it again"),
    "phrase_id": (int, "an integer; make it again"),
    "narrative_id": (str, "a string; write it as in the phrase table"),
}
Results = dict[int, list[tuple[str, dict[str, Any]]]]
"""image_id -> its results, each preceded by its place in the source for error messages."""


def read_coco_results(source: Source) -> Iterator[Row]:
    """Yield predictions from a JSON list of {"image_id", "segmentation", "score", ...}.

    Results have "category_id" or, for phrases, "narrative_id" and "phrase_id". `segmentation` is a run-length code {"size":
    [height, width], "counts"} at native size, compressed or not; `score` is in [0, 1]. On an overlap the highest score wins.
    """
    results = read_json(source.path)
    if not isinstance(results, list) or not results:
        content = "an empty list" if results == [] else type(results).__name__
        raise UserError(f"{source.path}: expected a list of results, got {content}")
    of_phrases = isinstance(results[0], dict) and {"narrative_id", "phrase_id"} <= set(results[0])
    by_image = _check_results(source, results, ["narrative_id", "phrase_id"] if of_phrases else ["category_id"])
    return _phrase_rows(source, by_image) if of_phrases else _class_rows(source, by_image)


def _check_results(source: Source, results: list[Any], ids: list[str]) -> Results:
    """Check the fields of all results, except segmentations, and return the results for test images."""
    images = source.phrases.drop_duplicates("image_id")
    test_images = set(images.loc[images["split"] == "test", "image_id"])
    fields = ["image_id", *ids, "segmentation", "score"]
    by_image: Results = defaultdict(list)
    for number, result in enumerate(results):
        where = f"{source.path}: result {number}"
        if not isinstance(result, dict) or not set(fields) <= set(result):
            raise UserError(f"{where}: expected the fields {', '.join(fields)}")
        for name, (id_type, expected) in ID_TYPES.items():
            if name in result and type(result[name]) is not id_type:  # True is an int
                raise UserError(f"{where}: {name} {result[name]!r} is not {expected}")
        if result["image_id"] not in source.sizes:
            raise UserError(f"{where}: image_id {result['image_id']!r} is not an image of the study; use the study's images")
        check_score(where, result["score"])
        if result["image_id"] in test_images:
            by_image[result["image_id"]].append((where, result))
        else:
            source.other_split += 1
    return by_image


def _phrase_rows(source: Source, by_image: Results) -> Iterator[Row]:
    if source.options.background or source.options.numbering:
        raise UserError(f"{source.path}: results have phrase ids; leave out --background and --numbering")
    for image_id, results in by_image.items():
        for where, result in results:
            key: Key = (image_id, result["narrative_id"], result["phrase_id"])
            if source.accept_row(where, key, None):
                yield *key, masks.encode(_decode(where, result, *source.sizes[image_id])), float(result["score"])


def _class_rows(source: Source, by_image: Results) -> Iterator[Row]:
    # 1. Check the options.
    classes = source.classes
    rule, numbering = source.options.background or Background("none"), source.options.numbering or "class_id"
    if rule.kind == "power":
        raise UserError("--background power: not available for instances; give threshold:V or none")
    source.settings |= {"background": str(rule), "numbering": numbering}
    indices = classes.indices_by_number(numbering)

    # 2. Label the images.
    for image_id, name, height, width, rows in iterate_images(source.class_phrases):
        results = by_image[image_id]
        if not results:
            source.missing.append(f"result for image {name}")
        for where, result in results:
            if result["category_id"] not in indices:
                category = f"category_id {result['category_id']!r}"
                raise UserError(f"{where}: {category} is not a class of the study (--numbering gives the meaning of ids)")
        scores = [float(result["score"]) for _, result in results]
        owner = paint([_decode(where, result, height, width) for where, result in results], scores, height, width)
        values = np.array([*scores, 0.0])[owner]  # NO_CLASS selects the last
        owner[rule.winner(values[None]) == NO_CLASS] = NO_CLASS
        labels = np.array([*(indices[result["category_id"]] for _, result in results), classes.background_label], np.int64)
        yield from class_rows(rows, labels[owner], values)


def _decode(where: str, result: dict[str, Any], height: int, width: int) -> masks.Mask:
    """Return the mask [H, W] of a compressed or uncompressed run-length code."""
    segmentation = result["segmentation"]
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= set(segmentation):
        remedy = "convert polygons with pycocotools' frPyObjects and merge"
        raise UserError(f"{where}: segmentation is not a run-length code; {remedy}")
    size, code = segmentation["size"], segmentation["counts"]
    if size != [height, width]:
        raise UserError(f"{where}: segmentation of size {size}, but the image has [{height}, {width}]; save it at that size")
    try:
        if isinstance(code, list):
            code = coco_mask.frPyObjects({"size": [height, width], "counts": code}, height, width)["counts"]
        return masks.decode(code.encode() if isinstance(code, str) else code, height, width)
    except (UserError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: segmentation: {' '.join(str(error).split())[:200]}; make it again") from None


def read_prediction_table(source: Source) -> Iterator[Row]:
    """Yield checked predictions from a Parquet file (`artifacts.predictions`), with canonical run-length codes."""
    rows = read_predictions(source.path)[[*KEY, "mask", "score"]]
    for number, (image_id, narrative_id, phrase_id, code, score) in enumerate(rows.itertuples(index=False, name=None)):
        where, key = f"{source.path}: row {number}", (image_id, narrative_id, phrase_id)
        if source.accept_row(where, key, score):
            try:
                yield *key, masks.encode(masks.decode(code, *source.sizes[image_id])), score
            except UserError as error:
                raise UserError(f"{where}: {error}") from None


def read_png_masks(source: Source) -> Iterator[Row]:
    """Yield predictions from mask PNGs at native size.

    The CSV has the columns image_id, narrative_id, phrase_id, file (relative to the CSV's folder) and, optionally, score in
    [0, 1]. A PNG is a soft mask (8-bit or 16-bit grey, divided by 255 or 65535) or a binary mask (1-bit or palette; all values
    but 0 are foreground). The default score is the mean of the soft mask inside the mask.
    """
    threshold = 0.5 if source.options.threshold is None else source.options.threshold
    source.settings["threshold"] = threshold
    for line, record in enumerate(_read_csv(source.path), start=2):
        where = f"{source.path}: line {line}"
        try:
            key: Key = (int(record["image_id"]), record["narrative_id"], int(record["phrase_id"]))
            score = float(record["score"]) if record.get("score") else None
        except (TypeError, ValueError):
            raise UserError(f"{where}: image_id and phrase_id must be integers, and score a number") from None
        if source.accept_row(where, key, score):
            soft = _soft_mask(source.path.parent / (record["file"] or ""), where)
            check_size(f"{where}: {record['file']}", soft.shape, *source.sizes[key[0]])
            mask = soft >= threshold
            if score is None:
                score = float(soft[mask].mean()) if mask.any() else 0.0
            yield *key, masks.encode(mask), score


def _read_csv(path: Path) -> list[dict[str, str]]:
    columns = [*KEY, "file"]
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            missing = [name for name in columns if name not in (reader.fieldnames or [])]
            if missing:
                raise UserError(f"{path}: no column {', '.join(missing)}; the required columns are {', '.join(columns)}")
            return list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV file ({error}); save it as UTF-8 text") from None


def _soft_mask(path: Path, where: str) -> NDArray[np.float32]:
    """Return the values [H, W] of a mask PNG, in [0, 1]; 0 or 1 for a palette or 1-bit PNG."""
    if not path.is_file():
        raise UserError(f"{where}: {path}: no such file; give its name relative to the CSV's folder")
    picture, _ = open_image(path, "mask")
    if picture.mode in ("P", "1"):
        return (np.asarray(picture) != 0).astype(np.float32)
    if picture.mode != "L" and not picture.mode.startswith("I"):
        raise BadImage(
            "mask in colour", f"{path}: expected one value per pixel, got mode {picture.mode}; save the mask as grey"
        )
    values, largest = np.asarray(picture, np.float32), 255 if picture.mode == "L" else 65535
    highest = values.max(initial=0)
    if 0 < highest <= (1 if largest == 255 else 255):
        raise UserError(
            f"{where}: {path}: the highest value is {highest:g} of {largest}, so the mask would be empty; save foreground as"
            f" {largest}"
        )
    return values / np.float32(largest)
