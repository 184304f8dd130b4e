"""Coarse masks that a study refines: masks of the phrases, and for the class phrases the labelling of each image."""

from collections.abc import Callable, Iterator
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
from genseg.artifacts.resample import Map, bilinear
from genseg.baselines.registry import Baseline
from genseg.interchange.labels import NO_CLASS, Background, Labels, class_list, paint
from genseg.params import Params
from genseg.refine.inputs import read_coarse, read_maps_rows
from genseg.refine.layout import coarse_paths, refined_images, refined_tables

GROUP_ROWS = 128
"""Number of masks that are refined together. Their memory and the work that a killed job loses do not grow with the data."""


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
        return np.stack([masks.decode(code, *self.size(rows)) for code in self.predictions["mask"].iloc[rows]])

    def binary_maps(self, rows: NDArray[np.int64]) -> Map:
        """Return `hard_masks` as maps of 0 and 1, one scale for all classes, so that argmax can compare their refined maps."""
        return self.hard_masks(rows).astype(np.float32)

    def groups(self) -> dict[int, NDArray[np.int64]]:
        """Return the rows of groups of consecutive images, by the id of the group's first image.

        A group has at least `GROUP_ROWS` rows if images are left. Groups are refined one after the other.
        """
        groups: dict[int, NDArray[np.int64]] = {}
        group: list[NDArray[np.int64]] = []
        for rows, _, _ in self.images():
            group.append(rows)
            if sum(map(len, group)) >= GROUP_ROWS:
                groups[int(self.predictions["image_id"].iloc[group[0][0]])] = np.concatenate(group)
                group = []
        if group:
            groups[int(self.predictions["image_id"].iloc[group[0][0]])] = np.concatenate(group)
        return groups

    def part(self, rows: NDArray[np.int64]) -> "CoarsePredictions":
        """Return the predictions in some rows, all of some images, and the phrases of these images."""
        predictions = self.predictions.iloc[rows].reset_index(drop=True)
        phrases = self.phrases[self.phrases["image_id"].isin(predictions["image_id"].unique())]
        return replace(self, phrases=phrases, predictions=predictions, maps_rows=self.maps_rows[rows])

    def images(self) -> Iterator[tuple[NDArray[np.int64], int, int]]:
        """Yield (rows of `predictions`, height, width) of each image."""
        for image_id, rows in self.predictions.groupby("image_id", sort=True).indices.items():
            yield np.asarray(rows, np.int64), *self._sizes[image_id]

    def labels(self, rows: NDArray[np.int64]) -> Labels:
        """Return the coarse labels [H, W] of an image's rows: positions among the rows, `NO_CLASS` for uncovered pixels."""
        layers = self.hard_masks(rows)
        return np.where(layers.any(0), layers.argmax(0), NO_CLASS)

    def size(self, rows: NDArray[np.int64]) -> tuple[int, int]:
        """Return (height, width) of the image of these rows."""
        return self._sizes[self.predictions["image_id"].iloc[rows[0]]]

    @cached_property
    def _sizes(self) -> dict[Any, tuple[int, int]]:
        """(height, width) of each image by id."""
        sizes = self.phrases[["image_id", "height", "width"]].drop_duplicates("image_id")
        return {image_id: (height, width) for image_id, height, width in sizes.itertuples(index=False, name=None)}


class RefinementInputs:
    """Inputs of a study's refinement.

    Attributes:
        images: sorted ids of the refined images.
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
        self.images = refined_images(params, class_phrases)
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

        def label(rows: NDArray[np.int64]) -> Labels:
            if coarse.maps_file is not None:
                return self.rule.winner(bilinear(coarse.soft_maps(rows), *coarse.size(rows)))
            return paint(list(coarse.hard_masks(rows)), list(coarse.predictions["score"].iloc[rows]), *coarse.size(rows))

        return self.label_images(coarse, label)

    def label_images(self, coarse: CoarsePredictions, label: Callable[[NDArray[np.int64]], Labels]) -> pd.DataFrame:
        """Return the predictions with masks from `label`, which returns the label map [H, W] for an image's rows.

        A label is the position of a class among the rows; other values are background.
        """
        labelled = coarse.predictions.copy()
        for rows, _, _ in coarse.images():
            winner = label(rows)
            labelled.loc[labelled.index[rows], "mask"] = [masks.encode(winner == index) for index in range(len(rows))]
        return labelled

    def label_maps(self, coarse: CoarsePredictions, soft: Map) -> pd.DataFrame:
        """Return the labelling of class masks that were refined one at a time, from their probabilities [N, h, w].

        A pixel belongs to the class with the highest one; with a background class, only if that is at least 0.5.
        """
        rule = self.rule if self.rule.kind == "none" else Background("threshold", 0.5)
        return self.label_images(coarse, lambda rows: rule.winner(bilinear(soft[rows], *coarse.size(rows))))
