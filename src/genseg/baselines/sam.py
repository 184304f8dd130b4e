"""Masks of SAM (Kirillov et al. 2023), which DiffPNG's last step selects; SAM itself is not run here.

A folder has one file per image, `<name of the image without suffix>.json`, as `amg.py --convert-to-rle` of segment-anything
writes it: a list of records whose `segmentation` is COCO's compressed run-length encoding, `{"size": [height, width],
"counts": "..."}`, at the image's size. Other fields of a record are ignored.
"""

from pathlib import Path

import numpy as np

from genseg.artifacts.files import read_json
from genseg.artifacts.masks import Mask, decode
from genseg.errors import UserError


def read_sam_masks(folder: str, image: str, height: int, width: int) -> Mask:
    """Return SAM's masks [K, height, width] of an image file. Raises UserError if its JSON is missing, malformed or unfit."""
    path = Path(folder) / f"{Path(image).stem}.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; write SAM's masks of every test image with `amg.py --convert-to-rle`")
    records = read_json(path)
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a list of masks at the top level; write it with `amg.py --convert-to-rle`")
    decoded = []
    for number, record in enumerate(records):
        try:
            size, counts = record["segmentation"]["size"], record["segmentation"]["counts"].encode()
        except (KeyError, TypeError, AttributeError):
            remedy = "write it with `amg.py --convert-to-rle`"
            raise UserError(f"{path}: mask {number}: expected a compressed run-length encoding; {remedy}") from None
        if size != [height, width]:
            raise UserError(
                f"{path}: mask {number}: size {size}, but the image has [{height}, {width}]; run SAM on the image itself"
            )
        try:
            decoded.append(decode(counts, height, width))
        except UserError as error:
            raise UserError(f"{path}: mask {number}: {error}") from None
    return np.stack(decoded) if decoded else np.zeros((0, height, width), bool)


def select_masks(proposals: Mask, mask: Mask, overlap: float) -> Mask:
    """Return the union [H, W] of the proposals [K, H, W] that cover more than `overlap` of the mask [H, W], or the reverse.

    Without such a proposal, the mask itself is returned. This is DiffPNG's refinement with SAM, described by its program.
    """
    common = (proposals & mask).sum((1, 2))
    areas, area = proposals.sum((1, 2)), mask.sum()
    chosen = (common > overlap * areas) | (common > overlap * area)
    return proposals[chosen].any(0) if chosen.any() else mask
