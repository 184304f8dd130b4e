"""Commands for sweeps, for the records of Snakemake and DVC, and for leased GPUs."""

import argparse

from genseg.cli.options import add_params
from genseg.errors import UserError
from genseg.phases import PHASES


def run_sweep(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """List the studies of a sweep: the params in which each differs from the study, and the outputs that it shares.

    `snakemake --cores all --config sweep=FILE` runs the sweep and writes its table to results/<study>/sweeps/<sweep>/.
    """
    add_params(parser)
    parser.add_argument("file", metavar="FILE", help="sweep document, e.g. sweeps/architecture.yaml")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--tables", action="store_true", help="write the table from the scores of the finished variants")
    action.add_argument("--choose", metavar="STUDY", help="write work/STUDY/chosen.json: its params with the choice on val")
    action.add_argument("--track", action="store_true", help="add the sweep to sweeps/dvc.yaml, which DVC runs and tracks")
    args = parser.parse_args(arguments)
    from genseg.params import load_params
    from genseg.sweeps import load_sweep

    sweep = load_sweep(args.file, load_params(args.params))
    if args.choose:
        from genseg.artifacts.files import write_json

        params = sweep.choose(args.choose)
        write_json(params.work_dir / "chosen.json", params.model_dump(mode="json"))
        print(f"sweep: {params.study}: {params.sample.main.label}, threshold {params.sample.threshold:g}")
    elif args.tables:
        from genseg.report.compare import compare

        print(f"{compare(sweep)}: {sweep.name}.csv, .tex, .md")
    elif args.track:
        from genseg.dag.stages import track_sweep

        print(f"{track_sweep(sweep)}: run `dvc repro sweeps/dvc.yaml`")
    else:
        print("\n".join(sweep.describe()))


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
