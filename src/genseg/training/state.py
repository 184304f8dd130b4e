"""The state of a training run: everything that changes from step to step and that a checkpoint holds."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from genseg.params import Train
from genseg.training.checkpoints import load_checkpoint, save_checkpoint
from genseg.training.distributed import (
    Ranks,
    full_optimizer_state_dict,
    full_state_dict,
    load_full_optimizer_state_dict,
    load_full_state_dict,
    parallelize,
)
from genseg.training.networks import Networks, average_weights, make_optimizer


class TrainingState:
    """Networks, averaged networks (EMA), optimizer, gradient scaler and step.

    Attributes:
        networks: the networks that are trained.
        model: the module to call in training: `networks` itself, or its DDP wrapper.
        averaged: exponential moving average of `networks`; the same object as `networks` if `train.ema` is null.
        step: number of steps taken.
    """

    def __init__(self, networks: Networks, train: Train, ranks: Ranks) -> None:
        self.ranks, self.ema, self.step = ranks, train.ema or 0.0, 0
        self.networks = self.averaged = networks
        if train.ema:
            self.averaged = copy.deepcopy(networks).requires_grad_(False)
            parallelize(self.averaged, ranks, train.sharding)
        self.model = parallelize(networks, ranks, train.sharding)
        self.optimizer = make_optimizer(networks, train.optimizer)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=train.precision == "fp16")

    def finish_step(self) -> None:
        """Update the averaged networks after the optimizer's step, and count the step. The decay rises to `train.ema`, so
        that the average soon forgets the initial weights."""
        if self.averaged is not self.networks:
            average_weights(self.averaged, self.networks, min(self.ema, (self.step + 1) / (self.step + 10)))
        self.step += 1

    def begin_stage(self) -> None:
        """Continue from the averaged weights with a fresh optimizer."""
        average_weights(self.networks, self.averaged, 0.0)
        self.optimizer.state.clear()

    def save(self, folder: Path) -> None:
        """Write a checkpoint of whole tensors. All ranks must call this; rank 0 writes."""
        checkpoint = {
            "networks": full_state_dict(self.networks),
            "optimizer": full_optimizer_state_dict(self.networks, self.optimizer),
            "scaler": self.scaler.state_dict(),
        }
        if self.averaged is not self.networks:
            checkpoint["averaged"] = full_state_dict(self.averaged)
        if self.ranks.rank == 0:
            save_checkpoint(folder, self.step, checkpoint)

    def load(self, folder: Path) -> None:
        """Load the newest readable checkpoint of `folder`, if there is one. All ranks must call this."""
        checkpoint = load_checkpoint(folder)
        if checkpoint is None:
            return
        load_full_state_dict(self.networks, checkpoint["networks"])
        load_full_optimizer_state_dict(self.networks, self.optimizer, checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        if self.averaged is not self.networks:
            load_full_state_dict(self.averaged, checkpoint["averaged"])
        self.step = checkpoint["step"]
