"""What a study will take, without a GPU, data or weights: parameters, memory, bytes, evaluations, operations, hours.

Counts come from the phrase table where the data were assembled, else from what is published. Where the study has run,
what was measured stands beside what is planned.
"""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="params of the study (default: %(default)s)")
    parser.add_argument("--gpu", default="H200", metavar="NAME", help="A100, H100, H200, ... (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many share the work (default: %(default)s)")
    parser.add_argument(
        "--mfu", type=float, default=0.4, metavar="F", help="part of the peak that is reached (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, unrounded")


def run(arguments: argparse.Namespace) -> None:
    import json

    from genseg.errors import UserError
    from genseg.params import load_params
    from genseg.plan.cost import make_plan

    if arguments.gpus < 1 or not 0 < arguments.mfu <= 1:
        raise UserError("--gpus must be at least 1 and --mfu lie between 0 and 1")
    plan = make_plan(load_params(arguments.params), arguments.gpu, arguments.gpus, arguments.mfu)
    print(json.dumps(plan, indent=2) if arguments.json else describe(plan))


def describe(plan: dict[str, Any]) -> str:
    """The plan as text tables."""
    counts, memory = plan["counts"], plan["memory"]
    parts = [f"study {plan['study']}, backbone {plan['backbone']}", f"counts: {counts['source']}"]
    rows = [[name, f"{counts[name]:,}"] for name in ("train", "val")] + [[k, f"{v:,}"] for k, v in counts["rows"].items()]
    parts.append(_table("phrases", ["part", "phrases"], rows))
    rows = [[name, f"{value:,}"] for name, value in plan["parameters"].items()]
    parts.append(_table("parameters", ["component", "parameters"], rows))

    names = ("weights", "gradients", "moments", "average", "teacher", "copies", "activations", "total")
    rows = [
        [
            row["sharding"],
            "recomputed" if row["checkpointing"] else "kept",
            *(_bytes(row[name]) for name in names),
            ("fits" if row["fits"] else "too large") + (" *" if row["chosen"] else ""),
        ]
        for row in memory["training"]
    ]
    title = f"training, bytes on each GPU at micro-batch {memory['micro_batch']} (*: as the params say; allocator slack on top)"
    parts.append(_table(title, ["sharding", "activations are", *names, plan["gpu"]], rows))
    sampling = memory["sampling"]
    parts.append(
        f"sampling: {_bytes(sampling['weights'])} of weights and {_bytes(sampling['activations'])} of activations: "
        + ("fits" if sampling["fits"] else "too large")
    )
    rows = [
        [
            *(phase, row["backbone"], _count(row["parameters"]), f"{row['size']} x {row['size']}", str(row["batch"])),
            *(row["precision"], *(_bytes(row[name]) for name in ("weights", "activations", "total"))),
            "fits" if row["fits"] else "too large",
        ]
        for phase, row in memory["generators"].items()
    ]
    if rows:
        title = "baselines and refinement, at most, on one GPU (activations: with attention maps, features and their distances)"
        header = ["phase", "backbone", "parameters", "size", "block", "in", "weights", "activations", "total", plan["gpu"]]
        parts.append(_table(title, header, rows))
    if memory["measured_rss"]:
        rss = ", ".join(f"{name} {_bytes(value)}" for name, value in memory["measured_rss"].items())
        parts.append(f"measured resident memory, Python and libraries included: {rss}")

    rows = [
        [row["artifact"], _bytes(row["bytes"]), row["basis"], "" if row["measured"] is None else _bytes(row["measured"])]
        for row in plan["artifacts"]
    ]
    rows.append(["all", _bytes(sum(row["bytes"] for row in plan["artifacts"])), "", ""])
    parts.append(_table("artifacts", ["artifact", "bytes", "basis", "on disk now"], rows))

    rows = []
    for row in plan["phases"]:
        seconds = row["measured_seconds"]
        measured = f"{_hours(seconds / 3600)} at {_count(row['flops'] / seconds)}FLOP/s" if seconds else ""
        rows.append(
            [
                *(row["phase"], row["what"], f"{row['evaluations']:,}", _count(row["flops"])),
                *("" if row["hours"] is None else _hours(row["hours"]), measured),
            ]
        )
    title = f"work on {plan['gpus']} x {plan['gpu']} at {plan['mfu']:.0%} of the peak (data, score and tables need no GPU)"
    parts.append(_table(title, ["phase", "what", "evaluations", "FLOPs", "time", "measured"], rows))
    return "\n\n".join(parts)


def _table(title: str, header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _bytes(value: float) -> str:
    return f"{_count(value)}B"


def _count(value: float) -> str:
    """Three digits and a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if value < 999.5:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} Z"


def _hours(value: float) -> str:
    return f"{value:,.1f} h" if value >= 1 else f"{60 * value:.1f} min" if value >= 1 / 60 else f"{3600 * value:.1f} s"
