"""How much data a study has: from its phrase table where it was assembled, else from what is published or drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from genseg.artifacts.phrases import read_phrases
from genseg.baselines.make import threshold_rows
from genseg.data.index_masks import read_classes
from genseg.data.scenes import SHAPES, STUFF, sample_scenes
from genseg.errors import UserError
from genseg.interchange.labels import class_list
from genseg.latents import images_by_size
from genseg.models.backbone import load_component
from genseg.models.text import token_ids
from genseg.params import IndexMasks, Params
from genseg.refine.layout import refined_tables
from genseg.sampling.runs import Run, run_rows, study_runs

TOKENS = 6
"""Tokens of a phrase where none can be counted: four words, start and end (5.7 in the embedded scenes)."""
PNG_NARRATIVES = {"train": 133_103, "test": 8_533}
PNG_PHRASES = 726_445
"""GS, section 4.1: narratives of train and val2017, and grounded phrases of both."""
COCO_IMAGES = {"train": 118_287, "test": 5_000}
PANOPTIC_CLASSES = 133
COCO_CLASSES = 80
COCO_CLASSES_AN_IMAGE = 3.5
"""Lin et al. 2014, section 5: categories in an image of COCO, on average."""
CAMVID_IMAGES = {"train": 367, "test": 101}
"""The usual split of CamVid; its val part is what `params/camvid.yaml` tests on."""
SCENES_DRAWN = 24
ROW_BYTES = {"scenes": 85, "png": 400, "coco_object": 400, "index_masks": 400}
"""Of a row with a mask, compressed, until there is a table to look at: its run-length code is most of it."""
CLASS_PHRASES = Run("class_phrases", "class_phrases", "gs", "class_phrases")
TABLES = ("phrases.parquet", "class_phrases.parquet")


@dataclass(frozen=True)
class Counts:
    """Counts of a study and where they come from."""

    source: str
    exact: bool
    """Counted in the study's own tables; else published, estimated or bounded, as `source` says."""
    image_latents: dict[int, int]
    """Images to encode, by size."""
    train: int
    val: int
    rows: dict[str, int]
    """Phrases of a run, by `Run.phrases`: test, grid, val, permutable, class_phrases."""
    attended: dict[str, int]
    """What the attention baselines look at: test_images, val_images; test_texts, val_texts: pairs of an image and one of its
    phrases or classes; most_texts: of one image (the mean where they are not counted)."""
    refined: dict[str, int]
    """Test's part whose masks are refined, each baseline's: images, phrases, class_phrases."""
    texts: int
    """Distinct phrases to encode."""
    tokens: int
    """Of all distinct phrases together."""
    picture_bytes: int | None
    """Of the images as files, where known."""
    row_bytes: float
    """Of a row of a table with its mask."""


def count_data(params: Params, source: str | None) -> Counts:
    """Counts of the study's data.

    Args:
        source: directory of the backbone, whose tokenizer counts tokens; None when it is not at hand.

    Raises:
        UserError: neither a table nor anything published or readable tells how much data there is.
    """
    tables = [params.data_dir / name for name in TABLES]
    return _from_tables(params, tables, source) if all(path.exists() for path in tables) else _before_assembly(params)


def _from_tables(params: Params, tables: list[Path], source: str | None) -> Counts:
    phrases, class_phrases = map(read_phrases, tables)
    runs = {run.phrases: run for run in study_runs(params)}
    texts = sorted({"", *phrases["phrase"], *class_phrases["phrase"]})
    tokens, exact = TOKENS * len(texts), False
    if source is not None:
        from transformers import CLIPTokenizer

        tokenizer = load_component(CLIPTokenizer, source, "tokenizer", None)
        tokens, exact = sum(len(token_ids(tokenizer, text, 77)[0]) for text in texts), True
    files = {Path(name) for name in phrases["file_name"].dropna()}
    test = phrases[phrases["split"] == "test"]
    pairs = {"val": threshold_rows(params, phrases[phrases["split"] == "val"])}
    pairs["test"] = pd.concat([test, run_rows(params, CLASS_PHRASES, phrases, class_phrases)])
    texts_of = {part: rows.drop_duplicates(["image_id", "phrase"]).groupby("image_id").size() for part, rows in pairs.items()}
    refined = refined_tables(params, phrases, class_phrases, class_list(class_phrases, str(tables[1])).background)
    return Counts(
        source=f"counted in {tables[0]}" + ("" if exact else f"; {TOKENS} tokens a phrase assumed"),
        exact=exact,
        image_latents={size: len(images) for size, images in images_by_size(params, phrases, class_phrases).items()},
        train=int((phrases["split"] == "train").sum()),
        val=int((phrases["split"] == "val").sum()),
        rows={name: len(run_rows(params, run, phrases, class_phrases)) for name, run in runs.items()},
        attended={
            **{f"{part}_images": len(found) for part, found in texts_of.items()},
            **{f"{part}_texts": int(found.sum()) for part, found in texts_of.items()},
            "most_texts": int(max(found.max() for found in texts_of.values())),
        },
        refined={
            "images": len(set(refined[False]["image_id"]) | set(refined[True]["image_id"])),
            "phrases": len(refined[False]),
            "class_phrases": len(refined[True]),
        },
        texts=len(texts),
        tokens=tokens,
        picture_bytes=sum(path.stat().st_size for path in files) if all(path.exists() for path in files) else None,
        row_bytes=sum(path.stat().st_size for path in tables) / (len(phrases) + len(class_phrases)),
    )


