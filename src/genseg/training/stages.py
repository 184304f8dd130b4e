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

    extra_passes: float = 0.0
    """Mean number of forward passes without gradient per sample, in addition to the one that is trained."""


def stage_spans(train: Train, rows: int, kind: Kind) -> list[StageSpan]:
    """Return the base training and the stages, in order. The control has a single span of the same total length.

    The base training makes an estimate of x_0 for a part of its samples; in distillation, the teacher evaluates every sample
    with and without the text.
    """
    before_last = (1 - train.terminal_warmup) * (1 - train.terminal_timestep_prob)
    spans = [StageSpan(0, total_steps(train, rows), None, train.self_estimate_prob * before_last)]
    for stage in train.stages:
        spans.append(StageSpan(spans[-1].end, stage.steps, stage, 2.0 if stage.objective == "distill" else 0.0))
    return spans if kind == "gs" else [StageSpan(0, spans[-1].end)]


def total_steps(train: Train, rows: int) -> int:
    """Return the number of steps before the stages, for `rows` training phrases."""
    return train.steps or math.ceil((train.epochs or 0) * rows / train.batch)
