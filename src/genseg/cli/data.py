"""Assemble the data of a study (data/<study>/): phrase table, class phrases, and a report of skipped items."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="params of the study (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    from genseg.data.assemble import assemble
    from genseg.params import load_params

    params = load_params(args.params)
    statistics = assemble(params)
    narratives = statistics["narratives_train"] + statistics["narratives_test"]
    print(
        f"{params.data_dir}: {statistics['images']:,} images, {narratives:,} narratives, "
        f"{statistics['grounded_phrases']:,} grounded phrases; report: {params.data_dir}/report.md"
    )
