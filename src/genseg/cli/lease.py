"""Run a command on leased GPUs: `genseg lease --gpus 2 -- genseg train --params params.yaml --model gs`.

Waits until that many of this machine's devices are free, shows only them to the command (CUDA_VISIBLE_DEVICES) and keeps
them until it ends. Where a scheduler already chose devices, or the machine has none, the command runs as it is.
"""

from __future__ import annotations

import argparse

from genseg.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, required=True, help="how many devices; with 0 the command sees none")
    parser.add_argument("--log", metavar="FILE", help="also write the command's output here")
    parser.add_argument("run_command", nargs="+", metavar="COMMAND", help="the command and its arguments, after --")


def run(args: argparse.Namespace) -> None:
    from genseg.dag.lease import run_leased

    if args.gpus < 0:
        raise UserError(f"--gpus {args.gpus}: give 0 or more")
    run_leased(args.run_command, args.gpus, args.log)
