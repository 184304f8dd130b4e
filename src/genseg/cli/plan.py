"""Plan a study without a GPU, data or weights: parameters, memory, bytes, network evaluations, operations and hours.

Counts are taken from the phrase table if it exists, otherwise from published figures. If the study has run, measured values
are shown next to the planned ones.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="params of the study (default: %(default)s)")
    parser.add_argument(
        "--gpu", default="H200", metavar="NAME", help="name of the GPU: A100, H100, H200, ... (default: %(default)s)"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs (default: %(default)s)")
    parser.add_argument(
        "--mfu", type=float, default=0.4, metavar="F", help="achieved fraction of the peak FLOP/s (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON with unrounded values")


def run(arguments: argparse.Namespace) -> None:
    import json

    from genseg.errors import UserError
    from genseg.params import load_params
    from genseg.plan.cost import make_plan
    from genseg.plan.describe import describe_plan

    if arguments.gpus < 1:
        raise UserError(f"--gpus must be at least 1, got {arguments.gpus}")
    if not 0 < arguments.mfu <= 1:
        raise UserError(f"--mfu must be above 0 and at most 1, got {arguments.mfu}")
    plan = make_plan(load_params(arguments.params), arguments.gpu, arguments.gpus, arguments.mfu)
    print(json.dumps(plan, indent=2) if arguments.json else describe_plan(plan))
