"""Read another method's outputs once into predictions, which are scored and refined as any other.

Class predictions (every format but png_masks) are for the study's class phrases, `data/<study>/class_phrases.parquet`; files
are found by the name of the picture without its suffix. Pickled files run nothing: only arrays are taken from them.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from genseg.interchange.importing import FORMATS

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "formats:\n" + "\n".join(f"  {name:<13} {text}" for name, text in FORMATS.items())
    parser.add_argument("--format", required=True, choices=FORMATS, help="what wrote the source; see below")
    parser.add_argument("--source", required=True, metavar="PATH", help="folder or file of the format")
    parser.add_argument("--phrases", required=True, metavar="T", help="(class-)phrase table, Parquet")
    parser.add_argument("--out", required=True, metavar="P", help="where the predictions go, a .parquet file")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="(default: test)")
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

    from genseg.artifacts.phrases import read_phrases
    from genseg.errors import UserError
    from genseg.interchange.importing import Recipe, import_predictions
    from genseg.interchange.labels import Background

    out = Path(args.out)
    if out.suffix != ".parquet":
        raise UserError(f"--out {out}: give a name that ends in .parquet")
    if out.resolve() == Path(args.phrases).resolve():
        raise UserError(f"--out {out}: would overwrite the phrase table; choose another name")
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: must lie above 0 and up to 1")
    recipe = Recipe(
        args.format,
        array=args.array,
        background=None if args.background is None else Background.parse(args.background),
        numbering=args.numbering,
        probabilities=args.probabilities,
        threshold=args.threshold,
        allow_missing=args.allow_missing,
    )
    counts = import_predictions(recipe, Path(args.source), read_phrases(args.phrases), args.split, out, args.phrases)
    print(
        f"{out}: {counts['predictions']} predictions for {counts['images']} images; "
        f"{counts['missing']} missing, {counts['other_split']} of other splits left out"
    )
