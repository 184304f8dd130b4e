"""Make another method's outputs a baseline of the study: scored, refined and in the tables from the next run of the DAG on.

Maps, index masks and COCO instances are of classes and give mIoU; rows that name their phrase (narrative_id, phrase_id) give
AR. Import both under one name to have both: a second import replaces only what it brings. Files are found by the name of the
picture without its suffix. Pickled files run nothing: only arrays are taken from them.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from genseg.interchange.importing import FORMATS

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "formats:\n" + "\n".join(f"  {name:<13} {text}" for name, text in FORMATS.items())
    parser.add_argument("name", metavar="NAME", help="what tables call the method: letters, digits and . _ + -")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what wrote the source; see below")
    parser.add_argument("--source", required=True, metavar="PATH", help="folder or file of the format")
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="params of the study (default: %(default)s)")
    parser.add_argument("--array", metavar="NAME", help="irn, clip_es: name of the maps (default: high_res; attn_highres)")
    parser.add_argument(
        "--background",
        metavar="RULE",
        help="none | constant:V | power:G ((1 - max)^G) | threshold:V; default: irn constant:0.15, clip_es power:1,"
        " coco_results none; mmseg needs one where background is no channel",
    )
    parser.add_argument(
        "--numbering",
        choices=("class_id", "position"),
        help="index_masks, coco_results: numbers are the study's class ids (default), or count its foreground classes from 1",
    )
    parser.add_argument("--probabilities", action="store_true", help="mmseg: the maps are probabilities, not logits")
    parser.add_argument("--threshold", type=float, metavar="V", help="png_masks: foreground from this value on (default: 0.5)")
    parser.add_argument(
        "--allow-missing", action="store_true", help="leave images (or phrases) without a file out; scores count them as IoU 0"
    )


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from genseg.baselines.registry import import_paths
    from genseg.errors import UserError
    from genseg.interchange.importing import Recipe, Target, import_predictions
    from genseg.interchange.labels import Background
    from genseg.params import load_params

    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: must lie above 0 and up to 1")
    params = load_params(args.params)
    tables = [params.data_dir / f"{name}.parquet" for name in ("phrases", "class_phrases")]
    for table in tables:
        if not table.exists():
            raise UserError(f"{table}: no such file; run `genseg data` with this study's params first")
    recipe = Recipe(
        args.format,
        array=args.array,
        background=None if args.background is None else Background.parse(args.background),
        numbering=args.numbering,
        probabilities=args.probabilities,
        threshold=args.threshold,
        allow_missing=args.allow_missing,
    )
    targets = [Target(table, out) for table, out in zip(tables, import_paths(params, args.name), strict=True)]
    for out, counts in import_predictions(recipe, Path(args.source), *targets).items():
        print(
            f"{out}: {counts['predictions']} predictions for {counts['images']} images; "
            f"{counts['missing']} missing, {counts['other_split']} of other splits left out"
        )
