"""Figures: examples at quantiles of the score, and the evolution of a mask over t (Fig. 5 of the GS paper)."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from genseg.artifacts.files import atomic_path
from genseg.artifacts.masks import Mask, decode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import row_mask
from genseg.artifacts.predictions import read_maps, read_predictions
from genseg.data.images import load_image
from genseg.errors import UserError

Image = NDArray[np.uint8]

WIDTH = 7.0
"""Width of a figure in inches: two columns of a conference page."""
TRUTH_COLOUR, PREDICTION_COLOUR = "#009E73", "#E69F00"
PAPER_TIMESTEPS = (999, 759, 519, 279)
"""The timesteps that Fig. 5 of the paper shows."""

_FONT = 7.0
_LINE = 1.25 * _FONT / 72
_LABEL = 0.2
_GAP = 0.05
_PER_STRIP = 6
_TALLEST = 1.5
_MOST_LINES = 3


# ------------------------------------------------------------------------------------------------------- examples
@dataclass(frozen=True)
class Example:
    phrase: str
    iou: float
    image: Image
    """[H, W, 3]"""
    truth: Mask
    prediction: Mask | None
    """[H, W]; None where there is no prediction for the phrase."""


def choose_examples(per_phrase: pd.DataFrame, count: int) -> pd.DataFrame:
    """Rows at equidistant quantiles of `iou`, best first, worst last; ties are broken by the key.

    Fewer rows than `count` give every row once. One row is the median.
    """
    ranked = per_phrase.sort_values(["iou", *KEY], ascending=[False, True, True, True], ignore_index=True)
    count = min(count, len(ranked))
    places = np.linspace(0, 1, count) if count != 1 else np.array([0.5])
    return ranked.iloc[np.rint(places * (len(ranked) - 1)).astype(int)].reset_index(drop=True)


def load_examples(chosen: pd.DataFrame, phrases: pd.DataFrame, predictions: pd.DataFrame) -> list[Example]:
    """Join chosen scores with the phrase table and the predictions, and read the images."""
    joined = chosen[[*KEY, "iou"]].merge(phrases, on=KEY, how="left", validate="one_to_one")
    masks = predictions.set_index(KEY)["mask"].to_dict()
    examples = []
    for _, row in joined.iterrows():
        key = tuple(row[name] for name in KEY)
        if pd.isna(row["phrase"]):
            raise UserError(
                f"phrase {key} has a score but no row in the phrase table; score again with this study's phrase table"
            )
        counts = masks.get(key)
        prediction = None if counts is None else decode(counts, int(row["height"]), int(row["width"]))
        examples.append(Example(str(row["phrase"]), float(row["iou"]), _image(row), row_mask(row), prediction))
    return examples


def _image(row: pd.Series) -> Image:
    """Picture [H, W, 3] of one row of the phrase table."""
    if not isinstance(row["file_name"], str):
        raise UserError(
            f"phrase {row['phrase']!r}: the phrase table names no image (file_name) to show it on; assemble the data again"
        )
    image = np.asarray(load_image(row["file_name"]), dtype=np.uint8)
    if image.shape[:2] != (row["height"], row["width"]):
        found, told = f"{image.shape[0]} x {image.shape[1]}", f"{row['height']} x {row['width']}"
        raise UserError(
            f"{row['file_name']}: the image is {found} pixels, the phrase table says {told}; assemble the data again"
        )
    return image


def draw_examples(examples: list[Example], path: Path, dpi: int) -> None:
    """Even strips of up to six examples: phrase, image, ground truth, prediction with the truth's outline, IoU."""
    count = -(-len(examples) // _PER_STRIP)
    strips = [[examples[index] for index in part] for part in np.array_split(np.arange(len(examples)), count)]
    tallest = min(_TALLEST, *(_fitting_height(strip) for strip in strips))
    layouts = [_strip_layout(strip, tallest) for strip in strips]
    width = max(_LABEL + sum(widths) + _GAP * (len(widths) - 1) for _, widths, _ in layouts)
    heights = [lines * _LINE + 3 * tall + 4 * _GAP + 1.3 * _LINE for tall, _, lines in layouts]
    space = 0.15
    total = sum(heights) + space * (count - 1)
    with _figure(width, total, path, dpi) as figure:
        top = total
        for strip, (tall, widths, lines), height in zip(strips, layouts, heights, strict=True):
            y = top - lines * _LINE - 1.5 * _GAP
            for index, name in enumerate(("image", "ground truth", "prediction")):
                _text(figure, 0.08, y - index * (tall + _GAP) - tall / 2, name, rotation=90)
            x = _LABEL
            for example, wide in zip(strip, widths, strict=True):
                _text(figure, x + wide / 2, y + 1.2 * _GAP, "\n".join(_wrap(example.phrase, wide, _MOST_LINES)), va="baseline")
                boxes = [_box(figure, x, y - index * (tall + _GAP) - tall, wide, tall) for index in range(3)]
                boxes[0].imshow(example.image, aspect="auto")
                boxes[1].imshow(overlay(example.image, example.truth, TRUTH_COLOUR), aspect="auto")
                _draw_prediction(boxes[2], example)
                _text(figure, x + wide / 2, y - 3 * tall - 3 * _GAP, f"IoU {example.iou:.2f}", va="top")
                x += wide + _GAP
            top -= height + space


def _aspect(example: Example) -> float:
    """Width over height as drawn: extreme formats are squeezed."""
    return min(max(example.image.shape[1] / example.image.shape[0], 0.6), 2.0)


def _fitting_height(strip: list[Example]) -> float:
    """Height (inches) at which the pictures of a strip fill the width."""
    return (WIDTH - _LABEL - _GAP * (len(strip) - 1)) / sum(map(_aspect, strip))


def _strip_layout(strip: list[Example], tallest: float) -> tuple[float, list[float], int]:
    """Height of the pictures, which they share, their widths (inches), and the lines of the longest caption."""
    tall = min(tallest * 1.15, _fitting_height(strip))
    widths = [tall * _aspect(example) for example in strip]
    lines = max(len(_wrap(example.phrase, wide, _MOST_LINES)) for example, wide in zip(strip, widths, strict=True))
    return tall, widths, lines


def _draw_prediction(box: Axes, example: Example) -> None:
    if example.prediction is None:
        box.imshow(dim(example.image), aspect="auto")
        box.text(0.5, 0.5, "no prediction", transform=box.transAxes, ha="center", va="center", fontsize=_FONT, color="white")
    else:
        box.imshow(overlay(example.image, example.prediction, PREDICTION_COLOUR), aspect="auto")
    if example.truth.any() and not example.truth.all():
        box.contour(example.truth.astype(float), levels=[0.5], colors=["white"], linewidths=0.7, linestyles="dashed")


def dim(image: Image) -> Image:
    """A picture [H, W, 3] in dark grey, as the ground of an overlay."""
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.repeat(np.rint(10 + 0.5 * grey).astype(np.uint8)[..., None], 3, axis=2)


def overlay(image: Image, mask: Mask, colour: str) -> Image:
    """The picture dimmed, and tinted with `colour` where the mask [H, W] is set."""
    tint = 255 * np.array(matplotlib.colors.to_rgb(colour), np.float32)
    shown = dim(image)
    shown[mask] = np.rint(0.45 * image[mask] + 0.55 * tint).astype(np.uint8)
    return shown


def load_refined(entries: list[dict[str, Any]], folder: Path, phrases: pd.DataFrame) -> list[Refined]:
    """What refinement kept for the figure, of every baseline in the `refined` of its manifest that G4Seg refined."""
    rows, found = phrases.set_index(KEY), []
    for entry in entries:
        if entry["refiner"] != "g4seg" or entry["coarse"] is None:
            continue
        kept = folder / f"{entry['baseline']}.parquet"
        refined, maps = read_predictions(kept), read_maps(kept)
        coarse = read_predictions(entry["coarse"]).set_index(KEY)["mask"]
        for (_, own), discrepancy in zip(refined.iterrows(), maps, strict=True):
            key = tuple(own[name] for name in KEY)
            row = rows.loc[key]
            size = int(row["height"]), int(row["width"])
            before, after = (decode(code, *size) for code in (coarse.loc[key], own["mask"]))
            shown = (_image(row), before, after, row_mask(row), discrepancy)
            found.append(Refined(entry["label"], str(row["phrase"]), *shown))
    return found


# ------------------------------------------------------------------------------------------------------ evolution
@dataclass(frozen=True)
class Evolution:
    x0: NDArray[np.uint8]
    """Estimates of x_0 [K, T, h, w], 0 background, 255 foreground."""
    xt: NDArray[np.uint8]
    """Noisy label latents [K, T, h, w] that the estimates were made from."""
    timesteps: list[int]
    keys: list[tuple[int, str, int]]


def read_evolution(path: Path) -> Evolution:
    """Read what the sample phase kept of some phrases' sampling.

    Raises:
        UserError: the file is missing or truncated, or its tensors and its header disagree.
    """
    try:
        with safe_open(path, framework="numpy") as handle:
            metadata = json.loads((handle.metadata() or {})["evolution"])
            x0, xt = handle.get_tensor("x0"), handle.get_tensor("xt")
        timesteps = [int(value) for value in metadata["timesteps"]]
        keys = [(int(image), str(narrative), int(phrase)) for image, narrative, phrase in metadata["keys"]]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `genseg sample` with this study's params") from None
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not a readable record of the evolution over t ({error}); remove it and sample again"
        ) from None
    if x0.shape != xt.shape or x0.ndim != 4 or x0.shape[:2] != (len(keys), len(timesteps)):
        raise UserError(
            f"{path}: {len(keys)} keys and {len(timesteps)} timesteps, but x0 {x0.shape} and xt {xt.shape}; sample again"
        )
    return Evolution(x0, xt, timesteps, keys)


