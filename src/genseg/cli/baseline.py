"""Predictions of the baselines: the backbone's attention (cross-attention maps, DiffPNG, DiffSeg), inexact masks made from
ground truth, and what `genseg import` read. What is finished is kept.

Without a name all of a study's baselines are made, and a manifest of them is written.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="*",
        metavar="NAME",
        help="cross_attention, diffpng_cross, diffpng_cross_self, diffseg, inexact_<kind>, or an import",
    )
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="params of the study (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from genseg.baselines.make import make_baselines
    from genseg.params import load_params

    make_baselines(load_params(arguments.params), arguments.name)
