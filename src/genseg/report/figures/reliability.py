"""Reliability of the soft masks of an ensemble and of a single sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from genseg.params import Cell
from genseg.report.figures import canvas


def reliability_caption(ensemble: Cell) -> str:
    return (
        f"Reliability of the soft masks on the grid's phrases, {ensemble} against one sample: per bin of probability the "
        "frequency of foreground pixels (dashed: perfect), and the share of pixels in the bin. ECE: expected calibration "
        "error, points."
    )


def draw_reliability(curves: dict[str, dict[str, Any]], path: Path, dpi: int) -> None:
    """Draw the frequency of the foreground in each bin of probability and, below it, the share of pixels in the bin.

    Args:
        curves: name -> `calibration` of a scores file; two curves.
    """
    with canvas.open_figure(0.55 * canvas.WIDTH, 3.9, path, dpi) as figure:
        width = 0.55 * canvas.WIDTH - 0.7
        axes = canvas.add_plot(figure, 0.5, 1.4, width, 2.3)
        shares_axes = canvas.add_plot(figure, 0.5, 0.45, width, 0.75)
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="dashed")
        for colour, (name, curve) in zip((canvas.TRUTH_COLOUR, canvas.PREDICTION_COLOUR), curves.items(), strict=False):
            filled = [index for index, count in enumerate(curve["pixels"]) if count]
            probability, frequency = ([curve[key][index] for index in filled] for key in ("probability", "frequency"))
            label = f"{name}: ECE {100 * curve['ece']:.1f}"
            axes.plot(probability, frequency, color=colour, marker="o", markersize=2.5, linewidth=0.9, label=label)
            shares = np.array(curve["pixels"]) / sum(curve["pixels"])
            edges = np.linspace(0, 1, len(shares) + 1)
            shares_axes.step(edges, np.append(shares, shares[-1]), where="post", color=colour, linewidth=0.9)
        axes.set_ylabel("frequency of foreground", fontsize=canvas.FONT)
        axes.legend(fontsize=0.85 * canvas.FONT, frameon=False)
        shares_axes.set_yscale("log")
        shares_axes.set_ylabel("pixels", fontsize=canvas.FONT)
        shares_axes.set_xlabel("probability in the soft map", fontsize=canvas.FONT)
