"""`GSPipeline`: image + phrases -> masks, as diffusers users expect it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers.utils.logging
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.utils import BaseOutput, logging
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from genseg.artifacts.resample import bilinear
from genseg.diffusion.sampling import Observe, draw_noise, phrase_generator, sample_labels
from genseg.errors import UserError
from genseg.models.adapter import TextAdapter
from genseg.models.attention import use_injected_attention
from genseg.models.backbone import TextEncoders
from genseg.models.text import TextEmbedding, encode_phrases
from genseg.models.unet import run_unet
from genseg.models.vae import decode_latents, encode_images, image_tensor
from genseg.params import Interval, Rule

DISCRIMINATIVE_TIMESTEP = 999
"""The one-pass control is the same U-Net asked once, at the last timestep, with an all-zero label."""


@dataclass
class GSOutput(BaseOutput):
    """Masks of one image.

    masks: [N, H, W] bool at the image's own size. maps: [N, h, w] float32 in [0, 1], soft labels at latent size.
    """

    masks: NDArray[np.bool_]
    maps: NDArray[np.float32]


class GSPipeline(DiffusionPipeline):
    """Generative segmentation: denoise one label map per phrase, conditioned on the image's latent and the phrase.

    Args:
        prediction: what the U-Net answers: "noise", "v", "x0", or "logits" for the discriminative control.
        label: what is denoised: "mask", a 1-channel map at latent size, or "vae", the VAE's latent of the mask as a grey image.
        label_scale: b; masks lie in [-b, b], a VAE's latents have b as their unit.
        image_size: side the image is resized to.
        steps, guidance: defaults that belong to this checkpoint.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->vae->adapter->unet"

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

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image,
        phrases: Sequence[str],
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        threshold: float = 0.5,
        batch: int = 16,
    ) -> GSOutput:
        """Segment `image` by each of `phrases`; the image is encoded once.

        Args:
            steps, guidance: the checkpoint's own when None.
            seed: a phrase's mask depends on it and on the phrase's position only, not on `batch`.
            threshold: of the soft map after bilinear up-sampling.
        """
        size = self.config.image_size
        device = self._execution_device
        encoders = TextEncoders((self.tokenizer, self.tokenizer_2), (self.text_encoder, self.text_encoder_2))
        texts = encode_phrases(encoders, phrases)
        latent = encode_images(self.vae, image_tensor(image, size)[None].to(device))
        maps = []
        for start in range(0, len(texts), batch):
            part = texts[start : start + batch]
            keys = [("image", "predict", start + i) for i in range(len(part))]
            maps.append(self.label_maps(latent.expand(len(part), -1, -1, -1), part, keys, size, steps, guidance, seed))
        soft = torch.cat(maps).cpu().numpy()
        masks = bilinear(soft, image.height, image.width) >= threshold
        return GSOutput(masks=masks, maps=soft)

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
        the decoded picture's mean over its colours, [B, H, W]."""
        labels = x_0 / self.config.label_scale
        pictures = decode_latents(self.vae, labels).float() if self.config.label == "vae" else labels
        return ((pictures.mean(1) + 1) / 2).clamp(0, 1)


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
