"""Entry point: finds the command's module, which is imported only when its command runs."""

from __future__ import annotations

import argparse
import importlib
import keyword
import os
import sys

from genseg.errors import UserError

COMMANDS = {
    "data": "assemble the data into the phrase table",
    "backbone": "load, fit or train the backbone (VAE, text encoders, U-Net)",
    "latents": "precompute image latents and text embeddings",
    "train": "train the label-diffusion model or its discriminative control",
    "baseline": "predict masks by the backbone's attention, or make inexact ones",
    "sample": "predict masks: the main row, its controls, the grid",
    "refine": "refine predictions of any method with G4Seg",
    "score": "score predictions: AR, mIoU, boundary IoU",
    "tables": "write the tables and figures",
    "sweep": "train variants of a study and compare them",
    "compare": "compare a sweep's variants, from their scores",
    "predict": "segment one image by phrases",
    "import": "make another method's outputs a baseline of the study",
    "export": "write predictions as COCO results or index masks",
    "plan": "what a study will take: memory, bytes, operations, hours",
    "sync": "make Snakemake and DVC agree about what is up to date",
    "dvc": "write dvc.yaml from the Snakefile, or check it",
    "lease": "run a command on leased GPUs",
}

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_MININTERVAL": "5",
}
"""The libraries' chatter is switched off, unless the user set it: our lines say what matters."""


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 with one line on stderr for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="genseg", description=__doc__ and "Generative segmentation by label diffusion, as a study."
    )
    parser.add_argument(
        "command", choices=COMMANDS, metavar="COMMAND", help="; ".join(f"{k}: {v}" for k, v in COMMANDS.items())
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="`genseg COMMAND --help` lists them")
    parser.usage = "genseg COMMAND [arguments]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "commands:\n" + "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    parser._actions[1].help = argparse.SUPPRESS
    head = parser.parse_args(argv)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    module = importlib.import_module(f"genseg.cli.{head.command}{'_' if keyword.iskeyword(head.command) else ''}")
    command = argparse.ArgumentParser(prog=f"genseg {head.command}", description=module.__doc__)
    module.add_arguments(command)
    arguments = command.parse_args(head.arguments)
    try:
        module.run(arguments)
    except UserError as error:
        print(f"genseg {head.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
