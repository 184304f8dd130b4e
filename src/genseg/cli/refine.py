"""Refine masks with G4Seg (ours): predictions in, predictions out, each phrase alone.

With --predictions one file of any method; constants are those of the params file's `refine`, and --method takes its controls
(`upsampling_only`, `alpha_zero`, ...), too. Without, all baselines of the study by G4Seg and its controls, on the fixed part of
test that `refine.test_fraction` gives; --train, --shard and --gather do a part of that. What is finished is kept.
With --tune-crf nothing is refined: ten settings of the dense CRF are compared on val, on GS's masks and on ground truth made
inexact, and the best one is printed as `refine.crf`, to be put into the params by hand.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="params of the study (default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="train the trained control")
    parser.add_argument("--shard", type=int, help="refine every n-th baseline, from this one, n = --shards")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="of how many (default: %(default)s)")
    parser.add_argument("--gather", action="store_true", help="remove what the study no longer has, write the manifest")
    parser.add_argument("--tune-crf", action="store_true", help="compare ten settings of the dense CRF on val, print the best")
    parser.add_argument("--phrases", metavar="FILE", help="phrase table, Parquet; it names the images")
    parser.add_argument("--predictions", metavar="FILE", help="coarse predictions, Parquet")
    parser.add_argument("--out", metavar="FILE", help="where the refined predictions go, Parquet")
    parser.add_argument(
        "--method",
        default="g4seg",
        help="g4seg, or a control of its own: upsampling_only, ... (default: %(default)s)",
    )
    parser.add_argument("--model", metavar="DIR", help="Stable Diffusion to refine with (default: refine.backbone)")
    parser.add_argument("--images", metavar="DIR", help="folder that the table's file names start from (default: here)")
    parser.add_argument("--pictures", metavar="DIR", help="write what is in between as one PNG a phrase")


def run(arguments: argparse.Namespace) -> None:
    from genseg.errors import UserError
    from genseg.params import load_params

    params = load_params(arguments.params)
    one = {f"--{name}": getattr(arguments, name) for name in ("phrases", "predictions", "out")}
    if arguments.tune_crf:
        parts = {"--train": arguments.train, "--shard": arguments.shard is not None, "--gather": arguments.gather}
        given = [flag for flag, value in (one | parts).items() if value]
        if given:
            raise UserError(f"--tune-crf refines nothing; leave out {', '.join(given)}")
        import yaml

        from genseg.refine.crf_search import tune_crf

        best, tried = tune_crf(params)
        print(tried, "", yaml.safe_dump({"refine": {"crf": best.model_dump()}}, sort_keys=False).rstrip(), sep="\n")
        return
    if any(one.values()):
        lacking = [flag for flag, value in one.items() if value is None]
        if lacking:
            raise UserError(f"give {', '.join(lacking)}, too (one set of predictions), or none of {', '.join(one)} (a study)")
        from genseg.refine.files import refine_file

        refine_file(
            params,
            arguments.phrases,
            arguments.predictions,
            arguments.out,
            method=arguments.method,
            source=arguments.model,
            images=arguments.images,
            pictures=arguments.pictures,
        )
        return
    single = {"--model": arguments.model, "--images": arguments.images, "--pictures": arguments.pictures}
    single["--method"] = arguments.method if arguments.method != "g4seg" else None
    if given := [flag for flag, value in single.items() if value is not None]:
        raise UserError(f"{', '.join(given)}: only for one set of predictions; give --phrases, --predictions and --out, too")
    from genseg.refine.gather import gather_refined
    from genseg.refine.shard import refine_shard
    from genseg.refine.trained_control import train_network

    everything = not (arguments.train or arguments.gather or arguments.shard is not None)
    if arguments.train or everything:
        train_network(params)
    if arguments.shard is not None or everything:
        refine_shard(params, arguments.shard or 0, arguments.shards)
    if arguments.gather or everything:
        gather_refined(params)
