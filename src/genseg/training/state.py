"""The state of a training run: everything that changes between steps and is saved in checkpoints."""

import copy
from pathlib import Path

import torch

from genseg.artifacts.files import atomic_path
from genseg.params.train import Train
from genseg.training.data import MicroBatch
from genseg.training.distributed import Ranks, accumulate, full_state_dict, load_full_state_dict, parallelize
from genseg.training.losses import Loss
from genseg.training.networks import Networks, average_weights, make_optimizer
from genseg.training.steps import check_finite, load_checkpoint, mixed_precision, save_checkpoint


class TrainingState:
    """Networks, averaged networks (EMA), optimizer, gradient scaler and step.

    Attributes:
        networks: the networks that are trained.
        model: the module to call in training: `networks` itself, or its DDP wrapper.
        averaged: exponential moving average of `networks`; the same object as `networks` if `train.ema` is null.
        step: number of steps taken.
    """

    def __init__(self, networks: Networks, train: Train, ranks: Ranks) -> None:
        self.train, self.ranks, self.step = train, ranks, 0
        self.networks = self.averaged = networks
        if train.ema:
            self.averaged = copy.deepcopy(networks).requires_grad_(False)
            parallelize(self.averaged, ranks, train.parallelism)
        self.model = parallelize(networks, ranks, train.parallelism)
        self.optimizer = make_optimizer(networks, train.optimizer)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=train.precision == "fp16")

    def update_weights(self, batches: list[MicroBatch], loss: Loss) -> float:
        """Take an optimizer step on the global batch and return its mean loss. `batches` is the part of this process."""
        # Evaluate the loss and accumulate gradients.
        batch_loss = torch.zeros((), device=self.ranks.device)
        self.optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(batches):
            with accumulate(self.model, last=number == len(batches) - 1):
                with mixed_precision(self.train, self.ranks.device):
                    losses = loss(self.model, batch.to(self.ranks.device))
                micro_loss = losses.sum() / self.train.batch
                batch_loss += micro_loss.detach()
                # DDP and FSDP average the gradients of the processes, but the loss is a sum over processes.
                self.scaler.scale(micro_loss * self.ranks.size).backward()
        check_finite(self.ranks.sum(batch_loss), self.step)

        # Check and clip gradients.
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if not self.scaler.is_enabled():  # an enabled scaler skips non-finite gradients and lowers its scale
            check_finite(norm, self.step, "gradient norm")
        if self.train.optimizer.gradient_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.train.optimizer.gradient_clip, norm)

        # Update the weights. Unused null embeddings get a gradient of zero, as they do with several processes.
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return batch_loss.item()

    def finish_step(self) -> None:
        """Update the averaged networks after the optimizer's step, and count the step. The decay starts low and rises to
        `train.ema`, so that the initial weights soon lose their influence."""
        if self.train.ema:
            average_weights(self.averaged, self.networks, min(self.train.ema, (self.step + 1) / (self.step + 10)))
        self.step += 1

    def begin_stage(self) -> None:
        """Continue from the averaged weights with a fresh optimizer."""
        average_weights(self.networks, self.averaged, 0.0)
        self.optimizer.state.clear()

    def make_teacher(self, networks: Networks, path: Path, begins: bool) -> Networks:
        """Turn `networks` into the frozen teacher of a distillation: the averaged networks at the start of its stage. If the
        stage `begins`, these weights are saved to `path`; if a run resumes within the stage, they are loaded from there."""
        parallelize(networks.requires_grad_(False).eval(), self.ranks, self.train.parallelism)
        if begins:
            average_weights(networks, self.averaged, 0.0)
            weights = full_state_dict(networks)
            if self.ranks.rank == 0:
                with atomic_path(path) as temporary:
                    torch.save(weights, temporary)
        else:
            load_full_state_dict(networks, torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        return networks

    def save(self, folder: Path) -> None:
        """Write a checkpoint of whole tensors. All ranks must call this; rank 0 writes."""
        checkpoint = {
            "networks": full_state_dict(self.networks),
            "optimizer": full_state_dict(self.networks, self.optimizer),
            "scaler": self.scaler.state_dict(),
        }
        if self.train.ema:
            checkpoint["averaged"] = full_state_dict(self.averaged)
        if self.ranks.rank == 0:
            save_checkpoint(folder, self.step, checkpoint)

    def load(self, folder: Path) -> None:
        """Load the newest readable checkpoint of `folder`, if there is one. All ranks must call this."""
        checkpoint = load_checkpoint(folder)
        if checkpoint is None:
            return
        load_full_state_dict(self.networks, checkpoint["networks"])
        load_full_state_dict(self.networks, checkpoint["optimizer"], self.optimizer)
        self.scaler.load_state_dict(checkpoint["scaler"])
        if self.train.ema:
            load_full_state_dict(self.averaged, checkpoint["averaged"])
        self.step = checkpoint["step"]
