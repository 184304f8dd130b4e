"""Binary masks as COCO compressed run-length codes (`counts` of pycocotools), always at native size."""

from __future__ import annotations

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
    """Measure many codes at once, without decoding them to pixels."""
    measures = _no_measures(len(codes))
    for rows in _blocks(np.array([len(code) for code in codes], np.int64)):
        _note(measures, rows, *_run_ends([codes[row] for row in rows.tolist()]))
    return measures


def compare(left: Sequence[bytes], right: Sequence[bytes]) -> tuple[Measures, Measures, Integers]:
    """`measure` of n pairs of codes, and the pixels [n] that the two masks of a pair, being of one size, have in common."""
    measures, common = (_no_measures(len(left)), _no_measures(len(right))), np.zeros(len(left), np.int64)
    for rows in _blocks(np.array([len(a) + len(b) for a, b in zip(left, right, strict=True)], np.int64)):
        ends = []
        for column, found in zip((left, right), measures, strict=True):
            some, canonical = _run_ends([column[row] for row in rows.tolist()])
            _note(found, rows, some, canonical)
            ends.append(some)
        common[rows] = _common_pixels(*ends)
    return *measures, common


def _blocks(lengths: Integers) -> Iterator[Integers]:
    """Row numbers of codes of about one length, few enough to stay in the processor's cache."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        end = start + 1024
        while end - start > 1 and (end - start) * lengths[order[min(end, len(order)) - 1]] > 1 << 18:
            end = (start + end) // 2
        yield order[start:end]
        start = end


def _no_measures(count: int) -> Measures:
    return Measures(np.full(count, -1, np.int64), np.zeros(count, np.int64), np.zeros(count, bool))


def _note(measures: Measures, rows: Integers, ends: Integers, canonical: Mask) -> None:
    measures.pixels[rows] = ends[:, -1]
    measures.foreground[rows] = (ends[:, 1::2] - ends[:, ::2]).sum(1, dtype=np.int64)
    measures.canonical[rows] = canonical


_WELL_FORMED = re.compile(rb"(?:[P-o]{0,5}[0-O])+").fullmatch
"""Complete numbers of at most six digits, which hold runs of up to 2 ** 29 pixels."""
_FOLLOWED = bytes(range(48 + 32, 48 + 64))
"""Digits that another one of their number follows."""


def _run_ends(codes: list[bytes]) -> tuple[Integers, Mask]:
    """Where the runs of n codes end: [n, L], background and foreground in turn, L even, the last end repeated; -1 for bytes
    that are no code. And `Measures.canonical` [n].

    A code is a sequence of little-endian base-32 numbers, one run each: 5 bits a byte, bit 5 says that more follow, bit 4
    of the last byte is the sign, 48 is added to make it printable; from the fourth on a number is the difference to the
    run two before (pycocotools, `rleToString`).
    """
    sizes = np.array([len(code) for code in codes])
    joined = b"".join(codes)
    digits = np.frombuffer(joined, np.uint8) - np.uint8(48)
    stops = np.cumsum(sizes)
    more = np.flatnonzero(digits > 31)
    if sizes.min() == 0 or digits.max() > 63 or digits[stops - 1].max() > 31 or (more[5:] - more[:-5] == 5).any():
        formed = np.array([_WELL_FORMED(code) is not None for code in codes], bool)
        ends, canonical = _run_ends([code if good else b"0" for code, good in zip(codes, formed, strict=True)])
        ends[~formed] = -1
        return ends, canonical & formed

    finals = np.frombuffer(joined.translate(None, _FOLLOWED), np.uint8) - np.uint8(48)  # each number's last digit,
    numbers = ((finals << 3).view(np.int8) >> 3).astype(np.int32)  # which is signed
    count = sizes - np.diff(np.searchsorted(more, stops), prepend=0)
    follow = more - np.arange(len(more))  # the number that each of the other digits belongs to
    while len(more):
        final = np.append(follow[1:] != follow[:-1], True)
        number = follow[final]
        numbers[number] = (numbers[number] << 5) | (digits[more[final]] & 31)
        more, follow = more[~final], follow[~final]

    width = int(count.max() + count.max() % 2)
    runs = np.zeros((len(codes), width), np.int32)
    runs[:, 1:3] = 1  # behind the last run of a code its runs are repeated, so that every one there is positive, too
    runs[np.arange(width, dtype=np.int32) < count[:, None].astype(np.int32)] = numbers
    for begin in (1, 2):  # undo the differences: runs 1, 3, 5, ... and 2, 4, 6, ... are two chains
        chain = runs[:, begin::2]
        np.cumsum(chain, axis=1, dtype=np.int32, out=chain)
    smallest = runs[:, 1:].min(1)
    ends = np.cumsum(runs, axis=1, dtype=np.int32)
    if ends.min() < 0:  # past 32 bits
        ends = np.cumsum(runs, axis=1, dtype=np.int64)
    np.minimum(ends, ends[np.arange(len(codes)), count - 1][:, None], out=ends)
    ends[(runs[:, 0] < 0) | (smallest < 0)] = -1
    return ends, smallest > 0


def _common_pixels(left: Integers, right: Integers) -> Integers:
    """Pixels [n] that are foreground in both, from `_run_ends`. At most two runs are open at any pixel, so in order of
    their places stop k closes start k, and until then start k + 1 may already be open."""
    starts, stops = (np.concatenate([left[:, side::2], right[:, side::2]], axis=1) for side in (0, 1))
    starts.sort(axis=1)
    stops.sort(axis=1)
    return np.maximum(stops[:, :-1] - starts[:, 1:], 0).sum(1, dtype=np.int64)


def union(codes: Sequence[bytes], height: int, width: int) -> bytes:
    """Code of the union of several masks of one size (logical or: overlaps count once)."""
    if not codes:
        return encode(np.zeros((height, width), bool))
    merged = coco_mask.merge([{"size": [height, width], "counts": code} for code in codes], intersect=False)
    return bytes(merged["counts"])


def area(counts: bytes, height: int, width: int) -> int:
    """Foreground pixels."""
    return int(coco_mask.area({"size": [height, width], "counts": counts}))
