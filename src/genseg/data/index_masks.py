"""Folders of images and index masks, and a class file -> phrases (layouts of CamVid, VOC, PASCAL Context, ADE, COCO-Stuff).

A mask is a PNG of mode L, P (the palette is ignored), 1 or 16-bit grey. The id of a class is its line number in the class file,
counted from 0. It is also its pixel value, unless the line lists other values. The name of a mask is the stem of its image
followed by `mask_suffix`. Every class in an image becomes a phrase; there are no instances, so no phrase is plural.
"""

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
from genseg.data.images import BadImage, open_image, read_labels
from genseg.errors import UserError
from genseg.params.data import IndexMasks

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_IGNORED = -1


@dataclass(frozen=True)
class Job:
    """An image file and its mask."""

    image_id: int
    split: str
    image: str
    mask: str


def open_source(index_masks: IndexMasks, val_fraction: float, templates: list[str]) -> Source:
    """Pair images with masks.

    Raises UserError if a folder or the class file is missing or malformed, or two images have the same id.
    """
    classes, values, unmarked = read_classes(Path(index_masks.classes), index_masks.ignore, index_masks.background)
    values |= dict.fromkeys(index_masks.ignore, _IGNORED)
    read = partial(read_image, classes, templates, values, index_masks.classes)
    source = Source(classes, [], read, [Path(index_masks.classes)])
    if unmarked:
        source.counts["classes without a mark `# thing` or `# stuff`, treated as stuff"] += unmarked
    pairs = {split: _pair_files(index_masks, split, source) for split in ("test", "train")}
    test_images = {Path(image).resolve() for _, image, _ in pairs["test"]}
    train_pairs, pairs["train"] = pairs["train"], []
    for stem, image, mask in train_pairs:
        if Path(image).resolve() in test_images:
            source.skips.append(Skip("image", "image in both splits", f"{image} is also a test image", 1))
        else:
            pairs["train"].append((stem, image, mask))
    ids = image_ids([(split, stem) for split, members in pairs.items() for stem, _, _ in members])
    val = choose_images(np.array([ids["train", stem] for stem, _, _ in pairs["train"]]), val_fraction, 0, "val")
    for split, members in pairs.items():
        for stem, image, mask in members:
            image_id = ids[split, stem]
            source.jobs.append(Job(image_id, "val" if split == "train" and image_id in val else split, image, mask))
    source.jobs.sort(key=lambda job: job.image_id)
    return source


