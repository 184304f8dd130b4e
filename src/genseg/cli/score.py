"""Score predictions: per-phrase IoU, average recall (AR) and its splits, ceilings and intervals.

Either one set of predictions of any method, `--phrases T --predictions P --out scores.json`, whose summary is printed as
JSON (the table per phrase lies beside it, `.parquet`), or with `--params` all runs of a study, with mIoU and comparisons.
No images are needed. A phrase without a prediction counts as IoU 0.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", help="score all runs of this study (a params file), instead of the options below")
    parser.add_argument("--phrases", help="phrase table, Parquet")
    parser.add_argument(
        "--predictions", help="predictions, Parquet: image_id, narrative_id, phrase_id, mask (RLE counts), score"
    )
    parser.add_argument("--out", help="where the summary goes, a .json file")
    parser.add_argument(
        "--protocol", choices=("native", "png-official", "ppmn"), default="native", help="geometry of the IoU (default: native)"
    )
    parser.add_argument(
        "--split", choices=("train", "val", "test"), default="test", help="part of the table that is scored (default: test)"
    )
    parser.add_argument(
        "--threshold-grid",
        choices=("exact", "official", "drmn", "gs_eq12"),
        default="exact",
        help="thresholds of AR; exact (default): the limit of ever finer grids, which is the mean IoU",
    )
    parser.add_argument(
        "--boundary-ratio",
        type=float,
        metavar="R",
        help="also boundary IoU, its band R of the diagonal wide (0.02 in its paper)",
    )
    parser.add_argument("--label-latent", type=int, metavar="N", help="also the ceiling of an N x N label latent")
    parser.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="replicates for the 95 %% intervals (default: 1000; 0: none)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")


def run(args: argparse.Namespace) -> None:
    from genseg.errors import UserError

    singles = {f"--{name}": getattr(args, name) for name in ("phrases", "predictions", "out")}
    if args.params:
        given = [flag for flag, value in singles.items() if value is not None]
        if given:
            raise UserError(f"--params scores a whole study, so leave out {', '.join(given)}")
        from genseg.metrics.study import score_study
        from genseg.params import load_params

        score_study(load_params(args.params))
        return
    lacking = [flag for flag, value in singles.items() if value is None]
    if lacking:
        raise UserError(f"give {', '.join(lacking)} (one set of predictions), or --params FILE (a study)")
    _score_one(args)


def _score_one(args: argparse.Namespace) -> None:
    import json
    import sys
    from pathlib import Path

    from genseg.artifacts.phrases import read_phrases
    from genseg.artifacts.predictions import read_predictions
    from genseg.artifacts.scores import read_summary, write_scores
    from genseg.errors import UserError
    from genseg.metrics.scoring import score_run

    out = Path(args.out)
    if out.suffix != ".json":
        raise UserError(f"--out {out}: give a name that ends in .json; the table per phrase goes beside it")
    table = out.with_suffix(".parquet")
    for source in (args.phrases, args.predictions):
        if table.resolve() == Path(source).resolve():
            raise UserError(f"--out {out}: the table per phrase, {table}, would overwrite {source}; choose another name")
    for flag, value, least in (("--bootstrap", args.bootstrap, 0), ("--label-latent", args.label_latent, 1)):
        if value is not None and value < least:
            raise UserError(f"{flag} {value}: must be at least {least}")
    if args.boundary_ratio is not None and not 0 < args.boundary_ratio < 1:
        raise UserError(f"--boundary-ratio {args.boundary_ratio}: must lie between 0 and 1, e.g. 0.02")

    per_phrase, summary = score_run(
        read_phrases(args.phrases),
        read_predictions(args.predictions),
        args.protocol,
        split=args.split,
        threshold_grid_name=args.threshold_grid,
        boundary_ratio=args.boundary_ratio,
        latent=None if args.label_latent is None else (args.label_latent, args.label_latent),
        replicates=args.bootstrap,
        seed=args.seed,
        origins=(args.phrases, args.predictions),
    )
    write_scores(per_phrase, summary, out)
    counts = summary["counts"]
    notes = {
        "missing": "phrases without a prediction, counted as IoU 0",
        "other_split": f"predictions for other splits than {args.split}, not scored",
        "plural_by_flag": f"phrases without segment_ids, plural by the table's flag instead of {args.protocol}'s rule",
    }
    for key, text in notes.items():
        if counts[key]:
            print(f"genseg score: {counts[key]} {text}", file=sys.stderr)
    print(json.dumps(read_summary(out), indent=2, ensure_ascii=False))
