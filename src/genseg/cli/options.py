"""Options that several commands have."""

import argparse


def add_params(parser: argparse.ArgumentParser) -> None:
    """Add the option for the params file of a study."""
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="params of the study (default: %(default)s)")
