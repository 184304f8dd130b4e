"""Select, fine-tune or train the backbone: VAE, text encoders and U-Net of an SDXL-inpainting pipeline."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="params of the study (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from genseg.params import load_params
    from genseg.training.backbone import prepare_backbone

    prepare_backbone(load_params(arguments.params))
