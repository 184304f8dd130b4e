"""Planned hours and memory of the jobs of a study, next to the resources that its params request."""

from typing import Any

from genseg.params import Params
from genseg.plan.counts import Counts
from genseg.plan.rows import Phases, job_count

HOST_BASE = {"cpu": 1.0e9, "cuda": 3.5e9}
"""Resident bytes of a process with all libraries by device; on GPUs, the CUDA context and pinned buffers are included."""
TABLE_ROW = 800
"""Bytes of a row of the phrase tables in memory, without its mask (750 in the embedded study)."""


def plan_jobs(params: Params, counts: Counts, memory: dict[str, Any], phases: Phases, parameters: int) -> list[dict[str, Any]]:
    """Return one row per kind of job: planned hours, planned bytes on each GPU and on the host, and the requested resources.

    Host memory is an upper bound without cached files. It contains the libraries, the phrase tables, the weights as they are
    loaded, and what a phase computes at once: batches, blocks and shards, but never all maps.

    Args:
        memory: bytes on a GPU (see `cost.plan_memory` and `generator.generator_memory`).
        parameters: number of parameters of the study's own networks, including encoders.
    """
    device_bytes = gpu_bytes(params, memory)
    rows = []
    for name, (phase, hours) in phases.job_hours.items():
        job, on_gpu = params.job(phase), device_bytes.get(phase, 0)
        is_cpu = params.device == "cpu" or job.gpu == 0
        host = _host_bytes(params, counts, memory, phase, parameters, is_cpu) + (on_gpu if is_cpu else 0)
        requested = {"gpu": job.gpu, "mem_mb": job.mem_mb, "runtime": job.runtime}
        row = {"job": name, "phase": phase, "jobs": job_count(params, phase), "hours": hours, "gpu_bytes": on_gpu}
        rows.append(row | {"host_bytes": round(host)} | requested)
    return rows


def gpu_bytes(params: Params, memory: dict[str, Any]) -> dict[str, int]:
    """Return phase -> planned bytes on each GPU, for the phases in the plan's memory."""
    planned = {phase: row["total"] for phase, row in memory["generators"].items()}
    if memory["training"]:
        shards = params.resources.train.gpu if params.train.parallelism == "fsdp" else 1
        name = f"FSDP over {shards}" if shards > 1 else "replicate"
        [planned["train"]] = [row["total"] for row in memory["training"] if row["chosen"] and row["sharding"] == name]
        planned["sample"] = memory["sampling"]["total"]
    return planned


def _host_bytes(params: Params, counts: Counts, memory: dict[str, Any], phase: str, parameters: int, is_cpu: bool) -> float:
    """Return the bytes of one job of a phase in host memory, without what is on the device."""
    rows = counts.train + counts.val + counts.rows["test"] + counts.rows["class_phrases"]
    process = HOST_BASE["cpu" if is_cpu else "cuda"] + rows * (TABLE_ROW + counts.row_bytes)
    if phase == "latents":
        # fp32 weights, a batch of decoded images in float32 with its resized copy, and one shard of latents.
        batch = 2 * params.latents.batch * 3 * 4 * max(params.sample.sizes()) ** 2
        shard = params.latents.shard_rows * max(params.sample.sizes()) ** 2 // 4
        return process + 4 * parameters + batch + shard
    if phase == "train":
        # Every process builds the fp32 networks before they are sharded. The first one also gathers a whole checkpoint.
        chosen = next(row for row in memory["training"] if row["sharding"] == "replicate")
        weights = chosen["weights"] + chosen["average"] + chosen["teacher"]
        checkpoint = chosen["weights"] + chosen["moments"] + chosen["average"]
        return max(1, params.job(phase).gpu) * (process + weights) + checkpoint
    if phase == "sample":
        return process + 4 * parameters
    return process + 4 * memory["generators"][phase]["parameters"]


def job_warnings(jobs: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for each job whose planned hours or host memory exceed the requested resources."""
    warnings = []
    for row in jobs:
        key = f"resources.{row['phase']}"
        if 60 * row["hours"] > row["runtime"]:
            remedy = f"raise {key}.shards or {key}.runtime" if row["phase"] in ("sample", "refine") else f"raise {key}.runtime"
            warnings.append(
                f"{row['job']}: {row['hours']:.1f} h are planned, but {key}.runtime is {row['runtime'] / 60:g} h; {remedy}"
            )
        if row["host_bytes"] > 1e6 * row["mem_mb"]:
            planned = f"{row['host_bytes'] / 1e9:.1f} GB of host memory are planned"
            warnings.append(f"{row['job']}: {planned}, but {key}.mem_mb is {row['mem_mb']}; raise it")
    return warnings
