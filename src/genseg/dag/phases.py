"""The phases: what of the params and of the source each one uses, and what it reads and writes.

The rules in `workflow/rules/<phase>.smk` take their `params:` from here and `dvc.yaml` is generated from here, so that
Snakemake and DVC rerun the same things.
"""

from __future__ import annotations

from dataclasses import dataclass

from genseg.params import Refine, Sample


@dataclass(frozen=True)
class Phase:
    """One phase: a file of rules for Snakemake, a stage for DVC. Paths are relative to the project, `{study}` in them."""

    keys: tuple[str, ...]
    """Dotted keys of the params whose values its outputs depend on (`device` and `resources` are none)."""
    rooms: tuple[str, ...]
    """What of `src/genseg` it runs, files or folders."""
    needs: tuple[str, ...]
    """Outputs of other phases and files of the project that DVC watches. What one of these was itself made from is left
    out: a rerun always changes a manifest, so a change comes through, and `dvc dag` stays readable."""
    outs: tuple[str, ...]
    """Folders that it fills; nothing else writes there."""
    targets: tuple[str, ...]
    """Manifests: each is written last, when all it describes is complete."""
    persist: bool = False
    """Whether DVC leaves the old outputs in place for a rerun, because the command reuses the finished parts that still
    hold and removes those that do not."""


# Everything of `sample` but `shards`, on which no byte depends.
_SAMPLE = tuple(f"sample.{name}" for name in Sample.model_fields if name != "shards")
# Likewise.
_REFINE = tuple(f"refine.{name}" for name in Refine.model_fields if name != "shards")
# What hashes a pipeline's weights.
_WEIGHTS = ("training/backbone.py", "training/checkpoints.py", "training/prepare.py", "training/steps.py")

PHASES = {
    "data": Phase(
        keys=("data",),
        rooms=("artifacts", "cli/data.py", "data"),
        needs=(),
        outs=("data/{study}",),
        targets=("data/{study}/manifest.json",),
    ),
    "backbone": Phase(
        keys=("seed", "backbone"),
        rooms=(
            *("artifacts", "cli/backbone.py", "data/images.py", "models"),
            *("training/backbone.py", "training/checkpoints.py", "training/prepare.py", "training/steps.py"),
        ),
        needs=("data/{study}", "data/backbone"),
        outs=("results/{study}/backbone",),
        targets=("results/{study}/backbone/manifest.json",),
    ),
    "latents": Phase(
        keys=(
            *("seed", "latents", "train.size", "sample.main.size", "sample.base.size", "sample.grid.sizes"),
            *("sample.grid_fraction", "sample.select_fraction"),
        ),
        rooms=("artifacts", "cli/latents.py", "data/images.py", "latents.py", "models"),
        needs=("results/{study}/backbone",),
        outs=("results/{study}/latents",),
        targets=("results/{study}/latents/manifest.json",),
        persist=True,
    ),
    "train": Phase(
        keys=("seed", "latents", "train"),
        rooms=(
            *(
                "artifacts",
                "cli/train.py",
                "dag/launch.py",
                "dag/lease.py",
                "data/images.py",
                "diffusion",
                "latents.py",
                "models",
            ),
            *("training/checkpoints.py", "training/data.py", "training/distributed.py", "training/export.py"),
            *("training/log.py", "training/losses.py", "training/networks.py", "training/stages.py", "training/state.py"),
            *("training/steps.py", "training/train.py", "training/validation.py"),
        ),
        # Of the latents the texts only: with the backbone and the params above they tell what training reads, and one more
        # size to sample at must not train again.
        needs=("results/{study}/backbone", "results/{study}/latents/text"),
        outs=("results/{study}/model", "results/{study}/control"),
        targets=("results/{study}/model/manifest.json", "results/{study}/control/manifest.json"),
    ),
    "baselines": Phase(
        keys=("seed", "baselines"),
        rooms=("artifacts", "baselines", "cli/baseline.py", "data/images.py", "models", *_WEIGHTS),
        needs=("results/{study}/backbone", "data/imported"),
        outs=("results/{study}/baselines",),
        targets=("results/{study}/baselines/manifest.json",),
        persist=True,
    ),
    "sample": Phase(
        keys=("seed", "latents", *_SAMPLE),
        rooms=(
            *("artifacts", "baselines/colour.py", "cli/sample.py", "data/images.py", "diffusion", "latents.py", "models"),
            "sampling",
        ),
        needs=("results/{study}/latents", "results/{study}/model", "results/{study}/control"),
        outs=("results/{study}/predictions",),
        targets=("results/{study}/predictions/manifest.json",),
        persist=True,
    ),
    "refine": Phase(
        keys=("seed", "baselines.inexact", *_REFINE, "score.background_threshold"),
        rooms=(
            *("artifacts", "baselines/inexact.py", "baselines/registry.py", "cli/refine.py", "data/images.py"),
            *("interchange/labels.py", "models", "refine", *_WEIGHTS),
        ),
        needs=("results/{study}/predictions", "results/{study}/baselines"),
        outs=("results/{study}/refined",),
        targets=("results/{study}/refined/manifest.json",),
        persist=True,
    ),
    "score": Phase(
        keys=("seed", "score", "sample.main", "sample.base", "sample.readout", "sample.threshold"),
        rooms=("artifacts", "cli/score.py", "metrics"),
        needs=("results/{study}/predictions", "results/{study}/baselines", "results/{study}/refined"),
        outs=("results/{study}/scores",),
        targets=("results/{study}/scores/manifest.json",),
    ),
    "tables": Phase(
        keys=("seed", "data.source", "data.class_template", *_SAMPLE, *_REFINE, "score", "tables"),
        rooms=("artifacts", "baselines/registry.py", "cli/tables.py", "data/images.py", "report"),
        needs=("data/published", "results/{study}/scores"),
        outs=("results/{study}/tables", "results/{study}/figures"),
        targets=("results/{study}/tables/manifest.json",),
    ),
}
