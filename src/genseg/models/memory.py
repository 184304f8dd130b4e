"""Memory of activations and recorded attention maps, measured on the meta device. Weights are not included."""

import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genseg.models.attention import InjectedAttnProcessor
from genseg.models.attention_control import AttentionControl, Kind, MaskInjection, attention_control
from genseg.models.device import DTYPES
from genseg.models.flops import cache_by_config, meta_inputs, meta_unet
from genseg.models.unet import added_conditions, run_unet
from genseg.models.vae import decode_latents, vae_factor


class LiveBytes(TorchDispatchMode):
    """Track the current and peak bytes of tensors created within the context (also meta tensors), except those in `ignore`."""

    def __init__(self, ignore: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in ignore}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _FusedAttnProcessor(InjectedAttnProcessor):
    """Attention without N x N weights, as in the fused kernels of GPUs; the meta device has no such kernel by default."""

    @staticmethod
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        by_head = (part.transpose(1, 2) for part in (query, key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention(*by_head)[0].transpose(1, 2)


def _fused_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    unet = meta_unet(config)
    unet.set_attn_processor(_FusedAttnProcessor())
    return unet


def _autocast(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """Emulate `torch.autocast` on a meta U-Net: products in `dtype`, norms in fp32."""
    for module in unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.Module.to(module, dtype)
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(dtype), *inputs[1:]))
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(), *inputs[1:]))


@cache_by_config
def activation_bytes(
    config: Mapping[str, Any],
    latent: int,
    tokens: int,
    inject: bool,
    batch: int,
    precision: str,
    training: bool = True,
    checkpointing: bool = False,
) -> int:
    """Return the peak bytes of activations of the label-diffusion U-Net for a batch of phrases, with fused attention.

    In 16-bit precision, training uses autocast, and inference uses 16-bit weights. Weight gradients, allocator overhead and
    kernel workspaces are not included.

    Args:
        latent, tokens, inject: see `meta_inputs`.
        precision: "fp32", "bf16" or "fp16".
        training: include the backward pass; False counts a forward pass without gradients.
        checkpointing: recompute activations in the backward pass (gradient checkpointing).
    """
    # 1. Build the network and its inputs.
    unet, dtype = _fused_unet(config), DTYPES[precision]
    inputs = meta_inputs(unet, latent, tokens, inject, batch)
    if not training:
        nn.Module.to(unet, dtype)
        inputs |= {name: inputs[name].to(dtype) for name in ("x_t", "image_latent")}
    elif precision != "fp32":
        _autocast(unet, dtype)

    # 2. Prepare the backward pass. Weight gradients are counted by the caller, so they are freed immediately.
    unet.requires_grad_(training)
    if checkpointing:
        unet.train()
        unet.enable_gradient_checkpointing()
    parameters = list(unet.parameters())
    if training:
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(_free_gradient)

    # 3. Run it.
    with LiveBytes([*parameters, *unet.buffers()]) as live, torch.set_grad_enabled(training):
        output = run_unet(unet, **inputs)
        if training:
            output.float().square().mean().backward()
    return live.peak


def _free_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def generator_bytes(
    config: Mapping[str, Any],
    latent: int,
    tokens: int,
    batch: int,
    precision: str,
    control: AttentionControl | None = None,
    gradient: bool = False,
) -> int:
    """Return the peak bytes, without weights, of a forward pass of a stock U-Net (see `TextToImage.predict`).

    Layers under the control hold their probabilities explicitly in float32, in slices of `attention_control.BYTE_CAP` bytes,
    together with the tensors that the control derives from them; all other layers use fused attention.

    Args:
        latent, tokens, batch: side of the square image latent, tokens per prompt, and number of prompts.
        control: attention control with tensors on the meta device, e.g. an `AttentionStore` or `meta_injection`; the tensors
            it records are counted.
        gradient: include the backward pass to the text embedding, as in null-text inversion.
    """
    # 1. Build the network and its inputs.
    unet, dtype = _fused_unet(config).requires_grad_(False), DTYPES[precision]
    nn.Module.to(unet, dtype)
    inputs = meta_inputs(unet, latent, tokens, False, batch)
    text = inputs["text"].tokens.to(dtype).requires_grad_(gradient)
    sample = torch.cat([inputs["x_t"], inputs["image_latent"]], dim=1).to(dtype)
    added = added_conditions(unet, inputs["text"].pooled.to(dtype), (latent, latent))

    # 2. Run it.
    with (
        torch.set_grad_enabled(gradient),
        LiveBytes([*unet.parameters(), *unet.buffers(), text]) as live,
        attention_control(unet, control) if control else nullcontext(),
    ):
        output = unet(sample, 0, text, added_cond_kwargs=added, return_dict=False)[0].float()
        if gradient:
            torch.autograd.grad(output.square().mean(), text)
    return live.peak


def meta_injection(batch: int, grid: int, tokens: int, kinds: Sequence[Kind]) -> MaskInjection:
    """Return a `MaskInjection` of `batch` masks [grid, grid] and prompts of `tokens` tokens, on the meta device."""
    mask = torch.empty(batch, grid, grid, device="meta")
    return MaskInjection(mask, torch.empty(batch, tokens, dtype=torch.bool, device="meta"), 0.5, kinds)


def encoding_bytes(config: Mapping[str, Any], size: int, precision: str) -> int:
    """Return the peak bytes of activations while an `AutoencoderKL` of this config encodes one `size` x `size` image."""
    vae = _meta_vae(config, precision)
    image = torch.empty(1, 3, size, size, dtype=vae.dtype, device="meta")
    with torch.no_grad(), LiveBytes([*vae.parameters(), *vae.buffers()]) as live:
        vae.encode(image)
    return live.peak


def decoding_bytes(config: Mapping[str, Any], size: int, batch: int, precision: str) -> int:
    """Return the peak bytes of activations while `models.vae.decode_latents` decodes `batch` images of `size` x `size`."""
    vae = _meta_vae(config, precision)
    side = size // vae_factor(vae)
    latents = torch.empty(batch, vae.config.latent_channels, side, side, dtype=vae.dtype, device="meta")
    with LiveBytes([*vae.parameters(), *vae.buffers()]) as live:
        decode_latents(vae, latents)
    return live.peak


def _meta_vae(config: Mapping[str, Any], precision: str) -> AutoencoderKL:
    """Build a VAE on the meta device in the dtype that it computes in: fp32 if the precision is fp16 (see `models.vae`)."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config))
    nn.Module.to(vae, torch.float32 if precision == "fp16" else DTYPES[precision])
    for module in vae.modules():
        # Fused attention on the coarsest grid needs little memory compared with the first convolutions.
        if isinstance(module, Attention):
            module.forward = lambda hidden_states, **_: hidden_states
    return vae
