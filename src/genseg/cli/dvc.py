"""Write `dvc.yaml`, one stage per phase, from the phases and the Snakemake rules; or check that it is up to date."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--write", action="store_true", help="write dvc.yaml")
    chosen.add_argument("--check", action="store_true", help="fail where dvc.yaml and the Snakefile disagree")


def run(args: argparse.Namespace) -> None:
    from genseg.dag import stages

    if args.write:
        stages.write_stages()
    else:
        stages.check_stages()
