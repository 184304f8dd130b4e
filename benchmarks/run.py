"""The benchmarks that run anywhere: ratios of two things timed in one run, as a table and a JSON.

    python -m benchmarks.run [--only NAME ...] [--params params.yaml] [--json results/benchmarks/cpu.json]

They run on the study of the params, which must be finished up to training; `scoring` needs none.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.harness import Effort, Study, machine, report
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
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=(*ON_STUDY, "scoring"), default=(*ON_STUDY, "scoring"), metavar="NAME")
    parser.add_argument("--params", default="params.yaml", help="the study to run on (default: %(default)s)")
    parser.add_argument("--json", default="results/benchmarks/cpu.json", help="where the results go (default: %(default)s)")
    parser.add_argument(
        "--tiny", action="store_true", help="everything once, on next to nothing: for tests, its times mean nothing"
    )
    arguments = parser.parse_args()
    effort = Effort(arguments.tiny)
    found = {}
    try:
        study: Study | UserError = Study(load_params(arguments.params))
    except UserError as error:
        study = error
    for name in arguments.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        what = (scoring if name == "scoring" else ON_STUDY[name]).__doc__ or ""
        entry: dict = {"what": " ".join(what.split())}
        if name == "scoring":
            entry["rows"] = scoring(effort)
        elif isinstance(study, UserError):
            entry["skipped"] = f"skipped: {study}"
        else:
            entry["rows"] = ON_STUDY[name](study, effort)
        found[name] = entry
    document = {"title": "Benchmarks", "tiny": arguments.tiny, "machine": machine(), "benchmarks": found}
    report(document, Path(arguments.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
