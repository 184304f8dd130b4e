"""What the phases take that ask a pretrained text-to-image model: the attention baselines and refinement."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from genseg.artifacts.files import read_json
from genseg.baselines.attend import METHODS, SEGMENT_PASSES, attention_grids, recorded_layers, recordings
from genseg.baselines.attention import Grid, aggregate, anchor_indices, divergence, nearest_grid
from genseg.baselines.registry import baselines_dir, study_baselines
from genseg.errors import UserError
from genseg.models import sdxl, stable_diffusion
from genseg.models.attention_control import AttentionCall, AttentionStore
from genseg.models.flops import BACKWARD, Gpu, meta_text_encoder, meta_unet, text_flops, unet_flops, vae_flops
from genseg.models.memory import LiveBytes, encoding_bytes, generator_bytes, meta_injection
from genseg.params import Baselines, Params, Refine
from genseg.plan.counts import Counts
from genseg.refine.g4seg import RANDOM, variants
from genseg.refine.layout import (
    G4SEG,
    MADE_WITH_G4SEG,
    discrepancy_path,
    refined_dir,
    refined_path,
    refiner_passes,
    refiners,
)
from genseg.refine.trained import RefinerNet
from genseg.refine.trained_control import network_dir

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PUBLISHED: dict[str, dict[str, Any]] = {sdxl.HUB_ID: sdxl.CONFIGS, **stable_diffusion.CONFIGS}
"""Configs by hub id."""
TOKENS = 77
"""Of a padded prompt (`TextToImage.embed`), in CLIP's tokenizers."""
Add = Callable[..., None]


def read_configs(source: str, key: str) -> dict[str, dict[str, Any]]:
    """Configs of unet, vae, text_encoder and, where the U-Net asks for SDXL's conditioning, text_encoder_2.

    Args:
        key: of the params, for messages.

    Raises:
        UserError: neither a known hub id nor a directory with these configs.
    """
    if source in PUBLISHED:
        return PUBLISHED[source]
    folder = Path(source)
    if not folder.is_dir():
        known = ", ".join(PUBLISHED)
        raise UserError(f"{key}: {source}: no such directory; the plan knows local directories and {known}")

    def read(name: str) -> dict[str, Any]:
        path = folder / name / "config.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: unreadable config ({error})") from None

    unet = read("unet")
    encoders = ["text_encoder", *(["text_encoder_2"] if is_double(unet) else [])]
    return {"unet": unet} | {name: read(name) for name in ("vae", *encoders)}


def is_double(unet: dict[str, Any]) -> bool:
    return unet.get("addition_embed_type") == "text_time"


