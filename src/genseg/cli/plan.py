"""Commands that plan a study, and check it before its first job."""

import argparse

from genseg.cli.options import add_params


def run_plan(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Plan a study without a GPU, data or weights: parameters, memory, bytes, network evaluations, operations and hours.

    Only the configs of the backbones are read, from directories or the hub. A warning names each job whose planned hours exceed
    its `runtime`.

    Counts are taken from the phrase table if it exists, otherwise from published figures. If the study has run, measured values
    are shown next to the planned ones.
    """
    add_params(parser)
    parser.add_argument(
        "--gpu", default="H200", metavar="NAME", help="name of the GPU: A100, H100, H200, ... (default: %(default)s)"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs (default: %(default)s)")
    parser.add_argument(
        "--mfu", type=float, default=0.4, metavar="F", help="achieved fraction of the peak FLOP/s (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON with unrounded values")
    args = parser.parse_args(arguments)
    import json

    from genseg.errors import UserError
    from genseg.params import load_params
    from genseg.plan.cost import make_plan
    from genseg.plan.describe import describe_plan

    if args.gpus < 1:
        raise UserError(f"--gpus must be at least 1, got {args.gpus}")
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu must be above 0 and at most 1, got {args.mfu}")
    plan = make_plan(load_params(args.params), args.gpu, args.gpus, args.mfu)
    print(json.dumps(plan, indent=2) if args.json else describe_plan(plan))


def run_preflight(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Check a study before its other jobs: backbones, sizes, attention grids, layers, disk space, memory and hours.

    The commit of each hub id is recorded in results/<study>/preflight/backbones.json, and all phases load that commit.
    """
    add_params(parser)
    args = parser.parse_args(arguments)
    from genseg.params import load_params
    from genseg.plan.preflight import preflight

    preflight(load_params(args.params))
