"""The plan as text tables."""

from typing import Any

from genseg.plan.jobs import job_warnings

STATE = ("weights", "gradients", "moments", "average", "teacher", "copies", "activations", "total")


def describe_plan(plan: dict[str, Any]) -> str:
    """Return the plan (see `plan.cost.make_plan`) as text tables."""
    counts, memory, gpu = plan["counts"], plan["memory"], plan["gpu"]
    phrases = {"train": counts["train"], "val": counts["val"]}
    phrases |= {f"runs on {part}": count for part, count in counts["rows"].items()}
    sampling = memory["sampling"]
    parts = [
        f"study {plan['study']}, backbone {plan['backbone']}",
        f"counts: {counts['source']}",
        _table("phrases", ["part", "phrases"], [[name, f"{count:,}"] for name, count in phrases.items()]),
        _table("parameters", ["component", "parameters"], [[k, f"{v:,}"] for k, v in plan["parameters"].items()]),
    ]
    if sampling:
        parts.append(_training_table(memory, gpu))
        weights, activations = _bytes(sampling["weights"]), _bytes(sampling["activations"])
        parts.append(f"sampling: weights {weights}, activations {activations}: {_fits(sampling)}")
    if memory["generators"]:
        parts.append(_generators_table(memory["generators"], gpu))
    if memory["measured_rss"]:
        rss = ", ".join(f"{name} {_bytes(value)}" for name, value in memory["measured_rss"].items())
        parts.append(f"measured resident memory, including Python and libraries: {rss}")
    parts += [_artifacts_table(plan["artifacts"]), _phases_table(plan), jobs_table(plan)]
    return "\n\n".join([*parts, *(f"warning: {warning}" for warning in job_warnings(plan["jobs"]))])


def _training_table(memory: dict[str, Any], gpu: str) -> str:
    rows = []
    for row in memory["training"]:
        checkpointing, chosen = "on" if row["checkpointing"] else "off", " *" if row["chosen"] else ""
        rows.append([row["sharding"], checkpointing, *(_bytes(row[name]) for name in STATE), _fits(row) + chosen])
    title = f"training, bytes per GPU at micro-batch {memory['micro_batch']} (*: set in params; allocator overhead excluded)"
    return _table(title, ["sharding", "checkpointing", *STATE, gpu], rows)


def _generators_table(generators: dict[str, dict[str, Any]], gpu: str) -> str:
    rows = []
    for phase, row in generators.items():
        settings = [f"{row['size']} x {row['size']}", str(row["batch"]), row["precision"]]
        sizes = [_bytes(row[name]) for name in ("weights", "activations", "total")]
        rows.append([phase, row["backbone"], _count(row["parameters"]), *settings, *sizes, _fits(row)])
    header = ["phase", "backbone", "parameters", "size", "batch", "precision", "weights", "activations", "total", gpu]
    note = "activations include attention maps, features and distances of features"
    return _table(f"baselines and refinement, upper bound per GPU ({note})", header, rows)


def _artifacts_table(artifacts: list[dict[str, Any]]) -> str:
    rows = []
    for row in artifacts:
        measured = "" if row["measured"] is None else _bytes(row["measured"])
        rows.append([row["artifact"], _bytes(row["bytes"]), row["basis"], measured])
    rows.append(["total", _bytes(sum(row["bytes"] for row in artifacts)), "", ""])
    return _table("artifacts", ["artifact", "bytes", "basis", "on disk"], rows)


def _phases_table(plan: dict[str, Any]) -> str:
    rows = []
    for row in plan["phases"]:
        seconds = row["measured_seconds"]
        time = "" if row["hours"] is None else _hours(row["hours"])
        measured = f"{_hours(seconds / 3600)} at {_count(row['flops'] / seconds)}FLOP/s" if seconds else ""
        rows.append([row["phase"], row["what"], f"{row['evaluations']:,}", _count(row["flops"]), time, measured])
    title = f"work on {plan['gpus']} x {plan['gpu']} at {plan['mfu']:.0%} of the peak (data, score and tables need no GPU)"
    return _table(title, ["phase", "what", "evaluations", "FLOPs", "time", "measured"], rows)


def jobs_table(plan: dict[str, Any]) -> str:
    """Return the table of planned hours and memory of one job of each kind, with the resources that it requests."""
    rows = []
    for row in plan["jobs"]:
        requested = [str(row["gpu"]), f"{row['mem_mb']:,} MB", _hours(row["runtime"] / 60)]
        rows.append(
            [
                row["job"],
                str(row["jobs"]),
                _hours(row["hours"]),
                _bytes(row["gpu_bytes"]),
                _bytes(row["host_bytes"]),
                *requested,
            ]
        )
    header = ["job", "jobs", "time", "per GPU", "host", "gpu", "mem_mb", "runtime"]
    return _table("each job: planned time and memory (upper bounds), and requested resources", header, rows)


def _table(title: str, header: list[str], rows: list[list[str]]) -> str:
    """Return an indented table with left-aligned columns below its title."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _fits(row: dict[str, Any]) -> str:
    return "fits" if row["fits"] else "too large"


def _bytes(value: float) -> str:
    return f"{_count(value)}B"


def _count(value: float) -> str:
    """Format a value with three significant digits and a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if value < 999.5:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} Z"


def _hours(value: float) -> str:
    """Format a number of hours in hours, minutes or seconds."""
    if value >= 1:
        return f"{value:,.1f} h"
    return f"{60 * value:.1f} min" if value >= 1 / 60 else f"{3600 * value:.1f} s"
