"""Plot of AR against evaluations per mask."""

from pathlib import Path

import numpy as np
import pandas as pd

from genseg.report.figures import canvas


def draw_evaluations(points: pd.DataFrame, path: Path, dpi: int) -> str:
    """Draw AR on test, with 95 % intervals, and on val against evaluations per mask, from the table `evaluations`.

    A line joins the points that no cheaper point reaches. Points with a `role` are labelled with it.
    """
    with canvas.open_figure(canvas.WIDTH, 3.0, path, dpi) as figure:
        axes = canvas.add_plot(figure, 0.5, 0.45, canvas.WIDTH - 0.6, 2.45)

        # Draw the two series, slightly apart.
        for name, key, colour, marker, offset in (
            ("test, 95 % interval", "overall", canvas.TRUTH_COLOUR, "o", 0.97),
            ("val", "val_ar", canvas.PREDICTION_COLOUR, "s", 1.03),
        ):
            rows = points[points[key].notna()].sort_values(["evaluations", key], ascending=[True, False])
            cost, ar = rows["evaluations"].to_numpy(float) * offset, rows[key].to_numpy(float)
            best = ar > np.maximum.accumulate(np.append(-np.inf, ar[:-1]))
            axes.plot(cost[best], ar[best], color=colour, linewidth=0.8, alpha=0.6)
            axes.plot(cost, ar, marker, markersize=3.5, color=colour, label=name)
            if key == "overall":
                axes.vlines(cost, rows["ci_low"].astype(float), rows["ci_high"].astype(float), color=colour, linewidth=0.5)
        axes.set_xscale("log", base=2)

        # Label the rows with a role, on the side towards the middle of the figure.
        middle = float(np.prod(axes.get_xlim()) ** 0.5)
        for _, row in points[(points["role"] != "") & points["overall"].notna()].iterrows():
            position = (float(row["evaluations"]), float(row["overall"]))
            side, x = ("right", -6) if position[0] > middle else ("left", 4)
            axes.annotate(str(row["role"]), position, (x, -9), textcoords="offset points", ha=side)

        ticks = sorted(set(points["evaluations"].astype(int)))
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("U-Net evaluations per mask")
        axes.set_ylabel("average recall (points)")
        axes.legend()
    return "Average recall against U-Net evaluations per mask: the operating points of the table `evaluations`."
