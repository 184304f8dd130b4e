"""Make the predictions of the baselines: from the backbone's attention (cross-attention maps, DiffPNG, DiffSeg), from ground
truth (inexact masks), and from the files of `genseg import`. Predictions that are up to date are kept.

Without a name, make all baselines of the study and write their manifest.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="*",
        metavar="NAME",
        help="cross_attention, diffpng_cross, diffpng_cross_self, diffseg, inexact_<kind>, or the name of an import",
    )
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="params of the study (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from genseg.baselines.make import make_baselines
    from genseg.params import load_params

    make_baselines(load_params(arguments.params), arguments.name)
