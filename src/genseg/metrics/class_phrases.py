"""The class phrases of test, and the pixel counts and mIoU of predictions for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genseg.artifacts.files import read_json
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import maps_path, maps_shape, read_maps, read_predictions
from genseg.errors import UserError
from genseg.metrics.bootstrap import percentile_interval, resampled_sums
from genseg.metrics.scoring import mask_pairs, match
from genseg.metrics.semantic import PixelCounts, class_ious, count_pixels, mean_iou
from genseg.params import Params


class ClassPhrases:
    """A study's class list and class-phrase table, for the test images with ids `images`, or all if None."""

    def __init__(self, params: Params, images: Sequence[int] | None = None) -> None:
        self.path = params.data_dir / "class_phrases.parquet"
        self.threshold = params.score.background_threshold
        self.images = images
        table = read_phrases(self.path)
        self.table = table if images is None else table[table["image_id"].isin(images)]
        self.classes = read_json(params.data_dir / "classes.json")

    @property
    def has_background(self) -> bool:
        return any(item.get("background") for item in self.classes)

    def count(self, path: Path, threshold: float | None = None) -> PixelCounts:
        """Count the pixels of a predictions file, from its soft maps if it has them, otherwise from its masks.

        Args:
            threshold: threshold in [0, 1] of the background rule; that of the params if None.

        Raises:
            UserError: the file is missing or broken, or does not match the class-phrase table.
        """
        origins = (str(self.path), str(path))
        predictions = read_predictions(path)
        shape = maps_shape(path)
        if shape is not None and shape[0] != len(predictions):
            raise UserError(
                f"{maps_path(path)}: expected {len(predictions)} soft maps, one for each prediction, got {shape[0]}; "
                f"make it and {path.name} again"
            )
        file_rows = np.arange(len(predictions))
        if self.images is not None:
            file_rows = np.flatnonzero(predictions["image_id"].isin(self.images))
            predictions = predictions.iloc[file_rows].reset_index(drop=True)
        rows, _ = match(self.table, predictions, "test", False, origins)
        pairs = mask_pairs(rows, origins)
        rows = rows.assign(mask=pairs.truths, predicted_mask=pairs.predictions, area=pairs.truth_area)

        def maps(predicted_rows: NDArray[np.int64]) -> NDArray[np.float32]:
            """Read the range of rows that contains `predicted_rows`; the rows of an image are adjacent."""
            positions = file_rows[predicted_rows]
            start, stop = (int(positions.min()), int(positions.max()) + 1) if len(positions) else (0, 0)
            return read_maps(path, slice(start, stop))[positions - start]

        threshold = self.threshold if threshold is None else threshold
        return count_pixels(rows, None if shape is None else maps, self.classes, threshold, origins[0])


def miou_summary(params: Params, pixels: PixelCounts) -> dict[str, Any]:
    """Return the `miou` of a scores file: `mean` and `per_class` in [0, 1] (null without ground truth), the 95 % `interval`
    of the mean, and the numbers of images, labelled pixels and missing predictions."""
    total = pixels.counts.sum(0)
    mean = float(mean_iou(total))
    ious = zip(pixels.names, class_ious(total), strict=True)
    return {
        "mean": None if np.isnan(mean) else mean,
        "per_class": {name: None if np.isnan(iou) else float(iou) for name, iou in ious},
        "interval": percentile_interval(mean_iou(resampled_sums(pixels.counts, params.score.bootstrap, params.seed))),
        "background_threshold": params.score.background_threshold,
        "images": len(pixels.image_ids),
        "pixels": int(total[1].sum()),
        "missing": pixels.missing,
    }
