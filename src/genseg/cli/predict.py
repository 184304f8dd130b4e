"""Commands that use or publish a trained model."""

import argparse


def run_predict(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Segment an image, or all images of a folder, by phrases with a trained model: one mask PNG per phrase, an overlay with
    a legend, and a JSON file of RLE masks. For a folder, each image has a folder of its own in --out.
    """
    parser.add_argument("image", metavar="IMAGE", help="image to segment, of any mode and size, or a folder of images")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--phrase", action="append", metavar="TEXT", help="phrase; may be repeated")
    text.add_argument("--caption", metavar="TEXT", help="English caption; each of its noun phrases is segmented")
    parser.add_argument("--model", metavar="DIR", help="trained model: a folder, or a hub id (default: that of --params)")
    parser.add_argument("--params", metavar="FILE", help="sample as the main row of this study (sample.main, threshold, ...)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for mask_<k>.png, overlay.png, predictions.json")
    parser.add_argument("--soft-maps", action="store_true", help="write the soft maps, too: map_<k>.png with values 0 to 255")
    parser.add_argument("--steps", type=int, help="denoising steps (default: that of --params, or the model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 for none (default: that of --params, or the model's)")
    parser.add_argument("--threshold", type=float, help="threshold of the soft map, 0 to 1 (default: that of --params, or 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial noise (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="precision (default: that of --params, or fp32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device (default: %(default)s)")
    args = parser.parse_args(arguments)
    from pathlib import Path

    from genseg.data.captions import noun_phrases
    from genseg.errors import UserError
    from genseg.models.device import choose_device, describe
    from genseg.params import load_params
    from genseg.predict import open_model, predict

    phrases = args.phrase or noun_phrases(args.caption)
    if not phrases:
        raise UserError("--caption: it has no noun phrase; pass phrases with --phrase")
    if not all(phrase.strip() for phrase in phrases):
        raise UserError("--phrase: the phrase is empty")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: must be between 0 and 1")
    image, out = Path(args.image), Path(args.out)
    if not image.exists():
        raise UserError(f"{image}: no such image or folder")
    if file := next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None):
        raise UserError(f"--out {out}: {file} is a file; pass a folder")
    params = load_params(args.params) if args.params else None
    if args.model is None and params is None:
        raise UserError("pass a trained model with --model DIR, or a study that has one with --params FILE")
    model = args.model if params is None or args.model else str(params.model_dir("gs"))
    given = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "threshold": args.threshold,
        "seed": args.seed,
    }

    device = choose_device(args.device)
    pipeline, options = open_model(model, device, params.sample if params else None, args.precision)
    options |= {name: value for name, value in given.items() if value is not None}
    folders = predict(image, phrases, args.caption, out, pipeline, args.soft_maps, **options)
    images = f" of each of {len(folders)} images" if image.is_dir() else ""
    print(f"{len(phrases)} masks{images} in {out} (device {describe(device)})")


def run_publish(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Upload a trained model to the Hugging Face hub, with its card and, if the study has scored it, its scores.

    `GSPipeline.from_pretrained(ID)` loads it where genseg is installed. Log in with `hf auth login`, or set HF_TOKEN;
    HF_ENDPOINT selects another hub.
    """
    from genseg.cli.options import add_params

    parser.add_argument("id", metavar="ID", help="hub id of the model, such as NAME/gs-mini; created if it does not exist")
    add_params(parser)
    parser.add_argument("--model", choices=("gs", "discriminative"), default="gs", help="model (default: %(default)s)")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    args = parser.parse_args(arguments)
    from genseg.params import load_params
    from genseg.publish import publish

    print(f"published {publish(load_params(args.params), args.model, args.id, args.private)}")
