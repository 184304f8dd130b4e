"""Label maps of class phrases: the study's classes, the rules for background pixels, and how overlapping masks are resolved."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.phrases import is_background
from genseg.errors import UserError

Labels = NDArray[np.int64]
Numbering = Literal["class_id", "position"]

NO_CLASS = -1
"""Label of a pixel that has no class in the list: background, or ignored by the producer."""
IGNORE = 255
"""Value of ignored pixels in an index mask."""


@dataclass(frozen=True)
class ClassList:
    """The study's classes in the order of their class phrases: the index of a class is the `phrase_id`.

    ids: `class_id` of each class. background: index of the class tagged as background, None if there is none.
    """

    ids: list[int]
    background: int | None

    @property
    def foreground(self) -> list[int]:
        """Indices of all classes except the background."""
        return [index for index in range(len(self.ids)) if index != self.background]

    @property
    def background_label(self) -> int:
        """Label of a background pixel: the index of the background class, or `NO_CLASS` if there is none."""
        return NO_CLASS if self.background is None else self.background

    def number(self, index: int, numbering: Numbering) -> int:
        """Return a class's number in an index mask: its `class_id`, or its position among the foreground classes, from 1."""
        if numbering == "class_id":
            return self.ids[index]
        return 0 if index == self.background else self.foreground.index(index) + 1

    def indices_by_number(self, numbering: Numbering) -> dict[int, int]:
        """Return {number: index} of the classes."""
        return {self.number(index, numbering): index for index in range(len(self.ids))}


def class_list(phrases: pd.DataFrame, origin: str) -> ClassList:
    """Return the classes of a class-phrase table; `origin` names the table in error messages.

    Raises UserError unless every image has all classes of the same list.
    """
    classes = phrases.drop_duplicates("phrase_id").sort_values("phrase_id")
    indices = classes["phrase_id"].tolist()
    complete = phrases.groupby("image_id")["phrase_id"].nunique().eq(len(indices)).all()
    identified = phrases["class_id"].notna().all() and (phrases.groupby("phrase_id")["class_id"].nunique() == 1).all()
    unique = not classes["class_id"].duplicated().any()
    if phrases.empty or indices != list(range(len(indices))) or not (complete and identified and unique):
        raise UserError(f"{origin}: expected every class of one list for every image; give the study's class_phrases.parquet")
    background = classes.loc[is_background(classes), "phrase_id"].tolist()
    return ClassList([int(class_id) for class_id in classes["class_id"]], background[0] if background else None)


def iterate_images(phrases: pd.DataFrame) -> Iterator[tuple[int, str, int, int, pd.DataFrame]]:
    """Yield (image_id, name, height, width, rows) of every image, by id. `name` is the stem of its file name, else its id."""
    for image_id, rows in phrases.groupby("image_id", sort=True):
        first = rows.iloc[0]
        name = str(image_id) if pd.isna(first["file_name"]) else Path(str(first["file_name"])).stem
        yield int(str(image_id)), name, int(first["height"]), int(first["width"]), rows


@dataclass(frozen=True)
class Background:
    """A rule for background pixels, as the producer of the maps defines it.

    `none`: every pixel belongs to the class with the highest score, max. `constant:V`: the background's score is V and wins
    ties (IRN). `power:G`: it is (1 - max)^G and wins ties (CLIP-ES). `threshold:V`: a pixel with max < V (GroupViT).
    """

    kind: Literal["none", "constant", "power", "threshold"]
    value: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the value of `--background`, e.g. `none` or `constant:0.15`. Raises UserError for any other text."""
        kind, _, value = text.partition(":")
        if kind == "none" and not value:
            return cls("none")
        try:
            number = float(value)
        except ValueError:
            number = np.nan
        if kind in ("constant", "power", "threshold") and np.isfinite(number) and (kind != "power" or number > 0):
            return cls(kind, number)  # type: ignore[arg-type]
        raise UserError(f"--background {text}: give none, constant:V, power:G or threshold:V with a number, e.g. constant:0.15")

    def __str__(self) -> str:
        return self.kind if self.kind == "none" else f"{self.kind}:{self.value:g}"

    def winner(self, maps: NDArray[np.floating]) -> Labels:
        """Return the index [H, W] of the class that wins each pixel of maps [K, H, W], `NO_CLASS` for background."""
        if not len(maps):
            return np.full(maps.shape[1:], NO_CLASS, np.int64)
        highest, index = maps.max(0), maps.argmax(0)
        if self.kind == "none":
            return index
        if self.kind == "threshold":
            return np.where(highest < self.value, NO_CLASS, index)
        background = np.power(1 - highest, self.value) if self.kind == "power" else np.asarray(self.value, maps.dtype)
        return np.where(background >= highest, NO_CLASS, index)


def paint(masks: Sequence[NDArray[np.bool_]], scores: Sequence[float], height: int, width: int) -> Labels:
    """Return the index [H, W] of the mask with the highest score at each pixel (the first on a tie), `NO_CLASS` without any."""
    labels = np.full((height, width), NO_CLASS, np.int64)
    for index in sorted(range(len(masks)), key=lambda index: (scores[index], -index)):
        labels[masks[index]] = index
    return labels
