"""Masks of a narrative against a plain diffusers loop; AR against evaluations; what a prediction spends its time on."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image

from benchmarks.harness import Effort, Row, Stopwatch, Study, interleaved, stage_modules, versus
from genseg.artifacts.masks import compare, encode
from genseg.artifacts.resample import bilinear
from genseg.data.images import load_image
from genseg.diffusion.pipeline import TAIL, GSPipeline
from genseg.diffusion.sampling import draw_noise, phrase_generator
from genseg.metrics.recall import average_recall
from genseg.models.backbone import TextEncoders
from genseg.models.device import DTYPES
from genseg.models.text import encode_phrases
from genseg.models.unet import run_unet
from genseg.models.vae import encode_images, image_tensor, vae_factor


@torch.no_grad()
def plain_loop(pipeline: GSPipeline, picture: str, phrases: list[str], steps: int, guidance: float) -> np.ndarray:
    """Soft maps [N, h, w] as a script around diffusers makes them: one phrase at a time, its image and text encoded anew,
    the conditional and the unconditional pass one after the other, diffusers' own DDIM step."""
    size, scale = pipeline.config.image_size, pipeline.config.label_scale
    encoders = TextEncoders((pipeline.tokenizer, pipeline.tokenizer_2), (pipeline.text_encoder, pipeline.text_encoder_2))
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    found = []
    for k, phrase in enumerate(phrases):
        image = load_image(picture)
        latent = encode_images(pipeline.vae, image_tensor(image, size)[None])
        conditional = pipeline.adapter(encode_phrases(encoders, [phrase]))
        unconditional = pipeline.adapter.unconditional(1)
        shape = (pipeline.unet.config.out_channels, *latent.shape[-2:])
        x_t = draw_noise([phrase_generator(0, "image", "predict", k, size)], shape)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            answer = run_unet(pipeline.unet, x_t, latent, t, conditional, (size, size))
            if guidance != 1:
                other = run_unet(pipeline.unet, x_t, latent, t, unconditional, (size, size))
                answer = other + guidance * (answer - other)
            x_t = scheduler.step(answer * scale if pipeline.config.prediction == "x0" else answer, t, x_t).prev_sample
        soft = ((x_t / scale + 1) / 2).clamp(0, 1)
        F.interpolate(soft, size=(image.height, image.width), mode="bilinear") >= 0.5  # noqa: B015 - its time counts
        found.append(soft[0, 0].numpy())
    return np.stack(found)


def sampling(study: Study, effort: Effort) -> list[Row]:
    """A narrative's masks, seconds per mask: ours through `GSPipeline`, which encodes the image once and denoises all phrases
    and both branches of the guidance together, against a plain diffusers loop of the base cell."""
    pipeline, rows = study.pipeline(), study.narrative()
    pipeline.sample_by("trailing", clip_x_0=False)  # diffusers keeps the noise of the estimate before it is clipped
    picture, phrases = rows["file_name"].iloc[0], rows["phrase"].tolist()
    sample = study.params.sample
    base, main, repeats = sample.base, sample.main, effort(3, 1)
    factor = vae_factor(pipeline.vae)
    evaluations, default = base.evaluations, main.evaluations
    found = []
    for size in sorted({main.size, *sample.grid.sizes}):
        pipeline.register_to_config(image_size=size)

        def ours(steps: int, guidance: float) -> np.ndarray:
            return np.asarray(pipeline(load_image(picture), phrases, steps, guidance, return_dict=False)[1])

        calls = {
            "equal": lambda: ours(base.steps, base.guidance),
            "plain": lambda: plain_loop(pipeline, picture, phrases, base.steps, base.guidance),
            "default": lambda: ours(main.steps, main.guidance),
            "plain default": lambda: plain_loop(pipeline, picture, phrases, main.steps, main.guidance),
        }
        ours(1, main.guidance), plain_loop(pipeline, picture, phrases[:1], 1, main.guidance)  # warm-up
        clipped = ((ours(2, base.guidance) - TAIL) / (1 - 2 * TAIL)).clip(0, 1)  # ours keep what lies beyond the bounds
        difference = np.abs(clipped - plain_loop(pipeline, picture, phrases, 2, base.guidance)).max()
        seconds = interleaved(calls, repeats)
        side = size // factor
        facts: dict[str, Any] = {"label": f"{side} x {side}", "phrases": len(phrases), "max_difference": float(difference)}
        count = len(phrases)
        wanted = 3.0 if side == 16 else None
        equal, plain = seconds["equal"], seconds["plain"]
        found.append(
            versus(f"size {size}, {evaluations} against {evaluations} evaluations", equal, plain, count, wanted, **facts)
        )
        fast, slow = seconds["default"], seconds["plain default"]
        found.append(versus(f"size {size}, {default} against {default} evaluations", fast, slow, count, **facts))
        wanted = 30.0 if size == main.size else None
        case = f"size {size}, our default, {default}, against {evaluations} evaluations"
        found.append(versus(case, fast, plain, count, wanted, **facts))
    return found


