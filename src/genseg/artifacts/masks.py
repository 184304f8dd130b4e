"""Binary masks as COCO compressed run-length encodings (RLE, `counts` of pycocotools), always at native size."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from genseg.errors import UserError

Mask = NDArray[np.bool_]
Integers = NDArray[np.int64]


def encode(mask: NDArray[np.generic]) -> bytes:
    """Return the RLE of a mask [H, W]; every non-zero value is foreground."""
    return bytes(coco_mask.encode(np.asfortranarray(np.asarray(mask) != 0, dtype=np.uint8))["counts"])


def decode(rle: bytes, height: int, width: int) -> Mask:
    """Return the mask [height, width] of an RLE as bool. Raises UserError if it does not have height x width pixels."""
    check(rle, height, width)  # otherwise pycocotools leaves the remaining pixels empty or raises another error
    return decode_checked(rle, height, width)


def decode_checked(rle: bytes, height: int, width: int) -> Mask:
    """Return the mask [height, width] of an RLE whose size was already checked, e.g. with `measure`."""
    return np.asarray(coco_mask.decode({"size": [height, width], "counts": rle}), dtype=bool)


def check(rle: bytes, height: int, width: int) -> None:
    """Raise UserError unless the runs of an RLE add up to height * width."""
    if measure([rle]).pixels[0] != height * width:
        raise UserError(f"{misfit(height, width)}; it has another size or is truncated")


def misfit(height: int, width: int) -> str:
    """Return the beginning of all messages about an RLE of the wrong size."""
    return f"the RLE of a mask does not fit {height} x {width} pixels"


class Measures(NamedTuple):
    """Pixel counts of n RLEs, one entry per RLE."""

    pixels: Integers
    """Sum of all runs, i.e. height * width of the mask; -1 if the bytes are not an RLE."""
    foreground: Integers
    """Area of the mask; 0 if the bytes are not an RLE."""
    canonical: Mask
    """Whether all runs after the first are non-empty. pycocotools' `iou` and `merge` may stop early at an empty run."""


def measure(rles: Sequence[bytes]) -> Measures:
    """Measure many RLEs at once without decoding them."""
    return _measure(rles)[0][0]


def compare(left: Sequence[bytes], right: Sequence[bytes]) -> tuple[Measures, Measures, Integers]:
    """Measure n pairs of RLEs. The two masks of a pair must have the same size.

    Returns:
        The measures of `left`, those of `right`, and the pixels [n] in the intersection of each pair.
    """
    (left_measures, right_measures), common = _measure(left, right)
    return left_measures, right_measures, common


def _measure(*sides: Sequence[bytes]) -> tuple[list[Measures], Integers]:
    """Measure the RLEs of one or two sides, block by block, and count the common pixels of two sides."""
    count = len(sides[0])
    measures = [Measures(np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, bool)) for _ in sides]
    common = np.zeros(count, np.int64)
    for rows in _blocks(np.array([sum(map(len, rles)) for rles in zip(*sides, strict=True)], np.int64)):
        ends_of_sides = []
        for rles, (pixels, foreground, canonical) in zip(sides, measures, strict=True):
            ends, canonical[rows] = _run_ends([rles[row] for row in rows.tolist()])
            pixels[rows] = ends[:, -1]
            foreground[rows] = (ends[:, 1::2] - ends[:, ::2]).sum(1, dtype=np.int64)
            ends_of_sides.append(ends)
        if len(sides) == 2:
            common[rows] = _common_pixels(*ends_of_sides)
    return measures, common


