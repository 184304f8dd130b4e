"""Plot of the gain of G4Seg by the quality of the coarse mask and the complexity of the boundary."""

from pathlib import Path
from typing import Any

from genseg.report.figures import canvas
from genseg.report.render import plural


def draw_gain(refinement: dict[str, Any], path: Path, dpi: int) -> str:
    """Draw G4Seg's mean gain in IoU (points) in each bin of `metrics.refinement`, with 95 % interval and phrase count."""
    quantities = {"iou": "IoU of the coarse mask", "complexity": "complexity of the boundary: perimeter² / area"}
    line: Any = {"color": canvas.TRUTH_COLOUR, "linewidth": 0.8}
    with canvas.open_figure(canvas.WIDTH, 2.4, path, dpi) as figure:
        for number, (quantity, label) in enumerate(quantities.items()):
            axes = canvas.add_plot(figure, 0.5 + number * canvas.WIDTH / 2, 0.45, canvas.WIDTH / 2 - 0.65, 1.8)
            axes.axhline(0, color="0.6", linewidth=0.8, linestyle="dashed")
            bins = [gain_bin for gain_bin in refinement["gain"] if gain_bin["by"] == quantity]
            centres = [(gain_bin["low"] + gain_bin["high"]) / 2 for gain_bin in bins]
            gains = [100 * gain_bin["difference"] for gain_bin in bins]
            axes.plot(centres, gains, "o", markersize=3.5, color=canvas.TRUTH_COLOUR)
            for gain_bin, centre, gain in zip(bins, centres, gains, strict=True):
                axes.hlines(gain, gain_bin["low"], gain_bin["high"], **line)
                if gain_bin["ci_low"] is not None:
                    axes.vlines(centre, 100 * gain_bin["ci_low"], 100 * gain_bin["ci_high"], **line)
                count = f"n = {gain_bin['n']}"
                axes.annotate(count, (centre, gain), (3, 3), textcoords="offset points", fontsize=0.8 * canvas.FONT)
            axes.set_xlabel(label)
            if number == 0:
                axes.set_ylabel("gain in IoU (points)")
    counts = refinement["counts"]
    return (
        "Mean gain in IoU by G4Seg (ours) over all coarse masks, by their IoU and by the complexity of the ground truth: "
        f"{plural(counts['phrases'], 'phrase')} in {plural(counts['images'], 'test image')}, protocol "
        f"{refinement['protocol']}, bootstrap over images. A gain that falls with the IoU of the coarse mask is in part "
        "regression to the mean."
    )