def read_classes(path: Path, ignore: list[int], background: int | None) -> tuple[list[SemanticClass], dict[int, int], int]:
    """Read the classes of a class file in index order, without the ignored indices.

    A line is a name, optionally followed by `#`, the mark `thing` or `stuff`, and pixel values, such as `person # thing 0` or
    `background # 91-181`. A class without a mark is stuff, because index masks do not distinguish instances. A class without
    pixel values has its line number as its value.

    Returns the classes, the class ids by pixel value, and the number of classes without a mark. Raises UserError if the file is
    missing, a line between names is empty, a mark or value is malformed, a name or value occurs twice, or `background` is not a
    line of the file.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the class names ({error}); set data.index_masks.classes") from None
    classes: list[SemanticClass] = []
    values: dict[int, int] = {}
    unmarked = 0
    for index, line in enumerate(lines):
        place = f"{path}: line {index + 1}"
        name, _, comment = (part.strip() for part in line.partition("#"))
        if not name:
            raise UserError(f"{place}: expected a class name, got an empty line; every index needs a name")
        mark, own_values = _parse_comment(place, comment)
        if index in ignore:
            continue
        if any(item.name == name for item in classes):
            raise UserError(f"{place}: duplicate class {name!r}")
        for value in own_values or [index]:
            if values.setdefault(value, index) != index or value in ignore:
                raise UserError(f"{place}: pixel value {value} also belongs to another line or to data.index_masks.ignore")
        unmarked += not mark and index != background
        classes.append(SemanticClass(index, name, mark == "thing", index == background))
    if background is not None and not any(item.background for item in classes):
        raise UserError(f"{path}: data.index_masks.background is {background}, which is not a line of the file or is ignored")
    if all(item.background for item in classes):
        raise UserError(f"{path}: no class names; write one name per line, in index order")
    return classes, values, unmarked


def _parse_comment(place: str, comment: str) -> tuple[str, list[int]]:
    """Return the mark (empty if there is none) and the pixel values in the comment of a line, such as `thing 0` or `91-181`."""
    words = comment.split()
    mark = words.pop(0) if words and not words[0][0].isdigit() else ""
    if mark not in ("", "thing", "stuff"):
        raise UserError(f"{place}: expected the mark thing or stuff, got {mark!r}")
    values: list[int] = []
    for word in words:
        first, _, last = word.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise UserError(f"{place}: expected a pixel value or a range such as 91-181, got {word!r}")
        values += range(int(first), int(last or first) + 1)
    return mark, values


def image_ids(keys: list[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """Return the image id of every (split, stem): the stem if all stems are distinct numbers, else a 63-bit hash.

    Raises UserError if two images have the same hash.
    """
    if all(stem.isascii() and stem.isdigit() and len(stem) <= 18 for _, stem in keys):
        numbers = {key: int(key[1]) for key in keys}
        if len(set(numbers.values())) == len(keys):
            return numbers
    hashed: dict[int, tuple[str, str]] = {}
    for key in keys:
        other = hashed.setdefault(derive_seed(0, "image", *key), key)
        if other != key:
            raise UserError(f"images {other[1]} ({other[0]}) and {key[1]} ({key[0]}) have the same hash; rename one of them")
    return {key: image_id for image_id, key in hashed.items()}


def _pair_files(index_masks: IndexMasks, split: str, source: Source) -> list[tuple[str, str, str]]:
    """Return (stem, image, mask) of one split, sorted by stem. Images and masks without a partner are skipped."""
    # 1. List the files.
    images_folder, masks_folder = _folder(index_masks, "images", split), _folder(index_masks, "masks", split)
    suffix = index_masks.mask_suffix
    same_folder = Path(images_folder).resolve() == Path(masks_folder).resolve()
    images: dict[str, list[str]] = defaultdict(list)
    for name in sorted(item.name for item in Path(images_folder).iterdir()):
        if Path(name).suffix.lower() in IMAGE_SUFFIXES and not (same_folder and name.endswith(suffix)):
            images[Path(name).stem].append(name)
    mask_names = {item.name for item in Path(masks_folder).iterdir()}
    stems = sorted(images.keys() | {name.removesuffix(suffix) for name in mask_names if name.endswith(suffix)})
    if index_masks.lists is not None:
        stems = _read_list(index_masks.lists, split, source)

    # 2. Match them by stem.
    pairs = []
    for stem in stems:
        mask = f"{stem}{suffix}"
        if stem not in images:
            reason, message = "mask without an image", f"{masks_folder}/{mask}: no image {stem}.* in {images_folder}"
        elif len(images[stem]) > 1:
            reason, message = "images with the same stem", f"{images_folder}: {' and '.join(images[stem])} have the same stem"
        elif mask not in mask_names:
            reason, message = "image without a mask", f"{images_folder}/{images[stem][0]}: no mask {masks_folder}/{mask}"
        else:
            pairs.append((stem, f"{images_folder}/{images[stem][0]}", f"{masks_folder}/{mask}"))
            continue
        source.skips.append(Skip("image", reason, message, 1))
    return pairs


def _folder(index_masks: IndexMasks, key: str, split: str) -> str:
    """Return the folder of `images` or `masks` of a split."""
    folders = getattr(index_masks, key)
    if split not in folders:
        raise UserError(f"params: data.index_masks.{key} has no {split}; set a folder for both train and test")
    if not Path(folders[split]).is_dir():
        raise UserError(f"{folders[split]}: no such folder; set data.index_masks.{key}.{split}")
    return str(folders[split]).rstrip("/")


def _read_list(lists: Mapping[Any, str], split: str, source: Source) -> list[str]:
    """Return the stems in the list of a split, and add the list to the inputs of the source."""
    if split not in lists:
        raise UserError(f"params: data.index_masks.lists has no {split}; set a file for both train and test, or null")
    path = Path(lists[split])
    try:
        stems = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the list of images ({error}); set data.index_masks.lists.{split}") from None
    source.inputs.append(path)
    return sorted(set(stems))


def read_indices(path: str | Path) -> NDArray[np.int64]:
    """Read the class indices [H, W] of an index mask. Raises BadImage if it is missing, corrupt or a colour image."""
    mask, _ = open_image(path, "index mask")
    if mask.mode not in ("L", "P", "1") and not mask.mode.startswith("I"):
        message = f"{path}: expected one value per pixel, got mode {mask.mode}; save the mask as L, P or 16-bit PNG"
        raise BadImage("index mask in colour", message)
    return np.asarray(mask).astype(np.int64)


def read_image(
    classes: list[SemanticClass], templates: list[str], values: dict[int, int], class_file: str, job: Job
) -> ImageRows:
    """Decode the mask of an image, and create a phrase for every class in it. `values` are the class ids by pixel value."""
    rows = ImageRows(job.image_id, job.split, job.image)
    try:
        pixels = read_labels(job.image, job.mask, "mask", read_indices)
        unknown = sorted(set(np.unique(pixels).tolist()) - values.keys())
        if unknown:
            remedy = "name it there or add it to data.index_masks.ignore"
            message = f"{job.mask}: pixel value {unknown[0]} has no line in {class_file}; {remedy}"
            raise BadImage("unknown class index", message)
    except BadImage as error:
        rows.skips.append(Skip("image", error.reason, str(error), 1))
        return rows
    ids = np.full(max(values) + 1, _IGNORED)
    ids[list(values)] = list(values.values())
    rows.height, rows.width = pixels.shape
    rows.class_masks = masks_by_class(ids[pixels], classes)
    rows.phrases = class_rows(rows, classes, templates, {}, set())
    rows.counts.update(images=1, narratives=1, segments=len(rows.phrases))
    return rows
