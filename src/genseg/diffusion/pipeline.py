"""`GSPipeline`: image and phrases to masks, with the interface of a diffusers pipeline."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
from genseg.diffusion.objectives import with_sampling
from genseg.diffusion.sampling import Observe, OnStepEnd, draw_noise, phrase_generator, sample_labels
from genseg.errors import UserError
from genseg.models.adapter import TextAdapter
from genseg.models.attention import use_injected_attention
from genseg.models.backbone import TextEncoders
from genseg.models.device import DTYPES
from genseg.models.text import TextEmbedding, encode_phrases
from genseg.models.unet import run_unet
from genseg.models.vae import decode_latents, encode_images, image_tensor
from genseg.params.base import Precision
from genseg.params.sample import GuidanceInterval, OperatingPoint, Sample, SamplerName, TimestepSpacing

ImageInput: TypeAlias = Image.Image | NDArray[Any] | torch.Tensor
"""PIL image of any mode; array [H, W, 3] or [H, W]; tensor [3, H, W] or [1, H, W]. Integers are 0..255, floats 0..1."""
TAIL = 0.05
"""Width of the range at each end of [0, 1] that represents labels below -1 or above 1 (see `soften`)."""
DISCRIMINATIVE_TIMESTEP = 999
"""Timestep at which the discriminative control is evaluated; its noisy label is zero."""


@dataclass
class GSOutput(BaseOutput):
    """Masks of one image; for a list of images, each field is a list with one entry per image.

    Attributes:
        masks: [N, H, W] bool at the image's own size: array, tensor ("pt"), or N PIL images of mode L with 0 and 255 ("pil").
        maps: soft labels [N, h, w] float32 in [0, 1] at latent size (VAE labels: at processing size): array or "pt" tensor.
    """

    masks: Any
    maps: Any


class GSPipeline(DiffusionPipeline):
    """Generative segmentation: denoise one label map per phrase, conditioned on the image latent and the phrase.

    Args:
        prediction_type: the U-Net's output: "epsilon", "v_prediction", "sample", or "logits" for the discriminative control.
        label_scale: b. Masks are scaled to [-b, b]; VAE latents are multiplied by b.
        label: what is denoised: "mask", a 1-channel map at latent size, or "vae", the VAE latent of the mask as a grey image.
        default_processing_resolution: side that images are resized to.
        default_denoising_steps, default_guidance_scale: defaults of `__call__` for this checkpoint.

    Example:
        >>> pipe = GSPipeline.from_pretrained("results/mini/model/gs", dtype=torch.bfloat16).to("cuda")
        >>> output = pipe(Image.open("scene.jpg"), ["the grass", "the small star"])
        >>> output.masks.shape  # (2, H, W), bool
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->vae->unet"
    # The adapter is small, and its null embeddings are read outside its forward pass, which offload hooks do not see.
    _exclude_from_cpu_offload = ["adapter"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

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
        prediction_type: str = "v_prediction",
        label_scale: float = 1.0,
        label: str = "mask",
        default_processing_resolution: int = 1024,
        default_denoising_steps: int = 50,
        default_guidance_scale: float = 7.5,
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
            prediction_type=prediction_type,
            label_scale=label_scale,
            label=label,
            default_processing_resolution=default_processing_resolution,
            default_denoising_steps=default_denoising_steps,
            default_guidance_scale=default_guidance_scale,
        )
        use_injected_attention(unet)

    def configure_sampling(self, timestep_spacing: TimestepSpacing, clip_sample: bool) -> None:
        """Set the spacing of the timesteps and whether estimates of x_0 are clipped to the label scale."""
        clip_range = self.config.label_scale if clip_sample else None
        self.register_modules(scheduler=with_sampling(self.scheduler, timestep_spacing, clip_range))

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput],
        phrases: str | Sequence[str] | Sequence[Sequence[str]],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: GuidanceInterval | None = None,
        sampler: SamplerName = "ddim",
        ensemble_size: int = 1,
        mirror: bool = False,
        threshold: float = 0.5,
        seed: int = 0,
        generator: torch.Generator | None = None,
        batch_size: int = 16,
        output_type: Literal["np", "pt", "pil"] = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> GSOutput | tuple[Any, Any]:
        """Segment an image by each of its phrases. The image is encoded once.

        Args:
            image: one image, a list of images, or a batch [B, ...].
            phrases: one phrase or N phrases; for several images, one list of phrases per image.
            num_inference_steps, guidance_scale: None for the checkpoint's defaults. A guidance scale of 1 disables guidance,
                which halves the number of evaluations.
            guidance_interval: part of the schedule with guidance, (from, to), where 1 is pure noise; None: all of it.
            sampler: update rule, "ddim", "ddpm", "dpmpp" (DPM-Solver++(2M)) or "mean" (of all estimates, with fresh noise).
            ensemble_size: number of samples with different seeds whose maps are averaged.
            mirror: whether every second sample is that of the mirrored image, mirrored back. Not for phrases that say left or
                right.
            threshold: minimum value of a foreground pixel in the bilinearly up-sampled soft map.
            seed: seed of the initial noise. A phrase's mask depends on it and on the phrase's position in the list of its
                image, not on `batch_size` or other images.
            generator: if given, `seed` is drawn from it.
            batch_size: number of phrases, of any images, that are denoised at once.
            output_type: "np", "pt" or "pil" (see `GSOutput`).
            callback_on_step_end: called after each step of each batch as `callback(pipeline, step, timestep, callback_kwargs)`.
                `callback_kwargs["latents"]` are the noisy labels [B, K, h, w]; sampling continues from the returned labels.

        Returns:
            `GSOutput`, or (masks, maps) with `return_dict=False`.

        Raises:
            ValueError: an argument is invalid, or the network output is not finite.
        """
        # 1. Check the inputs; a single image becomes a list of one.
        is_single = isinstance(image, Image.Image) or (not isinstance(image, Sequence) and image.ndim < 4)
        images: Any = [image] if is_single else image
        pictures = [_to_picture(item) for item in images]
        phrase_lists: Any = [[phrases] if isinstance(phrases, str) else phrases] if is_single else phrases
        self._check_inputs(pictures, phrase_lists, batch_size, output_type, callback_on_step_end_tensor_inputs)
        point = self._operating_point(num_inference_steps, guidance_scale, guidance_interval, sampler, ensemble_size, mirror)
        if generator is not None:
            seed = int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))

        # 2. Encode every image and every phrase once.
        device = self._execution_device
        encoders = TextEncoders((self.tokenizer, self.tokenizer_2), (self.text_encoder, self.text_encoder_2))
        embeddings = encode_phrases(encoders, [phrase for texts in phrase_lists for phrase in texts], device=device)
        latents = [encode_images(self.vae, image_tensor(picture, point.size, device)[None])[0] for picture in pictures]

        # 3. Denoise the labels in batches of phrases. (B, h, w)
        positions = [(number, k) for number, texts in enumerate(phrase_lists) for k in range(len(texts))]
        starts = range(0, len(positions), batch_size)
        is_discriminative = self.config.prediction_type == "logits"

        def on_step_end(step: int, t: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
            assert callback_on_step_end is not None
            return callback_on_step_end(self, step, t, {"latents": x_t}).pop("latents", x_t)

        batches = []
        with self.progress_bar(total=len(starts) * (1 if is_discriminative else point.num_inference_steps)) as bar:
            for start in starts:
                batch = positions[start : start + batch_size]
                soft = self.label_maps(
                    torch.stack([latents[number] for number, _ in batch]),
                    embeddings[start : start + batch_size],
                    [("image", "predict", k) for _, k in batch],
                    point,
                    seed,
                    observe=lambda t, x_t, x_0: bar.update(),
                    on_step_end=None if callback_on_step_end is None else on_step_end,
                )
                if is_discriminative:
                    bar.update()
                batches.append(soft.float().cpu())
        soft_maps = torch.cat(batches).numpy()
        self.maybe_free_model_hooks()
        if not np.isfinite(soft_maps).all():
            raise ValueError(f"the network output is not finite in {self.unet.dtype}; use torch.bfloat16 or torch.float32")

        # 4. Read out the masks at each image's own size. (N, H, W)
        mask_lists, map_lists, start = [], [], 0
        for picture, texts in zip(pictures, phrase_lists, strict=True):
            maps = soft_maps[start : start + len(texts)]
            upsampled = (bilinear(soft[None], picture.height, picture.width)[0] for soft in maps)
            mask_lists.append(_as_type(np.stack([soft >= threshold for soft in upsampled]), output_type))
            map_lists.append(torch.from_numpy(maps) if output_type == "pt" else maps)
            start += len(texts)
        output = GSOutput(masks=mask_lists[0], maps=map_lists[0]) if is_single else GSOutput(masks=mask_lists, maps=map_lists)
        return output if return_dict else (output.masks, output.maps)

    def _check_inputs(
        self, pictures: list[Image.Image], phrase_lists: Any, batch_size: int, output_type: str, tensor_inputs: Sequence[str]
    ) -> None:
        is_list = [isinstance(texts, Sequence) and not isinstance(texts, str) for texts in phrase_lists]
        if len(phrase_lists) != len(pictures) or not all(is_list):
            raise ValueError(f"phrases: expected {len(pictures)} lists of phrases, one per image")
        if not pictures or not all(
            texts and all(isinstance(text, str) and text.strip() for text in texts) for texts in phrase_lists
        ):
            raise ValueError("phrases: every image needs at least one phrase, and no phrase may be empty")
        if batch_size < 1:
            raise ValueError("batch_size must be at least 1")
        if output_type not in ("np", "pt", "pil"):
            raise ValueError(f"output_type {output_type!r}: must be np, pt or pil")
        if not set(tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be in {self._callback_tensor_inputs}, got {tensor_inputs}"
            )
        if not isinstance(self.scheduler, DDIMScheduler):
            raise ValueError(f"{type(self.scheduler).__name__}: the scheduler must be a DDIMScheduler")

    def _operating_point(
        self,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        guidance_interval: GuidanceInterval | None,
        sampler: SamplerName,
        ensemble_size: int,
        mirror: bool,
    ) -> OperatingPoint:
        steps = self.config.default_denoising_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        most = self.scheduler.config.num_train_timesteps
        if not 1 <= steps <= most or not 1 <= scale < 100 or not 1 <= ensemble_size < 100:
            raise ValueError(
                f"num_inference_steps must be in 1..{most}, guidance_scale at least 1 and below 100, and ensemble_size in 1..99"
            )
        if sampler not in get_args(SamplerName):
            raise ValueError(f"sampler {sampler!r}: must be one of {', '.join(get_args(SamplerName))}")
        if guidance_interval is not None and not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
            raise ValueError(f"guidance_interval {guidance_interval}: must be ascending and between 0 and 1")
        if mirror and ensemble_size == 1:
            raise ValueError("mirror needs an ensemble_size of at least 2")
        return OperatingPoint(
            size=self.config.default_processing_resolution,
            num_inference_steps=steps,
            guidance_scale=scale,
            guidance_interval=guidance_interval,
            sampler=sampler,
            ensemble_size=ensemble_size,
            mirror=mirror,
        )

    @torch.no_grad()
    def label_maps(
        self,
        image_latents: torch.Tensor,
        texts: list[TextEmbedding],
        keys: Sequence[tuple[object, object, object]],
        point: OperatingPoint,
        seed: int = 0,
        observe: Observe | None = None,
        on_step_end: OnStepEnd | None = None,
    ) -> torch.Tensor:
        """Return soft label maps in [0, 1]: [B, h, w] at latent size, or [B, H, W] at processing size for VAE labels.

        Args:
            image_latents: [B, 4, h, w].
            texts: embeddings of B phrases.
            keys: (image_id, narrative_id, phrase_id) of each phrase. All randomness derives from them, the image size and
                `seed`.
            observe: see `diffusion.sampling.Observe`; it is called for the first sample of an ensemble only.
        """
        # 1. Prepare the conditions.
        unet, device, size = self.unet, image_latents.device, (point.size, point.size)
        dtype = unet.dtype
        condition = self.adapter(texts)
        views = [image_latents.to(dtype)]
        if point.mirror:  # a flipped latent is nearly the latent of the flipped image
            views.append(views[0].flip(-1))
        shape = (unet.config.out_channels, *image_latents.shape[-2:])
        both = condition + self.adapter.unconditional(len(texts)) if point.guidance_scale != 1 else None

        # 2. Define the network evaluation. Guided evaluations put the conditional rows first.
        def denoise(latents: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, guided: bool) -> torch.Tensor:
            if guided:
                assert both is not None
                return run_unet(unet, x_t.repeat(2, 1, 1, 1).to(dtype), latents.repeat(2, 1, 1, 1), t, both, size)
            return run_unet(unet, x_t.to(dtype), latents, t, condition, size)

        # 3. Average the samples.
        samples = []
        for member in range(point.ensemble_size):
            latents = views[member % len(views)]
            if self.config.prediction_type == "logits":
                t = torch.full((len(texts),), DISCRIMINATIVE_TIMESTEP, device=device)
                soft = denoise(latents, latents.new_zeros((len(texts), *shape)), t, False).float().sigmoid()[:, 0]
            else:
                generators = [phrase_generator(seed, *key, point.size, member) for key in keys]
                x_t = draw_noise(generators, shape).to(device)
                member_observe = observe if member == 0 else None
                x_0 = sample_labels(
                    partial(denoise, latents),
                    self.scheduler,
                    x_t,
                    point,
                    generators,
                    self.config.label_scale,
                    member_observe,
                    on_step_end,
                )
                soft = self.soft_labels(x_0)
            samples.append(soft if latents is views[0] else soft.flip(-1))
        return torch.stack(samples).mean(0)

    def soft_labels(self, x_0: torch.Tensor) -> torch.Tensor:
        """Return soft labels in [0, 1] (see `soften`).

        Masks [B, 1, h, w] in about [-b, b] give [B, h, w]. VAE latents [B, C, h, w] are decoded and averaged over the
        colour channels, which gives [B, H, W].
        """
        labels = x_0 / self.config.label_scale
        pictures = decode_latents(self.vae, labels).float() if self.config.label == "vae" else labels
        return soften(pictures.mean(1))


def soften(labels: torch.Tensor) -> torch.Tensor:
    """Map labels, about -1 outside and 1 inside the mask, to soft labels in [0, 1] with a strictly increasing function.

    The paper's (x_0 + 1) / 2 needs clipping, after which several classes tie at 1 in a seventh of all pixels. Here, [-1, 1] is
    mapped linearly to [TAIL, 1 - TAIL], and values outside approach 0 or 1 exponentially, with a continuous derivative.
    """
    ratio, inside = (0.5 - TAIL) / TAIL, labels.clamp(-1, 1)
    tail = TAIL * (1 - torch.exp(-ratio * (labels - inside).abs()))
    return 0.5 + (0.5 - TAIL) * inside + torch.where(labels < 0, -tail, tail)


def _to_picture(image: ImageInput) -> Image.Image:
    """Return an image as 8-bit RGB. Raises ValueError if its shape or range is not that of `ImageInput`."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or len(image) not in (1, 3):
            raise ValueError(f"expected an image tensor [3, H, W] or [1, H, W], got {list(image.shape)}")
        image = (image.float() if image.is_floating_point() else image).detach().permute(1, 2, 0).cpu().numpy()
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] == 3)):
        raise ValueError(f"expected an image array [H, W, 3] or [H, W], got {list(pixels.shape)}")
    limit = 1 if np.issubdtype(pixels.dtype, np.floating) else 255
    if not (pixels.min() >= 0 and pixels.max() <= limit):
        raise ValueError(f"expected {pixels.dtype} pixels in 0..{limit}, got {pixels.min()}..{pixels.max()}")
    return to_rgb(Image.fromarray(np.rint(pixels * (255 / limit)).astype(np.uint8)))


def _as_type(masks: NDArray[np.bool_], output_type: str) -> Any:
    if output_type == "pil":
        return [Image.fromarray(mask.astype(np.uint8) * 255) for mask in masks]
    return torch.from_numpy(masks) if output_type == "pt" else masks


def load_pipeline(folder: str | Path, dtype: torch.dtype = torch.float32) -> GSPipeline:
    """Load a saved model without progress bars. Raises UserError if the folder holds no complete `GSPipeline`."""
    logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        return GSPipeline.from_pretrained(folder, dtype=dtype)
    except Exception as error:  # diffusers, safetensors and json raise many types
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: not a readable GS model ({detail}); run `genseg train`, or pass another folder") from error


def segment_image(
    image: Image.Image,
    phrases: Sequence[str],
    model: Path,
    device: torch.device,
    sample: Sample | None = None,
    precision: Precision | None = None,
    **options: Any,
) -> GSOutput:
    """Segment an image by phrases with a trained model, at the model's default operating point or at that of a study.

    Args:
        model: folder of the trained model.
        sample: section of a study's params; its main point, threshold, sampler settings and precision are the defaults. If
            None, the defaults are those of the model, threshold 0.5 and fp32.
        options: arguments of `GSPipeline.__call__` that replace the defaults, unless they are None.

    Raises UserError if the model cannot be loaded, an option is invalid, or the network output is not finite.
    """
    pipeline = load_pipeline(model, DTYPES[precision or (sample.precision if sample else "fp32")]).to(device)
    defaults: dict[str, Any] = {}
    if sample is not None:
        if sample.readout != "bilinear":
            raise UserError(f"sample.readout {sample.readout}: only bilinear read-out is available for single images")
        pipeline.configure_sampling(sample.timestep_spacing, sample.clip_sample)
        pipeline.register_to_config(default_processing_resolution=sample.main.size)
        defaults = sample.main.model_dump(exclude={"size"}) | {"threshold": sample.threshold}
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), desc="predict")
    try:
        return pipeline(image, phrases, **defaults | {name: value for name, value in options.items() if value is not None})
    except ValueError as error:
        raise UserError(str(error)) from None