POINTS = ((1, 1.0), (1, 2.0), (2, 1.0), (2, 2.0), (4, 1.0), (4, 2.0), (10, 2.0), (50, 7.5))
"""(steps, guidance)."""


def accuracy(study: Study, effort: Effort) -> list[Row]:
    """AR (native protocol) on phrases of val against network evaluations per mask; val, because such a curve is there to choose
    an operating point by. Sampled and read out as the study's params say."""
    sample = study.params.sample
    pipeline = study.pipeline().to(DTYPES[sample.precision])
    pipeline.sample_by(sample.spacing, sample.clip_x_0)
    parts = study.part("val", effort(48, 6))
    images = [load_image(rows["file_name"].iloc[0]) for rows in parts]
    phrases = [rows["phrase"].tolist() for rows in parts]
    truths = [code for rows in parts for code in rows["mask"]]
    found = []
    for steps, guidance in POINTS[: effort(len(POINTS), 3)]:
        masks: list[Any] = []

        def segment(steps: int = steps, guidance: float = guidance, masks: list[Any] = masks) -> None:
            found_masks, _ = pipeline(images, phrases, steps, guidance, threshold=sample.threshold, return_dict=False)
            masks.extend(mask for part in found_masks for mask in part)

        (seconds,) = interleaved({"": segment}, 1)[""]
        truth, predicted, common = compare(truths, [encode(mask) for mask in masks])
        union = truth.foreground + predicted.foreground - common
        iou = np.divide(common, union, out=np.zeros(len(union)), where=union > 0)
        evaluations = steps * (1 if guidance == 1 else 2)
        found.append(
            {
                "steps": steps,
                "guidance": guidance,
                "evaluations": evaluations,
                "phrases": len(masks),
                "ar": average_recall(iou),
                "masks_per_s": len(masks) / seconds,
            }
        )
    return found


def stage_shares(
    pipeline: GSPipeline, images: list[Image.Image], phrases: list[list[str]], steps: int, guidance: float, batch: int = 16
) -> Row:
    """Shares of the time of one call of the pipeline; `rest` is the loop around the U-Net, noise, transfers."""
    watch = Stopwatch()
    outputs: list[Any] = []
    with watch.inside(stage_modules(pipeline)):
        (total,) = interleaved({"": lambda: outputs.append(pipeline(images, phrases, steps, guidance, batch_size=batch))}, 1)[
            ""
        ]

    def read_out() -> None:
        for image, soft in zip(images, outputs[0].maps, strict=True):
            bilinear(soft, image.height, image.width) >= 0.5  # noqa: B015 - its time counts

    (watch.seconds["read-out"],) = interleaved({"": read_out}, 1)[""]
    watch.seconds["rest"] = max(0.0, total - sum(watch.seconds.values()))
    count = sum(map(len, phrases))
    shares = {name: seconds / total for name, seconds in watch.seconds.items()}
    return {"evaluations": steps * (1 if guidance == 1 else 2), "masks": count, "s_per_mask": total / count, **shares}


def shares(study: Study, effort: Effort) -> list[Row]:
    """Shares of VAE, text, U-Net and read-out in one narrative's prediction, at our default and at the base cell."""
    rows, sample = study.narrative(), study.params.sample
    images, phrases = [load_image(rows["file_name"].iloc[0])], [rows["phrase"].tolist()]
    pipeline = study.pipeline()
    pipeline(images, phrases, 1, 1.0)  # warm-up
    found = []
    for cell in (sample.main, sample.base):
        some = [stage_shares(pipeline, images, phrases, cell.steps, cell.guidance) for _ in range(effort(3, 1))]
        found.append({name: statistics.median(row[name] for row in some) for name in some[0]})
    return found
