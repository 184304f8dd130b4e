"""Amount of data of a study, counted in its phrase tables or estimated from published counts or sampled scenes."""

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from transformers import CLIPTokenizer

from genseg.artifacts.phrases import read_phrases
from genseg.baselines.make import threshold_rows
from genseg.data.index_masks import read_classes
from genseg.data.scenes import SHAPES, STUFF, sample_scenes
from genseg.errors import UserError
from genseg.interchange.labels import class_list
from genseg.latents import images_by_size
from genseg.models.backbone import load_component
from genseg.models.text import token_ids
from genseg.params import Params
from genseg.params.data import Data
from genseg.refine.layout import refined_images, refined_tables
from genseg.sampling.runs import Run, run_rows

TOKENS = 6  # assumed per phrase if not counted: four words, start and end (5.7 in the embedded scenes)
PNG_NARRATIVES = {"train": 133_103, "test": 8_533}  # GS, section 4.1
PNG_PHRASES = 726_445  # grounded phrases of train2017 and val2017 together; GS, section 4.1
COCO_IMAGES = {"train": 118_287, "test": 5_000}
PANOPTIC_CLASSES = 133
COCO_CLASSES = 80
COCO_CLASSES_PER_IMAGE = 3.5  # mean number of categories per image; Lin et al. 2014, section 5
MASKED_IMAGES = {
    "camvid": {"train": 367, "test": 101},
    "voc": {"train": 1464, "test": 1449},
    "pascal_context": {"train": 4998, "test": 5105},
    "coco_object": COCO_IMAGES,
}
"""Published numbers of images with index masks by the name of the class file; the published val part is the study's test."""
SCENES_DRAWN = 24  # scenes sampled per split to estimate the counts of the embedded data set
ROW_BYTES = {"scenes": 85, "png": 400, "coco_object": 400, "index_masks": 400}
"""Estimated compressed bytes of a table row by data source; most of them encode the mask."""
PHRASES = ("test", "permutable", "class_phrases", "grid", "val")  # values of `Run.phrases`, counted even if no run has them
TABLES = ("phrases.parquet", "class_phrases.parquet")


@dataclass(frozen=True)
class Counts:
    """Counts of a study's data; `train` and `val` are the phrases of these splits."""

    source: str
    exact: bool  # counted in the study's own tables with its tokenizer
    image_latents: dict[int, int]  # images to encode, by size
    train: int
    val: int
    rows: dict[str, int]  # number of phrases by `Run.phrases`
    class_rows: int  # rows of the table of class phrases, of which mIoU may need a part or none
    attended: dict[str, int]
    """Input of the attention baselines: test_images, val_images; test_texts, val_texts (pairs of an image and one of its
    phrases or classes); test_captions, val_captions (the same with its captions instead of its phrases); most_texts (maximum
    number of texts of one image, or the mean in estimates)."""
    refined: dict[str, int]  # part of test that is refined, per baseline: images, phrases, class_phrases
    texts: int  # distinct phrases to encode
    tokens: int  # tokens of all distinct phrases together
    picture_bytes: int | None  # bytes of the image files; None if unknown
    row_bytes: float  # mean bytes of a table row with its mask

    @property
    def basis(self) -> str:
        """Whether sizes computed from the counts are exact or estimates, as text."""
        return "exact" if self.exact else "from estimated counts"


def count_data(params: Params, source: str | None) -> Counts:
    """Return the counts of the study's data; `source` is the local directory of the backbone, whose tokenizer counts tokens.

    Raises:
        UserError: there are no tables, and nothing to estimate from (published counts, class file and images).
    """
    tables = [params.data_dir / name for name in TABLES]
    return _count_tables(params, tables, source) if all(path.exists() for path in tables) else _estimate_counts(params)


