"""Rows of the plan: planned bytes and operations, with the measured values of a finished study."""

import csv
import json
import math
from pathlib import Path
from typing import Any

from genseg.models.flops import Gpu
from genseg.params import Params

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_TYPES = {4: "F32", 2: "BF16", 1: "U8", 8: "I64"}


class Artifacts:
    """Planned and measured disk space of every artifact."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, size: float, basis: str, *paths: Path) -> None:
        """Add an artifact of `size` planned bytes. `basis` states their accuracy; `paths` that exist are measured."""
        sizes = [path.stat().st_size for path in paths if path.exists()]
        row = {"artifact": name, "bytes": round(size), "basis": basis}
        self.rows.append(row | {"measured": sum(sizes) if sizes else None})


class Phases:
    """Network evaluations, operations and hours of every phase on `gpus` GPUs that reach the fraction `mfu` of the peak rate.

    An evaluation is a forward pass of the U-Net for one phrase; the forward and backward pass of a training sample count as
    one. Operations of training include the recomputed forward pass of gradient checkpointing.
    """

    def __init__(self, params: Params, gpu: Gpu, gpus: int, mfu: float) -> None:
        self.params, self.gpu, self.gpus, self.mfu = params, gpu, gpus, mfu
        self.rows: list[dict[str, Any]] = []
        self.job_hours: dict[str, tuple[str, float]] = {}
        """(phase, hours of one job) by the name of the job, without its shard."""

    def add(
        self,
        phase: str,
        what: str,
        evaluations: int,
        flops: float,
        precision: str | None,
        seconds: float | None = None,
        job: str | None = None,
    ) -> None:
        """Add a row for the work `what`; `precision` is None for work on the CPU, which has no planned hours.

        `job` is the name of the jobs that share the work; it is None if another row contains the work.
        """
        peak = self.gpu.single if precision == "fp32" else self.gpu.half
        gpu_hours = None if precision is None else flops / (peak * self.mfu) / 3600
        hours = None if gpu_hours is None else gpu_hours / self.gpus
        row = {"phase": phase, "what": what, "evaluations": evaluations, "flops": flops, "hours": hours}
        self.rows.append(row | {"measured_seconds": seconds})
        if job is not None and gpu_hours is not None:
            # Only training uses all GPUs of its job.
            devices = self.params.job(phase).gpu if phase == "train" else 1
            self.job_hours[job] = phase, gpu_hours / max(1, devices) / job_count(self.params, phase)

    def seconds(self, *benchmarks: str) -> float | None:
        """Return the total seconds of Snakemake's benchmarks with these names; None if one is missing."""
        times = [read_benchmark(self.params, name, "s") for name in benchmarks]
        return None if None in times else sum(filter(None, times))


def job_count(params: Params, phase: str) -> int:
    """Return the number of jobs among which the work of a phase (of sampling: at one size) is divided."""
    return getattr(params.job(phase), "shards", 1)


def memory_row(parameters: int, precision: str, activations: int, gpu: Gpu) -> dict[str, Any]:
    """Return the bytes of an inference job with weights in `precision`, and whether they fit on the GPU."""
    weights = BYTES[precision] * parameters
    total = weights + activations
    return {"weights": weights, "activations": activations, "total": total, "fits": total < gpu.memory}


def read_benchmark(params: Params, name: str, column: str) -> float | None:
    """Return the column `s` (seconds) or `max_rss` (bytes) of a rule's last Snakemake benchmark, None if it has not run."""
    path = params.work_dir / "benchmarks" / f"{name}.tsv"
    if not path.exists():
        return None
    with path.open(newline="") as handle:
        row = next(csv.DictReader(handle, delimiter="\t"))
    return float(row[column]) * (2**20 if column == "max_rss" else 1)


def safetensors_bytes(tensors: dict[str, tuple[tuple[int, ...], int]], metadata: dict[str, str]) -> int:
    """Return the bytes of a safetensors file: the length of the header, the header padded to 8 bytes, and the data.

    tensors: {name: (shape, bytes per element)}.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (shape, element) in sorted(tensors.items(), key=lambda item: (-item[1][1], item[0])):
        start, end = end, end + math.prod(shape) * element
        header[name] = {"dtype": _TYPES[element], "shape": list(shape), "data_offsets": [start, end]}
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + end


def maps_bytes(count: int, side: int) -> int:
    """Return the bytes of a file of `count` soft maps [side, side] in uint8."""
    return safetensors_bytes({"maps": ((count, side, side), 1)}, {})