def _before_assembly(params: Params) -> Counts:
    data = params.data
    templates = len(data.phrase_templates)
    picture_bytes, texts = None, None
    if data.source == "png":
        images, classes = COCO_IMAGES, PANOPTIC_CLASSES
        phrases = {name: PNG_PHRASES * part / sum(PNG_NARRATIVES.values()) for name, part in PNG_NARRATIVES.items()}
        source = "published counts of COCO 2017 and PNG (GS, section 4.1): an upper bound for a part of them"
    elif data.source == "coco_object":
        images, classes = COCO_IMAGES, COCO_CLASSES
        phrases = {name: COCO_CLASSES_AN_IMAGE * count for name, count in images.items()}
        source, texts = "published counts of COCO 2017", COCO_CLASSES * (templates + 1) + 1
    elif data.scenes is not None and data.source == "scenes":
        images, classes = {"train": data.scenes.train_images, "test": data.scenes.test_images}, len(SHAPES) + len(STUFF)
        drawn = {name: sample_scenes(data.scenes, split, SCENES_DRAWN) for name, split in (("train", "train"), ("test", "val"))}
        phrases = {name: images[name] * drawn[name][0] for name in images}
        picture_bytes = round(sum(images[name] * drawn[name][1] for name in images))
        source = f"{SCENES_DRAWN} scenes of each split, drawn and scaled up"
    else:
        assert data.index_masks is not None
        folder = data.index_masks
        listed = read_classes(Path(folder.classes), folder.ignore, folder.background)[0]
        classes = sum(not item.background for item in listed)
        if all(Path(item).exists() for item in (folder.lists or folder.images).values()):
            images, source = {name: _images_of(folder, name) for name in folder.images}, "the images that are there"
        elif "camvid" in folder.classes:
            images, source = CAMVID_IMAGES, "published counts of CamVid"
        else:
            raise UserError(f"{folder.images['train']}: not there, so nothing tells how many images; put the data there first")
        phrases = {name: classes * count for name, count in images.items()}
        source, texts = f"{source}; every class in every image, an upper bound", classes * (templates + 1) + 1
    test, train = round(phrases["test"]), round(phrases["train"])
    val = round(data.val_fraction * train)
    grid_images = max(1, round(params.sample.grid_fraction * images["test"]))
    latents = dict.fromkeys(params.sample.sizes(), grid_images)
    latents[params.sample.main.size] = images["test"]
    if params.sample.main.size != params.train.size:
        latents[params.sample.main.size] += round(params.sample.select_fraction * data.val_fraction * images["train"])
    latents[params.train.size] = latents.get(params.train.size, 0) + images["train"]
    val_images = min(params.baselines.val_images, round(data.val_fraction * images["train"]))
    attended = {
        "test_images": images["test"],
        "val_images": val_images,
        "test_texts": test + classes * images["test"],
        "val_texts": round(val_images * phrases["train"] / images["train"]),
        "most_texts": math.ceil(test / images["test"]) + classes,
    }
    refined_images = max(1, round(params.refine.test_fraction * images["test"]))
    if texts is None:
        texts = train + test + classes + 1
        source += "; every phrase taken to be distinct"
    return Counts(
        source=f"{source}; {TOKENS} tokens a phrase",
        exact=False,
        image_latents=dict(sorted(latents.items())),
        train=train - val,
        val=val,
        rows={
            "test": test,
            "grid": round(test * grid_images / images["test"]),
            "val": round(params.sample.select_fraction * val),
            "permutable": test,
            "class_phrases": classes * images["test"],
        },
        attended=attended,
        refined={
            "images": refined_images,
            "phrases": round(test * refined_images / images["test"]),
            "class_phrases": classes * refined_images,
        },
        texts=texts,
        tokens=TOKENS * texts,
        picture_bytes=picture_bytes,
        row_bytes=ROW_BYTES[data.source],
    )


def _images_of(folder: IndexMasks, split: Literal["train", "test"]) -> int:
    if folder.lists is not None:
        return len(Path(folder.lists[split]).read_text().split())
    return len(list(Path(folder.images[split]).iterdir()))
