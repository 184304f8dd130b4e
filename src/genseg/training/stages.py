"""The stages of a training run: which steps belong to each, and how many steps there are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from genseg.params import Stage, Train

Kind = Literal["gs", "discriminative"]
"""The label-diffusion model, or its discriminative control."""


@dataclass(frozen=True)
class StageSpan:
    """Steps `first` to `end - 1` of a training run, with a learning-rate schedule of their own.

    stage: None for the base training, which precedes all stages.
    """

    first: int
    steps: int
    stage: Stage | None = None

    @property
    def end(self) -> int:
        return self.first + self.steps

    @property
    def lr_factor(self) -> float:
        """Factor of the stage on every learning rate."""
        return 1.0 if self.stage is None else self.stage.lr_factor

    @property
    def teacher_passes(self) -> int:
        """Forward passes of the teacher per sample: with the text and without it."""
        return 2 if self.stage is not None and self.stage.objective == "distill" else 0


def stage_spans(train: Train, rows: int, kind: Kind) -> list[StageSpan]:
    """Return the base training and the stages, in order.

    The control has a single span of the same total length, hence the same budget.
    """
    spans = [StageSpan(0, total_steps(train, rows))]
    for stage in train.stages:
        spans.append(StageSpan(spans[-1].end, stage.steps, stage))
    return spans if kind == "gs" else [StageSpan(0, spans[-1].end)]


def span_at(spans: list[StageSpan], step: int) -> StageSpan:
    """Return the span that contains the 0-based `step`."""
    return next(span for span in reversed(spans) if span.first <= step)


def total_steps(train: Train, rows: int) -> int:
    """Return the number of steps before the stages, for `rows` training phrases."""
    return train.steps or math.ceil((train.epochs or 0) * rows / train.batch)
