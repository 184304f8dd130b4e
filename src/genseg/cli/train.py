"""Train the label-diffusion model, or the discriminative control (same U-Net, inputs, data and budget, but one
forward pass per prediction).

On several visible GPUs, the command starts one process per GPU, up to `resources.train.gpu`. torchrun and `accelerate launch`
can start the processes, too: `torchrun --nproc-per-node 8 -m genseg train --params params.yaml`.
"""

from __future__ import annotations

import argparse
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="params of the study (default: %(default)s)")
    parser.add_argument("--model", choices=("gs", "discriminative"), default="gs", help="model to train (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from genseg.dag.launch import launch, one_of_several, processes
    from genseg.params import load_params
    from genseg.training.train import train_model

    params = load_params(arguments.params)
    if "WORLD_SIZE" in os.environ:
        with one_of_several():
            train_model(params, arguments.model)
    elif (count := processes(params)) > 1:
        command = ["train", "--params", arguments.params, "--model", arguments.model]
        launch(command, count, params.resources["train"].threads)
    else:
        train_model(params, arguments.model)
