"""Coarse masks that a study refines: masks of the phrases, and for the class phrases the labelling of each image."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts import masks
from genseg.artifacts.masks import Mask
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import maps_shape
from genseg.artifacts.resample import Map, bilinear
from genseg.baselines.registry import Baseline
from genseg.interchange.labels import Background, class_list, paint
from genseg.params import Params
from genseg.refine.inputs import read_coarse, read_maps_rows
from genseg.refine.layout import coarse_paths, refined_tables


@dataclass
class CoarsePredictions:
    """One baseline's coarse predictions for the phrases, or for the class phrases, of the refined images.

    The mask of a class phrase is the pixels that its class wins under the study's background rule. Refinement thus starts
    from the labelling whose mIoU is measured, one class at a time.
    """

    phrases: pd.DataFrame  # phrase table of the refined images
    predictions: pd.DataFrame  # in key order, with masks at native size
    maps_file: Path | None  # predictions file whose soft maps belong to the predictions; None for hard masks
    maps_rows: NDArray[np.int64]  # rows of the predictions in that file
    classes: bool  # whether these are class phrases

    def soft_maps(self, rows: NDArray[np.int64]) -> Map:
        """Read the soft maps [n, h, w] in [0, 1] of n rows of `predictions`."""
        assert self.maps_file is not None
        return read_maps_rows(self.maps_file, self.maps_rows[rows])

    def hard_masks(self, rows: NDArray[np.int64]) -> Mask:
        """Return the masks [n, H, W] of n rows of `predictions`, all of one image."""
        group = self.predictions.iloc[rows]
        height, width = self._sizes[group["image_id"].iloc[0]]
        return np.stack([masks.decode(code, height, width) for code in group["mask"]])

    def binary_maps(self, rows: NDArray[np.int64]) -> Map:
        """Return `hard_masks` as maps of 0 and 1, one scale for all classes, so that argmax can compare their refined maps."""
        return self.hard_masks(rows).astype(np.float32)

    def images(self) -> Iterator[tuple[NDArray[np.int64], int, int]]:
        """Yield (rows of `predictions`, height, width) of each image."""
        for image_id, rows in self.predictions.groupby("image_id", sort=True).indices.items():
            yield np.asarray(rows, np.int64), *self._sizes[image_id]

    @cached_property
    def _sizes(self) -> dict[Any, tuple[int, int]]:
        """(height, width) of each image by id."""
        sizes = self.phrases[["image_id", "height", "width"]].drop_duplicates("image_id")
        return {image_id: (height, width) for image_id, height, width in sizes.itertuples(index=False, name=None)}


class RefinementInputs:
    """Inputs of a study's refinement.

    Attributes:
        tables: rows of the phrase table (False) and of the class phrases (True) that are refined.
        rule: background rule that makes a labelling of class phrases.
        coarse: function that reads a baseline's `CoarsePredictions` for phrases (False) and class phrases (True). Raises
            UserError as `read_coarse` does.
    """

    def __init__(self, params: Params) -> None:
        self.params = params
        phrases, class_path = read_phrases(params.data_dir / "phrases.parquet"), params.data_dir / "class_phrases.parquet"
        class_phrases = read_phrases(class_path)
        background = class_list(class_phrases, str(class_path)).background
        threshold = Background("threshold", params.score.background_threshold)
        self.rule = Background("none") if background is None else threshold
        self.tables = refined_tables(params, phrases, class_phrases, background)
        self.coarse = lru_cache(maxsize=1)(self._read)

    def _read(self, baseline: Baseline) -> dict[bool, CoarsePredictions]:
        coarse = {}
        for classes, path in coarse_paths(self.params, baseline).items():
            (predictions, shape), phrases = read_coarse(path), self.tables[classes]
            numbered = predictions.assign(row=np.arange(len(predictions)))
            joined = numbered.merge(phrases[KEY], on=KEY).sort_values(KEY, kind="stable", ignore_index=True)
            maps_file = path if classes and shape is not None else None
            maps_rows = joined["row"].to_numpy(np.int64)
            kind = CoarsePredictions(phrases, joined[[*KEY, "score", "mask"]], maps_file, maps_rows, classes)
            coarse[classes] = replace(kind, predictions=self.labelling(kind)) if classes else kind
        return coarse

    def labelling(self, coarse: CoarsePredictions) -> pd.DataFrame:
        """Return the predictions with each mask replaced by the pixels that its class wins."""
        labelled = coarse.predictions.copy()
        for rows, height, width in coarse.images():
            group = coarse.predictions.iloc[rows]
            if coarse.maps_file is not None:
                winner = self.rule.winner(bilinear(coarse.soft_maps(rows), height, width))
            else:
                winner = paint(list(coarse.hard_masks(rows)), list(group["score"]), height, width)
            labelled.loc[group.index, "mask"] = [masks.encode(winner == index) for index in range(len(rows))]
        return labelled

    def maps_side(self, coarse: CoarsePredictions) -> int:
        """Return the side of the refined soft maps: `refine.maps`, else that of the coarse maps, else `refine.feature_size`.

        Never 0: if the coarse masks have soft maps, the refined ones need them too, so that mIoU is computed in the same way.
        """
        shape = maps_shape(coarse.maps_file) if coarse.maps_file is not None else None
        return self.params.refine.maps or (shape[2] if shape else self.params.refine.feature_size)

    def make_disjoint(
        self, coarse: CoarsePredictions, refined: pd.DataFrame, soft: Map | None
    ) -> tuple[pd.DataFrame, Map | None]:
        """Make refined class masks disjoint if the coarse predictions have no soft maps.

        A pixel belongs to the class with the highest refined probability, if any refined mask covers it or, without a
        background class, any coarse mask did; the soft maps are then dropped. Other predictions are returned unchanged:
        masks of phrases may overlap, and soft maps of classes are compared by argmax when they are scored.
        """
        if coarse.maps_file is not None or soft is None:
            return refined, soft
        disjoint = refined.copy()
        overlapping = replace(coarse, predictions=refined)
        for rows, height, width in overlapping.images():
            covered = overlapping.hard_masks(rows).any(0)
            if self.rule.kind == "none":
                covered |= coarse.hard_masks(rows).any(0)
            winner = np.where(covered, bilinear(soft[rows], height, width).argmax(0), -1)
            disjoint.loc[refined.index[rows], "mask"] = [masks.encode(winner == index) for index in range(len(rows))]
        return disjoint, None
