"""The benchmarks that run anywhere: ratios of two things timed in one run, as a table and a JSON.

    python -m benchmarks.run [--only NAME ...] [--images N] [--params params.yaml] [--json FILE]

They run on the study of the params, which must be finished up to training, for `refinement` up to sampling; `scoring` needs
none. All of them run on the CPU, `refinement` on the device of the params.
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
    parser.add_argument("--only", nargs="+", choices=(*ON_STUDY, "scoring"), default=(*ON_STUDY, "scoring"), metavar="NAME")
    parser.add_argument("--images", type=int, default=2, metavar="N", help="that `refinement` refines (default: %(default)s)")
    parser.add_argument("--params", default="params.yaml", help="the study to run on (default: %(default)s)")
    parser.add_argument("--json", default="results/benchmarks/cpu.json", help="where the results go (default: %(default)s)")
    parser.add_argument(
        "--tiny", action="store_true", help="everything once, on next to nothing: for tests, its times mean nothing"
    )
    arguments = parser.parse_args()
    if arguments.images < 1:
        parser.error(f"--images {arguments.images}: must be at least 1")
    effort = Effort(arguments.tiny, arguments.images)
    found: dict[str, dict] = {}
    document = {
        "title": "Benchmarks",
        "tiny": arguments.tiny,
        "machine": machine(torch.device("cpu")),
        "benchmarks": found,
    }
    params = arguments.params
    for name in arguments.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        what = (scoring if name == "scoring" else ON_STUDY[name]).__doc__ or ""
        entry: dict = {"what": " ".join(what.split())}
        try:
            entry["rows"] = scoring(effort) if name == "scoring" else ON_STUDY[name](Study(load_params(params)), effort)
        except UserError as error:
            entry["skipped"] = f"skipped: {error}"
        found[name] = entry
        text = report(document, Path(arguments.json))  # after each: what was measured is not lost with the rest
    print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
