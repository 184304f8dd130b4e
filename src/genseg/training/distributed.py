"""Several processes, one model: who takes which part of the global batch, and where weights and gradients lie.

Started by `torchrun` or `accelerate launch`, which set the same variables (RANK, WORLD_SIZE, LOCAL_RANK); without them
there is one process. `train.sharding` chooses between DDP ("replicate": every process holds everything, gradients are
averaged) and FSDP2 ("shard": weights, gradients, moments and average are cut into one part a process). The master weights
are fp32 and the arithmetic autocast's in either, so both compute what one process computes, up to the order of sums.

Checkpoints hold whole tensors, so a run may go on with another number of processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from genseg.errors import UserError

PATIENCE = timedelta(hours=1)
"""How long a process waits for another, e.g. for the first one to write a checkpoint of 40 GB to a slow disk."""
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Ranks:
    """This process among the `size` of the run."""

    rank: int
    size: int
    device: torch.device

    def places(self, batch: int) -> range:
        """This process's places in the global batch.

        Raises:
            UserError: the batch cannot be shared out evenly.
        """
        if batch % self.size:
            raise UserError(f"train.batch {batch} is no multiple of the {self.size} processes; start another number of them")
        share = batch // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of the processes' tensors, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[Ranks]:
    """Meet the other processes of this run, each with a device of its own kind `device`."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Ranks(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=PATIENCE, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def spread(model: nn.Module, ranks: Ranks, sharding: Literal["replicate", "shard"]) -> nn.Module:
    """Put a model on its device or, sharded, on all of them. Returns what to call in training; `model` keeps the weights.

    Every process must hold the same weights, and every parameter must take part in every backward pass. A model without
    gradients (the average of the weights) is called directly.
    """
    if ranks.size == 1 or sharding == "replicate":
        model.to(ranks.device)
        trained = any(parameter.requires_grad for parameter in model.parameters())
        return DistributedDataParallel(model, gradient_as_bucket_view=True) if ranks.size > 1 and trained else model
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for module in model.modules():
        if isinstance(module, (BasicTransformerBlock, ResnetBlock2D)):
            fully_shard(module, mesh=mesh)
    # By default what is left stays whole after a forward pass, until a backward pass that validation never makes.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def accumulating(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Context of one micro-batch: DDP averages gradients after the last one; FSDP after each, so that no process ever
    holds all of them."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def whole_state(model: nn.Module) -> dict[str, Any]:
    """State dict of whole tensors, in the first process; empty in the others, all of which must call this."""
    return get_model_state_dict(model, options=_WHOLE)


def whole_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return dict(get_optimizer_state_dict(model, optimizer, options=_WHOLE))


def load_whole_state(model: nn.Module, state: dict[str, Any]) -> None:
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def load_whole_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
