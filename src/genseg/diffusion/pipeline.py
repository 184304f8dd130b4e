"""`GSPipeline`: image + phrases -> masks, as diffusers users expect it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import transformers.utils.logging
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.utils import BaseOutput, logging
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from genseg.artifacts.resample import bilinear
from genseg.data.images import to_rgb
from genseg.diffusion.sampling import Observe, draw_noise, phrase_generator, sample_labels
from genseg.diffusion.schedule import sampled
from genseg.errors import UserError
from genseg.models.adapter import TextAdapter
from genseg.models.attention import use_injected_attention
from genseg.models.backbone import TextEncoders
from genseg.models.text import TextEmbedding, encode_phrases
from genseg.models.unet import run_unet
from genseg.models.vae import decode_latents, encode_images, image_tensor
from genseg.params import Interval, Rule

Picture: TypeAlias = Image.Image | NDArray[Any] | torch.Tensor
"""PIL image of any mode; array [H, W, 3] or [H, W]; tensor [3, H, W] or [1, H, W]. Whole numbers are 0..255, floats 0..1."""
TAIL = 0.05
"""Of [0, 1], at either end: what soft labels keep for labels beyond those that training knows."""
DISCRIMINATIVE_TIMESTEP = 999
"""The one-pass control is the same U-Net asked once, at the last timestep, with an all-zero label."""


@dataclass
class GSOutput(BaseOutput):
    """Masks of one image; of a list of images, a list of them in each field.

    masks: [N, H, W] bool at the image's own size: array, tensor ("pt"), or N images of mode L, 0 and 255 ("pil").
    maps: [N, h, w] float32 in [0, 1], soft labels at latent size (VAE labels: at the network's image size): array, or tensor
    ("pt").
    """

    masks: Any
    maps: Any


class GSPipeline(DiffusionPipeline):
    """Generative segmentation: denoise one label map per phrase, conditioned on the image's latent and the phrase.

    Args:
        prediction: what the U-Net answers: "noise", "v", "x0", or "logits" for the discriminative control.
        label: what is denoised: "mask", a 1-channel map at latent size, or "vae", the VAE's latent of the mask as a grey image.
        label_scale: b; masks lie in [-b, b], a VAE's latents have b as their unit.
        image_size: side the image is resized to.
        steps, guidance: defaults that belong to this checkpoint.

    Example:
        >>> pipe = GSPipeline.from_pretrained("results/mini/model", dtype=torch.bfloat16).to("cuda")
        >>> output = pipe(Image.open("scene.jpg"), ["the grass", "the small star"])
        >>> output.masks.shape  # (2, H, W), bool
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->vae->unet"
    # Small, and its learned nulls are read outside of its forward pass, which is what the hooks watch.
    _exclude_from_cpu_offload = ["adapter"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        adapter: TextAdapter,
        scheduler: SchedulerMixin,
        prediction: str = "v",
        label_scale: float = 1.0,
        image_size: int = 1024,
        steps: int = 50,
        guidance: float = 7.5,
        label: str = "mask",
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            adapter=adapter,
            scheduler=scheduler,
        )
        self.register_to_config(
            prediction=prediction,
            label_scale=label_scale,
            image_size=image_size,
            steps=steps,
            guidance=guidance,
            label=label,
        )
        use_injected_attention(unet)

    def sample_by(self, spacing: Literal["trailing", "leading"], clip_x_0: bool) -> None:
        """Choose the timesteps' spacing, and whether every step's estimate of x_0 is bounded by the label scale."""
        clip = self.config.label_scale if clip_x_0 else None
        self.register_modules(scheduler=sampled(self.scheduler, spacing, clip))

    @torch.no_grad()
    def __call__(
        self,
        image: Picture | Sequence[Picture],
        phrases: str | Sequence[str] | Sequence[Sequence[str]],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
        rule: Rule = "ddim",
        guidance_interval: Interval | None = None,
        ensemble: int = 1,
        threshold: float = 0.5,
        batch_size: int = 16,
        output_type: Literal["np", "pt", "pil"] = "np",
        return_dict: bool = True,
    ) -> GSOutput | tuple[Any, Any]:
        """Segment an image by each of its phrases; the image is encoded once for all of them.

        Args:
            image: one image, or a list of images (or a batch, [B, ...]).
            phrases: one phrase or N; for a list of images, a list of phrases for each.
            num_inference_steps, guidance_scale: the checkpoint's own when None; guidance 1 halves the evaluations.
            seed: of the initial noise. A phrase's mask depends on it and on the phrase's position among those of its
                image, not on `batch_size` or on other images.
            generator: draws the seed instead.
            rule: of the steps: "ddim", "ddpm", or "dpmpp", DPM-Solver++(2M).
            guidance_interval: part of the schedule that is guided, (from, to) with 1 pure noise; None is all of it.
            ensemble: samples of different seeds whose maps are averaged.
            threshold: of the soft map after bilinear up-sampling.
            batch_size: phrases denoised together, of whichever images.

        Returns:
            `GSOutput`, or (masks, maps) with `return_dict=False`.

        Raises:
            ValueError: an argument is not as described, or the network's answer is not finite.
        """
        # 1. Inputs: single ones become lists of one.
        single = isinstance(image, Image.Image) or (not isinstance(image, Sequence) and image.ndim < 4)
        given: Any = [image] if single else image
        pictures = [_to_picture(item) for item in given]
        texts_of: Any = [[phrases] if isinstance(phrases, str) else phrases] if single else phrases
        steps = self.config.steps if num_inference_steps is None else num_inference_steps
        guidance = self.config.guidance if guidance_scale is None else guidance_scale
        self._check_inputs(pictures, texts_of, steps, guidance, batch_size, output_type)
        self._check_rule(rule, guidance_interval, ensemble)
        if generator is not None:
            seed = int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))

        # 2. Every image and every phrase is encoded once.
        size, device = self.config.image_size, self._execution_device
        encoders = TextEncoders((self.tokenizer, self.tokenizer_2), (self.text_encoder, self.text_encoder_2))
        embeddings = encode_phrases(encoders, [phrase for texts in texts_of for phrase in texts], device=device)
        latents = [encode_images(self.vae, image_tensor(picture, size, device)[None])[0] for picture in pictures]

        # 3. Labels are denoised in batches of phrases. (B, h, w)
        places = [(number, k) for number, texts in enumerate(texts_of) for k in range(len(texts))]
        rounds = range(0, len(places), batch_size)
        evaluations = 1 if self.config.prediction == "logits" else steps
        maps = []
        with self.progress_bar(total=len(rounds) * evaluations) as bar:
            for start in rounds:
                part = places[start : start + batch_size]
                soft = self.label_maps(
                    torch.stack([latents[number] for number, _ in part]),
                    embeddings[start : start + batch_size],
                    [("image", "predict", k) for _, k in part],
                    size,
                    steps,
                    guidance,
                    seed,
                    observe=lambda t, x_t, x_0: bar.update(),
                    rule=rule,
                    interval=guidance_interval,
                    ensemble=ensemble,
                )
                if self.config.prediction == "logits":
                    bar.update()
                maps.append(soft.float().cpu())
        soft_maps = torch.cat(maps).numpy()
        self.maybe_free_model_hooks()
        if not np.isfinite(soft_maps).all():
            raise ValueError(f"the U-Net's answer is not finite in {self.unet.dtype}; use torch.bfloat16 or torch.float32")

        # 4. Read-out at each image's own size. (N, H, W)
        found_masks, found_maps, start = [], [], 0
        for picture, texts in zip(pictures, texts_of, strict=True):
            found_maps.append(soft_maps[start : start + len(texts)])
            large = (bilinear(row[None], picture.height, picture.width)[0] for row in found_maps[-1])
            found_masks.append(np.stack([row >= threshold for row in large]))
            start += len(texts)
        masks: Any = [_as_type(item, output_type) for item in found_masks]
        labels: Any = [torch.from_numpy(item) if output_type == "pt" else item for item in found_maps]
        if single:
            masks, labels = masks[0], labels[0]
        return GSOutput(masks=masks, maps=labels) if return_dict else (masks, labels)

    def _check_inputs(
        self, pictures: list[Image.Image], texts: Any, steps: int, guidance: float, batch_size: int, output_type: str
    ) -> None:
        if len(texts) != len(pictures) or not all(isinstance(part, Sequence) and not isinstance(part, str) for part in texts):
            raise ValueError(f"{len(pictures)} images need as many lists of phrases, one list an image")
        if not pictures or not all(part and all(isinstance(text, str) and text.strip() for text in part) for part in texts):
            raise ValueError("phrases: every image needs at least one, and none may be empty")
        if steps < 1 or guidance < 1 or batch_size < 1:
            raise ValueError("num_inference_steps, guidance_scale and batch_size must be at least 1")
        if output_type not in ("np", "pt", "pil"):
            raise ValueError(f"output_type {output_type!r}: must be np, pt or pil")
        if not isinstance(self.scheduler, DDIMScheduler):
            raise ValueError(f"{type(self.scheduler).__name__}: the sampler takes steps of its own over a DDIMScheduler only")

    def _check_rule(self, rule: str, interval: Interval | None, ensemble: int) -> None:
        if rule not in get_args(Rule):
            raise ValueError(f"rule {rule!r}: must be one of {', '.join(get_args(Rule))}")
        if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"guidance_interval {interval}: must ascend and lie between 0 and 1")
        if ensemble < 1:
            raise ValueError("ensemble must be at least 1")

    @torch.no_grad()
    def label_maps(
        self,
        image_latents: torch.Tensor,
        texts: list[TextEmbedding],
        keys: Sequence[tuple[object, object, object]],
        size: int,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        observe: Observe | None = None,
        rule: Rule = "ddim",
        interval: Interval | None = None,
        ensemble: int = 1,
    ) -> torch.Tensor:
        """Soft label maps [B, h, w] in [0, 1] for B image latents [B, 4, h, w] and phrases; [B, H, W] with VAE labels.

        Args:
            keys: (image_id, narrative_id, phrase_id) of each phrase: all randomness derives from them, `size` and `seed`.
            observe: see `diffusion.sampling.Observe`; sees the first sample of an ensemble.
            rule, interval: see `diffusion.sampling.sample_labels`.
            ensemble: samples of different seeds whose maps are averaged.
        """
        unet, device = self.unet, image_latents.device
        dtype = unet.dtype
        condition = self.adapter(texts)
        latents = image_latents.to(dtype)
        shape = (unet.config.out_channels, *latents.shape[-2:])
        if self.config.prediction == "logits":
            t = torch.full((len(texts),), DISCRIMINATIVE_TIMESTEP, device=device)
            zeros = latents.new_zeros((len(texts), *shape))
            return run_unet(unet, zeros, latents, t, condition, (size, size)).float().sigmoid()[:, 0]
        guidance = self.config.guidance if guidance is None else guidance
        both = condition + self.adapter.unconditional(len(texts)) if guidance != 1 else None

        def denoise(x_t: torch.Tensor, t: torch.Tensor, guided: bool) -> torch.Tensor:
            if guided:
                assert both is not None
                return run_unet(unet, x_t.repeat(2, 1, 1, 1).to(dtype), latents.repeat(2, 1, 1, 1), t, both, (size, size))
            return run_unet(unet, x_t.to(dtype), latents, t, condition, (size, size))

        samples = []
        for member in range(ensemble):
            generators = [phrase_generator(seed, *key, size, member) for key in keys]
            x_t = draw_noise(generators, shape).to(device)
            x_0 = sample_labels(
                denoise,
                self.scheduler,
                x_t,
                steps or self.config.steps,
                guidance,
                generators,
                self.config.label_scale,
                None if member else observe,
                rule,
                interval,
            )
            samples.append(self.soft_labels(x_0))
        return torch.stack(samples).mean(0)

    def soft_labels(self, x_0: torch.Tensor) -> torch.Tensor:
        """x_0 -> soft labels in [0, 1]: of masks [B, 1, h, w] in about [-b, b] the map [B, h, w]; of VAE latents [B, C, h, w]
        the decoded picture's mean over its colours, [B, H, W]. See `soften`."""
        labels = x_0 / self.config.label_scale
        pictures = decode_latents(self.vae, labels).float() if self.config.label == "vae" else labels
        return soften(pictures.mean(1))


