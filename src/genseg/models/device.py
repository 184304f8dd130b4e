"""Device, number of threads, determinism and precision of a job."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch

from genseg.errors import UserError
from genseg.params import DevicePreference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Result = TypeVar("Result")


def choose_device(preference: DevicePreference, threads: int | None = None, exact: bool = False) -> torch.device:
    """Select the device of this job ("auto": CUDA if it is available) and configure torch for reproducible results.

    Args:
        threads: number of CPU threads, on which the order of floating-point sums depends; None keeps torch's default.
        exact: raise an error for operators without a deterministic algorithm (see `run_deterministically`). Training needs
            this to resume bit for bit: only then is the backward pass of fused attention deterministic.

    Raises UserError if the preference is "cuda" and no CUDA device is available.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if preference == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was requested, but torch sees no GPU; set device: auto or cpu, or check the driver")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is initialised
    torch.use_deterministic_algorithms(True, warn_only=not exact)
    return torch.device("cuda" if torch.cuda.is_available() and preference != "cpu" else "cpu")


def run_deterministically(compute: Callable[[], Result]) -> Result:
    """Run `compute` with deterministic algorithms; if an operator has none, warn and run it again without requiring them.

    After such a retry this process no longer requires deterministic algorithms.
    """
    try:
        return compute()
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        print(f"{str(error).split('.')[0]}; an interrupted and resumed run may differ in the last bits", flush=True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        return compute()


def describe(device: torch.device) -> str:
    """Return the name of the device for logs and manifests."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"