def size_of(module: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


class Generator:
    """A text-to-image pipeline as shapes, as `models.text_to_image.TextToImage` holds it."""

    def __init__(self, configs: dict[str, dict[str, Any]], origin: str) -> None:
        self.origin, self.unet, self.vae = origin, configs["unet"], configs["vae"]
        self.encoders = [configs["text_encoder"], *([configs["text_encoder_2"]] if is_double(self.unet) else [])]
        meta = meta_unet(self.unet)
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(self.vae)
        encoders = [meta_text_encoder(config, bool(k)) for k, config in enumerate(self.encoders)]
        self.parameters = sum(map(size_of, (meta, vae, *encoders)))
        self._meta = meta

    def latent(self, size: int) -> int:
        return size // 2 ** (len(self.vae["block_out_channels"]) - 1)

    def grids(self, size: int) -> list[Grid]:
        """Token grids of its attention, finest first."""
        return attention_grids(self._meta, self.latent(size), self.latent(size))

    def widths(self, layers: list[int]) -> list[int]:
        """Channels of some up-blocks' outputs; layers that there are not are left out."""
        channels = list(reversed(self.unet["block_out_channels"]))
        return [channels[layer] for layer in layers if layer < len(channels)]

    def evaluation(self, size: int) -> int:
        """Operations of a U-Net pass for one phrase."""
        return unet_flops(self.unet, self.latent(size), TOKENS, inject=False)

    def text(self) -> int:
        return sum(text_flops(config, TOKENS, bool(k)) for k, config in enumerate(self.encoders))

    def encoding(self, size: int) -> int:
        return vae_flops(self.vae, size)[0]


def find_generator(source: str | None, key: str, own: Generator) -> Generator:
    """The generator of `baselines.backbone` or `refine.backbone`; the study's own where they are null."""
    return own if source is None else Generator(read_configs(source, key), source)


# ------------------------------------------------------------------------------------------------------------- memory
def plan_generators(params: Params, counts: Counts, attends: Generator, refines: Generator, gpu: Gpu) -> dict[str, Any]:
    """Weights and the peak beside them on the GPU of one job, for `baselines` and `refine`."""
    peaks: dict[str, tuple[Generator, Baselines | Refine, int]] = {
        "baselines": (attends, params.baselines, attention_bytes(params.baselines, attends, counts.attended["most_texts"])),
        "refine": (refines, params.refine, refinement_bytes(params.refine, refines)),
    }
    found = {}
    for phase, (generator, settings, peak) in peaks.items():
        weights = BYTES[settings.precision] * generator.parameters
        found[phase] = {
            "backbone": generator.origin,
            "parameters": generator.parameters,
            **{name: getattr(settings, name) for name in ("size", "batch", "precision")},
            "weights": weights,
            "activations": peak,
            "total": weights + peak,
            "fits": weights + peak < gpu.memory,
        }
    return found


def refinement_bytes(refine: Refine, generator: Generator) -> int:
    """Peak bytes beside weights while a block of masks is refined by G4Seg, its controls and its sensitivity."""
    latent, block = generator.latent(refine.size), refine.batch
    passing = generator_bytes(generator.unet, latent, TOKENS, block, refine.precision)
    control = meta_injection(block, refine.grid, TOKENS, refine.inject)
    injected = generator_bytes(generator.unet, latent, TOKENS, block, refine.precision, control)
    names = [G4SEG, *refine.controls, *refine.sensitivity.controls]
    used = [variant for name, variant in variants(refine).items() if name in names or "=" in name]
    moments = [_block_bytes(each, generator.widths(each.layers), passing, injected if each.alpha else passing) for each in used]
    return max(encoding_bytes(generator.vae, refine.size, refine.precision), *moments)


def _block_bytes(refine: Refine, widths: list[int], passing: int, injected: int) -> int:
    """The most that any moment of `g4seg._iterate` holds: features [B, N, C], distances [B, N, N], and a pass or what is
    computed from them.

    Args:
        widths: channels of `refine.layers`. passing, injected: peak of a pass without and with the masks.
    """
    if not refine.iterations:
        return 0
    cells, block = refine.grid**2, refine.batch
    distances, offsets = 4 * block * cells**2, 4 * cells**2
    levels = len(refine.timesteps) * refine.noises
    level = 4 * block * cells * sum(widths)
    features = level * levels
    # One level's features of the widest layer on the way: enlarged, in float32, without its mean.
    comparing = block * cells * max(widths, default=0) * (BYTES[refine.precision] + 8)
    moments = [features - level + passing, features + comparing, features + offsets + 3 * distances]
    generates, chooses = refine.generation > 0, bool(refine.levels and refine.alpha)
    if generates:
        before = (1 + (refine.iterations > 1 and refine.alpha > 0)) * distances + features + offsets
        moments += [before + features - level + injected, before + features + comparing, before + features + 3 * distances]
    held = features + offsets + (2 + generates) * distances
    moments.append(held + 2 * offsets)  # evidence of one phrase, should its confusion area be the whole picture
    if chooses:
        moments.append(held + injected)
    return max(moments)


def attention_bytes(baselines: Baselines, generator: Generator, texts: int) -> int:
    """Peak bytes beside weights while one image of at most `texts` phrases is attended to (`attend.Attended`)."""
    latent, grids = generator.latent(baselines.size), generator.grids(baselines.size)
    count = min(baselines.batch, texts)
    moments, held = [encoding_bytes(generator.vae, baselines.size, baselines.precision)], 0
    for recording in dict.fromkeys(recordings(baselines).values()):
        wanted = recorded_layers(baselines, grids, recording.own)
        store = AttentionStore(select=partial(_is_wanted, wanted))
        record = sum(4 * math.prod(grid) * (TOKENS if kind == "cross" else math.prod(grid)) for kind, grid in wanted)
        passing = generator_bytes(generator.unet, latent, TOKENS, count, baselines.precision, store)
        moments.append(held + (texts - count) * record + passing)
        if recording.inversion is not None:
            latents = (recording.inversion.steps + 4) * 4 * count * generator.vae["latent_channels"] * latent**2
            back = generator_bytes(generator.unet, latent, TOKENS, count, baselines.precision, gradient=True)
            moments.append(held + texts * record + latents + back)
        moments.append(held + (2 * texts + count) * record)  # the batches' maps, all of them in one, and the last sums
        held += texts * record
    return max(*moments, held + _segment_bytes(baselines, generator, grids, latent))


def _is_wanted(wanted: set[tuple[str, Grid]], call: AttentionCall) -> bool:
    return (call.kind, call.grid) in wanted


def _segment_bytes(baselines: Baselines, generator: Generator, grids: list[Grid], latent: int) -> int:
    """DiffSeg's pass of the empty prompt, and what it makes of all self-attention on the finest grid."""
    passing = generator_bytes(generator.unet, latent, TOKENS, 1, baselines.precision, AttentionStore(kinds=["self"]))
    maps = {grid: torch.empty(math.prod(grid), math.prod(grid), device="meta") for grid in grids}
    with LiveBytes([]) as live, torch.no_grad():
        every = aggregate(maps)
        divergence(every[anchor_indices(max(grids), baselines.diffseg.anchors)], every)
    return max(passing, live.peak + sum(item.nbytes for item in maps.values()))


# ---------------------------------------------------------------------------------------------------------- artifacts
def add_artifacts(
    add: Add, maps_bytes: Callable[[int, int], int], params: Params, counts: Counts, own: Generator, attends: Generator
) -> None:
    """Predictions and soft maps of the baselines and of what was refined.

    Args:
        maps_bytes: (N, side) -> bytes of a file of soft maps.
        own: what GS was fine-tuned from. attends: what the attention baselines ask.
    """
    exact, rows = "exact" if counts.exact else "follows the counts", counts.rows["test"] + counts.rows["class_phrases"]
    settings, grids = params.baselines, attends.grids(params.baselines.size)
    sides = {
        "cross_attention": max(grids)[0],
        "diffpng_cross": nearest_grid(grids, settings.diffpng.cross_side)[0],
        "diffpng_cross_self": nearest_grid(grids, settings.diffpng.self_side)[0],
    }
    assert sides.keys() == {name for name, method in METHODS.items() if method.chosen}
    made = [baseline for baseline in study_baselines(params) if baseline.family != "run"]
    folder = baselines_dir(params)
    add("baselines: predictions", counts.row_bytes * rows * len(made), "estimate", *folder.glob("*.parquet"))
    size = sum(maps_bytes(counts.rows[part], side) for side in sides.values() for part in ("test", "class_phrases"))
    add("baselines: soft maps", size, exact, *folder.glob("*.safetensors"))

    # Soft maps of class phrases, where the coarse ones have some: as large as the params say, else as those are.
    refine, count = params.refine, counts.refined["class_phrases"]
    main = params.sample.main.size
    sides |= {"gs": main if params.train.label == "vae" else own.latent(main), "discriminative": own.latent(main)}
    predictions, maps = 0.0, 0
    found: list[Path] = []
    for baseline in study_baselines(params):
        for refiner in refiners(params, baseline.name):
            predictions += counts.row_bytes * (count + counts.refined["phrases"])
            found += [refined_path(params, refiner, baseline.name, classes) for classes in (False, True)]
            if baseline.name in sides and not refiner.endswith("crf"):
                maps += maps_bytes(count, refine.maps or sides[baseline.name])
    add("refined: predictions", predictions, "estimate", *found)
    discrepancies = [
        discrepancy_path(params, baseline.name).with_suffix(".safetensors") for baseline in study_baselines(params)
    ]
    others = {*discrepancies, *network_dir(params).glob("*")}
    add(
        "refined: soft maps", maps, exact, *(path for path in refined_dir(params).glob("*/*.safetensors") if path not in others)
    )
    add("refined: maps of the figure", len(discrepancies) * maps_bytes(refine.pictures, refine.grid), "at most", *discrepancies)


# ------------------------------------------------------------------------------------------------------------- phases
def add_baseline_phases(add: Add, params: Params, counts: Counts, generator: Generator) -> None:
    """Passes, operations and hours of the attention baselines; recordings that methods share are made once."""
    settings, attended = params.baselines, counts.attended
    made: dict[Any, list[str]] = {}
    for method, recording in recordings(settings).items():
        made.setdefault(recording, []).append(method)
    parts, bounded = [], ""
    for recording, methods in made.items():
        chosen = any(METHODS[name].chosen for name in methods)
        images, texts = (attended[f"test_{kind}"] + chosen * attended[f"val_{kind}"] for kind in ("images", "texts"))
        passes, gradients = recording.passes()
        evaluations = texts * passes + (images * SEGMENT_PASSES if "diffseg" in methods else 0)
        bounded = ", at most" if recording.inversion is not None else ""
        parts.append((", ".join(methods) + bounded, evaluations, evaluations + texts * gradients * (BACKWARD - 1)))
    images, texts = (attended[f"test_{kind}"] + attended[f"val_{kind}"] for kind in ("images", "texts"))
    each, encoded = generator.evaluation(settings.size), images * generator.encoding(settings.size) + texts * generator.text()
    what = f"{texts:,} phrases of {images:,} images"
    total = sum(passed for *_, passed in parts) * each + encoded
    add("baselines", what, sum(count for _, count, _ in parts), total, settings.precision, "baselines")
    for name, evaluations, passed in parts:
        add("baselines", f"  {name}", evaluations, passed * each, settings.precision)


def add_refine_phases(add: Add, params: Params, counts: Counts, generator: Generator) -> None:
    """Passes, operations and hours of refinement; a mask that is empty or full takes none, so these are bounds."""
    refine, masks = params.refine, sum(counts.refined[part] for part in ("phrases", "class_phrases"))
    if "trained" in refine.controls:
        trained = refine.trained
        steps = trained.steps * trained.batch * _refiner_flops(trained.size) * (1 + BACKWARD)
        what = f"trained control: {trained.steps:,} steps of {trained.batch}, on the CPU"
        add("refine", what, 0, steps, None, "refine_train")
    own = generator.evaluation(refine.size)
    groups: dict[str, list[tuple[str, str]]] = {"G4Seg": [], "its controls": [], "its sensitivity": []}
    baselines = study_baselines(params)
    for baseline in baselines:
        for refiner in refiners(params, baseline.name):
            shared = refiner in refine.controls
            group = "G4Seg" if refiner == G4SEG else "its controls" if shared else "its sensitivity"
            groups[group].append((refiner, baseline.name))
    timing = _timing(params)
    rows = []
    for group, members in groups.items():
        evaluations, flops = 0, 0
        for refiner, _ in members:
            passes = 0 if refiner in MADE_WITH_G4SEG else refiner_passes(refine, refiner)
            evaluations += masks * passes
            if passes:  # a block encodes its images and embeds its phrases
                encoded = counts.refined["images"] + math.ceil(masks / refine.batch)
                flops += masks * (passes * own + generator.text()) + encoded * generator.encoding(refine.size)
        measured = [timing.get("/".join(member)) for member in members if member[0] != RANDOM]
        seconds = sum(item for item in measured if item is not None) if measured and None not in measured else None
        rows.append((group, len(members), evaluations, flops, seconds))
    what = f"at most {masks:,} masks of each of {len(baselines)} baselines"
    benchmarks = [f"refine.shard={shard}" for shard in range(refine.shards)]
    add("refine", what, sum(row[2] for row in rows), sum(row[3] for row in rows), refine.precision, *benchmarks)
    for group, times, evaluations, flops, seconds in rows:
        if flops:
            add("refine", f"  {group}, {times} times", evaluations, flops, refine.precision, seconds=seconds)


def _refiner_flops(size: int) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        RefinerNet()(torch.empty(1, 3, size, size), torch.empty(1, 1, size, size))
    return counter.get_total_flops()


def _timing(params: Params) -> dict[str, float]:
    """Seconds that each refiner of each baseline took, by `<refiner>/<baseline>`; empty before there are any."""
    path = refined_dir(params) / "manifest.json"
    return {name: item["seconds"] for name, item in read_json(path)["timing"].items()} if path.exists() else {}
