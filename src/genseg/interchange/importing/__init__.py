"""Outputs of other methods, converted to predictions.

Class maps of another size than the image are resized bilinearly to its native size. Every pixel then gets one class by the
producer's own background rule, which is recorded in the metadata. A class without pixels gets an empty mask with score 0.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import is_background, read_phrases
from genseg.artifacts.predictions import write_predictions
from genseg.errors import UserError
from genseg.interchange.importing.class_maps import read_clip_es, read_index_masks, read_irn, read_mmseg
from genseg.interchange.importing.result_lists import read_coco_results, read_png_masks, read_prediction_table
from genseg.interchange.importing.source import ImportOptions, Row, Source


@dataclass(frozen=True)
class Format:
    """A format: its layout in one line for the help, and its reader, which yields the rows for test phrases."""

    layout: str
    read: Callable[[Source], Iterator[Row]]
    is_file: bool = False
    """Whether the source is a file; else it is a folder."""


FORMATS = {
    "irn": Format("folder of {name}.npy, a pickled dict of `keys` (foreground classes from 0), `high_res` [K, h, w]", read_irn),
    "clip_es": Format("folder of {name}.npy, as irn with `attn_highres` instead of `high_res`", read_clip_es),
    "index_masks": Format("folder of {name}.png, grey or palette: class numbers, 0 background, 255 ignored", read_index_masks),
    "mmseg": Format("folder of {name}.npy or .npz, logits [C, h, w] of C foreground classes, or background first", read_mmseg),
    "coco_results": Format(
        "JSON list of {image_id, segmentation (RLE), score} with category_id, or with narrative_id and phrase_id",
        read_coco_results,
        is_file=True,
    ),
    "png_masks": Format(
        "CSV of image_id, narrative_id, phrase_id, file (, score): one binary or soft mask PNG per phrase",
        read_png_masks,
        is_file=True,
    ),
    "predictions": Format(
        "Parquet of image_id, narrative_id, phrase_id, mask (RLE counts at native size), score",
        read_prediction_table,
        is_file=True,
    ),
}
FORMATS_WITH_OPTION = {
    "array": ("irn", "clip_es"),
    "background": ("irn", "clip_es", "mmseg", "coco_results"),
    "numbering": ("index_masks", "coco_results"),
    "probabilities": ("mmseg",),
    "threshold": ("png_masks",),
}


def import_predictions(options: ImportOptions, path: Path, targets: dict[Path, Path]) -> dict[Path, Counter[str]]:
    """Convert a source and write predictions for the study's test phrases, its class phrases, or both.

    Maps, index masks and COCO instances are for class phrases. Rows with narrative_id and phrase_id are for either.

    Args:
        targets: the tables of the phrases and of the class phrases, in this order, each with the file for its predictions.

    Returns:
        Counts for every predictions file written: `predictions`, `images`, `missing` images (phrases, if rows have phrase ids),
        and `other_split` rows of the source.

    Raises:
        UserError: the format does not have an option, or a file is missing, malformed, of the wrong size or for unknown ids.
            Nothing is written in this case.
    """
    # 1. Check the options and the source.
    form = FORMATS[options.format]
    for name, formats in FORMATS_WITH_OPTION.items():
        if getattr(options, name) not in (None, False) and options.format not in formats:
            raise UserError(f"--{name}: format {options.format} does not have this option; leave it out")
    if not (path.is_file() if form.is_file else path.is_dir()):
        raise UserError(f"{path}: no such file or folder; {options.format} expects a {form.layout}")

    # 2. Read the source.
    tables = [read_phrases(table) for table in targets]
    tests = [table[table["split"] == "test"] for table in tables]
    settings = {"format": options.format, "source": str(path)}
    source = Source(path, options, pd.concat(tables, ignore_index=True), tests[1], list(targets)[1], settings)
    frame = pd.DataFrame(list(form.read(source)), columns=[*KEY, "mask", "score"])

    # 3. Split the rows by table, and check that no image or phrase is missing.
    keys = pd.MultiIndex.from_frame(frame[KEY])
    parts = [frame[keys.isin(pd.MultiIndex.from_frame(test[KEY]))] for test in tests]
    missing = source.missing
    if not missing:
        for test, part in zip(tests, parts, strict=True):
            expected = pd.MultiIndex.from_frame(test.loc[~is_background(test), KEY] if len(part) else part[KEY])
            unpredicted = expected[~expected.isin(keys)].sort_values()
            missing += [f"mask for phrase {key} (image_id, narrative_id, phrase_id)" for key in unpredicted]
    if missing and not options.allow_missing:
        more = f", and {len(missing) - 1} more are missing" if len(missing) > 1 else ""
        raise UserError(f"{path}: no {missing[0]}{more}; add them, or count them as IoU 0 with --allow-missing")
    if frame.empty:
        raise UserError(f"{path}: no predictions for test phrases of {' or '.join(map(str, targets))}")

    # 4. Write the predictions.
    counts = {}
    for out, part in zip(targets.values(), parts, strict=True):
        if len(part):
            write_predictions(part, out, imported=json.dumps(settings, sort_keys=True))
            images = part["image_id"].nunique()
            counts[out] = Counter(predictions=len(part), images=images, missing=len(missing), other_split=source.other_split)
    return counts
