"""Command that segments one image."""

import argparse


def run_predict(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Segment one image by phrases with a trained model: one mask PNG per phrase, an overlay, and a JSON file of RLE masks."""
    parser.add_argument("image", metavar="IMAGE", help="image to segment, of any mode and size")
    parser.add_argument("--phrase", action="append", required=True, metavar="TEXT", help="phrase; may be repeated")
    parser.add_argument("--model", metavar="DIR", help="trained model, e.g. results/mini/model/gs (default: that of --params)")
    parser.add_argument("--params", metavar="FILE", help="sample as the main row of this study (sample.main, threshold, ...)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for mask_<k>.png, overlay.png, predictions.json")
    parser.add_argument("--steps", type=int, help="denoising steps (default: that of --params, or the model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 for none (default: that of --params, or the model's)")
    parser.add_argument("--threshold", type=float, help="threshold of the soft map, 0 to 1 (default: that of --params, or 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial noise (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="precision (default: that of --params, or fp32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device (default: %(default)s)")
    args = parser.parse_args(arguments)
    from pathlib import Path

    from genseg.data.images import load_image
    from genseg.diffusion.pipeline import segment_image
    from genseg.errors import UserError
    from genseg.interchange.exporting import write_prediction_folder
    from genseg.models.device import choose_device, describe
    from genseg.params import load_params

    if not all(phrase.strip() for phrase in args.phrase):
        raise UserError("--phrase: the phrase is empty")
    for flag, value in (("--steps", args.steps), ("--guidance", args.guidance)):
        if value is not None and not 1 <= value < float("inf"):
            raise UserError(f"{flag} {value}: must be a number of at least 1")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: must be between 0 and 1")
    out = Path(args.out)
    if file := next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None):
        raise UserError(f"--out {out}: {file} is a file; pass a folder")
    params = load_params(args.params) if args.params else None
    if args.model is None and params is None:
        raise UserError("pass a trained model with --model DIR, or a study that has one with --params FILE")
    model = Path(args.model) if params is None or args.model else params.model_dir("gs")

    image, device = load_image(args.image), choose_device(args.device)
    output = segment_image(
        image,
        args.phrase,
        model,
        device,
        params.sample if params else None,
        args.precision,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        threshold=args.threshold,
        seed=args.seed,
    )
    write_prediction_folder(out, image, args.phrase, output.masks, output.maps)
    print(f"{len(output.masks)} masks in {out} (device {describe(device)})")
