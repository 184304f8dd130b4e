"""Commands for sweeps, for the records of Snakemake and DVC, and for leased GPUs."""

import argparse

from genseg.cli.options import add_params
from genseg.errors import UserError
from genseg.phases import PHASES


def run_sweep(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Train variants of a study, select an operating point of each on val, and compare them on test (see `genseg compare`).

    Each variant is a study of its own, `<study>-<variant>`, which Snakemake runs up to its scores. Variants with equal params
    share data, backbone, latents and trainings. After a kill, running the command again continues.
    """
    _add_params_and_sweep(parser)
    help_only = "run only these variants, their groups, and variants whose training they share"
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=help_only)
    parser.add_argument(
        "--cores", default="all", type=_cores, metavar="N", help="number of CPU cores for Snakemake, or all (default: all)"
    )
    args = parser.parse_args(arguments)
    from genseg.dag.sweep import run_sweep
    from genseg.params import load_params
    from genseg.report.compare import compare
    from genseg.sweeps import load_sweep

    sweep = load_sweep(args.sweep, load_params(args.params))
    run_sweep(sweep, args.only, args.cores)
    print(f"{compare(sweep)}: variants, points, picks, differences (.csv, .tex, .md), evaluations.png")


def _add_params_and_sweep(parser: argparse.ArgumentParser) -> None:
    add_params(parser)
    parser.add_argument("--sweep", required=True, metavar="FILE", help="sweep document, e.g. sweeps/objectives.yaml")


def _cores(text: str) -> str:
    if text != "all" and not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text}: must be all or a positive integer")
    return text


def run_compare(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Compare a sweep's variants from their scores: tables and a figure in results/<study>/sweeps/<sweep>/."""
    _add_params_and_sweep(parser)
    args = parser.parse_args(arguments)
    from genseg.params import load_params
    from genseg.report.compare import compare
    from genseg.sweeps import load_sweep

    print(compare(load_sweep(args.sweep, load_params(args.params))))


def run_sync(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Synchronise the records of Snakemake and DVC.

    After `snakemake`, DVC records its outputs. After `dvc pull`, `dvc checkout` or a copy, Snakemake records the outputs that
    DVC confirms. If both have something to run, nothing is changed: run one of them first.
    """
    parser.parse_args(arguments)
    from genseg.dag.stages import sync

    print(sync())


def run_dvc(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Write `dvc.yaml`, with one stage per phase, from the phases and the Snakemake rules, or check that it is up to date.

    The command of each stage is `genseg dvc --run PHASE`. It runs the rules of the phase for the study of `params.yaml`.
    """
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="write dvc.yaml")
    action.add_argument("--check", action="store_true", help="fail if dvc.yaml and the Snakefile disagree")
    action.add_argument("--run", metavar="PHASE", choices=PHASES, help="run a stage: " + ", ".join(PHASES))
    args = parser.parse_args(arguments)
    from genseg.dag.stages import check_stages, run_stage, write_stages
    from genseg.params import load_params

    if args.run:
        run_stage(args.run, load_params("params.yaml").study)
    elif args.write:
        write_stages()
    else:
        check_stages()


def run_lease(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Run a command on leased GPUs: `genseg lease --gpus 2 -- genseg train --params params.yaml --model gs`.

    Waits for free devices of this machine and makes only these visible to the command (CUDA_VISIBLE_DEVICES) until it ends. If
    a scheduler has already chosen devices, or the machine has none, the command runs unchanged.
    """
    parser.add_argument("--gpus", type=int, required=True, help="number of devices; with 0, none is visible")
    parser.add_argument("--log", metavar="FILE", help="file to which the command's output is also written")
    parser.add_argument("run_command", nargs="+", metavar="COMMAND", help="the command and its arguments, after --")
    args = parser.parse_args(arguments)
    from genseg.dag.jobs import run_leased

    if args.gpus < 0:
        raise UserError(f"--gpus {args.gpus}: must be at least 0")
    run_leased(args.run_command, args.gpus, args.log)
