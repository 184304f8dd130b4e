"""The source of an import: its options, the phrases that it may predict, and the checks that several formats share."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from genseg.artifacts.parquet import KEY
from genseg.errors import UserError
from genseg.interchange.labels import Background, ClassList, Numbering, class_list

Key = tuple[int, str, int]
"""image_id, narrative_id, phrase_id."""
Row = tuple[int, str, int, bytes, float]
"""A key, the mask's run-length code at native size, and the score in [0, 1]."""


@dataclass(frozen=True)
class ImportOptions:
    """Options of `genseg import`, whose help explains them; None is the format's default."""

    format: str
    array: str | None = None
    background: Background | None = None
    numbering: Numbering | None = None
    probabilities: bool = False
    threshold: float | None = None
    allow_missing: bool = False


@dataclass
class Source:
    """A source, the phrases that it may predict, and what its reader reports."""

    path: Path
    options: ImportOptions
    phrases: pd.DataFrame
    """All phrases and class phrases of the study, in every split."""
    class_phrases: pd.DataFrame
    """Class phrases of the test split."""
    class_table: Path
    """File of the class phrases, for error messages."""
    settings: dict[str, Any]
    """Settings of the import, recorded with the predictions; readers add their own."""
    other_split: int = 0
    """Number of rows for phrases of train or val, which are skipped."""
    missing: list[str] = field(default_factory=list)
    """Files or results that the source lacks."""
    _seen: set[Key] = field(default_factory=set)

    @cached_property
    def classes(self) -> ClassList:
        """Classes of the study. Raises UserError as `class_list` does."""
        return class_list(self.class_phrases, str(self.class_table))

    @cached_property
    def sizes(self) -> dict[int, tuple[int, int]]:
        """(height, width) of every image of the study."""
        images = self.phrases.drop_duplicates("image_id")
        return dict(zip(images["image_id"], zip(images["height"], images["width"], strict=True), strict=True))

    @cached_property
    def splits(self) -> dict[Key, str]:
        """Split of every phrase and class phrase of the study."""
        return dict(zip(self.phrases[KEY].itertuples(index=False, name=None), self.phrases["split"], strict=True))

    def accept_row(self, where: str, key: Key, score: float | None) -> bool:
        """Check a row, and return whether its phrase is in the test split; other rows are counted and must be skipped.

        Raises UserError if the phrase is unknown or appears a second time, or the score is neither None nor in [0, 1].
        """
        key_text = f"{key} (image_id, narrative_id, phrase_id)"
        if key not in self.splits:
            raise UserError(f"{where}: {key_text} is not a phrase of the study; use ids of its phrase tables")
        if key in self._seen:
            raise UserError(f"{where}: duplicate {key_text}; keep one of them")
        self._seen.add(key)
        if score is not None:
            check_score(where, score)
        self.other_split += self.splits[key] != "test"
        return self.splits[key] == "test"


def check_score(where: str, score: object) -> None:
    """Raise UserError unless a score is a number in [0, 1]."""
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 1:
        raise UserError(f"{where}: score {score!r} is not a number in [0, 1]; give a confidence")


def check_size(where: object, shape: tuple[int, ...], height: int, width: int) -> None:
    """Raise UserError unless a mask of this shape has the size of its image."""
    if tuple(shape) != (height, width):
        size = " x ".join(map(str, shape))
        raise UserError(f"{where}: {size} pixels, but the image has {height} x {width}; save it at native size")
