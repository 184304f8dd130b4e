"""Refine masks of any method with G4Seg (ours): predictions in, predictions out, each phrase alone.

Constants are those of the params file's `refine`; --method takes its controls (`upsampling_only`, `alpha_zero`, ...), too.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="params of the study (default: %(default)s)")
    parser.add_argument("--phrases", required=True, metavar="FILE", help="phrase table, Parquet; it names the images")
    parser.add_argument("--predictions", required=True, metavar="FILE", help="coarse predictions, Parquet")
    parser.add_argument("--out", required=True, metavar="FILE", help="where the refined predictions go, Parquet")
    parser.add_argument("--method", default="g4seg", help="g4seg or one of its controls (default: %(default)s)")
    parser.add_argument("--model", metavar="DIR", help="Stable Diffusion to refine with (default: refine.backbone)")
    parser.add_argument("--images", metavar="DIR", help="folder that the table's file names start from (default: here)")
    parser.add_argument("--pictures", metavar="DIR", help="write what is in between as one PNG a phrase")


def run(arguments: argparse.Namespace) -> None:
    from genseg.params import load_params
    from genseg.refine.files import refine_file

    refine_file(
        load_params(arguments.params),
        arguments.phrases,
        arguments.predictions,
        arguments.out,
        method=arguments.method,
        source=arguments.model,
        images=arguments.images,
        pictures=arguments.pictures,
    )
