"""Plot of the reliability of soft masks."""

from pathlib import Path
from typing import Any

import numpy as np

from genseg.report.figures import canvas


def draw_reliability(curves: dict[str, dict[str, Any]], path: Path, dpi: int) -> str:
    """Draw the foreground frequency in each probability bin and, below it, the share of pixels in the bin.

    `curves` maps the names of an ensemble and of its single sample to the `calibration` of their scores files.
    """
    width = 0.55 * canvas.WIDTH
    with canvas.open_figure(width, 3.9, path, dpi) as figure:
        axes = canvas.add_plot(figure, 0.5, 1.4, width - 0.7, 2.3)
        shares_axes = canvas.add_plot(figure, 0.5, 0.45, width - 0.7, 0.75)
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="dashed")
        for colour, (name, curve) in zip((canvas.TRUTH_COLOUR, canvas.PREDICTION_COLOUR), curves.items(), strict=True):
            filled = [index for index, count in enumerate(curve["pixels"]) if count]
            probability, frequency = ([curve[key][index] for index in filled] for key in ("probability", "frequency"))
            label = f"{name}: ECE {100 * curve['ece']:.1f}"
            axes.plot(probability, frequency, color=colour, marker="o", markersize=2.5, linewidth=0.9, label=label)
            shares = np.array(curve["pixels"]) / sum(curve["pixels"])
            edges = np.linspace(0, 1, len(shares) + 1)
            shares_axes.step(edges, np.append(shares, shares[-1]), where="post", color=colour, linewidth=0.9)
        axes.set_ylabel("frequency of foreground")
        axes.legend(fontsize=0.85 * canvas.FONT)
        shares_axes.set_yscale("log")
        shares_axes.set_ylabel("share of pixels")
        shares_axes.set_xlabel("probability in the soft map")
    return (
        f"Reliability of the soft masks on the grid's phrases, {next(iter(curves))} against one sample: for each probability "
        "bin, the frequency of foreground (dashed: perfect calibration) and the share of pixels. ECE: expected calibration "
        "error in points."
    )
