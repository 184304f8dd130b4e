"""Assemble the data of a study into its phrase table (data/<study>/), with a report of what was skipped and why."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="params of the study (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    from genseg.data.assemble import assemble
    from genseg.params import load_params

    params = load_params(args.params)
    found = assemble(params)
    print(
        f"{params.data_dir}: {found['images']:,} images, {found['narratives_train'] + found['narratives_test']:,} narratives, "
        f"{found['grounded_phrases']:,} grounded phrases; report: {params.data_dir}/report.md"
    )
