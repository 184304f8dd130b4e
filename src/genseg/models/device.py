"""Which device a job runs on, with which threads and which precision: always a named choice."""

from __future__ import annotations

import torch

from genseg.errors import UserError
from genseg.params import DevicePreference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(preference: DevicePreference, threads: int | None = None) -> torch.device:
    """The device of this job: `auto` takes the first CUDA device when there is one.

    Fixes the number of CPU threads, because the order of floating-point sums depends on it.

    Raises:
        UserError: `cuda` was asked for and there is none.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if preference == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no GPU here; set device: auto or cpu, or check the driver")
    torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device("cuda" if torch.cuda.is_available() and preference != "cpu" else "cpu")


def describe(device: torch.device) -> str:
    """Name of the device for logs and manifests."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"
