"""Train the label-diffusion model, or the discriminative control (same U-Net, inputs, data and budget; one pass)."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="params of the study (default: %(default)s)")
    parser.add_argument("--model", choices=("gs", "discriminative"), default="gs", help="which one (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from genseg.params import load_params
    from genseg.training.gs import train_model

    train_model(load_params(arguments.params), arguments.model)
