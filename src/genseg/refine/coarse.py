"""The coarse masks that a study refines: those of the phrases, and of the class phrases the labelling they amount to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts import masks
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import maps_path, maps_shape, read_maps, read_predictions
from genseg.artifacts.resample import bilinear
from genseg.baselines.registry import Baseline
from genseg.errors import UserError
from genseg.interchange.labels import Background, class_list, paint
from genseg.params import Params
from genseg.refine.g4seg import Maps
from genseg.refine.layout import coarse_paths, refined_tables


@dataclass
class Part:
    """The phrases or the class phrases of the refined images: their table, and one baseline's coarse predictions.

    Of class phrases the masks are the pixels that each class wins by the baseline's own background rule: what is refined is
    the labelling whose mIoU is measured, one class at a time.
    """

    table: pd.DataFrame
    coarse: pd.DataFrame
    soft: Path | None
    """Predictions file that has soft maps beside it; None: hard masks."""
    rows: NDArray[np.int64]
    """Of `coarse`, in that file."""
    classes: bool

    def maps(self, chosen: NDArray[np.int64]) -> Maps:
        """Soft maps [n, h, w] of some rows of `coarse`."""
        assert self.soft is not None
        return np.concatenate([read_maps(self.soft, slice(row, row + 1)) for row in self.rows[chosen]])

    def labels(self, chosen: NDArray[np.int64]) -> Maps:
        """Masks [n, H, W] of some rows of `coarse`, of one image, as probabilities 0 and 1: P^0 of the classes on one scale,
        whatever the baseline's maps are on, so that the classes' refined P compete by argmax."""
        sizes = self.coarse.iloc[chosen].merge(self.table, on=KEY, suffixes=("", "_"))[["mask", "height", "width"]]
        return np.stack([masks.decode(*row) for row in sizes.itertuples(index=False)]).astype(np.float32)

    def images(self) -> Iterator[tuple[NDArray[np.int64], int, int]]:
        """(rows of `coarse`, height, width) of every image."""
        first = self.table.drop_duplicates("image_id")
        sizes = dict(zip(first["image_id"], zip(first["height"], first["width"], strict=True), strict=True))
        for image_id, rows in self.coarse.groupby("image_id", sort=True).indices.items():
            height, width = sizes[image_id]
            yield np.asarray(rows, np.int64), int(height), int(width)


class CoarseMasks:
    """A study's refined images: `tables` of their phrases (False) and class phrases (True), the background `rule` that makes
    a labelling of class phrases, and each baseline's parts."""

    def __init__(self, params: Params) -> None:
        self.params = params
        phrases = read_phrases(params.data_dir / "phrases.parquet")
        every_class = read_phrases(params.data_dir / "class_phrases.parquet")
        found = class_list(every_class, str(params.data_dir / "class_phrases.parquet"))
        self.rule = Background("none")
        if found.background is not None:
            self.rule = Background("threshold", params.score.background_threshold)
        self.tables = refined_tables(params, phrases, every_class, found.background)
        self._parts: tuple[str, dict[bool, Part]] | None = None

    def parts(self, baseline: Baseline) -> dict[bool, Part]:
        """By whether they are class phrases; those of the last baseline are kept in memory."""
        if self._parts is None or self._parts[0] != baseline.name:
            coarse = coarse_paths(self.params, baseline)
            self._parts = (baseline.name, {classes: self._part(path, classes) for classes, path in coarse.items()})
        return self._parts[1]

    def _part(self, path: Path, classes: bool) -> Part:
        predictions, table = read_predictions(path), self.tables[classes]
        shape = maps_shape(path) if classes else None
        if shape is not None and shape[0] != len(predictions):
            raise UserError(f"{maps_path(path)}: {shape[0]} soft maps for {len(predictions)} predictions; make both again")
        numbered = predictions.assign(row=np.arange(len(predictions)))
        coarse = numbered.merge(table[KEY], on=KEY).sort_values(KEY, kind="stable", ignore_index=True)
        rows = coarse["row"].to_numpy(np.int64)
        part = Part(table, coarse[[*KEY, "score", "mask"]], None if shape is None else path, rows, classes)
        return replace(part, coarse=self.labelled(part)) if classes else part

    def labelled(self, part: Part) -> pd.DataFrame:
        """The coarse predictions with the pixels that each wins as its mask."""
        found = part.coarse.copy()
        for rows, height, width in part.images():
            group = part.coarse.iloc[rows]
            if part.soft is not None:
                winner = self.rule.winner(bilinear(part.maps(rows), height, width))
            else:
                winner = paint(
                    [masks.decode(code, height, width) for code in group["mask"]], list(group["score"]), height, width
                )
            found.loc[group.index, "mask"] = [masks.encode(winner == index) for index in range(len(rows))]
        return found

    def side(self, part: Part) -> int:
        """Of refined soft maps: a study needs some wherever the coarse masks have some, or mIoU would be read otherwise."""
        own = maps_shape(part.soft) if part.soft is not None else None
        return self.params.refine.maps or (own[2] if own else self.params.refine.grid)

    def apart(self, part: Part, frame: pd.DataFrame, soft: Maps | None) -> tuple[pd.DataFrame, Maps | None]:
        """Hard class masks shared no pixel when they were coarse, and share none afterwards: a pixel goes to the class with the
        highest refined probability, if a class claims it or, without a background class, one had it. They need no soft maps;
        others, which cover every pixel by argmax, stay as they are."""
        if part.soft is not None or soft is None:
            return frame, soft
        found = frame.copy()
        for rows, height, width in replace(part, coarse=frame).images():
            own = np.stack([masks.decode(code, height, width) for code in frame["mask"].iloc[rows]])
            owned = own.any(0) | (part.labels(rows).any(0) if self.rule.kind == "none" else False)
            winner = np.where(owned, bilinear(soft[rows], height, width).argmax(0), -1)
            found.loc[frame.index[rows], "mask"] = [masks.encode(winner == index) for index in range(len(own))]
        return found, None
