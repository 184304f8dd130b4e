"""Commands that print a study's params or run one of its phases."""

import argparse
import os

from genseg.cli.options import add_params
from genseg.params import load_params


def run_params(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Print the resolved params of a study with a comment for each key, or the keys in which two studies differ.

    DVC reads params.yaml only. To run another study with DVC, write its params there:
    `genseg params params/camvid.yaml > params.yaml`.
    """
    parser.add_argument("file", metavar="FILE", help="params file")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="second params file, which is compared with the first")
    args = parser.parse_args(arguments)
    from genseg.params.text import differences, flow, to_yaml

    params = load_params(args.file)
    if args.other is None:
        print(to_yaml(params), end="")
        return
    for key, first, second in differences(params, load_params(args.other)):
        print(f"{key}: {flow(first)} -> {flow(second)}")


def run_data(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Assemble the data of a study (data/<study>/): phrase table, class phrases, and a report of skipped items."""
    add_params(parser)
    args = parser.parse_args(arguments)
    from genseg.data.assemble import assemble

    params = load_params(args.params)
    statistics = assemble(params)
    narratives = statistics["narratives_train"] + statistics["narratives_test"]
    print(
        f"{params.data_dir}: {statistics['images']:,} images, {narratives:,} narratives, "
        f"{statistics['grounded_phrases']:,} grounded phrases; report: {params.data_dir}/report.md"
    )


def run_backbone(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Select, fine-tune or train the backbone: VAE, text encoders and U-Net of an SDXL-inpainting pipeline."""
    add_params(parser)
    args = parser.parse_args(arguments)
    from genseg.training.backbone import prepare_backbone

    prepare_backbone(load_params(args.params))


def run_latents(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Encode every image with the VAE, once per size, and every phrase with the text encoders."""
    add_params(parser)
    parser.add_argument(
        "--only-training", action="store_true", help="encode only what training reads: the images at its size, and all texts"
    )
    args = parser.parse_args(arguments)
    from genseg.latents import compute_latents

    compute_latents(load_params(args.params), args.only_training)


def run_train(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Train the label-diffusion model, or the discriminative control (same U-Net, inputs, data and budget, but one
    forward pass per prediction).

    On several visible GPUs, the command starts one process per GPU, up to `resources.train.gpu`. The processes
    can also be started by torchrun or `accelerate launch`: `torchrun --nproc-per-node 8 -m genseg train --params params.yaml`.
    """
    add_params(parser)
    parser.add_argument("--model", choices=("gs", "discriminative"), default="gs", help="model to train (default: %(default)s)")
    args = parser.parse_args(arguments)
    from genseg.dag.jobs import launch, one_of_several, processes
    from genseg.training.train import train_model

    params = load_params(args.params)
    if "WORLD_SIZE" in os.environ:
        with one_of_several():
            train_model(params, args.model)
    elif (count := processes(params)) > 1:
        launch(["train", "--params", args.params, "--model", args.model], count, params.resources.train.threads)
    else:
        train_model(params, args.model)


def run_baseline(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Make the predictions of the baselines: from the backbone's attention (cross-attention maps, DiffPNG, DiffSeg), from
    ground truth (inexact masks), and from the files of `genseg import`. Predictions that are up to date are kept.

    Without a name, make all baselines of the study and write their manifest.
    """
    parser.add_argument(
        "name",
        nargs="*",
        metavar="NAME",
        help="cross_attention, diffpng_cross, diffpng_cross_self, diffseg, inexact_<kind>, or the name of an import",
    )
    add_params(parser)
    args = parser.parse_args(arguments)
    from genseg.baselines.make import make_baselines

    make_baselines(load_params(args.params), args.name)


def run_sample(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Predict masks with the trained models: one shard of all runs at one image size, or gather the shards.

    Without --size and --gather, all sizes and shards are sampled in this process and then gathered.
    """
    add_params(parser)
    parser.add_argument("--size", type=int, help="image size of the runs")
    parser.add_argument("--shard", type=int, default=0, help="index of the shard, from 0 (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=1, help="number of shards (default: %(default)s)")
    parser.add_argument("--gather", action="store_true", help="gather the shards into results/<study>/predictions")
    args = parser.parse_args(arguments)
    from genseg.sampling.shard import gather, sample_shard

    params = load_params(args.params)
    if not args.gather:
        if args.size is not None:
            sample_shard(params, args.size, args.shard, args.shards)
            return
        shards = params.resources.sample.shards
        for size in params.sample.run_sizes():
            for shard in range(shards):
                sample_shard(params, size, shard, shards)
    gather(params)


def run_tables(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Write a study's tables (CSV, LaTeX, Markdown), figures and index.html from its scores and the published numbers."""
    add_params(parser)
    args = parser.parse_args(arguments)
    from genseg.report.write import write_report

    write_report(load_params(args.params))
