"""Memory that a network needs beside its weights, found on the meta device: activations, and recorded attention maps."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
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
from genseg.models.flops import meta_inputs, meta_unet
from genseg.models.unet import run_unet, size_ids
from genseg.models.vae import decode_latents, vae_factor
from genseg.params import canonical_json


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that operations made and somebody still holds, and the peak; meta tensors count as real ones."""

    def __init__(self, ignore: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in ignore}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._watch(leaf.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _FusedAttnProcessor(InjectedAttnProcessor):
    """Attention without its N x N weights, as the fused kernels of GPUs do it and the meta device does not."""

    @staticmethod
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        rows = (item.transpose(1, 2) for item in (query, key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention(*rows)[0].transpose(1, 2)


def _autocast(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """Have a meta U-Net hold what `torch.autocast` holds on a GPU: products in `dtype`, norms in fp32."""
    for module in unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.Module.to(module, dtype)
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(dtype), *inputs[1:]))
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(), *inputs[1:]))


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
    """Peak bytes beside weights and gradients of one pass (forward and backward when `training`) of a batch of phrases.

    Eager execution with fused attention and, for a `precision` of 16 bits, autocast in training and weights of that type
    in inference. Allocator slack and the kernels' workspaces come on top.
    """
    return _activation_bytes(canonical_json(dict(config)), latent, tokens, inject, batch, precision, training, checkpointing)


@cache
def _activation_bytes(
    config: str, latent: int, tokens: int, inject: bool, batch: int, precision: str, training: bool, checkpointing: bool
) -> int:
    unet = meta_unet(json.loads(config))
    processor: Any = _FusedAttnProcessor()
    unet.set_attn_processor(processor)
    if precision != "fp32":
        _autocast(unet, DTYPES[precision]) if training else nn.Module.to(unet, DTYPES[precision])
    inputs = meta_inputs(unet, latent, tokens, inject, batch)
    for name in ("x_t", "image_latent"):
        inputs[name] = inputs[name].to(torch.float32 if training else DTYPES[precision])
    unet.requires_grad_(training)
    if checkpointing:
        unet.train()
        unet.enable_gradient_checkpointing()
    parameters = list(unet.parameters())
    for parameter in parameters if training else []:  # a gradient is freed where it would go into the optimiser's buffer
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with LiveBytes([*parameters, *unet.buffers()]) as live, torch.set_grad_enabled(training):
        output = run_unet(unet, **inputs)
        if training:
            output.float().square().mean().backward()
    return live.peak


def generator_bytes(
    config: Mapping[str, Any],
    latent: int,
    tokens: int,
    batch: int,
    precision: str,
    control: AttentionControl | None = None,
    gradient: bool = False,
) -> int:
    """Peak bytes beside weights of one pass of a stock text-to-image U-Net (`TextToImage.predict`), weights in `precision`.

    Under a control the layers that it wants hold their probabilities explicitly, in float32, a slice of
    `attention_control.BYTE_CAP` at a time, and what the control makes of them; all others are fused.

    Args:
        control: of tensors on the meta device, e.g. an `AttentionStore` or `meta_injection`; what it records is counted.
        gradient: the pass and one back to the text, as null-text inversion needs.
    """
    unet, dtype = meta_unet(config).requires_grad_(False), DTYPES[precision]
    processor: Any = _FusedAttnProcessor()
    unet.set_attn_processor(processor)
    nn.Module.to(unet, dtype)
    inputs = meta_inputs(unet, latent, tokens, False, batch)
    text = inputs["text"].tokens.to(dtype).requires_grad_(gradient)
    sample = torch.cat([inputs["x_t"], inputs["image_latent"]], dim=1).to(dtype)
    ids = size_ids(unet, batch, latent, latent, sample)
    added = None if ids is None else {"text_embeds": inputs["text"].pooled.to(dtype), "time_ids": ids}
    held = [*unet.parameters(), *unet.buffers(), text]
    with (
        torch.set_grad_enabled(gradient),
        LiveBytes(held) as live,
        attention_control(unet, control) if control else nullcontext(),
    ):
        answer = unet(sample, 0, text, added_cond_kwargs=added, return_dict=False)[0].float()
        if gradient:
            torch.autograd.grad(answer.square().mean(), text)
    return live.peak


