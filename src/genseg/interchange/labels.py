"""Labels of an image: which class phrase owns which pixel. What all the formats of class predictions have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.errors import UserError

Labels = NDArray[np.int64]
Numbering = Literal["class_id", "position"]

NOTHING = -1
"""Label of a pixel that belongs to no class of the list: background, or ignored by the producer."""
IGNORE = 255


@dataclass(frozen=True)
class ClassList:
    """The study's classes in the order of its class phrases, whose `phrase_id` is the place in the list."""

    ids: list[int]
    """`class_id` of each."""
    background: int | None
    """Place of the class tagged `background`."""

    @property
    def foreground(self) -> list[int]:
        return [place for place in range(len(self.ids)) if place != self.background]

    def number(self, place: int, numbering: Numbering) -> int:
        """What an index mask calls a class: its `class_id`, or its position among the foreground classes from 1."""
        if numbering == "class_id":
            return self.ids[place]
        return 0 if place == self.background else self.foreground.index(place) + 1

    def values(self, numbering: Numbering) -> dict[int, int]:
        """Place by the number that an index mask uses. 0 is background and 255 ignored, unless a class is called so."""
        rest = NOTHING if self.background is None else self.background
        return {0: rest, IGNORE: NOTHING} | {self.number(place, numbering): place for place in range(len(self.ids))}


def class_list(phrases: pd.DataFrame, origin: str) -> ClassList:
    """The classes of a class-phrase table. Raises UserError for a table of other phrases."""
    classes = phrases.drop_duplicates("phrase_id").sort_values("phrase_id")
    places = classes["phrase_id"].tolist()
    every = phrases.groupby("image_id")["phrase_id"].nunique().eq(len(places)).all()
    named = phrases["class_id"].notna().all() and (phrases.groupby("phrase_id")["class_id"].nunique() == 1).all()
    if phrases.empty or places != list(range(len(places))) or not every or not named or classes["class_id"].duplicated().any():
        raise UserError(
            f"{origin}: not class phrases (every class of the list for every image); give the study's class_phrases.parquet"
        )
    background = [place for place, tags in zip(places, classes["tags"], strict=True) if "background" in _tags(tags)]
    return ClassList([int(item) for item in classes["class_id"]], background[0] if background else None)


def _tags(tags: Any) -> list[str]:
    return [] if tags is None else list(tags)


def images(phrases: pd.DataFrame) -> Iterator[tuple[int, str, int, int, pd.DataFrame]]:
    """(image_id, stem of the picture's file or else the id, height, width, rows) of every image, by id."""
    for image_id, rows in phrases.groupby("image_id", sort=True):
        first = rows.iloc[0]
        name = str(image_id) if pd.isna(first["file_name"]) else Path(str(first["file_name"])).stem
        yield int(str(image_id)), name, int(first["height"]), int(first["width"]), rows


@dataclass(frozen=True)
class Background:
    """Who owns a pixel that no class is sure of: the producer's own rule, frozen.

    `none`: the highest class, always. `constant:V`: background has score V everywhere, and wins a tie (IRN). `power:G`: it has
    (1 - max)^G, and wins a tie (CLIP-ES). `threshold:V`: pixels whose highest score is under V (GroupViT).
    """

    kind: Literal["none", "constant", "power", "threshold"]
    value: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Background:
        kind, _, value = text.partition(":")
        try:
            if kind == "none" and not value:
                return cls("none")
            if (
                kind in ("constant", "power", "threshold")
                and np.isfinite(float(value))
                and (kind != "power" or float(value) > 0)
            ):
                return cls(kind, float(value))  # type: ignore[arg-type]
        except ValueError:
            pass
        raise UserError(f"--background {text}: give none, constant:V, power:G or threshold:V with a number, e.g. constant:0.15")

    def __str__(self) -> str:
        return self.kind if self.kind == "none" else f"{self.kind}:{self.value:g}"

    def winner(self, values: NDArray[np.floating]) -> Labels:
        """Index [H, W] of the class that owns each pixel of values [K, H, W], -1 for background."""
        if not len(values):
            return np.full(values.shape[1:], NOTHING, np.int64)
        best, index = values.max(0), values.argmax(0)
        if self.kind == "none":
            return index
        if self.kind == "threshold":
            return np.where(best < self.value, NOTHING, index)
        rival = np.power(1 - best, self.value) if self.kind == "power" else np.asarray(self.value, values.dtype)
        return np.where(rival >= best, NOTHING, index)


def paint(masks: Sequence[NDArray[np.bool_]], scores: Sequence[float], height: int, width: int) -> Labels:
    """Index [H, W] of the mask with the highest score at each pixel (of equals the first), -1 where none is."""
    labels = np.full((height, width), NOTHING, np.int64)
    for index in sorted(range(len(masks)), key=lambda item: (scores[item], -item)):
        labels[masks[index]] = index
    return labels