def soften(labels: torch.Tensor) -> torch.Tensor:
    """Labels, -1 outside and 1 inside but for the network's error, to soft labels in [0, 1], strictly increasing.

    The paper's (x_0 + 1) / 2 would have to be clipped, and a seventh of all pixels would tie at 1 for more than one class.
    So it is drawn together to [TAIL, 1 - TAIL], and what lies beyond comes nearer to 0 or 1 exponentially, without a kink.
    """
    room, inside = (0.5 - TAIL) / TAIL, labels.clamp(-1, 1)
    tail = TAIL * (1 - torch.exp(-room * (labels - inside).abs()))
    return 0.5 + (0.5 - TAIL) * inside + torch.where(labels < 0, -tail, tail)


def _to_picture(image: Picture) -> Image.Image:
    """8-bit RGB of any picture that the pipeline takes."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or len(image) not in (1, 3):
            raise ValueError(f"a tensor of an image must be [3, H, W] or [1, H, W]; got {list(image.shape)}")
        image = (image.float() if image.is_floating_point() else image).detach().permute(1, 2, 0).cpu().numpy()
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] == 3)):
        raise ValueError(f"an array of an image must be [H, W, 3] or [H, W]; got {list(pixels.shape)}")
    limit = 1 if np.issubdtype(pixels.dtype, np.floating) else 255
    if not (pixels.min() >= 0 and pixels.max() <= limit):
        raise ValueError(f"an image of {pixels.dtype} must lie in 0..{limit}; got {pixels.min()}..{pixels.max()}")
    return to_rgb(Image.fromarray(np.rint(pixels * (255 / limit)).astype(np.uint8)))


def _as_type(masks: NDArray[np.bool_], output_type: str) -> Any:
    if output_type == "pil":
        return [Image.fromarray(mask.astype(np.uint8) * 255) for mask in masks]
    return torch.from_numpy(masks) if output_type == "pt" else masks


def load_pipeline(folder: str | Path, dtype: torch.dtype = torch.float32) -> GSPipeline:
    """Load a saved model without the libraries' progress bars.

    Raises:
        UserError: the folder holds no complete `GSPipeline`.
    """
    logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        return GSPipeline.from_pretrained(folder, dtype=dtype)
    except Exception as error:  # diffusers, safetensors and json raise a dozen kinds
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: no readable GS model ({detail}); run the phase train, or name another folder") from error