def _count_tables(params: Params, tables: list[Path], source: str | None) -> Counts:
    # 1. Read the tables and count distinct texts and their tokens.
    phrases, class_phrases = map(read_phrases, tables)
    splits = {split: phrases[phrases["split"] == split] for split in ("train", "val", "test")}
    texts = sorted({"", *phrases["phrase"], *class_phrases["phrase"]})
    tokens = TOKENS * len(texts)
    if source is not None:
        tokenizer = load_component(CLIPTokenizer, source, "tokenizer", None)
        tokens = sum(len(token_ids(tokenizer, text, 77)[0]) for text in texts)

    # 2. Select the rows of runs, of the attention baselines and of refinement.
    runs = [Run.model_validate({"name": part, "role": "main", "method": "gs", "phrases": part}) for part in PHRASES]
    rows = {run.phrases: run_rows(params, run, phrases, class_phrases) for run in runs}
    attended = {"val": threshold_rows(params, splits["val"]), "test": pd.concat([splits["test"], rows["class_phrases"]])}
    captions = {part: table.assign(phrase=table["caption"].fillna(table["phrase"])) for part, table in attended.items()}
    refined = refined_tables(params, phrases, class_phrases, class_list(class_phrases, str(tables[1])).background)

    # 3. Count.
    files = {Path(name) for name in phrases["file_name"].dropna()}
    unique = {part: table.drop_duplicates(["image_id", "phrase"]) for part, table in attended.items()}
    per_image = {part: table.groupby("image_id").size() for part, table in unique.items()}
    images = {f"{part}_images": len(sizes) for part, sizes in per_image.items()}
    pairs = {f"{part}_captions": len(table.drop_duplicates(["image_id", "phrase"])) for part, table in captions.items()}
    pairs |= {f"{part}_texts": int(sizes.sum()) for part, sizes in per_image.items()}
    return Counts(
        source=f"counted in {tables[0]}" + (f"; assuming {TOKENS} tokens per phrase" if source is None else ""),
        exact=source is not None,
        image_latents={size: len(images) for size, images in images_by_size(params, phrases, class_phrases).items()},
        train=len(splits["train"]),
        val=len(splits["val"]),
        rows={part: len(table) for part, table in rows.items()},
        class_rows=len(class_phrases),
        attended=images | pairs | {"most_texts": int(max(sizes.max() for sizes in per_image.values()))},
        refined={
            "images": len(refined_images(params, class_phrases)),
            "phrases": len(refined[False]),
            "class_phrases": len(refined[True]),
        },
        texts=len(texts),
        tokens=tokens,
        picture_bytes=sum(path.stat().st_size for path in files) if all(path.exists() for path in files) else None,
        row_bytes=sum(path.stat().st_size for path in tables) / (len(phrases) + len(class_phrases)),
    )


@dataclass(frozen=True)
class _Estimate:
    """Estimated counts of a data set; its train split includes val."""

    source: str
    images: dict[str, int]
    phrases: dict[str, float]
    classes: int
    texts: int | None = None  # distinct texts; None if unknown
    picture_bytes: int | None = None
    captions: float = 1.0  # captions per image


