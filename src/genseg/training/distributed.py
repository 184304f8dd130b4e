"""Training in several processes: the part of the global batch of each process, and the placement of weights and gradients.

`torchrun` or `accelerate launch` starts the processes and sets RANK, WORLD_SIZE and LOCAL_RANK; without these variables there
is one process. `train.parallelism` selects DDP ("ddp": every process holds everything, gradients are averaged) or FSDP2
("fsdp": weights, gradients, moments and averaged weights are divided among the processes). Both keep fp32 master weights and
compute under autocast, so both equal a single process up to rounding. Checkpoints hold unsharded tensors, so a run can be
resumed with another number of processes.
"""

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


@dataclass(frozen=True)
class Ranks:
    """This process and its device among the `size` processes of the run."""

    rank: int
    size: int
    device: torch.device

    def positions(self, batch: int) -> range:
        """Return this process's positions in the global batch. Raises UserError if `batch` is not divisible by `size`."""
        if batch % self.size:
            raise UserError(f"train.batch ({batch}) must be divisible by the number of processes ({self.size})")
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
    timeout = timedelta(hours=1)  # rank 0 may write a checkpoint of 40 GB to a slow disk while the others wait
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    try:
        yield Ranks(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def parallelize(model: nn.Module, ranks: Ranks, parallelism: Literal["ddp", "fsdp"]) -> nn.Module:
    """Move a model to its device, or shard it over all devices, and return the module to call in training: a DDP wrapper, or
    `model` itself, which holds the weights in any case. Models without gradients (averaged networks, a teacher) get no wrapper.

    Every process must hold the same weights, and every parameter must take part in every backward pass.
    """
    if ranks.size == 1 or parallelism == "ddp":
        model.to(ranks.device)
        is_trained = any(parameter.requires_grad for parameter in model.parameters())
        return DistributedDataParallel(model, gradient_as_bucket_view=True) if ranks.size > 1 and is_trained else model
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for module in model.modules():
        if isinstance(module, (BasicTransformerBlock, ResnetBlock2D)):
            fully_shard(module, mesh=mesh)
    # By default, the root's parameters stay gathered until the backward pass, which validation lacks.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def accumulate(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Return the context of one micro-batch. DDP averages gradients only after the last micro-batch; FSDP averages them after
    each, so that no process ever holds all gradients."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def full_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Return the state dict of a model or of its optimizer: unsharded on rank 0, empty elsewhere. All ranks must call this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if optimizer is None:
        return get_model_state_dict(model, options=options)
    return dict(get_optimizer_state_dict(model, optimizer, options=options))


def load_full_state_dict(model: nn.Module, state: dict[str, Any], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Load a state dict of whole tensors into a model (sharded or not) or into its optimizer. All ranks must call this."""
    options = StateDictOptions(full_state_dict=True)
    if optimizer is None:
        set_model_state_dict(model, state, options=options)
    else:
        set_optimizer_state_dict(model, optimizer, state, options=options)
