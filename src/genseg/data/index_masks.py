"""A folder of images, a folder of index masks and the classes' names -> phrases (CamVid, VOC, PASCAL Context, ADE layouts).

A mask is a PNG of mode L, P (its palette is not looked at), 1 or 16-bit grey; its pixel values are line numbers, from 0, of
the class file. An image and its mask have the same stem, but for `mask_suffix`. One phrase for every class in an image; there
are no instances, so no phrase is plural.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genseg.artifacts.phrases import choose_images
from genseg.artifacts.seeds import derive_seed
from genseg.data import ImageRows, SemanticClass, Skip, Source, class_rows, masks_by_class
from genseg.data.images import BadImage, check_image, open_picture
from genseg.errors import UserError
from genseg.params import IndexMasks

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Job:
    image_id: int
    split: str
    image: str
    mask: str


def open_source(index_masks: IndexMasks, val_fraction: float, templates: list[str]) -> Source:
    """Pair images with masks; nothing is decoded yet.

    Raises:
        UserError: a folder or the class file is missing or malformed, or two images get the same id.
    """
    classes, unmarked = read_classes(Path(index_masks.classes), index_masks.ignore, index_masks.background)
    read = partial(read_image, classes, templates, frozenset(index_masks.ignore), index_masks.classes)
    source = Source(classes, [], read, [Path(index_masks.classes)])
    if unmarked:
        source.counts["classes marked neither `# thing` nor `# stuff`, taken as stuff"] += unmarked
    pairs: dict[str, list[tuple[str, str, str]]] = {}
    for split in ("test", "train"):
        pairs[split] = _pair(index_masks, split, source)
    in_test = {Path(image).resolve() for _, image, _ in pairs["test"]}
    for _, image, _ in [pair for pair in pairs["train"] if Path(pair[1]).resolve() in in_test]:
        source.skips.append(Skip("image", "image of both splits", f"{image} is a test image too", 1))
    pairs["train"] = [pair for pair in pairs["train"] if Path(pair[1]).resolve() not in in_test]
    ids = image_ids([(split, stem) for split, members in pairs.items() for stem, _, _ in members])
    val = choose_images(np.array([ids["train", stem] for stem, _, _ in pairs["train"]]), val_fraction, 0, "val")
    for split, members in pairs.items():
        for stem, image, mask in members:
            image_id = ids[split, stem]
            source.jobs.append(Job(image_id, "val" if split == "train" and image_id in val else split, image, mask))
    source.jobs.sort(key=lambda job: job.image_id)
    return source


def read_classes(path: Path, ignore: list[int], background: int | None) -> tuple[list[SemanticClass], int]:
    """Classes of a class file in index order, without the ignored indices, and how many have no mark.

    A line is a name, then perhaps `# thing` or `# stuff`. Without a mark a class is stuff: index masks tell no instances.

    Raises:
        UserError: no such file, an empty line between names, an unknown mark, a name twice, or `background` is no line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the class names ({error}); set data.index_masks.classes") from None
    classes: list[SemanticClass] = []
    unmarked = 0
    for index, line in enumerate(lines):
        name, _, mark = (part.strip() for part in line.partition("#"))
        if not name:
            raise UserError(f"{path}: line {index + 1}: no class name; line n names index n - 1, so no line may be empty")
        if mark not in ("", "thing", "stuff"):
            raise UserError(f"{path}: line {index + 1}: mark {mark!r} is neither thing nor stuff")
        if index in ignore:
            continue
        if name in [item.name for item in classes]:
            raise UserError(f"{path}: line {index + 1}: class {name!r} is named twice")
        unmarked += not mark and index != background
        classes.append(SemanticClass(index, name, mark == "thing", index == background))
    if background is not None and not any(item.background for item in classes):
        raise UserError(f"{path}: data.index_masks.background is {background}, which is no line here or is ignored")
    if not any(not item.background for item in classes):
        raise UserError(f"{path}: names no class; write one name a line, in index order")
    return classes, unmarked


