"""Cost of the phases that use a pretrained text-to-image model: the attention baselines and refinement."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from genseg.artifacts.files import read_json
from genseg.artifacts.manifest import times_path
from genseg.baselines.attend import METHODS, SEGMENT_PASSES, attention_grids, recorded_layers, recordings
from genseg.baselines.attention import Grid, aggregate, anchor_indices, divergence, find_grid
from genseg.baselines.make import writes_maps
from genseg.baselines.registry import Baseline, baselines_dir, study_baselines
from genseg.errors import UserError
from genseg.models import sdxl, stable_diffusion
from genseg.models.attention_control import AttentionControl, AttentionStore
from genseg.models.flops import BACKWARD, Gpu, meta_text_encoder, meta_unet, text_flops, unet_flops, vae_flops
from genseg.models.memory import LiveBytes, encoding_bytes, generator_bytes, meta_injection
from genseg.models.source import backbones, find_commit, read_repository, recorded_backbone
from genseg.params import Params
from genseg.params.baselines import Baselines
from genseg.params.refine import Refine
from genseg.plan.counts import Counts
from genseg.plan.rows import BYTES, Artifacts, Phases, maps_bytes, memory_row
from genseg.refine.layout import (
    G4SEG,
    RANDOM,
    discrepancy_path,
    evidence_passes,
    refined_path,
    refiner_passes,
    refiners,
    variants,
)
from genseg.refine.trained import RefinerNet

Configs = dict[str, dict[str, Any]]
PUBLISHED: dict[str, Configs] = {sdxl.HUB_ID: sdxl.CONFIGS, **stable_diffusion.CONFIGS}
CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
"""Class of each component that has a config."""
PADDED_TOKENS = 77  # tokens of a padded prompt (`TextToImage.embed`) with CLIP's tokenizers


def study_configs(params: Params, key: str, commits: Mapping[str, str | None] | None) -> Configs:
    """Return the configs of the pipeline of a params key such as "refine.backbone" (see `read_configs`).

    commits: commit by params key. With None, the configs are those of the commit that the phase `preflight` recorded,
    else of `PUBLISHED`, else of the current commit on the hub.
    """
    source, revision = backbones(params)[key]
    if commits is not None:
        return read_configs(source, commits[key], key)
    if record := recorded_backbone(params, key, source, revision):
        return read_configs(source, record["commit"], key)
    return PUBLISHED.get(source) or read_configs(source, find_commit(source, revision, key).sha, key)


def read_configs(source: str, commit: str | None, key: str) -> Configs:
    """Return the configs of unet, vae, text_encoder and, if the U-Net has SDXL's conditioning, text_encoder_2, of a
    directory or hub id.

    Raises UserError, with the `key` of the params, if a config is missing or belongs to another class.
    """
    configs: Configs = {}
    for name, expected in CLASSES.items():
        if name == "text_encoder_2" and configs["unet"].get("addition_embed_type") != "text_time":
            continue
        config = read_repository(source, f"{name}/config.json", commit, key)
        [found] = [config["_class_name"]] if "_class_name" in config else config.get("architectures") or [expected]
        if found != expected:
            raise UserError(f"{key}: {source}: its {name} is a {found}; expected a {expected}, as in Stable Diffusion and SDXL")
        configs[name] = config
    return configs


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class Generator:
    """Configs, parameters and operations of a text-to-image pipeline with the components of `TextToImage`.

    tokens: number of tokens of a phrase. inject: whether the adapter's tokens are injected into self-attention.
    """

    def __init__(self, configs: Configs, origin: str, tokens: int = PADDED_TOKENS, inject: bool = False) -> None:
        self.origin, self.unet, self.vae = origin, configs["unet"], configs["vae"]
        self.tokens, self.inject = tokens, inject
        names = sorted(name for name in configs if name.startswith("text_encoder"))
        self.encoders = [configs[name] for name in names]
        self.meta_unet = meta_unet(self.unet)
        with torch.device("meta"):
            self.modules: dict[str, nn.Module] = {"unet": self.meta_unet, "vae": AutoencoderKL.from_config(self.vae)}
        self.modules |= {name: meta_text_encoder(configs[name], projection=k > 0) for k, name in enumerate(names)}
        self.parameters = sum(map(count_parameters, self.modules.values()))

    def latent(self, size: int) -> int:
        """Return the side of the latent of a `size` x `size` image."""
        return size // 2 ** (len(self.vae["block_out_channels"]) - 1)

    def grids(self, size: int) -> list[Grid]:
        """Return the token grids of the attention layers, finest first."""
        return attention_grids(self.unet, self.latent(size), self.latent(size))

    def evaluation_flops(self, size: int) -> int:
        """Return the operations of a forward pass of the U-Net for one phrase."""
        return unet_flops(self.unet, self.latent(size), self.tokens, self.inject)

    def text_flops(self) -> int:
        """Return the operations of all text encoders for one phrase."""
        return sum(text_flops(config, self.tokens, projection=k > 0) for k, config in enumerate(self.encoders))

    def forward_bytes(
        self, size: int, batch: int, precision: str, control: AttentionControl | None = None, gradient: bool = False
    ) -> int:
        """Return the peak bytes of a forward pass of the U-Net (see `generator_bytes`)."""
        return generator_bytes(self.unet, self.latent(size), self.tokens, batch, precision, control, gradient)


def find_generator(params: Params, key: str, default: Generator, commits: Mapping[str, str | None] | None) -> Generator:
    """Return the generator of `baselines.backbone` or `refine.backbone`, or the default if the key is null."""
    if key not in backbones(params):
        return default
    return Generator(study_configs(params, key, commits), backbones(params)[key][0])


# ------------------------------------------------------------------------------------------------------------- memory
def generator_memory(generator: Generator, settings: Baselines | Refine, activations: int, gpu: Gpu) -> dict[str, Any]:
    """Return the GPU bytes of a job of a phase with these settings; `activations` are the peak bytes of its activations."""
    row = {"backbone": generator.origin, "parameters": generator.parameters}
    row |= {"size": settings.size, "batch": settings.batch, "precision": settings.precision}
    return row | memory_row(generator.parameters, settings.precision, activations, gpu)


def refinement_bytes(refine: Refine, generator: Generator) -> int:
    """Return the peak bytes, without weights, while G4Seg and its variants refine a batch of masks."""
    injection = meta_injection(refine.batch, refine.feature_size, generator.tokens, refine.inject)
    forward = generator.forward_bytes(refine.size, refine.batch, refine.precision)
    injected = generator.forward_bytes(refine.size, refine.batch, refine.precision, injection)
    names = [G4SEG, *refine.controls, *refine.sensitivity.controls]
    peaks = [encoding_bytes(generator.vae, refine.size, refine.precision)]
    channels = generator.unet["block_out_channels"][::-1]
    for name, variant in variants(refine).items():
        if name in names or "=" in name:
            widths = [channels[layer] for layer in variant.layers if layer < len(channels)]
            peaks.append(_batch_bytes(variant, widths, forward, injected if variant.alpha else forward))
    return max(peaks)


def _batch_bytes(refine: Refine, widths: list[int], forward: int, injected: int) -> int:
    """Return the peak bytes of `run_iterations`: features [B, N, C], distances [B, N, N] and intermediate results.

    widths: channels of `refine.layers`. forward, injected: peak bytes of a forward pass without and with injected masks.
    """
    if not refine.iterations:
        return 0
    cells, batch = refine.feature_size**2, refine.batch
    distances, offsets = 4 * batch * cells**2, 4 * cells**2
    level = 4 * batch * cells * sum(widths)
    features = level * len(refine.timesteps)
    # Features of the widest layer at one noise level: interpolated, converted to float32, and centred.
    comparison = batch * cells * max(widths, default=0) * (BYTES[refine.precision] + 8)

    # 1. Extract and compare features of the image.
    peaks = [features - level + forward, features + comparison, features + offsets + 3 * distances]

    # 2. Do the same for the generated image.
    is_generated = refine.generation > 0
    if is_generated:
        earlier = features + offsets + distances
        if refine.iterations > 1 and refine.alpha > 0:
            earlier += distances
        peaks += [earlier + features - level + injected, earlier + features + comparison, earlier + features + 3 * distances]

    # 3. Collect the evidence of one phrase, at most on the whole image, and choose among the candidate masks.
    held = features + offsets + (3 if is_generated else 2) * distances
    peaks.append(held + 2 * offsets)
    if refine.cut_quantiles and refine.alpha:
        peaks.append(held + injected)
    return max(peaks)


def attention_bytes(baselines: Baselines, generator: Generator, texts: int) -> int:
    """Return the peak bytes, without weights, while `attend.ImageAttention` records one image with at most `texts` phrases."""
    size, precision = baselines.size, baselines.precision
    grids, batch = generator.grids(size), min(baselines.batch, texts)
    peaks, held = [encoding_bytes(generator.vae, size, precision)], 0
    for recording in dict.fromkeys(
        recording for name, recording in recordings(baselines).items() if name in baselines.attention
    ):
        # 1. Record the maps of one batch, in addition to those of earlier batches and recordings.
        layers = recorded_layers(baselines, grids, recording.self_attention)
        store = AttentionStore(select=lambda call: (call.kind, call.grid) in layers)  # noqa: B023 - used in this iteration only
        maps = sum(4 * math.prod(grid) * (generator.tokens if kind == "cross" else math.prod(grid)) for kind, grid in layers)
        peaks.append(held + (texts - batch) * maps + generator.forward_bytes(size, batch, precision, store))
        # 2. Invert the image.
        if recording.inversion is not None:
            latent_bytes = 4 * batch * generator.vae["latent_channels"] * generator.latent(size) ** 2
            backward = generator.forward_bytes(size, batch, precision, gradient=True)
            peaks.append(held + texts * maps + (recording.inversion.steps + 4) * latent_bytes + backward)
        # 3. Concatenate the maps of all batches, while those of the last batch are still in memory.
        peaks.append(held + (2 * texts + batch) * maps)
        held += texts * maps
    # 4. Segment with DiffSeg: a forward pass with the empty prompt, and the aggregation of self-attention.
    if "diffseg" not in baselines.attention:
        return max(peaks)
    forward = generator.forward_bytes(size, 1, precision, AttentionStore(kinds=["self"]))
    aggregated_grids = [find_grid(grids, side, "baselines.diffseg.sides") for side in baselines.diffseg.sides]
    self_maps = {grid: torch.empty(math.prod(grid), math.prod(grid), device="meta") for grid in aggregated_grids}
    with LiveBytes([]) as live, torch.no_grad():
        aggregated = aggregate(self_maps)
        divergence(aggregated[anchor_indices(max(aggregated_grids), baselines.diffseg.anchors)], aggregated)
    return max(*peaks, held + forward, held + live.peak + sum(attention.nbytes for attention in self_maps.values()))


# ---------------------------------------------------------------------------------------------------------- artifacts
def add_artifacts(artifacts: Artifacts, params: Params, counts: Counts, baseline_generator: Generator) -> None:
    """Add predictions and soft maps of the attention baselines (`baseline_generator`), and predictions of refinement."""
    # 1. Add the baselines.
    settings, grids = params.baselines, baseline_generator.grids(params.baselines.size)
    sides_of_maps = {
        "cross_attention": max(grids)[0],
        "diffpng_cross": settings.diffpng.cross_side,
        "diffpng_cross_self": settings.diffpng.self_side,
    }
    assert sides_of_maps.keys() == set(filter(writes_maps, METHODS))
    sides = {name: side for name, side in sides_of_maps.items() if name in set[str](settings.attention)}
    folder, all_baselines = baselines_dir(params), _planned_baselines(params)
    phrases = [counts.rows["test"], counts.rows["class_phrases"]]
    predictions = counts.row_bytes * sum(phrases) * sum(baseline.family != "run" for baseline in all_baselines)
    artifacts.add("baselines: predictions", predictions, "estimate", *folder.glob("*.parquet"))
    maps = sum(maps_bytes(count, side) for side in sides.values() for count in phrases)
    if maps:
        artifacts.add("baselines: soft maps", maps, counts.basis, *folder.glob("*.safetensors"))

    # 2. Add refined predictions.
    refine = params.refine
    prediction_paths: list[Path] = []
    for baseline in all_baselines:
        for refiner in refiners(params, baseline.name):
            prediction_paths += [refined_path(params, refiner, baseline.name, classes) for classes in (False, True)]
    masks = counts.refined["class_phrases"] + counts.refined["phrases"]
    predictions = counts.row_bytes * masks * (len(prediction_paths) // 2)
    artifacts.add("refined: predictions", predictions, "estimate", *prediction_paths)
    figure_paths = [discrepancy_path(params, baseline.name).with_suffix(".safetensors") for baseline in all_baselines]
    figure_maps = len(figure_paths) * maps_bytes(refine.pictures, refine.feature_size)
    artifacts.add("refined: maps for the figure", figure_maps, "upper bound", *figure_paths)


def _planned_baselines(params: Params) -> list[Baseline]:
    """Return the baselines of the study; if there are none yet, one imported method."""
    return study_baselines(params) or [Baseline("imported", "imported", "imported")]


# ------------------------------------------------------------------------------------------------------------- phases
def add_baseline_phases(phases: Phases, params: Params, counts: Counts, generator: Generator) -> None:
    """Add evaluations, operations and hours of the attention baselines. Methods that share a recording share its cost."""
    settings, attended = params.baselines, counts.attended
    methods_by_recording: dict[Any, list[str]] = {}
    for method, recording in recordings(settings).items():
        if method not in settings.attention:
            continue
        methods_by_recording.setdefault(recording, []).append(method)

    # 1. Count the evaluations of each recording. A backward pass adds operations, but no evaluation.
    parts = []
    for recording, methods in methods_by_recording.items():
        prompts = "captions" if recording.captioned else "texts"
        images, texts = attended["test_images"], attended[f"test_{prompts}"]
        if any(METHODS[name].choose_threshold for name in methods):  # the threshold is chosen on val
            images, texts = images + attended["val_images"], texts + attended[f"val_{prompts}"]
        passes, gradients = recording.passes()
        evaluations = texts * passes + (images * SEGMENT_PASSES if "diffseg" in methods else 0)
        name = ", ".join(methods) + (", upper bound" if recording.inversion is not None else "")
        parts.append((name, evaluations, evaluations + texts * gradients * (BACKWARD - 1)))

    # 2. Add the total, which includes the encoders, and each recording.
    images, texts = (attended[f"test_{kind}"] + attended[f"val_{kind}"] for kind in ("images", "texts"))
    forward = generator.evaluation_flops(settings.size)
    encoding = images * vae_flops(generator.vae, settings.size)[0] + texts * generator.text_flops()
    evaluations = sum(part[1] for part in parts)
    flops = sum(part[2] for part in parts) * forward + encoding
    what = f"{texts:,} phrases of {images:,} images"
    phases.add("baselines", what, evaluations, flops, settings.precision, phases.seconds("baselines"), "baselines")
    for name, evaluations, forward_passes in parts:
        phases.add("baselines", f"  {name}", evaluations, forward_passes * forward, settings.precision)


def add_refine_phases(phases: Phases, params: Params, counts: Counts, generator: Generator) -> None:
    """Add evaluations, operations and hours of refinement. They are upper bounds: empty and full masks are not refined."""
    refine, counted = params.refine, [counts.refined["phrases"], counts.refined["class_phrases"]]
    masks = sum(counted)

    # 1. Add the training of the trained control.
    if "trained" in refine.controls:
        trained = refine.trained
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            RefinerNet()(torch.empty(1, 3, trained.size, trained.size), torch.empty(1, 1, trained.size, trained.size))
        flops = trained.steps * trained.batch * counter.get_total_flops() * (1 + BACKWARD)
        what = f"trained control: {trained.steps:,} steps of batch {trained.batch}, on the CPU"
        phases.add("refine", what, 0, flops, None, phases.seconds("refine_train"))

    # 2. Group the refiners.
    groups: dict[str, list[tuple[str, str]]] = {"G4Seg": [], "controls": [], "sensitivity": []}
    baselines = _planned_baselines(params)
    for baseline in baselines:
        for refiner in refiners(params, baseline.name):
            group = "controls" if refiner in refine.controls else "sensitivity"
            groups["G4Seg" if refiner == G4SEG else group].append((refiner, baseline.name))

    # 3. Add the total and each group. Every batch of masks also encodes its images and texts.
    images = counts.refined["images"] + math.ceil(masks / refine.batch)
    encoding = masks * generator.text_flops() + images * vae_flops(generator.vae, refine.size)[0]
    path = times_path(params, "refine")
    times = read_json(path) if path.exists() else {}
    rows = []
    for group, pairs in groups.items():
        names = [refiner for refiner, _ in pairs if refiner != RANDOM]
        passes = [refiner_passes(refine, name) for name in names]
        evaluations = sum(count * refiner_passes(refine, name, bool(k)) for k, count in enumerate(counted) for name in names)
        if group == "G4Seg":  # every shard computes the class evidence once
            evaluations += params.resources.refine.shards * counted[True] * evidence_passes(refine)
        flops = evaluations * generator.evaluation_flops(refine.size) + sum(count > 0 for count in passes) * encoding
        keys = [f"{refiner}/{baseline}" for refiner, baseline in pairs if refiner != RANDOM]
        seconds = sum(times[key]["seconds"] for key in keys) if keys and all(key in times for key in keys) else None
        rows.append((f"  {group}, {len(pairs)} runs", evaluations, flops, seconds))
    what = f"up to {masks:,} masks for each of {len(baselines)} baselines"
    total = phases.seconds(*(f"refine.shard={shard}" for shard in range(params.resources.refine.shards)))
    phases.add("refine", what, sum(row[1] for row in rows), sum(row[2] for row in rows), refine.precision, total, "refine")
    for what, evaluations, flops, seconds in rows:
        if flops:
            phases.add("refine", what, evaluations, flops, refine.precision, seconds)
