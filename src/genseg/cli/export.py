"""Command that exports predictions."""

import argparse


def run_export(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Write predictions in a format that other tools read."""
    from genseg.interchange.exporting import FORMATS

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "formats:\n" + "\n".join(f"  {name:<10} {text}" for name, text in FORMATS.items())
    parser.add_argument("--predictions", required=True, metavar="P", help="predictions, Parquet")
    parser.add_argument("--phrases", required=True, metavar="T", help="(class-)phrase table of the predictions, Parquet")
    parser.add_argument("--format", required=True, choices=FORMATS, help="format of the output; see below")
    parser.add_argument("--out", required=True, metavar="PATH", help="a .json file (coco) or a new folder (index_png)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="(default: test)")
    parser.add_argument(
        "--numbering",
        choices=("class_id", "position"),
        default="class_id",
        help="index_png: pixel values are class ids (default), or positions of foreground classes, counted from 1",
    )
    parser.add_argument(
        "--background",
        metavar="RULE",
        help="index_png, for soft maps of a study with a background class: none | threshold:V; mIoU is scored with"
        " V = score.background_threshold",
    )
    args = parser.parse_args(arguments)
    from pathlib import Path

    from genseg.artifacts.phrases import read_phrases
    from genseg.artifacts.predictions import maps_path, read_predictions
    from genseg.errors import UserError
    from genseg.interchange.exporting import export_coco, export_index_png, join_predictions
    from genseg.interchange.labels import Background, class_list

    out = Path(args.out)
    if out.resolve() in (Path(args.predictions).resolve(), Path(args.phrases).resolve()):
        raise UserError(f"--out {out}: would overwrite an input; choose another name")
    phrases = read_phrases(args.phrases)
    rows = join_predictions(phrases, read_predictions(args.predictions), args.split, args.predictions)
    if args.format == "coco":
        if args.background:
            raise UserError(f"--background {args.background}: COCO results have no background; leave it out")
        export_coco(rows, out)
        print(f"{out}: {len(rows)} results")
    else:
        soft = Path(args.predictions) if maps_path(args.predictions).exists() else None
        rule = Background.parse(args.background) if args.background else None
        classes = class_list(phrases[phrases["split"] == args.split], args.phrases)
        count = export_index_png(rows, classes, out, args.numbering, args.phrases, soft, rule)
        print(f"{out}: {count} index masks")
