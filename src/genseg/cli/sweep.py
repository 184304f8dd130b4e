"""Train variants of a study, choose an operating point of each on val, and compare them on test (see `genseg compare`).

Each variant is a study of its own, `<study>-<variant>`, made by Snakemake up to its scores; data, backbone, latents and
trainings that params have in common are made once. Killed, it goes on when it is run again.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="params of the study (default: %(default)s)")
    parser.add_argument("--sweep", required=True, metavar="FILE", help="the variants, e.g. sweeps/objectives.yaml")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these variants, and what they hang on")
    parser.add_argument(
        "--cores", default="all", type=_cores, metavar="N", help="for Snakemake: all or 1, 2, ... (default: all)"
    )


def _cores(text: str) -> str:
    if text != "all" and not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text}: give all or a number of at least 1")
    return text


def run(arguments: argparse.Namespace) -> None:
    from genseg.dag.sweep import run_sweep
    from genseg.params import load_params
    from genseg.report.compare import compare
    from genseg.sweeps import load_sweep

    sweep = load_sweep(arguments.sweep, load_params(arguments.params))
    run_sweep(sweep, arguments.only, arguments.cores)
    print(f"{compare(sweep)}: variants, points, picks, differences (.csv, .tex, .md), evaluations.png")
