"""Which device a job runs on, with which threads and which precision: always a named choice."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch

from genseg.errors import UserError
from genseg.params import DevicePreference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


Result = TypeVar("Result")


def choose_device(preference: DevicePreference, threads: int | None = None, exact: bool = False) -> torch.device:
    """The device of this job: `auto` takes the first CUDA device when there is one.

    Fixes the number of CPU threads, because the order of floating-point sums depends on it, and takes deterministic
    algorithms where there are some.

    Args:
        exact: insist on them, as training must, whose resume is bit for bit: fused attention's backward pass is deterministic
            only then. See `exactly`.

    Raises:
        UserError: `cuda` was asked for and there is none.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if preference == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no GPU here; set device: auto or cpu, or check the driver")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True, warn_only=not exact)
    return torch.device("cuda" if torch.cuda.is_available() and preference != "cpu" else "cpu")


def exactly(compute: Callable[[], Result]) -> Result:
    """`compute()`, which can be begun anew, by deterministic algorithms alone (see `choose_device`); where torch has none for
    an operation on this device, once more and from then on without insisting, which is said."""
    try:
        return compute()
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        print(f"{str(error).split('.')[0]}; a run that is killed and resumed may differ in the last bits", flush=True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        return compute()


def describe(device: torch.device) -> str:
    """Name of the device for logs and manifests."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"
