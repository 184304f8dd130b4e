"""Write a study's tables (CSV, LaTeX, Markdown), figures and index.html from its scores and the published numbers."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", default="params.yaml", help="params file of the study (default: params.yaml)")


def run(args: argparse.Namespace) -> None:
    from genseg.params import load_params
    from genseg.report.write import write_report

    write_report(load_params(args.params))