def image_ids(keys: list[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """Image id of every (split, stem): the number that the stem is, if all are different numbers, else a 63-bit hash.

    Raises:
        UserError: two hashes collide.
    """
    if all(stem.isascii() and stem.isdigit() and len(stem) <= 18 for _, stem in keys):
        numbers = {key: int(key[1]) for key in keys}
        if len(set(numbers.values())) == len(keys):
            return numbers
    hashed: dict[int, tuple[str, str]] = {}
    for key in keys:
        other = hashed.setdefault(derive_seed(0, "image", *key), key)
        if other != key:
            raise UserError(f"images {other[1]} ({other[0]}) and {key[1]} ({key[0]}) hash to the same id; rename one of them")
    return {key: image_id for image_id, key in hashed.items()}


def _pair(index_masks: IndexMasks, split: str, source: Source) -> list[tuple[str, str, str]]:
    """(stem, image, mask) of one split, by stem; what has no partner is skipped and reported."""
    images_folder, masks_folder = _folder(index_masks, "images", split), _folder(index_masks, "masks", split)
    suffix = index_masks.mask_suffix
    same = Path(images_folder).resolve() == Path(masks_folder).resolve()
    images: dict[str, list[str]] = defaultdict(list)
    for name in sorted(item.name for item in Path(images_folder).iterdir()):
        if Path(name).suffix.lower() in IMAGE_SUFFIXES and not (same and name.endswith(suffix)):
            images[Path(name).stem].append(name)
    found = {item.name for item in Path(masks_folder).iterdir()}
    stems = sorted(images.keys() | {name.removesuffix(suffix) for name in found if name.endswith(suffix)})
    if index_masks.lists is not None:
        stems = _listed(index_masks.lists, split, source)
    pairs = []
    for stem in stems:
        mask = f"{stem}{suffix}"
        if stem not in images:
            source.skips.append(
                Skip("image", "no image of this name", f"{masks_folder}/{mask}: no image {stem}.* in {images_folder}", 1)
            )
        elif len(images[stem]) > 1:
            where = f"{images_folder}: {' and '.join(images[stem])} have the same stem"
            source.skips.append(Skip("image", "two images of one stem", where, 1))
        elif mask not in found:
            source.skips.append(
                Skip("image", "image without a mask", f"{images_folder}/{images[stem][0]}: no {masks_folder}/{mask}", 1)
            )
        else:
            pairs.append((stem, f"{images_folder}/{images[stem][0]}", f"{masks_folder}/{mask}"))
    return pairs


def _folder(index_masks: IndexMasks, key: str, split: str) -> str:
    folders = getattr(index_masks, key)
    if split not in folders:
        raise UserError(f"params: data.index_masks.{key} has no {split}; give the folder of both train and test")
    if not Path(folders[split]).is_dir():
        raise UserError(f"{folders[split]}: no such folder; set data.index_masks.{key}.{split}")
    return str(folders[split]).rstrip("/")


def _listed(lists: Mapping[Any, str], split: str, source: Source) -> list[str]:
    if split not in lists:
        raise UserError(f"params: data.index_masks.lists has no {split}; give a file for both train and test, or null")
    path = Path(lists[split])
    try:
        stems = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the list of images ({error}); set data.index_masks.lists.{split}") from None
    source.inputs.append(path)
    return sorted(set(stems))


def read_indices(path: str | Path) -> NDArray[np.int64]:
    """Class indices [H, W] of an index mask. Raises BadImage when it is missing, corrupt or a colour picture."""
    picture, _ = open_picture(path, "index mask")
    if picture.mode not in ("L", "P", "1") and not picture.mode.startswith("I"):
        message = (
            f"{path}: an index mask has one value a pixel, this one has mode {picture.mode}; save it as L, P or 16-bit PNG"
        )
        raise BadImage("index mask in colours", message)
    return np.asarray(picture).astype(np.int64)


def read_image(
    classes: list[SemanticClass], templates: list[str], ignore: frozenset[int], class_file: str, job: Job
) -> ImageRows:
    """Decode one image's mask and make a phrase for every class in it."""
    rows = ImageRows(job.image_id, job.split, job.image)
    try:
        height, width = check_image(job.image)
        indices = read_indices(job.mask)
        if indices.shape != (height, width):
            message = (
                f"{job.mask}: {indices.shape[0]} x {indices.shape[1]} pixels, its image {job.image} has {height} x {width}"
            )
            raise BadImage("image and mask differ in size", message)
        strange = sorted(set(np.unique(indices).tolist()) - {item.id for item in classes} - ignore)
        if strange:
            message = (
                f"{job.mask}: index {strange[0]} is no line of {class_file}; name it there or add it to data.index_masks.ignore"
            )
            raise BadImage("unknown class index", message)
    except BadImage as error:
        rows.skips.append(Skip("image", error.reason, str(error), 1))
        return rows
    rows.height, rows.width = height, width
    rows.class_masks = masks_by_class(indices, classes)
    rows.phrases = class_rows(rows, classes, templates, {}, set())
    rows.counts.update(images=1, narratives=1, segments=len(rows.phrases))
    return rows
