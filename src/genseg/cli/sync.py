"""Make Snakemake and DVC agree about what is up to date.

After `snakemake`, DVC records what it made; after `dvc pull`, `dvc checkout` or a copy, Snakemake takes what DVC knows to
be right. Where both see something to do, nothing is changed: run one of them first.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> None:
    from genseg.dag.sync import sync

    print(sync())
