"""The attention baselines: one image's attention, recorded once and shared, to one soft map a phrase.

image = Attended(model, params, latent, native, texts, (seed, image_id))
maps = METHODS["diffseg"].maps(image, texts_of_one_narrative, False)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray

from genseg.artifacts.seeds import derive_seed
from genseg.baselines.attention import (
    Grid,
    aggregate,
    anchor_indices,
    assign,
    combined_maps,
    lift,
    locate,
    merge,
    minmax,
    nearest_grid,
    phrase_maps,
    segment,
    spread,
)
from genseg.baselines.inversion import replay, replay_passes
from genseg.models.attention_control import AttentionStore, attention_control
from genseg.models.text_to_image import Prompts, TextToImage
from genseg.params import Baselines, Inversion

Maps = NDArray[np.float32]
Recorded = dict[Grid, torch.Tensor]
SOME = 1e-6
"""A threshold that every positive value passes."""


def attention_grids(unet: UNet2DConditionModel, height: int, width: int) -> list[Grid]:
    """Token grids of the U-Net's transformer blocks for latents of height x width, finest first."""
    found = []
    for block in unet.config.down_block_types:
        if "CrossAttn" in block:
            found.append((height, width))
        height, width = -(-height // 2), -(-width // 2)
    return found


class Attended:
    """One image and the texts that are asked of it; what attention says about them is computed when first wanted.

    Args:
        latent: [1, 4, h, w].
        native: (height, width) of the picture.
        texts: unique phrases, at least one.
        identity: what noise is drawn for, e.g. (study's seed, image_id): the same for all phrases of the image.
    """

    def __init__(
        self,
        model: TextToImage,
        params: Baselines,
        latent: torch.Tensor,
        native: tuple[int, int],
        texts: Sequence[str],
        identity: tuple[int, object],
    ) -> None:
        self.model, self.params, self.latent, self.native, self.identity = model, params, latent, native, identity
        self.rows = {text: row for row, text in enumerate(texts)}
        self.prompts = model.embed(list(texts), params.prompt)
        self.grids = attention_grids(model.unet, *latent.shape[-2:])
        self._memory: dict[object, Any] = {}

    def once(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """`compute(self, *arguments)`, remembered."""
        key = compute, arguments
        if key not in self._memory:
            self._memory[key] = compute(self, *arguments)
        return self._memory[key]

    def weights(self, texts: Sequence[str]) -> torch.Tensor:
        """Equal weights of a phrase's tokens [K, L]."""
        return self.prompts.phrase_tokens[[self.rows[text] for text in texts]].float()

    def semantic_weights(self, texts: Sequence[str]) -> torch.Tensor:
        """DiffPNG's weights of a phrase's tokens [K, L]: how near each token, encoded alone, is to the whole prompt.

        The cosine of the pooled embeddings, negative ones 0; equal weights where all are.
        """
        result = self.weights(texts)
        for row, text in zip(result, texts, strict=True):
            places = row.nonzero()[:, 0]
            words = self.model.words(text)[: len(places)]  # the prompt may have been cut
            alone = torch.stack([self.model.pooled_word(word) for word in words])
            cosines = torch.cosine_similarity(alone, self.prompts.pooled[self.rows[text]].float(), dim=-1).clamp_min(0)
            if cosines.sum() > 0:
                row[places] = cosines
        return result

    @torch.no_grad()
    def record(self, store: AttentionStore, timesteps: Sequence[int], noisy: bool, prompts: Prompts) -> None:
        """One pass a timestep under `store`, of the image with this timestep's noise or of the image as it is."""
        with attention_control(self.model.unet, store):
            for t in timesteps:
                x_t = self._noised(t) if noisy else self.latent
                self.model.predict(x_t.expand(len(prompts), -1, -1, -1), t, self.latent, prompts.tokens, prompts.pooled)

    def _noised(self, t: int) -> torch.Tensor:
        seed, image_id = self.identity
        generator = torch.Generator().manual_seed(derive_seed(seed, "baseline", image_id, t))
        noise = torch.randn(self.latent.shape, generator=generator).to(self.latent)
        alpha = self.model.alphas[t]
        return alpha.sqrt() * self.latent + (1 - alpha).sqrt() * noise


@dataclass(frozen=True)
class Recording:
    """The passes that cross-attention is recorded in, and with `own` self-attention on DiffPNG's grid, for every text.

    timesteps: one pass each; of no account where an inversion is replayed. noisy: of the noised image, or as it is.
    """

    timesteps: tuple[int, ...]
    noisy: bool
    own: bool
    inversion: Inversion | None = None

    def passes(self) -> tuple[int, int]:
        """U-Net passes for one text, and how many of them are followed by one back to the text; at most, with an inversion."""
        return (len(self.timesteps), 0) if self.inversion is None else replay_passes(self.inversion)


def recordings(params: Baselines) -> dict[str, Recording]:
    """What each of `METHODS` reads; methods with equal recordings share one."""
    inversion = params.diffpng.inversion
    timesteps = () if inversion is not None else tuple(params.diffpng.timesteps)
    diffpng = Recording(timesteps, noisy=True, own=True, inversion=inversion)
    return {
        "cross_attention": Recording(tuple(params.cross_attention.timesteps), noisy=True, own=True),
        "diffpng_cross": diffpng,
        "diffpng_cross_self": diffpng,
        "diffseg": Recording((params.diffseg.timestep,), noisy=False, own=False),
    }


SEGMENT_PASSES = 1
"""U-Net passes for one image, of the empty prompt, that DiffSeg's segments come from."""


def recorded_layers(params: Baselines, grids: Sequence[Grid], own: bool) -> set[tuple[str, Grid]]:
    """(kind, grid) of the attention that is recorded: cross on all grids, `own` as above."""
    return {("cross", grid) for grid in grids} | ({("self", nearest_grid(grids, params.diffpng.self_side))} if own else set())


def phrase_attention(image: Attended, recording: Recording) -> tuple[Recorded, Recorded]:
    """Cross-attention {grid: [K, N, L]} of every prompt on all grids, and where the recording has `own`, of the same passes,
    self-attention on DiffPNG's grid {grid: [K, N, N]}; mean over the timesteps, or over the replay of an inversion."""
    wanted = recorded_layers(image.params, image.grids, recording.own)
    parts = []
    for start in range(0, len(image.prompts), image.params.batch):
        prompts = image.prompts[start : start + image.params.batch]
        store = AttentionStore(select=lambda call: (call.kind, call.grid) in wanted)
        if recording.inversion is not None:
            record = partial(attention_control, image.model.unet, store)
            replay(image.model, image.latent, prompts, image.model.embed([""]), recording.inversion, record)
        else:
            image.record(store, recording.timesteps, recording.noisy, prompts)
        parts.append(store.maps)
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    cross = {grid: value for (kind, grid), value in joined.items() if kind == "cross"}
    return cross, {grid: value for (kind, grid), value in joined.items() if kind == "self"}


def diffseg_segments(image: Attended) -> NDArray[np.int64]:
    """DiffSeg's segments [H, W] at native size: self-attention of the empty prompt on all grids, without noise."""
    params, store = image.params.diffseg, AttentionStore(kinds=["self"])
    image.record(store, (params.timestep,), False, image.model.embed([""]))
    self_attention = {grid: value[0] for (_, grid), value in store.maps.items()}
    finest = max(self_attention)
    proposals = merge(aggregate(self_attention), anchor_indices(finest, params.anchors), params.tau, params.iterations)
    return segment(proposals, finest, *image.native)


@dataclass(frozen=True)
class Method:
    """maps: (image, texts of one narrative, whether they exclude each other) -> soft maps [K, h, w] in [0, 1] of any size.

    Texts that exclude each other (the classes of a list) are scaled together, so that a pixel can take the highest.
    chosen: whether the threshold is chosen on val; else every positive value counts (and the maps are no probabilities).
    """

    maps: Callable[[Attended, Sequence[str], bool], Maps]
    chosen: bool = True


def _cross_attention(image: Attended, texts: Sequence[str], exclusive: bool) -> Maps:
    """Mean cross-attention of the phrase's tokens over layers, heads and timesteps."""
    cross, _ = _recorded(image, "cross_attention")
    maps = combined_maps(_of(cross, image, texts), image.weights(texts))
    return minmax(lift(maps), exclusive).cpu().numpy()


def _diffpng_cross(image: Attended, texts: Sequence[str], exclusive: bool) -> Maps:
    """DiffPNG's phrase maps: one grid's cross-attention, tokens weighted by meaning."""
    return minmax(lift(_located(image, texts)), exclusive).cpu().numpy()


def _diffpng_cross_self(image: Attended, texts: Sequence[str], exclusive: bool) -> Maps:
    """DiffPNG's segmentation: the self-attention of the phrase map's anchors."""
    (grid, own), *_ = _recorded(image, "diffpng_cross_self")[1].items()
    anchors = locate(_located(image, texts), grid, image.params.diffpng.anchor)
    rows = [image.rows[text] for text in texts]
    return minmax(lift(spread(own[rows], anchors, grid)), exclusive).cpu().numpy()


def _recorded(image: Attended, method: str) -> tuple[Recorded, Recorded]:
    return image.once(phrase_attention, recordings(image.params)[method])


def _located(image: Attended, texts: Sequence[str]) -> torch.Tensor:
    cross, _ = _recorded(image, "diffpng_cross")
    grid = nearest_grid(cross, image.params.diffpng.cross_side)
    return phrase_maps(_of(cross, image, texts)[grid], grid, image.semantic_weights(texts))


def _diffseg(image: Attended, texts: Sequence[str], exclusive: bool) -> Maps:
    """DiffSeg's segments, shared out among the phrases; at native size."""
    cross, _ = _recorded(image, "diffseg")
    maps = lift(combined_maps(_of(cross, image, texts), image.weights(texts)))
    return assign(image.once(diffseg_segments), maps.cpu().numpy(), not exclusive)


def _of(cross: Recorded, image: Attended, texts: Sequence[str]) -> Recorded:
    rows = [image.rows[text] for text in texts]
    return {grid: part[rows] for grid, part in cross.items()}


METHODS = {
    "cross_attention": Method(_cross_attention),
    "diffpng_cross": Method(_diffpng_cross),
    "diffpng_cross_self": Method(_diffpng_cross_self),
    "diffseg": Method(_diffseg, chosen=False),
}
