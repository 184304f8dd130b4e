"""Command that refines predictions."""

import argparse

from genseg.cli.options import add_params


def run_refine(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Refine the masks of predictions with our reimplementation of G4Seg, each phrase independently.

    With --predictions, one predictions file of any method is refined with the constants of `refine` in the params file;
    --method chooses G4Seg or one of its controls (`as_summarised`, `alpha_zero`, ...). Without it, all baselines of the study
    are refined by G4Seg and its controls on a fixed part of test (`refine.test_fraction`); --train, --shard and --gather each
    run one step of this. Files that are up to date are kept. With --tune-crf, nothing is refined. Instead, ten settings of the
    dense CRF are compared on val, on the masks of GS and on inexact ground-truth masks. The best setting is printed as
    `refine.crf`, to be copied into the params file.
    """
    add_params(parser)
    parser.add_argument("--train", action="store_true", help="train the trained control")
    parser.add_argument("--shard", type=int, metavar="I", help="refine shard I of the baselines, counted from 0")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="number of shards (default: %(default)s)")
    parser.add_argument("--gather", action="store_true", help="remove stale files and write the manifest")
    parser.add_argument("--tune-crf", action="store_true", help="compare ten settings of the dense CRF on val, print the best")
    parser.add_argument("--phrases", metavar="FILE", help="phrase table with the file names of the images, Parquet")
    parser.add_argument("--predictions", metavar="FILE", help="coarse predictions, Parquet")
    parser.add_argument("--out", metavar="FILE", help="file for the refined predictions, Parquet")
    parser.add_argument("--method", default="g4seg", help="g4seg or a control: as_summarised, ... (default: %(default)s)")
    parser.add_argument("--model", metavar="DIR", help="Stable Diffusion to refine with (default: refine.backbone)")
    parser.add_argument("--images", metavar="DIR", help="folder that the table's file names are relative to (default: .)")
    parser.add_argument("--pictures", metavar="DIR", help="folder for intermediate results, one PNG per phrase")
    args = parser.parse_args(arguments)
    from genseg.errors import UserError
    from genseg.params import load_params

    params = load_params(args.params)
    file_flags = {f"--{name}": getattr(args, name) for name in ("phrases", "predictions", "out")}
    if args.tune_crf:
        part_flags = {"--train": args.train, "--shard": args.shard is not None, "--gather": args.gather}
        unused = [flag for flag, value in (file_flags | part_flags).items() if value]
        if unused:
            raise UserError(f"--tune-crf refines nothing; leave out {', '.join(unused)}")
        from genseg.refine.crf_search import tune_crf

        tune_crf(params)
        return
    if any(file_flags.values()):
        missing = [flag for flag, value in file_flags.items() if value is None]
        if missing:
            raise UserError(
                f"missing {', '.join(missing)}; give all of {', '.join(file_flags)} to refine one file, or none of them to "
                "refine the study"
            )
        from genseg.refine.files import refine_file

        refine_file(
            params,
            args.phrases,
            args.predictions,
            args.out,
            method=args.method,
            source=args.model,
            images=args.images,
            pictures=args.pictures,
        )
        return
    one_file_only = {f"--{name}": getattr(args, name) for name in ("model", "images", "pictures")}
    one_file_only["--method"] = args.method if args.method != "g4seg" else None
    unused = [flag for flag, value in one_file_only.items() if value is not None]
    if unused:
        raise UserError(f"{', '.join(unused)}: applies to one file only; also give {', '.join(file_flags)}")
    from genseg.refine.study import gather_refined, refine_shard, train_network

    everything = not args.train and args.shard is None and not args.gather
    if args.train or everything:
        train_network(params)
    if args.shard is not None or everything:
        refine_shard(params, args.shard or 0, args.shards)
    if args.gather or everything:
        gather_refined(params)
