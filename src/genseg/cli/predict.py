"""Segment one image by phrases with a trained model: one mask PNG a phrase, an overlay, and a JSON with RLE masks."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="picture to segment, of any mode and size")
    parser.add_argument("--phrase", action="append", required=True, metavar="TEXT", help="what to segment; may be repeated")
    parser.add_argument("--model", required=True, metavar="DIR", help="trained model, e.g. results/mini/model")
    parser.add_argument("--out", required=True, metavar="DIR", help="where mask_<k>.png, overlay.png, predictions.json go")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale; 1 is none (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from genseg.data.images import load_image
    from genseg.diffusion.pipeline import load_pipeline
    from genseg.diffusion.predict import write_prediction
    from genseg.errors import UserError
    from genseg.models.device import choose_device, describe

    if not all(phrase.strip() for phrase in arguments.phrase):
        raise UserError("--phrase: empty phrase; say what to segment")
    if arguments.steps < 1 or arguments.guidance < 1:
        raise UserError("--steps and --guidance must be at least 1")
    image = load_image(arguments.image)
    device = choose_device(arguments.device)
    pipeline = load_pipeline(arguments.model).to(device)
    output = pipeline(image, arguments.phrase, arguments.steps, arguments.guidance, arguments.seed)
    write_prediction(Path(arguments.out), image, arguments.phrase, output)
    print(f"{len(output.masks)} masks in {arguments.out} (device {describe(device)})")
