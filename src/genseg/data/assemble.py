"""Reads a source image by image and writes the phrase table, the class phrases, the class list, the report and the manifest."""

from __future__ import annotations

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
from genseg.artifacts.manifest import code_hash, write_manifest
from genseg.artifacts.phrases import SCHEMA, write_phrases
from genseg.data import ImageRows, SemanticClass, Source, coco_object, coco_panoptic, download, index_masks
from genseg.data.report import Skipped, line, write_report
from genseg.errors import UserError
from genseg.params import Data, Params, Png

CODE = ("artifacts", "cli/data.py", "data")
"""What the manifest's code hash covers."""
_PARALLEL_FROM = 5000
"""Images from which other processes are worth their start."""
_REPORT_SECONDS = 10.0


def assemble(params: Params) -> dict[str, Any]:
    """Write everything below `params.data_dir`, the manifest last; returns the statistics of the report.

    Files: `phrases.parquet`, `class_phrases.parquet`, `classes.json`, `report.json`, `report.md`, `manifest.json`, and
    `scenes/` for the embedded data set. The bytes depend on the params' subtree `data` and on the files alone, not on the
    number of workers (`resources.data.threads`).

    Raises:
        UserError: a top-level file is missing or broken, or a split is left without a phrase.
    """
    started = time.time()
    directory = params.data_dir
    _refuse_inputs_inside(params.data, directory)
    (directory / "manifest.json").unlink(missing_ok=True)
    try:
        source = open_source(params.data, directory, params.resources["data"].threads)
    except PermissionError as error:
        raise UserError(f"{error.filename}: cannot read ({error.strerror}); check the permissions") from None
    class_texts = [params.data.class_template.replace("{name}", item.name) for item in source.classes]
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    class_columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    skipped: dict[tuple[str, str], Skipped] = defaultdict(Skipped)
    for skip in source.skips:
        skipped[skip.unit, skip.reason].add(skip)
    for rows in _progress(_read(source, params.resources["data"].threads), len(source.jobs), "images read"):
        counts[rows.split].update(rows.counts)
        for skip in rows.skips:
            skipped[skip.unit, skip.reason].add(skip)
        for phrase in rows.phrases:
            _append(columns, rows, phrase)
        if rows.class_masks is not None and rows.split != "train":
            for phrase in _class_phrases(rows, source.classes, class_texts):
                _append(class_columns, rows, phrase)
    for (unit, reason), item in sorted(skipped.items()):
        print(line(unit, reason, item), file=sys.stderr)
    phrases, class_phrases = _frame(columns), _frame(class_columns)
    notes = sum(counts.values(), Counter(source.counts))
    for known in ("images", "narratives", "ungrounded", "segments"):
        del notes[known]
    found = write_report(directory, params.data.source, phrases, counts, skipped, notes)
    for split in ("train", "val", "test"):
        if not (phrases["split"] == split).any():
            hint = "; raise data.val_fraction" if split == "val" else ""
            raise UserError(
                f"{directory}/report.md: no phrase is left for {split}; the report says what was skipped and why{hint}"
            )
    write_phrases(phrases, directory / "phrases.parquet")
    write_phrases(class_phrases, directory / "class_phrases.parquet")
    write_json(directory / "classes.json", [vars(item) for item in source.classes])
    outputs = [
        directory / name for name in ("phrases.parquet", "class_phrases.parquet", "classes.json", "report.json", "report.md")
    ]
    write_manifest(
        directory / "manifest.json",
        "data",
        params.subtree("data"),
        source.inputs if params.data.source != "scenes" else [],
        outputs + ([directory / "scenes"] if params.data.source == "scenes" else []),
        started,
        code=code_hash(*CODE),
        statistics=found,
    )
    return found


def open_source(data: Data, directory: Path, workers: int = 1) -> Source:
    """Look at the source that the params name; the embedded scenes are generated first, into `directory`/scenes."""
    if data.index_masks is not None and data.source == "index_masks":
        return index_masks.open_source(data.index_masks, data.val_fraction, data.phrase_templates)
    if data.coco_object is not None and data.source == "coco_object":
        return coco_object.open_source(data.coco_object, data.val_fraction, data.phrase_templates)
    if data.scenes is not None and data.source == "scenes":
        from genseg.data.scenes import write_scenes

        root = directory / "scenes"
        write_scenes(data.scenes, root, workers)
        annotations = str(root / "annotations")
        png = Png(images=str(root), annotations=annotations, narratives=annotations, download=False)
    else:
        assert data.png is not None
        png = data.png
        if png.download:
            download.fetch_png(png)
    return coco_panoptic.open_source(png, data.val_fraction)


def _refuse_inputs_inside(data: Data, directory: Path) -> None:
    """Inputs below the study's own folder would be deleted with it, by Snakemake and by DVC, before a re-run."""
    chosen = getattr(data, data.source).model_dump(mode="json") if data.source != "scenes" else {}
    values = [item for value in chosen.values() for item in (value.values() if isinstance(value, dict) else [value])]
    for value in values:
        if isinstance(value, str) and Path(value).absolute().is_relative_to(directory.absolute()):
            raise UserError(
                f"{value}: the study writes (and clears) {directory}; move its inputs elsewhere, e.g. to data/inputs/"
            )


def _read(source: Source, workers: int) -> Iterator[ImageRows]:
    """Rows of every job, in order."""
    if workers == 1 or len(source.jobs) < _PARALLEL_FROM:
        yield from map(source.read, source.jobs)
        return
    with get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(source.read, source.jobs, chunksize=16)


def _progress(items: Iterable[ImageRows], total: int, what: str) -> Iterator[ImageRows]:
    """A bar on a terminal, a plain line every ten seconds (and at the end) otherwise; both on stderr."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=f"data: {what}")
        return
    started = last = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= _REPORT_SECONDS or number == total:
            rate = number / max(now - started, 1e-9)
            print(f"data: {number:,} of {total:,} {what}, {rate:.1f} a second", file=sys.stderr, flush=True)
            last = now


def _class_phrases(rows: ImageRows, classes: list[SemanticClass], texts: list[str]) -> Iterator[dict[str, Any]]:
    """One row for every class of the list; the mask of a class that is not in the image is empty."""
    empty = masks.encode(np.zeros((rows.height, rows.width), bool))
    for index, item in enumerate(classes):
        yield {
            "narrative_id": "class",
            "phrase_id": index,
            "caption": None,
            "phrase": texts[index],
            "is_thing": item.is_thing,
            "is_plural": False,
            "class_id": item.id,
            "segment_ids": [],
            "mask": (rows.class_masks or {}).get(item.id, empty),
            "tags": ["background"] if item.background else [],
        }


def _append(columns: dict[str, list[Any]], rows: ImageRows, phrase: dict[str, Any]) -> None:
    common = {
        "image_id": rows.image_id,
        "split": rows.split,
        "file_name": rows.file_name,
        "height": rows.height,
        "width": rows.width,
    }
    for name, value in {**common, **phrase}.items():
        columns[name].append(value)


def _frame(columns: dict[str, list[Any]]) -> pd.DataFrame:
    frame = pd.DataFrame({name: values for name, values in columns.items() if name != "class_id"})
    return frame.assign(class_id=pd.array(columns["class_id"], dtype="Int64")).astype({"is_thing": bool, "is_plural": bool})