def _blocks(lengths: Integers) -> Iterator[Integers]:
    """Yield row numbers of RLEs of similar length, in blocks that fit into the processor's cache."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        end = start + 1024
        while end - start > 1 and (end - start) * lengths[order[min(end, len(order)) - 1]] > 1 << 18:
            end = (start + end) // 2
        yield order[start:end]
        start = end


_WELL_FORMED = re.compile(rb"(?:[P-o]{0,5}[0-O])+").fullmatch
"""Complete numbers of at most six digits, enough for runs of up to 2 ** 29 pixels."""
_CONTINUED = bytes(range(48 + 32, 48 + 64))
"""Bytes of digits that are followed by another digit of the same number."""


def _run_ends(rles: list[bytes]) -> tuple[Integers, Mask]:
    """Return the ends of the runs of n RLEs, and `Measures.canonical` [n].

    The ends [n, L] alternate between background and foreground runs. L is even, shorter rows repeat their last end, and all
    entries of a row are -1 if its bytes are not an RLE.

    An RLE is a sequence of little-endian base-32 numbers, one per run: 5 bits per byte; bit 5 is set if more digits follow;
    bit 4 of the last digit is the sign; 48 is added to make the byte printable. The fourth and later numbers are differences
    from the run two places before (pycocotools, `rleToString`).
    """
    # 1. Split the bytes into digits; replace malformed RLEs with an empty one.
    sizes = np.array([len(rle) for rle in rles])
    joined = b"".join(rles)
    digits = np.frombuffer(joined, np.uint8) - np.uint8(48)
    stops = np.cumsum(sizes)
    more = np.flatnonzero(digits > 31)
    if sizes.min() == 0 or digits.max() > 63 or digits[stops - 1].max() > 31 or (more[5:] - more[:-5] == 5).any():
        well_formed = np.array([_WELL_FORMED(rle) is not None for rle in rles], bool)
        ends, canonical = _run_ends([rle if valid else b"0" for rle, valid in zip(rles, well_formed, strict=True)])
        ends[~well_formed] = -1
        return ends, canonical & well_formed

    # 2. Combine the digits into numbers, starting with the last digit of each, which is signed.
    finals = np.frombuffer(joined.translate(None, _CONTINUED), np.uint8) - np.uint8(48)
    numbers = ((finals << 3).view(np.int8) >> 3).astype(np.int32)
    count = sizes - np.diff(np.searchsorted(more, stops), prepend=0)
    follow = more - np.arange(len(more))  # index of the number to which each continued digit belongs
    while len(more):
        final = np.append(follow[1:] != follow[:-1], True)
        number = follow[final]
        numbers[number] = (numbers[number] << 5) | (digits[more[final]] & 31)
        more, follow = more[~final], follow[~final]

    # 3. Arrange the numbers as rows and undo the differences: runs 1, 3, 5, ... and 2, 4, 6, ... are two chains.
    width = int(count.max() + count.max() % 2)
    runs = np.zeros((len(rles), width), np.int32)
    runs[:, 1:3] = 1  # both chains continue past the last run with positive values
    runs[np.arange(width, dtype=np.int32) < count[:, None].astype(np.int32)] = numbers
    for first in (1, 2):
        chain = runs[:, first::2]
        np.cumsum(chain, axis=1, dtype=np.int32, out=chain)

    # 4. Add up the runs, and repeat the last end in shorter rows.
    smallest = runs[:, 1:].min(1)
    ends = np.cumsum(runs, axis=1, dtype=np.int32)
    if ends.min() < 0:  # overflow of 32 bits
        ends = np.cumsum(runs, axis=1, dtype=np.int64)
    np.minimum(ends, ends[np.arange(len(rles)), count - 1][:, None], out=ends)
    ends[(runs[:, 0] < 0) | (smallest < 0)] = -1
    return ends, smallest > 0


def _common_pixels(left: Integers, right: Integers) -> Integers:
    """Return the pixels [n] that are foreground in both masks, from the results of `_run_ends`.

    At most two runs overlap at any pixel. With starts and stops sorted, an overlap reaches from start k + 1 to stop k.
    """
    starts, stops = (np.concatenate([left[:, side::2], right[:, side::2]], axis=1) for side in (0, 1))
    starts.sort(axis=1)
    stops.sort(axis=1)
    return np.maximum(stops[:, :-1] - starts[:, 1:], 0).sum(1, dtype=np.int64)


def union(rles: Sequence[bytes], height: int, width: int) -> bytes:
    """Return the RLE of the union (logical or) of several masks of the same size."""
    if not rles:
        return encode(np.zeros((height, width), bool))
    merged = coco_mask.merge([{"size": [height, width], "counts": rle} for rle in rles], intersect=False)
    return bytes(merged["counts"])


def area(rle: bytes, height: int, width: int) -> int:
    """Return the number of foreground pixels of an RLE."""
    return int(coco_mask.area({"size": [height, width], "counts": rle}))