def choose_timesteps(timesteps: list[int], most: int = 6) -> list[int]:
    """Indices of the columns to show: all if they fit, else those nearest to the paper's and the last."""
    if len(timesteps) <= most:
        return list(range(len(timesteps)))
    near = [min(range(len(timesteps)), key=lambda index: abs(timesteps[index] - wanted)) for wanted in PAPER_TIMESTEPS]
    return sorted({*near, len(timesteps) - 1})


def draw_evolution(evolution: Evolution, phrases: pd.DataFrame, path: Path, dpi: int) -> None:
    """Per phrase the image and its ground truth, and over t the noisy label x_t above the estimate of x_0."""
    rows = phrases.set_index(KEY)
    keys: list[Any] = list(evolution.keys)
    missing = [key for key in keys if key not in rows.index]
    if missing:
        raise UserError(f"phrase {missing[0]} of the evolution figure is not in the phrase table; sample again")
    shown = choose_timesteps(evolution.timesteps)
    columns = 2 + len(shown)
    split = 0.16
    wide = min(1.1, (WIDTH - _GAP * (columns - 1) - split - 0.04) / columns)
    width = columns * wide + _GAP * (columns - 1) + split + 0.04
    pictures = [rows.loc[key] for key in keys]
    talls = [wide / min(max(row["width"] / row["height"], 0.6), 2.0) for row in pictures]
    head, space = 1.6 * _LINE, 0.1
    total = head + sum(2 * tall + _GAP for tall in talls) + space * (len(talls) - 1)
    starts = [0.02 + index * (wide + _GAP) + (split if index >= 2 else 0) for index in range(columns)]
    with _figure(width, total, path, dpi) as figure:
        for x, name in zip(
            starts, ["image", "ground truth", *(f"t = {evolution.timesteps[index]}" for index in shown)], strict=True
        ):
            _text(figure, x + wide / 2, total - head / 2, name)
        y = total - head
        for k, (row, tall) in enumerate(zip(pictures, talls, strict=True)):
            image, truth = _image(row), row_mask(row)
            _box(figure, starts[0], y - tall, wide, tall).imshow(image, aspect="auto")
            _box(figure, starts[1], y - tall, wide, tall).imshow(overlay(image, truth, TRUTH_COLOUR), aspect="auto")
            caption = "\n".join(_wrap(f"“{row['phrase']}”", 2 * wide, 4))
            _text(figure, starts[0], y - tall - 1.5 * _GAP, caption, ha="left", va="top")
            for line, (name, maps) in enumerate((("$x_t$", evolution.xt), (r"$\hat{x}_0$", evolution.x0))):
                bottom = y - tall - line * (tall + _GAP)
                _text(figure, starts[2] - split / 2, bottom + tall / 2, name, math=True)
                for x, index in zip(starts[2:], shown, strict=True):
                    _box(figure, x, bottom, wide, tall).imshow(
                        maps[k, index], cmap="gray", vmin=0, vmax=255, aspect="auto", interpolation="nearest"
                    )
            y -= 2 * tall + _GAP + space


