"""Which device a job runs on, with which threads and which precision: always a named choice."""

from __future__ import annotations

import re

import torch

from genseg.errors import UserError
from genseg.params import DevicePreference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

PEAK_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "A40": 150,
    "A30": 165,
    "A10": 125,
    "RTX A6000": 155,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090$": 165,
    "RTX 3090$": 71,
    "V100": 125,
    "T4": 65,
}
"""Dense 16-bit tensor-core peaks by device name (NVIDIA's data sheets; the keys are regular expressions); of several that
fit, the first counts."""


def peak_flops(name: str) -> float | None:
    """Dense 16-bit peak in FLOP/s of a GPU by the name that its driver gives it; None for an unknown one."""
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items() if re.search(rf"\b{known}(?!\w)", name)), None)


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
