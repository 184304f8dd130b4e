"""Encode every image with the VAE, once per size, and every phrase with the text encoders."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="params of the study (default: %(default)s)")
    parser.add_argument(
        "--only-training", action="store_true", help="encode only what training reads: the images at its size, and all texts"
    )


def run(arguments: argparse.Namespace) -> None:
    from genseg.latents import compute_latents
    from genseg.params import load_params

    compute_latents(load_params(arguments.params), arguments.only_training)
