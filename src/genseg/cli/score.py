"""Command that scores predictions."""

import argparse
from pathlib import Path

from genseg.errors import UserError


def run_score(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Score predictions: per-phrase IoU, average recall (AR) and its splits, ceilings and intervals.

    With `--phrases T --predictions P --out scores.json` one set of predictions of any method is scored. The summary is printed
    as JSON; the per-phrase table is written next to it (.parquet). With `--params` all runs of a study are scored, including
    mIoU and comparisons. No images are needed. A phrase without a prediction counts as IoU 0.
    """
    parser.add_argument("--params", help="params of a study whose runs are all scored; replaces the options below")
    parser.add_argument("--phrases", help="phrase table (Parquet)")
    parser.add_argument(
        "--predictions", help="predictions (Parquet): image_id, narrative_id, phrase_id, mask (RLE counts), score"
    )
    parser.add_argument("--out", help="path of the summary (.json)")
    parser.add_argument(
        "--protocol", choices=("native", "png-official", "ppmn"), default="native", help="geometry of the IoU (default: native)"
    )
    parser.add_argument(
        "--split", choices=("train", "val", "test"), default="test", help="split of the table to score (default: test)"
    )
    parser.add_argument(
        "--threshold-grid",
        choices=("exact", "official", "drmn", "gs_eq12"),
        default="exact",
        help="thresholds of AR; exact (default) is the limit of infinitely fine grids, the mean IoU",
    )
    parser.add_argument(
        "--boundary-ratio",
        type=float,
        metavar="R",
        help="also report boundary IoU, with a band of R times the image diagonal (0.02 in its paper)",
    )
    parser.add_argument("--label-latent", type=int, metavar="N", help="also report the ceiling of an N x N label latent")
    parser.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="replicates for the 95 %% intervals (default: 1000; 0: none)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")
    args = parser.parse_args(arguments)
    options = {f"--{name}": getattr(args, name) for name in ("phrases", "predictions", "out")}
    missing = [flag for flag, value in options.items() if value is None]
    if args.params and (present := [flag for flag in options if flag not in missing]):
        raise UserError(f"--params scores a whole study, so leave out {', '.join(present)}")
    if args.params:
        from genseg.metrics.study import score_study
        from genseg.params import load_params

        score_study(load_params(args.params))
    elif missing:
        raise UserError(f"missing {', '.join(missing)} to score one set of predictions; or score a study with --params FILE")
    else:
        _score_one(args)


def _score_one(args: argparse.Namespace) -> None:
    import json
    import sys

    from genseg.artifacts.phrases import read_phrases
    from genseg.artifacts.predictions import read_predictions
    from genseg.artifacts.scores import read_summary, write_scores
    from genseg.metrics.scoring import score_run

    _check(args)
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
    write_scores(per_phrase, summary, args.out)
    notes = {
        "missing": "phrases without a prediction, counted as IoU 0",
        "other_split": f"predictions for splits other than {args.split}, not scored",
        "plural_by_flag": f"phrases without segment_ids, plural by the table's flag instead of {args.protocol}'s rule",
    }
    for key, text in notes.items():
        if summary["counts"][key]:
            print(f"genseg score: {text}: {summary['counts'][key]}", file=sys.stderr)
    print(json.dumps(read_summary(args.out), indent=2, ensure_ascii=False))


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for an argument that is out of range or would overwrite an input."""
    out = Path(args.out)
    if out.suffix != ".json":
        raise UserError(f"--out {out}: expected a name that ends in .json; the per-phrase table is written next to it")
    table = out.with_suffix(".parquet")
    for source in (args.phrases, args.predictions):
        if table.resolve() == Path(source).resolve():
            raise UserError(f"--out {out}: the per-phrase table, {table}, would overwrite {source}; choose another name")
    for flag, value, minimum in (("--bootstrap", args.bootstrap, 0), ("--label-latent", args.label_latent, 1)):
        if value is not None and value < minimum:
            raise UserError(f"{flag} {value}: must be at least {minimum}")
    if args.boundary_ratio is not None and not 0 < args.boundary_ratio < 1:
        raise UserError(f"--boundary-ratio {args.boundary_ratio}: must be between 0 and 1, e.g. 0.02")
