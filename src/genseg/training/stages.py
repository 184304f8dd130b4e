"""The stages of a training run, the steps of each, and the total number of steps."""

import math
from dataclasses import dataclass
from typing import Literal

from genseg.params.train import Stage, Train

Kind = Literal["gs", "discriminative"]
"""The label-diffusion model, or its discriminative control."""


@dataclass(frozen=True)
class StageSpan:
    """Steps `first` to `end - 1` of a training run, which have their own learning-rate schedule."""

    first: int
    steps: int
    stage: Stage | None = None
    """None for the base training, which precedes all stages."""

    @property
    def end(self) -> int:
        return self.first + self.steps

    @property
    def teacher_passes(self) -> int:
        """Forward passes of the teacher per sample: 2 (with and without the text) in distillation, otherwise 0."""
        return 2 if self.stage is not None and self.stage.objective == "distill" else 0


def stage_spans(train: Train, rows: int, kind: Kind) -> list[StageSpan]:
    """Return the base training and the stages, in order. The control has a single span of the same total length."""
    spans = [StageSpan(0, total_steps(train, rows))]
    for stage in train.stages:
        spans.append(StageSpan(spans[-1].end, stage.steps, stage))
    return spans if kind == "gs" else [StageSpan(0, spans[-1].end)]


def total_steps(train: Train, rows: int) -> int:
    """Return the number of steps before the stages, for `rows` training phrases."""
    return train.steps or math.ceil((train.epochs or 0) * rows / train.batch)
