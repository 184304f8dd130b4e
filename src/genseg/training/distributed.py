"""One model in several processes: which rows of the global batch each one takes, and where weights and gradients lie.

The processes are started by `torchrun` or `accelerate launch`, which set the same variables (RANK, WORLD_SIZE, LOCAL_RANK).
Without these variables there is one process. `train.sharding` selects DDP ("replicate": every process holds everything,
gradients are averaged) or FSDP2 ("shard": weights, gradients, moments and averaged weights are divided among the processes).
Both keep fp32 master weights and compute under autocast, so both give the result of one process up to the order of sums.

Checkpoints hold whole tensors, so a run can be resumed with another number of processes.
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

TIMEOUT = timedelta(hours=1)
"""How long a process waits for another, e.g. for rank 0 to write a checkpoint of 40 GB to a slow disk."""
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Ranks:
    """This process and its device among the `size` processes of the run."""

    rank: int
    size: int
    device: torch.device

    def positions(self, batch: int) -> range:
        """Return this process's positions in the global batch.

        Raises:
            UserError: the batch is not divisible by the number of processes.
        """
        if batch % self.size:
            raise UserError(
                f"train.batch ({batch}) must be divisible by the number of processes ({self.size}); start another number"
            )
        share = batch // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum the tensors of all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[Ranks]:
    """Join the other processes of this run. Each process has its own device of the type of `device`."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Ranks(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def parallelize(model: nn.Module, ranks: Ranks, sharding: Literal["replicate", "shard"]) -> nn.Module:
    """Move a model to its device or, sharded, to all devices.

    Every process must hold the same weights, and every parameter must take part in every backward pass.

    Returns:
        The module to call in training; `model` keeps the weights. A model without gradients (averaged networks, a teacher)
        is called directly.
    """
    if ranks.size == 1 or sharding == "replicate":
        model.to(ranks.device)
        is_trained = any(parameter.requires_grad for parameter in model.parameters())
        return DistributedDataParallel(model, gradient_as_bucket_view=True) if ranks.size > 1 and is_trained else model
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for module in model.modules():
        if isinstance(module, (BasicTransformerBlock, ResnetBlock2D)):
            fully_shard(module, mesh=mesh)
    # By default, the root's parameters stay gathered after a forward pass until a backward pass, which validation has not.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def accumulate(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Return the context of one micro-batch. DDP averages gradients after the last one only; FSDP averages them after each,
    so that no process ever holds all of them."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the state dict of whole tensors in rank 0, and an empty one in the other ranks. All ranks must call this."""
    return get_model_state_dict(model, options=_FULL)


def full_optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state dict of whole tensors in rank 0, and an empty one in the other ranks. All ranks must call
    this."""
    return dict(get_optimizer_state_dict(model, optimizer, options=_FULL))


def load_full_state_dict(model: nn.Module, state: dict[str, Any]) -> None:
    """Load a state dict of whole tensors into a model, which may be sharded. All ranks must call this."""
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def load_full_optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict of whole tensors into the optimizer of a model, which may be sharded. All ranks must call this."""
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
