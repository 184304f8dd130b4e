"""Gallery of failures of the main row, by kind."""

from pathlib import Path

import pandas as pd

from genseg.report.figures.examples import Strip, draw_strips, fitting_height
from genseg.report.render import plural
from genseg.report.tables.failures import FAILURE_IOU, KINDS

_COUNT = 6  # pictures of a kind


def choose_failures(failed: pd.DataFrame, count: int) -> dict[str, pd.DataFrame]:
    """Return for each kind the `count` failures with the lowest IoU, at most one of an image, ties by id."""
    ordered = failed.sort_values(["iou", "image_id", "narrative_id", "phrase_id"])
    return {kind: ordered[ordered["kind"] == kind].drop_duplicates("image_id").head(count) for kind in KINDS}


def draw_failures(failed: pd.DataFrame, path: Path, dpi: int) -> str:
    """Draw a strip of failures (from `tables.failures.find_failures`) for each kind.

    Raises UserError if an image is missing or has another size than in the phrase table.
    """
    examples = {
        kind: [row for _, row in rows.assign(note=rows.apply(_note, axis=1) if len(rows) else None).iterrows()]
        for kind, rows in choose_failures(failed, _COUNT).items()
    }
    height = min((fitting_height(rows) for rows in examples.values() if rows), default=1.0)
    strips = [
        Strip(rows, min(height, 1.3), ("image", "prediction"), f"{kind}: {(failed['kind'] == kind).sum()} of {len(failed)}")
        for kind, rows in examples.items()
    ]
    draw_strips(strips, max(3.0, *(strip.width for strip in strips)), path, dpi)
    return (
        f"Failures of GS by kind (defined in the table `failures`): of {plural(len(failed), 'test phrase')} with a native IoU "
        f"below {FAILURE_IOU:g}, up to {_COUNT} of each kind with the lowest IoU, at most one of an image, ties by id. Below: "
        "prediction with the outline of the ground truth (dashed), its IoU, and for a wrong object the phrase or class whose "
        "ground truth it resembles most."
    )


def _note(row: pd.Series) -> str:
    other = f"; {row['other_iou']:.2f} with “{row['other']}”" if row["kind"] == "wrong object" else ""
    return f"IoU {row['iou']:.2f}{other}"
