"""`GSPipeline`: image and phrases to masks, with the interface of a diffusers pipeline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import transformers.utils.logging
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils import BaseOutput, logging
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from genseg.artifacts.resample import bilinear
from genseg.data.images import to_rgb
from genseg.diffusion.objectives import with_sampling
from genseg.diffusion.sampling import (
    Observe,
    OnStepEnd,
    draw_noise,
    phrase_generator,
    phrase_generators,
    sample_labels,
    sample_with_scheduler,
)
from genseg.errors import UserError
from genseg.models.adapter import TextAdapter
from genseg.models.attention import InjectedAttnProcessor, use_injected_attention
from genseg.models.backbone import TextEncoders
from genseg.models.text import TextEmbedding, encode_phrases
from genseg.models.unet import run_unet
from genseg.models.vae import decode_latents, encode_images, image_tensor, vae_factor
from genseg.params.sample import GuidanceInterval, OperatingPoint, SamplerName, TimestepSpacing

ImageInput: TypeAlias = Image.Image | NDArray[Any] | torch.Tensor
"""PIL image of any mode; array [H, W, 3] or [H, W]; tensor [3, H, W] or [1, H, W]. Integers are 0..255, floats 0..1."""
# Diffusers downloads only components that it knows: without this entry, a model would load from a folder but not from a hub.
LOADABLE_CLASSES["genseg.models.adapter"] = {"TextAdapter": ["save_pretrained", "from_pretrained"]}
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
        uncertainty: standard deviation of the ensemble's soft labels, in the form of `maps`; None if it was not requested.
    """

    masks: Any
    maps: Any
    uncertainty: Any = None


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

    def set_attention_slice(self, slice_size: int | Literal["auto", "max"] | None) -> None:
        """Compute attention over a part of the heads at a time (see `enable_attention_slicing`), with the injected text."""
        use_injected_attention(self.unet, slice_size)

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
        sampler: SamplerName | None = None,
        ensemble_size: int = 1,
        mirror: bool = False,
        processing_resolution: int | None = None,
        match_input_resolution: bool = True,
        threshold: float = 0.5,
        seed: int = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        batch_size: int = 16,
        output_type: Literal["np", "pt", "pil"] = "np",
        output_uncertainty: bool = False,
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> GSOutput | tuple[Any, Any, Any]:
        """Segment an image by each of its phrases. The image is encoded once.

        Arguments that `MarigoldDepthPipeline` of diffusers also has mean the same here, with phrases in place of images.

        Args:
            image: one image, a list of images, or a batch [B, ...].
            phrases: one phrase or N phrases; for several images, one list of phrases per image.
            num_inference_steps, guidance_scale: None for the checkpoint's defaults. A guidance scale of at most 1 disables
                guidance, which halves the number of evaluations.
            guidance_interval: part of the schedule with guidance, (from, to), where 1 is pure noise; None: all of it.
            sampler: update rule of a `DDIMScheduler`: "ddim" (the default), "ddpm", "dpmpp" (DPM-Solver++(2M)) or "mean" (of
                all estimates, with fresh noise). Any other first-order or multistep scheduler of diffusers that is set as
                `scheduler` brings its own rule.
            ensemble_size: number of samples with different seeds whose maps are averaged.
            mirror: whether every second sample is that of the mirrored image, mirrored back. Not for phrases that say left or
                right.
            processing_resolution: side that images are resized to, a multiple of the VAE's factor; None for the checkpoint's
                default, 0 for the larger side of the image, rounded up.
            match_input_resolution: whether masks have the size of their image, or are squares of the processing resolution.
            threshold: minimum value of a foreground pixel in the bilinearly up-sampled soft map.
            seed: seed of the initial noise. A phrase's mask depends on it and on the phrase's position in the list of its
                image, not on `batch_size` or other images.
            generator: if given, `seed` is drawn from it. A list has one generator for each sample: `ensemble_size` generators
                for each phrase of each image, in order. A sample then equals that of a call with its generator alone.
            latents: initial noise [samples, K, h, w], ordered as a list of generators, in place of the noise from `seed`.
            batch_size: number of phrases, of any images, that are denoised at once.
            output_type: "np", "pt" or "pil" (see `GSOutput`).
            output_uncertainty: whether to return the standard deviation of the samples of each ensemble.
            callback_on_step_end: called after each step of each batch as `callback(pipeline, step, timestep, callback_kwargs)`.
                `callback_kwargs["latents"]` are the noisy labels [B, K, h, w]; sampling continues from the returned labels.
            callback_on_step_end_tensor_inputs: keys of `callback_kwargs`; "latents" is the only one.

        Returns:
            `GSOutput`, or (masks, maps, uncertainty) with `return_dict=False`.

        Raises:
            ValueError: an argument is invalid, or the network output is not finite.
        """
        # 1. Check the inputs; a single image becomes a list of one.
        is_single = isinstance(image, Image.Image) or (not isinstance(image, Sequence) and image.ndim < 4)
        images: Any = [image] if is_single else image
        pictures = [_to_picture(item) for item in images]
        phrase_lists: Any = [[phrases] if isinstance(phrases, str) else phrases] if is_single else phrases
        self._check_inputs(pictures, phrase_lists, batch_size, output_type, callback_on_step_end_tensor_inputs)
        point = self._operating_point(
            num_inference_steps,
            guidance_scale,
            guidance_interval,
            sampler,
            ensemble_size,
            mirror,
            self._processing_resolution(processing_resolution, pictures),
        )
        if output_uncertainty and ensemble_size == 1:
            raise ValueError("output_uncertainty needs an ensemble_size of at least 2")
        positions = [(number, k) for number, texts in enumerate(phrase_lists) for k in range(len(texts))]
        generators = _generators(generator, seed, [k for _, k in positions], point)
        noise = None if latents is None else self._check_latents(latents, generator, len(positions), point)

        # 2. Encode every image and every phrase once.
        device = self._execution_device
        encoders = TextEncoders((self.tokenizer, self.tokenizer_2), (self.text_encoder, self.text_encoder_2))
        embeddings = encode_phrases(encoders, [phrase for texts in phrase_lists for phrase in texts], device=device)
        image_latents = [encode_images(self.vae, image_tensor(picture, point.size, device)[None])[0] for picture in pictures]

        # 3. Denoise the labels in batches of phrases. (B, h, w)
        starts = range(0, len(positions), batch_size)
        is_discriminative = self.config.prediction_type == "logits"
        steps = 1 if is_discriminative else point.num_inference_steps * point.ensemble_size

        def on_step_end(step: int, t: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
            bar.update()
            if callback_on_step_end is None:
                return x_t
            tensors = {"latents": x_t} if "latents" in callback_on_step_end_tensor_inputs else {}
            return callback_on_step_end(self, step, t, tensors).pop("latents", x_t)

        batches = []
        with self.progress_bar(total=len(starts) * steps) as bar:
            for start in starts:
                rows = slice(start, start + batch_size)
                samples = self.label_maps(
                    torch.stack([image_latents[number] for number, _ in positions[rows]]),
                    embeddings[rows],
                    generators[rows],
                    point,
                    None if noise is None else noise[rows],
                    on_step_end=on_step_end,
                ).float()
                if is_discriminative:
                    bar.update()
                deviation = samples.std(0) if output_uncertainty else torch.empty(samples.shape[1:])
                batches.append((samples.mean(0).cpu(), deviation.cpu()))
        soft_maps, deviations = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
        self.maybe_free_model_hooks()
        if not np.isfinite(soft_maps).all():
            raise ValueError(f"the network output is not finite in {self.unet.dtype}; use torch.bfloat16 or torch.float32")

        # 4. Read out the masks at each image's own size. (N, H, W)
        results, start = [], 0
        for picture, texts in zip(pictures, phrase_lists, strict=True):
            rows = slice(start, start + len(texts))
            width, height = picture.size if match_input_resolution else (point.size, point.size)
            masks = np.stack([bilinear(soft[None], height, width)[0] >= threshold for soft in soft_maps[rows]])
            maps, uncertainty = (torch.from_numpy(a) if output_type == "pt" else a for a in (soft_maps[rows], deviations[rows]))
            results.append((_as_type(masks, output_type), maps, uncertainty if output_uncertainty else None))
            start = rows.stop
        fields: Any = results[0] if is_single else tuple(map(list, zip(*results, strict=True)))
        if not output_uncertainty:
            fields = (*fields[:2], None)
        return GSOutput(*fields) if return_dict else fields

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
        if getattr(self.scheduler, "order", 1) != 1:
            raise ValueError(
                f"{type(self.scheduler).__name__}: evaluates the network twice per step; use a multistep scheduler"
            )
        processors = self.unet.attn_processors.values()
        if others := {type(item).__name__ for item in processors if not isinstance(item, InjectedAttnProcessor)}:
            raise ValueError(
                f"unet: the attention processor {', '.join(sorted(others))} would drop the injected text; set a subclass of "
                "genseg.models.attention.InjectedAttnProcessor, or call disable_attention_slicing() to restore the own one"
            )

    def _processing_resolution(self, resolution: int | None, pictures: list[Image.Image]) -> int:
        """Return the side of the processed images. Raises ValueError if it is not a multiple of the VAE's factor."""
        factor = vae_factor(self.vae)
        if resolution is None:
            return self.config.default_processing_resolution
        if resolution == 0:
            sides = {max(picture.size) for picture in pictures}
            if len(sides) > 1:
                raise ValueError("processing_resolution 0: the images differ in their larger side; pass them one by one")
            return -(-sides.pop() // factor) * factor
        if resolution < 0 or resolution % factor:
            raise ValueError(f"processing_resolution {resolution}: must be 0 or a multiple of {factor}")
        return resolution

    def _check_latents(self, latents: torch.Tensor, generator: object, phrases: int, point: OperatingPoint) -> torch.Tensor:
        """Return initial noise [phrases * E, K, h, w] as [phrases, E, K, h, w]. Raises ValueError if it has another shape."""
        side = point.size // vae_factor(self.vae)
        shape = (phrases * point.ensemble_size, self.unet.config.out_channels, side, side)
        if generator is not None:
            raise ValueError("latents and generator cannot be used together")
        if latents.shape != shape:
            raise ValueError(f"latents: expected the shape {list(shape)}, got {list(latents.shape)}")
        return latents.unflatten(0, (phrases, point.ensemble_size))

    def _operating_point(
        self,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        guidance_interval: GuidanceInterval | None,
        sampler: SamplerName | None,
        ensemble_size: int,
        mirror: bool,
        size: int,
    ) -> OperatingPoint:
        steps = self.config.default_denoising_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        most = self.scheduler.config.num_train_timesteps
        if not 1 <= steps <= most or not scale < 100 or not 1 <= ensemble_size < 100:
            raise ValueError(f"num_inference_steps must be in 1..{most}, guidance_scale below 100, and ensemble_size in 1..99")
        if sampler not in (None, *get_args(SamplerName)):
            raise ValueError(f"sampler {sampler!r}: must be one of {', '.join(get_args(SamplerName))}")
        if sampler is not None and not isinstance(self.scheduler, DDIMScheduler):
            raise ValueError(
                f"sampler {sampler!r}: needs a DDIMScheduler, but the scheduler is {type(self.scheduler).__name__}"
            )
        if guidance_interval is not None and not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
            raise ValueError(f"guidance_interval {guidance_interval}: must be ascending and between 0 and 1")
        if mirror and ensemble_size == 1:
            raise ValueError("mirror needs an ensemble_size of at least 2")
        return OperatingPoint(
            size=size,
            num_inference_steps=steps,
            guidance_scale=max(scale, 1.0),
            guidance_interval=guidance_interval,
            sampler=sampler or "ddim",
            ensemble_size=ensemble_size,
            mirror=mirror,
        )

    @torch.no_grad()
    def label_maps(
        self,
        image_latents: torch.Tensor,
        texts: list[TextEmbedding],
        generators: Sequence[Sequence[torch.Generator]],
        point: OperatingPoint,
        noise: torch.Tensor | None = None,
        observe: Observe | None = None,
        on_step_end: OnStepEnd | None = None,
    ) -> torch.Tensor:
        """Return the soft label maps in [0, 1] of each of the E samples of an ensemble, whose mean is the prediction.

        They are [E, B, h, w] at latent size, or [E, B, H, W] at processing size for VAE labels.

        Args:
            image_latents: [B, 4, h, w].
            texts: embeddings of B phrases.
            generators: [B][E], the sources of all randomness (see `phrase_generators`).
            noise: initial noise [B, E, K, h, w]; None: draw it.
            observe: see `diffusion.sampling.Observe`; it is called for the first sample of an ensemble only, by samplers of a
                `DDIMScheduler`.
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

        # 3. Draw the samples.
        samples = []
        for member in range(point.ensemble_size):
            latents = views[member % len(views)]
            if self.config.prediction_type == "logits":
                t = torch.full((len(texts),), DISCRIMINATIVE_TIMESTEP, device=device)
                soft = denoise(latents, latents.new_zeros((len(texts), *shape)), t, False).float().sigmoid()[:, 0]
            else:
                own = [row[member] for row in generators]
                x_t = (draw_noise(own, shape) if noise is None else noise[:, member].float()).to(device)
                arguments = (partial(denoise, latents), self.scheduler, x_t, point, own, self.config.label_scale)
                if isinstance(self.scheduler, DDIMScheduler):
                    x_0 = sample_labels(*arguments, observe if member == 0 else None, on_step_end)
                else:
                    x_0 = sample_with_scheduler(*arguments, on_step_end)
                soft = self.soft_labels(x_0)
            samples.append(soft if latents is views[0] else soft.flip(-1))
        return torch.stack(samples)

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


def _generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, seed: int, positions: list[int], point: OperatingPoint
) -> list[list[torch.Generator]]:
    """Return the generators [N][E] of N phrases, given their positions in the lists of their images (see `__call__`)."""

    def draw(source: torch.Generator) -> int:
        return int(torch.randint(2**63 - 1, (1,), generator=source, device=source.device))

    if not isinstance(generator, Sequence):
        seed = seed if generator is None else draw(generator)
        return phrase_generators(seed, [("image", "predict", k) for k in positions], point)
    if len(generator) != len(positions) * point.ensemble_size:
        expected = f"{len(positions)} phrases x ensemble_size {point.ensemble_size}"
        raise ValueError(f"generator: expected a list of {expected} generators, got {len(generator)}")
    samples = iter(generator)
    return [
        [phrase_generator(draw(next(samples)), "image", "predict", 0, point.size) for _ in range(point.ensemble_size)]
        for _ in positions
    ]


def _as_type(masks: NDArray[np.bool_], output_type: str) -> Any:
    if output_type == "pil":
        return [Image.fromarray(mask.astype(np.uint8) * 255) for mask in masks]
    return torch.from_numpy(masks) if output_type == "pt" else masks


def load_pipeline(folder: str | Path, dtype: torch.dtype = torch.float32) -> GSPipeline:
    """Load a model from a folder or a hub id, without progress bars. Raises UserError if it is no complete `GSPipeline`."""
    logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        return GSPipeline.from_pretrained(str(folder), dtype=dtype)
    except Exception as error:  # diffusers, safetensors and json raise many types
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: not a readable GS model ({detail}); run `genseg train`, or pass another folder") from error