# ----------------------------------------------------------------------------------------------------- refinement
@dataclass(frozen=True)
class Refined:
    method: str
    phrase: str
    image: Image
    coarse: Mask
    refined: Mask
    truth: Mask
    discrepancy: NDArray[np.float32]
    """[h, w] in [0, 1]."""


def draw_refined(shown: list[Refined], path: Path, dpi: int) -> None:
    """A row of five pictures a phrase: image, coarse mask, G4Seg's discrepancy, refined mask, ground truth."""
    names = ("image", "coarse", "discrepancy", "refined", "ground truth")
    split, columns = 1.4, len(names)
    wide = min(1.0, (WIDTH - split - _GAP * columns) / columns)
    width = split + columns * (wide + _GAP)
    talls = [wide / min(max(one.image.shape[1] / one.image.shape[0], 0.6), 2.0) for one in shown]
    head = 1.6 * _LINE
    total = head + sum(talls) + _GAP * len(talls)
    with _figure(width, total, path, dpi) as figure:
        starts = [split + index * (wide + _GAP) for index in range(columns)]
        for x, name in zip(starts, names, strict=True):
            _text(figure, x + wide / 2, total - head / 2, name)
        y = total - head
        for one, tall in zip(shown, talls, strict=True):
            boxes = [_box(figure, x, y - tall, wide, tall) for x in starts]
            caption = "\n".join([*_wrap(one.method, split, 3), *_wrap(f"“{one.phrase}”", split, 3)])
            _text(figure, 0.03, y - tall / 2, caption, ha="left")
            boxes[0].imshow(one.image, aspect="auto")
            boxes[1].imshow(overlay(one.image, one.coarse, PREDICTION_COLOUR), aspect="auto")
            boxes[2].imshow(one.discrepancy, cmap="magma", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            boxes[3].imshow(overlay(one.image, one.refined, PREDICTION_COLOUR), aspect="auto")
            boxes[4].imshow(overlay(one.image, one.truth, TRUTH_COLOUR), aspect="auto")
            y -= tall + _GAP


def draw_gain(gain: list[dict[str, Any]], path: Path, dpi: int) -> None:
    """Mean gain in IoU of G4Seg (points, with 95 % intervals) by the coarse mask's IoU and by the boundary's complexity, as
    `metrics.refinement` bins them."""
    heads = {"iou": "IoU of the coarse mask", "complexity": "complexity of the boundary: perimeter² / area"}
    with _figure(WIDTH, 2.4, path, dpi) as figure:
        for number, (by, head) in enumerate(heads.items()):
            axes = _plot(figure, 0.5 + number * WIDTH / 2, 0.45, WIDTH / 2 - 0.65, 1.8)
            bins = [one for one in gain if one["by"] == by]
            centres = [(one["low"] + one["high"]) / 2 for one in bins]
            axes.axhline(0, color="0.6", linewidth=0.8, linestyle="dashed")
            axes.plot(centres, [100 * one["difference"] for one in bins], "o", markersize=3.5, color=TRUTH_COLOUR)
            for centre, one in zip(centres, bins, strict=True):
                axes.hlines(100 * one["difference"], one["low"], one["high"], color=TRUTH_COLOUR, linewidth=0.8)
                if one["ci_low"] is not None:
                    axes.vlines(centre, 100 * one["ci_low"], 100 * one["ci_high"], color=TRUTH_COLOUR, linewidth=0.8)
                place = (centre, 100 * one["difference"])
                axes.annotate(f"n = {one['n']}", place, (3, 3), textcoords="offset points", fontsize=0.8 * _FONT)
            axes.set_xlabel(head, fontsize=_FONT)
            if number == 0:
                axes.set_ylabel("gain in IoU (points)", fontsize=_FONT)


# ------------------------------------------------------------------------------------------ evaluations, calibration
def draw_evaluations(points: pd.DataFrame, path: Path, dpi: int) -> None:
    """AR against U-Net evaluations per mask, of the table `evaluations`: test with 95 % intervals, and val; the points of
    either that no cheaper one reaches are joined."""
    with _figure(WIDTH, 3.0, path, dpi) as figure:
        axes = _plot(figure, 0.5, 0.45, WIDTH - 0.6, 2.45)
        series = {"test, 95 % interval": ("overall", TRUTH_COLOUR, "o"), "val": ("val_ar", PREDICTION_COLOUR, "s")}
        for offset, (name, (key, colour, marker)) in zip((0.97, 1.03), series.items(), strict=True):
            shown = points[points[key].notna()].sort_values(["evaluations", key], ascending=[True, False])
            cost, height = shown["evaluations"].to_numpy(float) * offset, shown[key].to_numpy(float)
            best = height > np.maximum.accumulate(np.append(-np.inf, height[:-1]))
            axes.plot(cost[best], height[best], color=colour, linewidth=0.8, alpha=0.6)
            axes.plot(cost, height, marker, markersize=3.5, color=colour, label=name)
            if key == "overall":
                bars = shown[["ci_low", "ci_high"]].astype(float)
                axes.vlines(cost, bars["ci_low"], bars["ci_high"], color=colour, linewidth=0.5)
        axes.set_xscale("log", base=2)
        middle = float(np.prod(axes.get_xlim()) ** 0.5)
        for _, row in points[(points["role"] != "") & points["overall"].notna()].iterrows():
            place = (float(row["evaluations"]), float(row["overall"]))
            side, x = ("right", -6) if place[0] > middle else ("left", 4)  # into the figure
            axes.annotate(str(row["role"]), place, (x, -9), textcoords="offset points", fontsize=_FONT, ha=side)
        axes.set_xticks(ticks := sorted(set(points["evaluations"].astype(int))), [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("U-Net evaluations per mask", fontsize=_FONT)
        axes.set_ylabel("average recall (points)", fontsize=_FONT)
        axes.legend(fontsize=_FONT, frameon=False)


def draw_reliability(curves: dict[str, dict[str, Any]], path: Path, dpi: int) -> None:
    """Reliability plot of soft maps: per bin of probability the frequency of the foreground, and below how many pixels are in
    it. `curves`: name -> the `calibration` of a scores file."""
    with _figure(0.55 * WIDTH, 3.9, path, dpi) as figure:
        wide = 0.55 * WIDTH - 0.7
        axes, below = _plot(figure, 0.5, 1.4, wide, 2.3), _plot(figure, 0.5, 0.45, wide, 0.75)
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="dashed")
        for colour, (name, found) in zip((TRUTH_COLOUR, PREDICTION_COLOUR), curves.items(), strict=False):
            filled = [index for index, count in enumerate(found["pixels"]) if count]
            probability, frequency = ([found[key][index] for index in filled] for key in ("probability", "frequency"))
            label = f"{name}: ECE {100 * found['ece']:.1f}"
            axes.plot(probability, frequency, color=colour, marker="o", markersize=2.5, linewidth=0.9, label=label)
            share = np.array(found["pixels"]) / sum(found["pixels"])
            below.step(
                np.linspace(0, 1, len(share) + 1), np.append(share, share[-1]), where="post", color=colour, linewidth=0.9
            )
        axes.set_ylabel("frequency of foreground", fontsize=_FONT)
        axes.legend(fontsize=0.85 * _FONT, frameon=False)
        below.set_yscale("log")
        below.set_ylabel("pixels", fontsize=_FONT)
        below.set_xlabel("probability in the soft map", fontsize=_FONT)


# ---------------------------------------------------------------------------------------------------------- canvas
@contextmanager
def _figure(width: float, height: float, path: Path, dpi: int) -> Iterator[Figure]:
    """A canvas measured in inches from the lower left, saved without dates or versions: the same input, the same bytes."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})


def _box(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    across, up = figure.get_size_inches()
    box = figure.add_axes((x / across, y / up, width / across, height / up))
    box.set_axis_off()
    return box


def _plot(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes of a plot with ticks and an open frame, in inches from the lower left."""
    axes = _box(figure, x, y, width, height)
    axes.set_axis_on()
    axes.tick_params(labelsize=_FONT, width=0.5)
    for side, line in axes.spines.items():
        line.set_linewidth(0.5)
        line.set_visible(side in ("left", "bottom"))
    return axes


def _text(
    figure: Figure,
    x: float,
    y: float,
    text: str,
    ha: str = "center",
    va: str = "center",
    rotation: float = 0,
    math: bool = False,
) -> None:
    across, up = figure.get_size_inches()
    figure.text(x / across, y / up, text, ha=ha, va=va, rotation=rotation, fontsize=_FONT, linespacing=1.1, parse_math=math)


def _wrap(text: str, width: float, most: int) -> list[str]:
    """Lines of a caption in a box `width` inches wide; what does not fit into `most` lines is cut with an ellipsis."""
    across = max(4, int(width * 72 / (0.55 * _FONT)))
    return textwrap.wrap(text, across, max_lines=most, placeholder="…") or [""]