class _MetaInjection(MaskInjection):
    """Without the check of its tokens, which on the meta device have no values."""

    def __init__(self, mask: torch.Tensor, phrase_tokens: torch.Tensor, kinds: Sequence[Kind]) -> None:
        self.mask, self.phrase_tokens, self.alpha, self.kinds = mask, phrase_tokens, 0.5, tuple(kinds)


def meta_injection(batch: int, grid: int, tokens: int, kinds: Sequence[Kind]) -> MaskInjection:
    """The injection of `batch` masks [grid, grid] with some strength, on the meta device."""
    mask = torch.empty(batch, grid, grid, device="meta")
    return _MetaInjection(mask, torch.empty(batch, tokens, dtype=torch.bool, device="meta"), kinds)


def encoding_bytes(config: Mapping[str, Any], size: int, precision: str) -> int:
    """Peak bytes beside weights while an `AutoencoderKL` of this config encodes one `size` x `size` image."""
    vae = _meta_vae(config, precision)
    image = torch.empty(1, 3, size, size, dtype=vae.dtype, device="meta")
    with torch.no_grad(), LiveBytes([*vae.parameters(), *vae.buffers()]) as live:
        vae.encode(image)
    return live.peak


def decoding_bytes(config: Mapping[str, Any], size: int, batch: int, precision: str) -> int:
    """Peak bytes beside weights while `models.vae.decode_latents` decodes `batch` images of `size` x `size`."""
    vae = _meta_vae(config, precision)
    side = size // vae_factor(vae)
    latents = torch.empty(batch, vae.config.latent_channels, side, side, dtype=vae.dtype, device="meta")
    with LiveBytes([*vae.parameters(), *vae.buffers()]) as live:
        decode_latents(vae, latents)
    return live.peak


def _meta_vae(config: Mapping[str, Any], precision: str) -> AutoencoderKL:
    """In the type that it works in: fp16 is raised to fp32 (see `models.vae`)."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config))
    nn.Module.to(vae, torch.float32 if precision == "fp16" else DTYPES[precision])
    for module in vae.modules():
        if isinstance(module, Attention):  # fused on a GPU, and at the coarsest grid: nothing beside the first convolutions
            module.forward = lambda hidden_states, **_: hidden_states
    return vae


@dataclass(frozen=True)
class AttentionMap:
    """The attention weights [heads, queries, keys] of one layer for one sample."""

    layer: str
    heads: int
    queries: int
    keys: int

    @property
    def is_self(self) -> bool:
        return self.layer.endswith("attn1")


def attention_maps(config: Mapping[str, Any], latent: int, tokens: int) -> list[AttentionMap]:
    """Every attention layer's map in one pass at a `latent` x `latent` input, in the order of the pass.

    Recording those of some layers in 16 bits for a batch of B takes
    `2 * B * sum(m.heads * m.queries * m.keys for m in maps if ...)` bytes; averaged over heads, `m.heads` is 1.
    """
    unet = meta_unet(config)
    found: list[AttentionMap] = []
    names = {module: name for name, module in unet.named_modules() if isinstance(module, Attention)}

    def record(module: Attention, arguments: tuple[torch.Tensor, ...], options: dict[str, Any]) -> None:
        queries = arguments[0].shape[1]
        context = options.get("encoder_hidden_states")
        found.append(AttentionMap(names[module], module.heads, queries, queries if context is None else context.shape[1]))

    for module in names:
        module.register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad():
        run_unet(unet, **meta_inputs(unet, latent, tokens, inject=False))
    return found
