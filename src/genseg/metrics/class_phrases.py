"""The class phrases of test, and the pixels that predictions for them get right, by class and image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from genseg.artifacts.files import read_json
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import maps_path, maps_shape, read_maps, read_predictions
from genseg.errors import UserError
from genseg.metrics.scoring import fitting_pairs, match
from genseg.metrics.semantic import Semantic, count_pixels
from genseg.params import Params


class ClassPhrases:
    """The table and the classes, read once; of all test images or of some."""

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

    def count(self, path: Path, threshold: float | None = None) -> Semantic:
        """Pixel counts of a predictions file, from its soft maps where it has them and its masks otherwise.

        Args:
            threshold: of the background rule; that of the params when None.
        """
        origins = (str(self.path), str(path))
        predictions = read_predictions(path)
        shape = maps_shape(path)
        if shape is not None and shape[0] != len(predictions):
            raise UserError(f"{maps_path(path)}: {shape[0]} soft maps for {len(predictions)} predictions; make both again")
        kept = np.arange(len(predictions))
        if self.images is not None:
            kept = np.flatnonzero(predictions["image_id"].isin(self.images))
            predictions = predictions.iloc[kept].reset_index(drop=True)
        rows, _ = match(self.table, predictions, "test", False, origins)
        pairs = fitting_pairs(rows, origins)
        rows = rows.assign(mask=pairs.truths, predicted_mask=pairs.predictions, area=pairs.truth_area)

        def maps(chosen: NDArray[np.int64]) -> NDArray[np.float32]:
            inside = kept[chosen]
            low, high = (int(inside.min()), int(inside.max()) + 1) if len(inside) else (0, 0)
            return read_maps(path, slice(low, high))[inside - low]  # an image's rows lie together

        bound = self.threshold if threshold is None else threshold
        return count_pixels(rows, None if shape is None else maps, self.classes, bound, origins[0])
