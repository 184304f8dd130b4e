"""Gain of G4Seg by the coarse mask's IoU and by the boundary's complexity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from genseg.report.figures import canvas
from genseg.report.text import plural


def gain_caption(refinement: dict[str, Any]) -> str:
    counts = refinement["counts"]
    return (
        "Mean gain in IoU by G4Seg (ours) over all coarse masks, by their IoU and by the complexity of the ground truth: "
        f"{plural(counts['phrases'], 'phrase')} in {plural(counts['images'], 'test image')}, protocol "
        f"{refinement['protocol']}, bootstrap over images. A gain that falls with the IoU of the coarse mask is in part "
        "regression to the mean."
    )


def draw_gain(gain: list[dict[str, Any]], path: Path, dpi: int) -> None:
    """Draw the mean gain in IoU of G4Seg (points, with 95 % intervals) in the bins of `metrics.refinement`."""
    heads = {"iou": "IoU of the coarse mask", "complexity": "complexity of the boundary: perimeter² / area"}
    with canvas.open_figure(canvas.WIDTH, 2.4, path, dpi) as figure:
        for number, (quantity, head) in enumerate(heads.items()):
            axes = canvas.add_plot(figure, 0.5 + number * canvas.WIDTH / 2, 0.45, canvas.WIDTH / 2 - 0.65, 1.8)
            _draw_bins(axes, [gain_bin for gain_bin in gain if gain_bin["by"] == quantity])
            axes.set_xlabel(head, fontsize=canvas.FONT)
            if number == 0:
                axes.set_ylabel("gain in IoU (points)", fontsize=canvas.FONT)


def _draw_bins(axes: Axes, bins: list[dict[str, Any]]) -> None:
    """Draw each bin as a point with its width, 95 % interval and count."""
    centres = [(gain_bin["low"] + gain_bin["high"]) / 2 for gain_bin in bins]
    axes.axhline(0, color="0.6", linewidth=0.8, linestyle="dashed")
    axes.plot(centres, [100 * gain_bin["difference"] for gain_bin in bins], "o", markersize=3.5, color=canvas.TRUTH_COLOUR)
    for centre, gain_bin in zip(centres, bins, strict=True):
        gain = 100 * gain_bin["difference"]
        axes.hlines(gain, gain_bin["low"], gain_bin["high"], color=canvas.TRUTH_COLOUR, linewidth=0.8)
        if gain_bin["ci_low"] is not None:
            axes.vlines(centre, 100 * gain_bin["ci_low"], 100 * gain_bin["ci_high"], color=canvas.TRUTH_COLOUR, linewidth=0.8)
        axes.annotate(f"n = {gain_bin['n']}", (centre, gain), (3, 3), textcoords="offset points", fontsize=0.8 * canvas.FONT)
