"""Command that imports predictions of another method."""

import argparse

from genseg.cli.options import add_params


def run_import(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Add the outputs of another method as a baseline of the study. The next run of the DAG scores, refines and tabulates it.

    Maps, index masks and COCO instances are for classes and give mIoU; rows with narrative_id and phrase_id give AR. To have
    both, import both under the same name: a second import replaces only the half that it provides. Files are matched by the
    image's file name without its suffix. Nothing in a pickled file is executed; only its arrays are read.
    """
    from genseg.interchange.importing import FORMATS

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "formats:\n" + "\n".join(f"  {name:<13} {form.layout}" for name, form in FORMATS.items())
    parser.add_argument("name", metavar="NAME", help="name of the method in tables: letters, digits and . _ + -")
    parser.add_argument("--format", required=True, choices=FORMATS, help="format of the source; see below")
    parser.add_argument("--source", required=True, metavar="PATH", help="folder or file to import")
    add_params(parser)
    parser.add_argument("--array", metavar="NAME", help="irn, clip_es: name of the maps (default: high_res; attn_highres)")
    parser.add_argument(
        "--background",
        metavar="RULE",
        help="none | constant:V | power:G ((1 - max)^G) | threshold:V (default: irn constant:0.15, clip_es power:1,"
        " coco_results none; required for mmseg maps without a background channel)",
    )
    parser.add_argument(
        "--numbering",
        choices=("class_id", "position"),
        help="index_masks, coco_results: numbers are class ids (default) or positions of foreground classes, from 1",
    )
    parser.add_argument("--probabilities", action="store_true", help="mmseg: the maps are probabilities, not logits")
    parser.add_argument("--threshold", type=float, metavar="V", help="png_masks: smallest foreground value (default: 0.5)")
    parser.add_argument(
        "--allow-missing", action="store_true", help="accept images (or phrases) missing from the source; they count as IoU 0"
    )
    args = parser.parse_args(arguments)
    from pathlib import Path

    from genseg.baselines.registry import import_paths
    from genseg.errors import UserError
    from genseg.interchange.importing import import_predictions
    from genseg.interchange.importing.source import ImportOptions
    from genseg.interchange.labels import Background
    from genseg.params import load_params

    # 1. Check the arguments.
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: must be above 0 and at most 1")
    params = load_params(args.params)
    tables = [params.data_dir / f"{name}.parquet" for name in ("phrases", "class_phrases")]
    for table in tables:
        if not table.exists():
            raise UserError(f"{table}: no such file; run `genseg data` with this study's params first")
    options = ImportOptions(
        args.format,
        array=args.array,
        background=None if args.background is None else Background.parse(args.background),
        numbering=args.numbering,
        probabilities=args.probabilities,
        threshold=args.threshold,
        allow_missing=args.allow_missing,
    )

    # 2. Import.
    targets = dict(zip(tables, import_paths(params, args.name), strict=True))
    for out, counts in import_predictions(options, Path(args.source), targets).items():
        print(
            f"{out}: {counts['predictions']} predictions for {counts['images']} images; "
            f"{counts['missing']} missing, {counts['other_split']} of other splits skipped"
        )
