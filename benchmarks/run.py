"""Benchmarks for any machine: mostly ratios of two times measured in the same run, as a Markdown table and JSON.

    python -m benchmarks.run [--only NAME ...] [--images N] [--params params.yaml] [--json FILE]

All but `scoring` need a study that has finished training; `refinement` also needs its predictions. All run on the CPU
except `refinement`, which runs on the device of the params.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.harness import Effort, Study, machine, report
from benchmarks.refinement import refinement
from benchmarks.sampling import accuracy, sampling, shares
from benchmarks.scoring import scoring
from benchmarks.training import precompute, training
from genseg.errors import UserError
from genseg.params import load_params

ON_STUDY = {
    "sampling": sampling,
    "accuracy": accuracy,
    "shares": shares,
    "precompute": precompute,
    "training": training,
    "refinement": refinement,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.partition("\n")[0])
    names = (*ON_STUDY, "scoring")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"run only these: {', '.join(names)}"
    )
    parser.add_argument(
        "--images", type=int, default=2, metavar="N", help="number of images that `refinement` refines (default: %(default)s)"
    )
    parser.add_argument("--params", default="params.yaml", help="params of the study (default: %(default)s)")
    parser.add_argument("--json", default="results/benchmarks/cpu.json", help="output file (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="run everything once on little data, for tests of the benchmarks")
    arguments = parser.parse_args()
    if arguments.images < 1:
        parser.error(f"--images must be at least 1, got {arguments.images}")

    effort = Effort(arguments.tiny, arguments.images)
    entries: dict[str, dict] = {}
    document = {
        "title": "Benchmarks",
        "tiny": arguments.tiny,
        "machine": machine(torch.device("cpu")),
        "benchmarks": entries,
    }
    text = ""
    for name in arguments.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        description = (scoring if name == "scoring" else ON_STUDY[name]).__doc__ or ""
        entry: dict = {"what": " ".join(description.split())}
        try:
            if name == "scoring":
                entry["rows"] = scoring(effort)
            else:
                entry["rows"] = ON_STUDY[name](Study(load_params(arguments.params)), effort)
        except UserError as error:
            entry["skipped"] = f"skipped: {error}"
        entries[name] = entry
        # Write the report after each benchmark, so that an interrupted run keeps its results.
        text = report(document, Path(arguments.json))
    print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
