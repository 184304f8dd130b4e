"""Time of sampling compared with a plain diffusers loop; AR by number of evaluations; time per stage of a prediction."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image

from benchmarks.harness import (
    Effort,
    Row,
    Stopwatch,
    Study,
    evaluations_per_mask,
    interleaved,
    stage_modules,
    time_call,
    versus,
)
from genseg.artifacts.masks import compare, encode
from genseg.artifacts.resample import bilinear
from genseg.data.images import load_image
from genseg.diffusion.guidance import count_evaluations
from genseg.diffusion.pipeline import TAIL, GSPipeline
from genseg.diffusion.sampling import draw_noise, phrase_generator
from genseg.metrics.recall import average_recall
from genseg.models.backbone import TextEncoders
from genseg.models.device import DTYPES
from genseg.models.text import encode_phrases
from genseg.models.unet import run_unet
from genseg.models.vae import encode_images, image_tensor, vae_factor

POINTS = ((1, 1.0), (1, 2.0), (2, 1.0), (2, 2.0), (4, 1.0), (4, 2.0), (10, 2.0), (50, 7.5))
"""(steps, guidance scale)."""


@torch.no_grad()
def plain_loop(pipeline: GSPipeline, file: str, phrases: list[str], steps: int, guidance: float) -> np.ndarray:
    """Return the soft maps [N, h, w] of a plain diffusers loop.

    It takes one phrase at a time, encodes its image and text again, evaluates the conditional and the unconditional branch one
    after the other, and steps with diffusers' DDIM.
    """
    size, scale = pipeline.config.default_processing_resolution, pipeline.config.label_scale
    factor = scale if pipeline.config.prediction_type == "sample" else 1.0
    encoders = TextEncoders((pipeline.tokenizer, pipeline.tokenizer_2), (pipeline.text_encoder, pipeline.text_encoder_2))
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    maps = []
    for k, phrase in enumerate(phrases):
        image = load_image(file)
        latent = encode_images(pipeline.vae, image_tensor(image, size)[None])
        conditional = pipeline.adapter(encode_phrases(encoders, [phrase]))
        unconditional = pipeline.adapter.unconditional(1)
        shape = (pipeline.unet.config.out_channels, *latent.shape[-2:])
        x_t = draw_noise([phrase_generator(0, "image", "predict", k, size)], shape)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            output = run_unet(pipeline.unet, x_t, latent, t, conditional, (size, size))
            if guidance != 1:
                unconditional_output = run_unet(pipeline.unet, x_t, latent, t, unconditional, (size, size))
                output = unconditional_output + guidance * (output - unconditional_output)
            x_t = scheduler.step(output * factor, t, x_t).prev_sample
        soft = ((x_t / scale + 1) / 2).clamp(0, 1)
        F.interpolate(soft, size=(image.height, image.width), mode="bilinear") >= 0.5  # noqa: B015 - timed, result not needed
        maps.append(soft[0, 0].numpy())
    return np.stack(maps)


def sampling(study: Study, effort: Effort) -> list[Row]:
    """Masks of a narrative, seconds per mask: `GSPipeline` (ours), which encodes the image once and denoises all phrases and
    both branches of the guidance together, compared with a plain diffusers loop (reference)."""
    # 1. Load the model. Estimates are not clipped, since diffusers would still derive the noise from the unclipped estimate.
    pipeline, rows = study.pipeline(), study.narrative()
    pipeline.configure_sampling("trailing", clip_sample=False)
    file, phrases = rows["file_name"].iloc[0], rows["phrase"].tolist()
    sample = study.params.sample
    base, main = sample.base, sample.main
    evaluations, main_evaluations = count_evaluations(base), count_evaluations(main)

    def ours(steps: int, guidance: float) -> np.ndarray:
        return np.asarray(pipeline(load_image(file), phrases, steps, guidance, return_dict=False)[1])

    def plain(steps: int, guidance: float, count: int | None = None) -> np.ndarray:
        return plain_loop(pipeline, file, phrases[:count], steps, guidance)

    calls = {
        "ours": lambda: ours(base.num_inference_steps, base.guidance_scale),
        "plain": lambda: plain(base.num_inference_steps, base.guidance_scale),
        "ours, main": lambda: ours(main.num_inference_steps, main.guidance_scale),
        "plain, main": lambda: plain(main.num_inference_steps, main.guidance_scale),
    }
    comparisons = []
    for size in sorted({main.size, *sample.grid.sizes}):
        # 2. Warm up, and compare the maps. Our maps are clipped first: their tails represent values beyond the bounds.
        pipeline.register_to_config(default_processing_resolution=size)
        ours(1, main.guidance_scale)
        plain(1, main.guidance_scale, count=1)
        clipped = ((ours(2, base.guidance_scale) - TAIL) / (1 - 2 * TAIL)).clip(0, 1)
        difference = float(np.abs(clipped - plain(2, base.guidance_scale)).max())

        # 3. Measure.
        seconds = interleaved(calls, effort(3, 1))
        side, count = size // vae_factor(pipeline.vae), len(phrases)
        facts: dict[str, Any] = {"label": f"{side} x {side}", "phrases": count, "max_difference": difference}
        cases = [
            (f"{evaluations} vs. {evaluations} evaluations", "ours", "plain", 3.0 if side == 16 else None),
            (f"{main_evaluations} vs. {main_evaluations} evaluations", "ours, main", "plain, main", None),
            (
                f"{main_evaluations} (main) vs. {evaluations} evaluations",
                "ours, main",
                "plain",
                30.0 if size == main.size else None,
            ),
        ]
        for case, name, reference, wanted in cases:
            comparisons.append(versus(f"size {size}, {case}", seconds[name], seconds[reference], count, wanted, **facts))
    return comparisons


def accuracy(study: Study, effort: Effort) -> list[Row]:
    """AR (native protocol) by evaluations per mask. The phrases are from the validation split, because the curve is used to
    choose an operating point. Spacing, clipping and threshold are those of the study."""
    # 1. Load the model, images, phrases and ground truth.
    sample = study.params.sample
    pipeline = study.pipeline().to(DTYPES[sample.precision])
    pipeline.configure_sampling(sample.timestep_spacing, sample.clip_sample)
    parts = study.part("val", effort(48, 6))
    images = [load_image(rows["file_name"].iloc[0]) for rows in parts]
    phrases = [rows["phrase"].tolist() for rows in parts]
    truths = [code for rows in parts for code in rows["mask"]]

    # 2. Segment and score at every point.
    points = []
    for steps, guidance in POINTS[: effort(len(POINTS), 3)]:
        masks: list[Any] = []

        def segment(steps: int = steps, guidance: float = guidance, masks: list[Any] = masks) -> None:
            image_masks, *_ = pipeline(images, phrases, steps, guidance, threshold=sample.threshold, return_dict=False)
            masks.extend(mask for part in image_masks for mask in part)

        [seconds] = time_call(segment, 1)
        truth, predicted, common = compare(truths, [encode(mask) for mask in masks])
        union = truth.foreground + predicted.foreground - common
        iou = np.divide(common, union, out=np.zeros(len(union)), where=union > 0)
        points.append(
            {
                "steps": steps,
                "guidance": guidance,
                "evaluations": evaluations_per_mask(steps, guidance),
                "phrases": len(masks),
                "ar": average_recall(iou),
                "masks_per_s": len(masks) / seconds,
            }
        )
    return points


def stage_shares(
    pipeline: GSPipeline, images: list[Image.Image], phrases: list[list[str]], steps: int, guidance: float, batch: int = 16
) -> Row:
    """Return the time of one call of the pipeline, and the share of each stage. `rest`: sampling loop, noise, transfers."""
    watch = Stopwatch()
    outputs: list[Any] = []
    with watch.inside(stage_modules(pipeline)):
        [total] = time_call(lambda: outputs.append(pipeline(images, phrases, steps, guidance, batch_size=batch)), 1)

    def read_out() -> None:
        for image, soft in zip(images, outputs[0].maps, strict=True):
            bilinear(soft, image.height, image.width) >= 0.5  # noqa: B015 - timed, result not needed

    [watch.seconds["read-out"]] = time_call(read_out, 1)
    watch.seconds["rest"] = max(0.0, total - sum(watch.seconds.values()))
    masks = sum(map(len, phrases))
    shares = {name: seconds / total for name, seconds in watch.seconds.items()}
    return {"evaluations": evaluations_per_mask(steps, guidance), "masks": masks, "s_per_mask": total / masks, **shares}


def shares(study: Study, effort: Effort) -> list[Row]:
    """Shares of text encoders, VAE, U-Net and read-out in the sampling time of one narrative, at the main and base points."""
    rows, sample = study.narrative(), study.params.sample
    images, phrases = [load_image(rows["file_name"].iloc[0])], [rows["phrase"].tolist()]
    pipeline = study.pipeline()
    pipeline(images, phrases, 1, 1.0)  # warm-up
    medians = []
    for point in (sample.main, sample.base):
        steps, guidance = point.num_inference_steps, point.guidance_scale
        repetitions = [stage_shares(pipeline, images, phrases, steps, guidance) for _ in range(effort(3, 1))]
        medians.append({name: statistics.median(row[name] for row in repetitions) for name in repetitions[0]})
    return medians
