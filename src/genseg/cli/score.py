"""Score predictions: per-phrase IoU, average recall (AR) and its splits, ceilings and intervals.

With `--phrases T --predictions P --out scores.json` one set of predictions of any method is scored. The summary is printed as
JSON; the per-phrase table is written next to it (.parquet). With `--params` all runs of a study are scored, including mIoU
and comparisons. No images are needed. A phrase without a prediction counts as IoU 0.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", help="params file of a study, to score all of its runs; excludes the options below")
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
        help="thresholds of AR; exact (default) is the limit of ever finer grids, the mean IoU",
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


def run(args: argparse.Namespace) -> None:
    from genseg.errors import UserError

    options = {f"--{name}": getattr(args, name) for name in ("phrases", "predictions", "out")}
    if args.params:
        present = [flag for flag, value in options.items() if value is not None]
        if present:
            raise UserError(f"--params scores a whole study, so leave out {', '.join(present)}")
        from genseg.metrics.study import score_study
        from genseg.params import load_params

        score_study(load_params(args.params))
        return
    missing = [flag for flag, value in options.items() if value is None]
    if missing:
        raise UserError(f"missing {', '.join(missing)} to score one set of predictions; or score a study with --params FILE")
    _score_one(args)


def _score_one(args: argparse.Namespace) -> None:
    import json
    import sys

    from genseg.metrics.files import score_file, score_notes

    _check(args)
    summary = score_file(
        args.phrases,
        args.predictions,
        args.out,
        args.protocol,
        split=args.split,
        threshold_grid_name=args.threshold_grid,
        boundary_ratio=args.boundary_ratio,
        latent=None if args.label_latent is None else (args.label_latent, args.label_latent),
        replicates=args.bootstrap,
        seed=args.seed,
    )
    for note in score_notes(summary):
        print(f"genseg score: {note}", file=sys.stderr)
    print(json.dumps(summary, indent=2, ensure_ascii=False))


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for an argument that is out of range or would overwrite an input."""
    from pathlib import Path

    from genseg.errors import UserError

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
