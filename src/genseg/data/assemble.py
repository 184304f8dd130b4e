"""Data assembly: reads a source image by image and writes the phrase table, class phrases, class list, report and manifest."""

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from genseg.artifacts import masks
from genseg.artifacts.files import write_json
from genseg.artifacts.manifest import is_current, read_manifest, write_manifest
from genseg.artifacts.phrases import SCHEMA, SPLITS, write_phrases
from genseg.data import PROGRESS_SECONDS, ImageRows, Source, class_phrase, coco_object, coco_panoptic, download, index_masks
from genseg.data.report import SkipSummary, skip_line, write_report
from genseg.data.scenes import write_scenes
from genseg.errors import UserError
from genseg.params import Params
from genseg.params.data import Data, PngFolders

_MIN_PARALLEL_IMAGES = 5000
"""Minimum number of images for which worker processes are started."""


def assemble(params: Params) -> dict[str, Any]:
    """Assemble the data of a study below `params.data_dir` and return the statistics of the report.

    Writes `phrases.parquet`, `class_phrases.parquet`, `classes.json`, `report.json`, `report.md`, `scenes/` (embedded data
    set only) and finally `manifest.json`. The bytes do not depend on the number of workers (`resources.data.threads`).

    Raises UserError if a top-level file is missing or invalid, or a split has no phrases.
    """
    directory, workers = params.data_dir, params.resources.data.threads
    manifest = directory / "manifest.json"

    # 1. Scan the source. Outputs are reused for generated scenes only: the images of other sources are not hashed.
    _check_inputs_outside(params.data, directory)
    if params.data.source == "scenes" and is_current(manifest, "data", params, []):
        return read_manifest(manifest)["statistics"]
    manifest.unlink(missing_ok=True)
    try:
        source = open_source(params.data, directory, workers)
    except PermissionError as error:
        raise UserError(f"{error.filename}: cannot read ({error.strerror}); check the permissions") from None

    # 2. Read the images.
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    class_columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    skipped: dict[tuple[str, str], SkipSummary] = defaultdict(SkipSummary)
    for skip in source.skips:
        skipped[skip.unit, skip.reason].add(skip)
    for rows in _progress(_read_images(source, workers), len(source.jobs), "images read"):
        counts[rows.split].update(rows.counts)
        for skip in rows.skips:
            skipped[skip.unit, skip.reason].add(skip)
        for phrase in rows.phrases:
            _append(columns, rows, phrase)
        if rows.class_masks is not None and rows.split != "train":
            empty_mask = masks.encode(np.zeros((rows.height, rows.width), bool))  # for classes that are not in the image
            for index, item in enumerate(source.classes):
                mask = rows.class_masks.get(item.id, empty_mask)
                _append(class_columns, rows, class_phrase("class", index, item, params.data.class_template, mask))

    # 3. Report skipped items and statistics.
    for (unit, reason), summary in sorted(skipped.items()):
        print(skip_line(unit, reason, summary), file=sys.stderr)
    phrases, class_phrases = _frame(columns), _frame(class_columns)
    notes = sum(counts.values(), Counter(source.counts))
    for statistic in ("images", "narratives", "ungrounded", "segments"):
        del notes[statistic]
    statistics = write_report(directory, params.data.source, phrases, counts, skipped, notes)
    for split in SPLITS:
        if not (phrases["split"] == split).any():
            remedy = "; raise data.val_fraction" if split == "val" else ""
            raise UserError(f"{directory}/report.md: no phrase is left for {split}; the report lists what was skipped{remedy}")

    # 4. Write the tables, then the manifest.
    write_phrases(phrases, directory / "phrases.parquet")
    write_phrases(class_phrases, directory / "class_phrases.parquet")
    write_json(directory / "classes.json", [vars(item) for item in source.classes])
    outputs = ["phrases.parquet", "class_phrases.parquet", "classes.json", "report.json", "report.md"]
    inputs = source.inputs
    if params.data.source == "scenes":  # the scenes are generated, so they are outputs
        inputs = []
        outputs.append("scenes")
    write_manifest(manifest, "data", params, inputs, [directory / name for name in outputs], statistics=statistics)
    return statistics


def open_source(data: Data, directory: Path, workers: int = 1) -> Source:
    """Scan the source that the params select. The embedded scenes are first generated in `directory`/scenes."""
    if data.index_masks is not None and data.source == "index_masks":
        return index_masks.open_source(data.index_masks, data.val_fraction, data.phrase_templates)
    if data.coco_object is not None and data.source == "coco_object":
        return coco_object.open_source(data.coco_object, data.val_fraction, data.phrase_templates)
    if data.scenes is not None and data.source == "scenes":
        root = directory / "scenes"
        write_scenes(data.scenes, root, workers)
        annotations = str(root / "annotations")
        folders = PngFolders(images=str(root), annotations=annotations, narratives=annotations)
        return coco_panoptic.open_source([folders], data.val_fraction)
    assert data.png is not None
    if data.png.download:
        download.fetch_png(data.png)
    return coco_panoptic.open_source([data.png, *data.png.more], data.val_fraction, data.png.classes)


def _check_inputs_outside(data: Data, directory: Path) -> None:
    """Raise UserError if an input is below the study's data directory, which Snakemake and DVC delete before a rerun."""
    inputs = getattr(data, data.source).model_dump(mode="json") if data.source != "scenes" else {}
    for value in _leaves(inputs):
        if isinstance(value, str) and Path(value).absolute().is_relative_to(directory.absolute()):
            raise UserError(f"{value}: {directory} is cleared before a rerun; move the inputs elsewhere, e.g. to data/inputs/")


def _leaves(document: Any) -> list[Any]:
    """Return the values in nested mappings and lists."""
    if isinstance(document, dict | list):
        return [leaf for value in (document.values() if isinstance(document, dict) else document) for leaf in _leaves(value)]
    return [document]


def _read_images(source: Source, workers: int) -> Iterator[ImageRows]:
    """Yield the rows of every job, in order."""
    if workers == 1 or len(source.jobs) < _MIN_PARALLEL_IMAGES:
        yield from map(source.read, source.jobs)
        return
    with get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(source.read, source.jobs, chunksize=16)


def _progress(items: Iterable[ImageRows], total: int, label: str) -> Iterator[ImageRows]:
    """Report progress on stderr: a bar on a terminal, otherwise lines."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=f"data: {label}")
        return
    start_time = last_time = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last_time >= PROGRESS_SECONDS or number == total:
            rate = number / max(now - start_time, 1e-9)
            print(f"data: {number:,} of {total:,} {label}, {rate:.1f} per second", file=sys.stderr, flush=True)
            last_time = now


def _append(columns: dict[str, list[Any]], rows: ImageRows, phrase: dict[str, Any]) -> None:
    """Append one phrase of an image to the columns of the phrase table."""
    for name in ("image_id", "split", "file_name", "height", "width"):
        columns[name].append(getattr(rows, name))
    for name, value in phrase.items():
        columns[name].append(value)


def _frame(columns: dict[str, list[Any]]) -> pd.DataFrame:
    frame = pd.DataFrame({name: values for name, values in columns.items() if name != "class_id"})
    return frame.assign(class_id=pd.array(columns["class_id"], dtype="Int64")).astype({"is_thing": bool, "is_plural": bool})
