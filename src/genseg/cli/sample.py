"""Predict masks: one shard of all runs at one size, or gather the shards into the predictions.

Without --size and --gather, every size and shard is sampled in this process, then gathered.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="params of the study (default: %(default)s)")
    parser.add_argument("--size", type=int, help="sample the runs at this image size")
    parser.add_argument("--shard", type=int, default=0, help="which shard of it (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=1, help="of how many (default: %(default)s)")
    parser.add_argument("--gather", action="store_true", help="gather the shards' parts into results/<study>/predictions")


def run(arguments: argparse.Namespace) -> None:
    from genseg.params import load_params

    params = load_params(arguments.params)
    if arguments.gather:
        from genseg.sampling.gather import gather

        gather(params)
        return
    from genseg.sampling.shard import sample_shard

    if arguments.size is not None:
        sample_shard(params, arguments.size, arguments.shard, arguments.shards)
        return
    from genseg.sampling.gather import gather

    for size in params.sample.run_sizes():
        for shard in range(params.sample.shards):
            sample_shard(params, size, shard, params.sample.shards)
    gather(params)
