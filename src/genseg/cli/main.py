"""Entry point. The module of a command is imported only when the command runs."""

import argparse
import importlib
import inspect
import os
import sys

from genseg.errors import UserError

COMMANDS = {
    "params": ("study", "print the resolved params of a study, or how two studies differ"),
    "preflight": ("plan", "check backbones, sizes, disk, memory and hours of a study before its jobs"),
    "data": ("study", "assemble the data into the phrase table"),
    "backbone": ("study", "load, fine-tune or train the backbone (VAE, text encoders, U-Net)"),
    "latents": ("study", "compute image latents and text embeddings"),
    "train": ("study", "train the label-diffusion model or its discriminative control"),
    "baseline": ("study", "predict masks from the backbone's attention, or make inexact masks"),
    "sample": ("study", "predict masks: the main row, its controls, the grid"),
    "refine": ("refine", "refine predictions of any method with G4Seg"),
    "score": ("score", "score predictions: AR, mIoU, boundary IoU"),
    "tables": ("study", "write the tables and figures"),
    "sweep": ("workflow", "list the variants of a study that `snakemake --config sweep=FILE` compares"),
    "predict": ("predict", "segment images by phrases, or by a caption"),
    "publish": ("predict", "upload a trained model to the Hugging Face hub"),
    "import": ("import_", "import predictions of another method as a baseline of the study"),
    "export": ("export", "write predictions as COCO results or index masks"),
    "plan": ("plan", "estimate memory, storage, operations and hours of a study"),
    "sync": ("workflow", "synchronise the records of Snakemake and DVC"),
    "dvc": ("workflow", "write dvc.yaml from the phases and rules, or check it"),
    "lease": ("workflow", "run a command on leased GPUs"),
}
"""Command -> (module of `genseg.cli` with the function `run_<command>`, line of the help text)."""

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_MININTERVAL": "5",
}
"""Environment variables that silence the libraries, unless the user has set them."""


def main(argv: list[str] | None = None) -> int:
    """Run one command. Return the exit code: 0, or 2 after a user error, with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="genseg",
        usage="genseg COMMAND [arguments]",
        description="Generative segmentation by label diffusion, as a reproducible study.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
        + "\n\n`genseg COMMAND --help` lists the arguments of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="name of the command")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    head = parser.parse_args(argv)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    module, _ = COMMANDS[head.command]
    run = getattr(importlib.import_module(f"genseg.cli.{module}"), f"run_{head.command}")
    command = argparse.ArgumentParser(prog=f"genseg {head.command}", description=inspect.getdoc(run))
    try:
        run(command, head.arguments)
    except UserError as error:
        print(f"genseg {head.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
