"""Encode every image with the VAE, once per size, and every phrase with the text encoders."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="the study's params (default: params.yaml)")
    parser.add_argument("--only-training", action="store_true", help="only what training reads: its image size and the texts")


def run(arguments: argparse.Namespace) -> None:
    from genseg.latents import compute_latents
    from genseg.params import load_params

    compute_latents(load_params(arguments.params), arguments.only_training)
