"""The attention baselines: one soft map per phrase, from attention that is recorded once per image; methods share it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray

from genseg.artifacts.seeds import derive_seed
from genseg.baselines import attention
from genseg.baselines.attention import Grid
from genseg.baselines.inversion import null_text_inversion, null_text_passes
from genseg.models.attention_control import AttentionStore, attention_control
from genseg.models.text_to_image import Prompts, TextToImage
from genseg.params.baselines import Baselines, Inversion

Maps = NDArray[np.float32]
ANY_POSITIVE = 1e-6
"""A threshold below every positive value of a map."""


def attention_grids(unet: UNet2DConditionModel, height: int, width: int) -> list[Grid]:
    """Return the token grids of the U-Net's transformer blocks for latents of height x width, finest first."""
    grids = []
    for block in unet.config.down_block_types:
        if "CrossAttn" in block:
            grids.append((height, width))
        height, width = -(-height // 2), -(-width // 2)
    return grids


@dataclass(eq=False)
class ImageAttention:
    """One image, its phrases, and the attention recorded for them, which is computed on first use."""

    model: TextToImage
    params: Baselines
    latent: torch.Tensor
    """[1, 4, h, w]."""
    native: tuple[int, int]
    """(height, width) of the image."""
    texts: Sequence[str]
    """Unique phrases, at least one."""
    identity: tuple[int, object]
    """(study's seed, image_id), which determine the noise; all phrases of the image share it."""

    def __post_init__(self) -> None:
        self.rows = {text: row for row, text in enumerate(self.texts)}
        self.prompts = self.model.embed(list(self.texts), self.params.prompt)
        self.grids = attention_grids(self.model.unet, *self.latent.shape[-2:])
        self._recorded: dict[Recording, dict[tuple[str, Grid], torch.Tensor]] = {}

    def recorded(self, method: str, kind: str, texts: Sequence[str]) -> dict[Grid, torch.Tensor]:
        """Return the attention of one kind (cross or self) that one of `METHODS` records, with a row for each text."""
        recording, rows = recordings(self.params)[method], [self.rows[text] for text in texts]
        if recording not in self._recorded:
            self._recorded[recording] = phrase_attention(self, recording)
        return {grid: maps[rows] for (each_kind, grid), maps in self._recorded[recording].items() if each_kind == kind}

    @cached_property
    def segments(self) -> NDArray[np.int64]:
        """DiffSeg's segments [H, W] at native size, from self-attention with the empty prompt and without noise."""
        params, store = self.params.diffseg, AttentionStore(kinds=["self"])
        self.record(store, (params.timestep,), False, self.model.embed([""]))
        self_attention = {grid: maps[0] for (_, grid), maps in store.maps.items()}
        finest = max(self_attention)
        proposals = attention.merge(
            attention.aggregate(self_attention), attention.anchor_indices(finest, params.anchors), params.tau
        )
        return attention.segment(proposals, finest, *self.native)

    def token_weights(self, texts: Sequence[str]) -> torch.Tensor:
        """Return weights [K, L]: 1 for the tokens of each phrase, 0 for other tokens."""
        return self.prompts.phrase_tokens[[self.rows[text] for text in texts]].float()

    def semantic_weights(self, texts: Sequence[str]) -> torch.Tensor:
        """Return DiffPNG's weights [K, L] for the tokens of each phrase, 0 for other tokens.

        A weight is the cosine similarity between the pooled embeddings of the token (encoded alone) and of the prompt, where
        negative values become 0. If all are 0, the weights of the phrase's tokens are 1.
        """
        weights = self.token_weights(texts)
        for row, text in zip(weights, texts, strict=True):
            positions = row.nonzero()[:, 0]
            words = self.model.words(text)[: len(positions)]  # a long prompt is truncated
            embeddings = torch.stack([self.model.pooled_word(word) for word in words])
            cosines = torch.cosine_similarity(embeddings, self.prompts.pooled[self.rows[text]].float(), dim=-1).clamp_min(0)
            if cosines.sum() > 0:
                row[positions] = cosines
        return weights

    @torch.no_grad()
    def record(self, store: AttentionStore, timesteps: Sequence[int], noisy: bool, prompts: Prompts) -> None:
        """Run one forward pass per timestep under `store`, on the latent with that timestep's noise or without noise."""
        with attention_control(self.model.unet, store):
            for t in timesteps:
                x_t = self._add_noise(t) if noisy else self.latent
                self.model.predict(x_t.expand(len(prompts), -1, -1, -1), t, self.latent, prompts.tokens, prompts.pooled)

    def _add_noise(self, t: int) -> torch.Tensor:
        seed, image_id = self.identity
        generator = torch.Generator().manual_seed(derive_seed(seed, "baseline", image_id, t))
        noise = torch.randn(self.latent.shape, generator=generator).to(self.latent)
        alpha = self.model.alphas[t]
        return alpha.sqrt() * self.latent + (1 - alpha).sqrt() * noise


@dataclass(frozen=True)
class Recording:
    """The forward passes in which attention is recorded for every text."""

    timesteps: tuple[int, ...]
    """Timesteps of one pass each; empty with an inversion."""
    noisy: bool
    """Whether noise is added to the latent."""
    self_attention: bool
    """Whether self-attention on DiffPNG's grid is recorded besides cross-attention."""
    inversion: Inversion | None = None
    """Inversion whose reconstruction passes are recorded."""

    def passes(self) -> tuple[int, int]:
        """Return the number of forward passes per text, and how many have a backward pass; upper bounds with an inversion."""
        return (len(self.timesteps), 0) if self.inversion is None else null_text_passes(self.inversion)


def recordings(params: Baselines) -> dict[str, Recording]:
    """Return the recording of each method in `baselines.attention`; methods with equal recordings share one."""
    inversion = params.diffpng.inversion
    timesteps = () if inversion is not None else tuple(params.diffpng.timesteps)
    diffpng = Recording(timesteps, noisy=True, self_attention=True, inversion=inversion)
    by_method = {
        "cross_attention": Recording(tuple(params.cross_attention.timesteps), noisy=True, self_attention=True),
        "diffpng_cross": diffpng,
        "diffpng_cross_self": diffpng,
        "diffseg": Recording((params.diffseg.timestep,), noisy=False, self_attention=False),
    }
    return {method: by_method[method] for method in params.attention}


SEGMENT_PASSES = 1
"""Forward passes per image, with the empty prompt, for DiffSeg's segments."""


def recorded_layers(params: Baselines, grids: Sequence[Grid], self_attention: bool) -> set[tuple[str, Grid]]:
    """Return the recorded (kind, grid) pairs: cross-attention on all grids, self-attention on DiffPNG's grid."""
    layers = {("cross", grid) for grid in grids}
    return layers | {("self", attention.nearest_grid(grids, params.diffpng.self_side))} if self_attention else layers


def phrase_attention(image: ImageAttention, recording: Recording) -> dict[tuple[str, Grid], torch.Tensor]:
    """Record attention for all K texts of an image, averaged over the forward passes.

    Returns:
        {("cross", grid): [K, N, L]} for all grids and, if recorded, {("self", grid): [K, N, N]} for DiffPNG's grid.
    """
    layers = recorded_layers(image.params, image.grids, recording.self_attention)
    batches = []
    for start in range(0, len(image.prompts), image.params.batch):
        prompts = image.prompts[start : start + image.params.batch]
        store = AttentionStore(select=lambda call: (call.kind, call.grid) in layers)
        if recording.inversion is not None:
            record = partial(attention_control, image.model.unet, store)
            null_text_inversion(image.model, image.latent, prompts, image.model.embed([""]), recording.inversion, record)
        else:
            image.record(store, recording.timesteps, recording.noisy, prompts)
        batches.append(store.maps)
    return {key: torch.cat([maps[key] for maps in batches]) for key in batches[0]}


@dataclass(frozen=True)
class Method:
    """A method of the attention baselines."""

    maps: Callable[[ImageAttention, Sequence[str], bool], Maps]
    """(image, texts of one narrative, exclusive) -> soft maps [K, h, w] in [0, 1], of any size. Exclusive texts (the classes
    of a list) are scaled together, so that a pixel can be assigned to the highest one."""
    section: str
    """Section of the params `baselines` with the method's settings."""
    choose_threshold: bool = True
    """Whether the threshold is chosen on val and the soft maps are written; else every positive value is foreground, and the
    maps are not probabilities."""


def _cross_attention(image: ImageAttention, texts: Sequence[str], exclusive: bool) -> Maps:
    """Mean cross-attention of the phrase's tokens over layers, heads and timesteps."""
    maps = attention.combined_maps(image.recorded("cross_attention", "cross", texts), image.token_weights(texts))
    return attention.minmax(attention.divide_by_mean(maps), exclusive).cpu().numpy()


def _diffpng_cross(image: ImageAttention, texts: Sequence[str], exclusive: bool) -> Maps:
    """DiffPNG's phrase maps: cross-attention on one grid, tokens weighted by similarity to the prompt."""
    return attention.minmax(attention.divide_by_mean(_diffpng_phrase_maps(image, texts)), exclusive).cpu().numpy()


def _diffpng_cross_self(image: ImageAttention, texts: Sequence[str], exclusive: bool) -> Maps:
    """DiffPNG's segmentation: the self-attention of the phrase map's anchors."""
    ((grid, self_attention),) = image.recorded("diffpng_cross_self", "self", texts).items()
    anchors = attention.locate(_diffpng_phrase_maps(image, texts), grid, image.params.diffpng.anchor)
    return attention.minmax(attention.divide_by_mean(attention.spread(self_attention, anchors, grid)), exclusive).cpu().numpy()


def _diffpng_phrase_maps(image: ImageAttention, texts: Sequence[str]) -> torch.Tensor:
    cross = image.recorded("diffpng_cross", "cross", texts)
    grid = attention.nearest_grid(cross, image.params.diffpng.cross_side)
    return attention.phrase_maps(cross[grid], grid, image.semantic_weights(texts))


def _diffseg(image: ImageAttention, texts: Sequence[str], exclusive: bool) -> Maps:
    """DiffSeg's segments at native size, assigned to the phrases."""
    maps = attention.combined_maps(image.recorded("diffseg", "cross", texts), image.token_weights(texts))
    return attention.assign(image.segments, attention.divide_by_mean(maps).cpu().numpy(), not exclusive)


METHODS = {
    "cross_attention": Method(_cross_attention, "cross_attention"),
    "diffpng_cross": Method(_diffpng_cross, "diffpng"),
    "diffpng_cross_self": Method(_diffpng_cross_self, "diffpng"),
    "diffseg": Method(_diffseg, "diffseg", choose_threshold=False),
}
