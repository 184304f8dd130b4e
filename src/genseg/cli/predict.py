"""Segment one image by phrases with a trained model: one mask PNG a phrase, an overlay, and a JSON with RLE masks."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="picture to segment, of any mode and size")
    parser.add_argument("--phrase", action="append", required=True, metavar="TEXT", help="what to segment; may be repeated")
    parser.add_argument("--model", metavar="DIR", help="trained model, e.g. results/mini/model (default: that of --params)")
    parser.add_argument(
        "--params", metavar="FILE", help="sample as this study's main row: sample.main, threshold, spacing, clip_x_0, precision"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where mask_<k>.png, overlay.png, predictions.json go")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the params', or the model's own)")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 is none (default: the params', or the model's own)")
    parser.add_argument("--threshold", type=float, help="of the soft map, 0 to 1 (default: the params', or 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="of the networks (default: the params', or fp32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    import sys
    from pathlib import Path
    from typing import Any

    from genseg.data.images import load_image
    from genseg.diffusion.pipeline import load_pipeline
    from genseg.diffusion.predict import write_prediction
    from genseg.errors import UserError
    from genseg.models.device import DTYPES, choose_device, describe
    from genseg.params import load_params

    if not all(phrase.strip() for phrase in arguments.phrase):
        raise UserError("--phrase: empty phrase; say what to segment")
    for flag, value in (("--steps", arguments.steps), ("--guidance", arguments.guidance)):
        if value is not None and not 1 <= value < float("inf"):
            raise UserError(f"{flag} {value}: must be a number of at least 1")
    if arguments.threshold is not None and not 0 <= arguments.threshold <= 1:
        raise UserError(f"--threshold {arguments.threshold}: must lie between 0 and 1")
    out = Path(arguments.out)
    if file := next((place for place in (out, *out.parents) if place.exists() and not place.is_dir()), None):
        raise UserError(f"--out {out}: {file} is a file; give a folder")
    params = load_params(arguments.params) if arguments.params else None
    model = arguments.model or (params.results_dir / "model" if params else None)
    if model is None:
        raise UserError("--model DIR: name a trained model, or with --params FILE a study that has one")
    image = load_image(arguments.image)
    device = choose_device(arguments.device)

    sample = params.sample if params else None
    precision = arguments.precision or (sample.precision if sample else "fp32")
    pipeline = load_pipeline(model, DTYPES[precision]).to(device)
    options: dict[str, Any] = {"threshold": 0.5}
    if sample:
        if sample.readout != "bilinear":
            raise UserError(f"{arguments.params}: sample.readout is {sample.readout}; predict reads out bilinearly only")
        main = sample.main
        pipeline.sample_by(sample.spacing, sample.clip_x_0)
        pipeline.register_to_config(image_size=main.size, steps=main.steps, guidance=main.guidance)
        options = {"threshold": sample.threshold, "rule": main.rule, "guidance_interval": main.guidance_interval}
        options["ensemble"] = main.ensemble
    if arguments.threshold is not None:
        options["threshold"] = arguments.threshold
    if (arguments.steps or 1) > (most := pipeline.scheduler.config.num_train_timesteps):
        raise UserError(f"--steps {arguments.steps}: the model has {most} timesteps; give at most that many")
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), desc="predict")
    try:
        output = pipeline(image, arguments.phrase, arguments.steps, arguments.guidance, arguments.seed, **options)
    except ValueError as error:  # what the arguments above let through: an answer that is not finite
        raise UserError(str(error)) from None
    write_prediction(out, image, arguments.phrase, output)
    print(f"{len(output.masks)} masks in {arguments.out} (device {describe(device)})")
