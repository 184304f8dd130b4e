"""Compare a sweep's variants from their scores: tables and a figure in results/<study>/sweeps/<sweep>/."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="params of the study (default: %(default)s)")
    parser.add_argument("--sweep", required=True, metavar="FILE", help="sweep document, e.g. sweeps/objectives.yaml")


def run(args: argparse.Namespace) -> None:
    from genseg.params import load_params
    from genseg.report.compare import compare
    from genseg.sweeps import load_sweep

    print(compare(load_sweep(args.sweep, load_params(args.params))))