def _estimate_counts(params: Params) -> Counts:
    estimate, sample = _estimate_data(params.data), params.sample

    # 1. Split the phrases.
    images, classes = estimate.images, estimate.classes
    test, train = round(estimate.phrases["test"]), round(estimate.phrases["train"])
    val = round(params.data.val_fraction * train)
    val_images = min(params.baselines.val_images, round(params.data.val_fraction * images["train"]))
    grid_images = max(1, round(sample.grid_fraction * images["test"]))
    refined = max(1, round(params.refine.test_fraction * images["test"]))
    scored = max(1, round(params.score.miou * images["test"])) if params.score.miou else 0  # images on which mIoU is scored

    # 2. Count the images to encode at each size.
    latents = dict.fromkeys(sample.sizes(), grid_images) | {sample.main.size: images["test"]}
    if sample.main.size != params.train.size:
        latents[sample.main.size] += round(sample.select_fraction * params.data.val_fraction * images["train"])
    latents[params.train.size] = latents.get(params.train.size, 0) + images["train"]

    # 3. Count distinct texts.
    source, texts = estimate.source, estimate.texts
    if texts is None:
        texts = train + test + classes + 1
        source += "; assuming that all phrases are distinct"
    return Counts(
        source=f"{source}; assuming {TOKENS} tokens per phrase",
        exact=False,
        image_latents=dict(sorted(latents.items())),
        train=train - val,
        val=val,
        rows={
            "test": test,
            "grid": round(test * grid_images / images["test"]),
            "val": round(sample.select_fraction * val),
            "permutable": test,
            "class_phrases": classes * scored,
        },
        class_rows=classes * images["test"],
        attended={
            "test_images": images["test"],
            "val_images": val_images,
            "test_texts": test + classes * scored,
            "test_captions": round(estimate.captions * images["test"]) + classes * scored,
            "val_captions": round(estimate.captions * val_images),
            "val_texts": round(val_images * estimate.phrases["train"] / images["train"]),
            "most_texts": math.ceil(test / images["test"]) + (classes if scored else 0),
        },
        refined={
            "images": refined,
            "phrases": round(test * refined / images["test"]),
            "class_phrases": classes * min(refined, scored),
        },
        texts=texts,
        tokens=TOKENS * texts,
        picture_bytes=estimate.picture_bytes,
        row_bytes=ROW_BYTES[params.data.source],
    )


def _estimate_data(data: Data) -> _Estimate:
    templates = len(data.phrase_templates)
    if data.source == "png":
        source = "published counts of COCO 2017 and PNG (GS, section 4.1), an upper bound for a subset"
        phrases = {split: PNG_PHRASES * count / sum(PNG_NARRATIVES.values()) for split, count in PNG_NARRATIVES.items()}
        captions = PNG_NARRATIVES["test"] / COCO_IMAGES["test"]
        return _Estimate(source, COCO_IMAGES, phrases, PANOPTIC_CLASSES, captions=captions)
    if data.source == "coco_object":
        phrases = {split: COCO_CLASSES_PER_IMAGE * count for split, count in COCO_IMAGES.items()}
        texts = COCO_CLASSES * (templates + 1) + 1
        return _Estimate("published counts of COCO 2017", COCO_IMAGES, phrases, COCO_CLASSES, texts)
    if data.source == "scenes":
        assert data.scenes is not None
        images = {"train": data.scenes.train_images, "test": data.scenes.test_images}
        train, test = (sample_scenes(data.scenes, split, SCENES_DRAWN) for split in ("train", "val"))
        return _Estimate(
            source=f"extrapolated from {SCENES_DRAWN} scenes of each split",
            images=images,
            phrases={"train": images["train"] * train[0], "test": images["test"] * test[0]},
            classes=len(SHAPES) + len(STUFF),
            picture_bytes=round(images["train"] * train[1] + images["test"] * test[1]),
        )
    folders = data.index_masks
    assert folders is not None
    listed = read_classes(Path(folders.classes), folders.ignore, folders.background)[0]
    classes = sum(not item.background for item in listed)
    paths = {split: Path(path) for split, path in (folders.lists or folders.images).items()}
    if all(path.exists() for path in paths.values()):
        source, images = "counted images", dict[str, int]()
        for split, path in paths.items():
            images[split] = len(path.read_text().split()) if folders.lists else len(list(path.iterdir()))
    elif (name := Path(folders.classes).stem) in MASKED_IMAGES:
        source, images = f"published counts of {name}", MASKED_IMAGES[name]
    else:
        raise UserError(f"{folders.images['train']}: not found, so the number of images is unknown; add the data first")
    phrases = {split: float(classes * count) for split, count in images.items()}
    source += "; every class in every image (upper bound)"
    return _Estimate(source, images, phrases, classes, classes * (templates + 1) + 1)
