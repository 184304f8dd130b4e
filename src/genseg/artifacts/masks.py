"""Binary masks as COCO compressed run-length codes (`counts` of pycocotools), always at native size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from genseg.errors import UserError

Mask = NDArray[np.bool_]
Integers = NDArray[np.int64]


def encode(mask: NDArray[np.generic]) -> bytes:
    """`counts` of a mask [H, W]; every non-zero value is foreground."""
    return bytes(coco_mask.encode(np.asfortranarray(np.asarray(mask) != 0, dtype=np.uint8))["counts"])


def decode(counts: bytes, height: int, width: int) -> Mask:
    """Mask [H, W] of bool.

    Raises:
        UserError: `counts` does not describe exactly height x width pixels. (pycocotools itself would leave the rest
            of the picture empty, or refuse with a traceback.)
    """
    check(counts, height, width)
    return decode_checked(counts, height, width)


def decode_checked(counts: bytes, height: int, width: int) -> Mask:
    """`decode` of a code that was already found to fit, e.g. by `measure`."""
    return np.asarray(coco_mask.decode({"size": [height, width], "counts": counts}), dtype=bool)


def check(counts: bytes, height: int, width: int) -> None:
    """Raise UserError unless the runs of `counts` add up to height * width."""
    if measure([counts]).pixels[0] != height * width:
        raise UserError(f"{misfit(height, width)}; it was made for another size or cut off")


def misfit(height: int, width: int) -> str:
    """How every message about a code of the wrong size begins."""
    return f"a mask's run-length code does not fit {height} x {width} pixels"


class Measures(NamedTuple):
    """What the run lengths of n codes say, one entry a code."""

    pixels: Integers
    """Sum of the runs: height * width of the mask; -1 where the bytes are no code."""
    foreground: Integers
    """Sum of the odd runs: the mask's area; 0 where the bytes are no code."""
    canonical: Mask
    """No empty run but the first. pycocotools' `iou` and `merge` may stop early at the other empty runs."""


def measure(codes: Sequence[bytes]) -> Measures:
    """Measure many codes at once, without decoding them to pixels.

    A code is a sequence of little-endian base-32 numbers, one run each: 5 bits a byte, bit 5 says that more follow, bit 4
    of the last byte is the sign, 48 is added to make it printable; from the fourth on a number is the difference to the
    run two before (pycocotools, `rleToString`).
    """
    pixels, foreground = np.full(len(codes), -1, np.int64), np.zeros(len(codes), np.int64)
    canonical = np.zeros(len(codes), bool)
    formed = np.array([_WELL_FORMED(code) is not None for code in codes], bool)
    for start in range(0, len(codes), 1024):  # few enough to stay in the processor's cache
        chosen = start + np.flatnonzero(formed[start : start + 1024])
        if len(chosen):
            pixels[chosen], foreground[chosen], canonical[chosen] = _measure([codes[row] for row in chosen.tolist()])
    return Measures(pixels, foreground, canonical)


_WELL_FORMED = re.compile(rb"(?:[P-o]{0,5}[0-O])+").fullmatch
"""Complete numbers of at most six digits, which hold runs of up to 2 ** 29 pixels."""


def _measure(codes: Sequence[bytes]) -> Measures:
    """`measure` for one or more well-formed codes."""
    digits = np.frombuffer(b"".join(codes), np.uint8) - np.uint8(48)
    last = np.flatnonzero(digits < 32)  # of each number
    first = np.append(0, last[:-1] + 1)
    length = last - first + 1
    runs = (digits[first] & 0x1F).astype(np.int64)
    longer = np.flatnonzero(length > 1)
    for digit in range(1, 6):
        runs[longer] |= (digits[first[longer] + digit] & 0x1F).astype(np.int64) << (5 * digit)
        longer = longer[length[longer] > digit + 1]
    runs -= np.where(digits[last] & 0x10, np.int64(1) << (5 * length), 0)

    ends = np.searchsorted(last, np.cumsum([len(code) for code in codes]))  # each code's numbers are [start, end)
    starts = np.append(0, ends[:-1])
    place = np.arange(len(runs)) - np.repeat(starts, ends - starts)
    for begin in (1, 2):  # undo the differences: runs 1, 3, 5, ... and 2, 4, 6, ... are two chains
        chain = np.flatnonzero((place & 1 == begin & 1) & (place > 0))
        if len(chain):
            steps = runs[chain]
            total = np.cumsum(steps)
            head = place[chain] == begin
            runs[chain] = total - (total - steps)[head][np.cumsum(head) - 1]

    positive = np.minimum.reduceat(runs, starts) >= 0
    pixels = np.where(positive, np.add.reduceat(runs, starts), -1)
    foreground = np.where(positive, np.add.reduceat(runs * (place & 1), starts), 0)
    return Measures(pixels, foreground, positive & ~np.logical_or.reduceat((runs == 0) & (place > 0), starts))


def union(codes: Sequence[bytes], height: int, width: int) -> bytes:
    """Code of the union of several masks of one size (logical or: overlaps count once)."""
    if not codes:
        return encode(np.zeros((height, width), bool))
    merged = coco_mask.merge([{"size": [height, width], "counts": code} for code in codes], intersect=False)
    return bytes(merged["counts"])


def area(counts: bytes, height: int, width: int) -> int:
    """Foreground pixels."""
    return int(coco_mask.area({"size": [height, width], "counts": counts}))
