"""The attention baselines: one soft map per phrase, from attention that is recorded once per image; methods share it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from genseg.artifacts.seeds import derive_seed
from genseg.artifacts.templates import fill_template
from genseg.baselines import attention
from genseg.baselines.attention import Grid
from genseg.baselines.captions import Query
from genseg.baselines.inversion import null_text_inversion, null_text_passes
from genseg.models.attention_control import AttentionStore, attention_control
from genseg.models.text_to_image import Prompts, TextToImage
from genseg.params.baselines import Baselines, Inversion

Maps = NDArray[np.float32]
ANY_POSITIVE = 1e-6
"""A threshold below every positive value of a map."""


def attention_grids(unet: Mapping[str, Any], height: int, width: int) -> list[Grid]:
    """Return the token grids of the transformer blocks for latents of height x width, finest first. `unet`: its config."""
    blocks = unet["down_block_types"]
    sizes, types = [(height, width)], [*blocks, unet.get("mid_block_type", "UNetMidBlock2DCrossAttn") or ""]
    for _ in blocks[1:]:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    sizes.append(sizes[-1])  # the middle block
    return list(dict.fromkeys(size for size, block in zip(sizes, types, strict=True) if "CrossAttn" in block))


@dataclass(eq=False)
class ImageAttention:
    """One image, its phrases, and the attention recorded for them, which is computed on first use."""

    model: TextToImage
    params: Baselines
    latent: torch.Tensor
    """[1, 4, h, w]."""
    native: tuple[int, int]
    """(height, width) of the image."""
    queries: Sequence[Query]
    """Unique phrases with their captions, at least one."""
    identity: tuple[int, object]
    """(study's seed, image_id), which determine the noise; all phrases of the image share it."""

    def __post_init__(self) -> None:
        self.grids = attention_grids(self.model.unet.config, *self.latent.shape[-2:])
        self._recorded: dict[Recording, dict[tuple[str, Grid], torch.Tensor]] = {}

    @cached_property
    def captioned(self) -> "EncodedQueries":
        """The phrases within their captions."""
        return EncodedQueries(self.model, {query: (query.prompt, query.start, query.end) for query in self.queries})

    @cached_property
    def alone(self) -> "EncodedQueries":
        """The phrases in the template `baselines.prompt`."""
        filled = {query: fill_template(self.params.prompt, query.phrase) for query in self.queries}
        return EncodedQueries(
            self.model, {query: (text, start, start + len(query.phrase)) for query, (text, start) in filled.items()}
        )

    def encoded(self, recording: "Recording") -> "EncodedQueries":
        """Return the prompts of a recording."""
        return self.captioned if recording.captioned else self.alone

    def recorded(self, method: str, kind: str, queries: Sequence[Query]) -> dict[Grid, torch.Tensor]:
        """Return the attention of one kind (cross or self) that one of `METHODS` records, with a row for each query."""
        recording = recordings(self.params)[method]
        rows = [self.encoded(recording).rows[query] for query in queries]
        if recording not in self._recorded:
            self._recorded[recording] = phrase_attention(self, recording)
        return {grid: maps[rows] for (each_kind, grid), maps in self._recorded[recording].items() if each_kind == kind}

    @cached_property
    def segments(self) -> NDArray[np.int64]:
        """DiffSeg's segments [H, W] at native size, from self-attention with the empty prompt and without noise."""
        params = self.params.diffseg
        grids = [attention.find_grid(self.grids, side, "baselines.diffseg.sides") for side in params.sides]
        store = AttentionStore(kinds=["self"], select=lambda call: call.grid in grids)
        self.record(store, (params.timestep,), False, self.model.embed([""]))
        self_attention = {grid: maps[0] for (_, grid), maps in store.maps.items()}
        finest = max(self_attention)
        proposals = attention.merge(
            attention.aggregate(self_attention), attention.anchor_indices(finest, params.anchors), params.tau
        )
        return attention.segment(proposals, finest, *self.native)

    def token_weights(self, method: str, queries: Sequence[Query]) -> torch.Tensor:
        """Return weights [K, L]: 1 for the tokens of each phrase in the prompt of a method, 0 for other tokens."""
        tokens = self.encoded(recordings(self.params)[method]).tokens
        return torch.stack([tokens[query] for query in queries]).float().to(self.model.device)

    def semantic_weights(self, queries: Sequence[Query]) -> torch.Tensor:
        """Return DiffPNG's weights [K, L] for the tokens of each phrase, 0 for other tokens.

        They compare the tokens with the last one, which is the head of most noun phrases: `attention.similarity_weights` of the
        pooled embeddings of the tokens, each encoded alone.
        """
        weights = self.token_weights("diffpng_cross", queries)
        for row, query in zip(weights, queries, strict=True):
            positions = row.nonzero()[:, 0]
            words = self.model.words(query.phrase)[: len(positions)]  # a phrase may be cut at the end of a piece of its caption
            embeddings = torch.stack([self.model.pooled_word(word) for word in words])
            row[positions] = attention.similarity_weights(embeddings)
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


class EncodedQueries:
    """The distinct prompts of an image's queries, embedded, with the row and the tokens [L] of each query."""

    def __init__(self, model: TextToImage, spans: Mapping[Query, tuple[str, int, int]]) -> None:
        numbers = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompt for prompt, _, _ in spans.values()))}
        self.prompts = model.embed(list(numbers))
        self.rows = {query: numbers[prompt] for query, (prompt, _, _) in spans.items()}
        self.tokens = {query: model.tokens_of(*span) for query, span in spans.items()}


@dataclass(frozen=True)
class Recording:
    """The forward passes in which attention is recorded for every prompt."""

    timesteps: tuple[int, ...]
    """Timesteps of one pass each; empty with an inversion."""
    noisy: bool
    """Whether noise is added to the latent."""
    captioned: bool
    """Whether the prompts are captions (as DiffPNG's and, for its labels, DiffSeg's), or one prompt per phrase."""
    self_attention: bool
    """Whether self-attention on DiffPNG's grid is recorded besides cross-attention."""
    inversion: Inversion | None = None
    """Inversion whose reconstruction passes are recorded."""

    def passes(self) -> tuple[int, int]:
        """Return the number of forward passes per prompt, and how many have a backward pass; upper bounds with an inversion."""
        return (len(self.timesteps), 0) if self.inversion is None else null_text_passes(self.inversion)


def recordings(params: Baselines) -> dict[str, Recording]:
    """Return the recording of each method; methods with equal recordings share one."""
    inversion = params.diffpng.inversion
    timesteps = () if inversion is not None else tuple(params.diffpng.timesteps)
    cross = Recording(tuple(params.cross_attention.timesteps), noisy=True, captioned=False, self_attention=False)
    diffpng = Recording(timesteps, noisy=True, captioned=True, self_attention=True, inversion=inversion)
    return {
        "cross_attention": cross,
        "diffpng_cross": diffpng,
        "diffpng_cross_self": diffpng,
        "diffpng_sam": diffpng,
        "diffseg": Recording((params.diffseg.timestep,), noisy=False, captioned=True, self_attention=False),
    }


SEGMENT_PASSES = 1
"""Forward passes per image, with the empty prompt, for DiffSeg's segments."""


def recorded_layers(params: Baselines, grids: Sequence[Grid], self_attention: bool) -> set[tuple[str, Grid]]:
    """Return the recorded (kind, grid) pairs: cross-attention on all grids, self-attention on DiffPNG's grid."""
    layers = {("cross", grid) for grid in grids}
    if not self_attention:
        return layers
    return layers | {("self", attention.find_grid(grids, params.diffpng.self_side, "baselines.diffpng.self_side"))}


def phrase_attention(image: ImageAttention, recording: Recording) -> dict[tuple[str, Grid], torch.Tensor]:
    """Record attention for all K prompts of an image, averaged over the forward passes.

    Returns:
        {("cross", grid): [K, N, L]} for all grids and, if recorded, {("self", grid): [K, N, N]} for DiffPNG's grid.
    """
    layers = recorded_layers(image.params, image.grids, recording.self_attention)
    batches, all_prompts = [], image.encoded(recording).prompts
    for start in range(0, len(all_prompts), image.params.batch):
        prompts = all_prompts[start : start + image.params.batch]
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

    maps: Callable[[ImageAttention, Sequence[Query], bool], Maps]
    """(image, queries of one narrative, exclusive) -> soft maps [K, h, w] in [0, 1], of any size. Exclusive phrases (classes
    of a list) are scaled together, so that a pixel can be assigned to the highest one."""
    section: str
    """Section of the params `baselines` with the method's settings."""
    sam: bool = False
    """Whether SAM's masks replace the thresholded map (`baselines.sam`); the soft maps are then not written."""
    choose_threshold: bool = True
    """Whether the threshold is chosen on val and the soft maps are written; else every positive value is foreground, and the
    maps are not probabilities."""


def _cross_attention(image: ImageAttention, queries: Sequence[Query], exclusive: bool) -> Maps:
    """Mean cross-attention of the phrase's tokens over layers, heads and timesteps."""
    weights = image.token_weights("cross_attention", queries)
    maps = attention.combined_maps(image.recorded("cross_attention", "cross", queries), weights)
    return attention.minmax(attention.divide_by_mean(maps), exclusive).cpu().numpy()


def _diffpng_cross(image: ImageAttention, queries: Sequence[Query], exclusive: bool) -> Maps:
    """DiffPNG's phrase maps: cross-attention on one grid, tokens weighted by similarity to the last one."""
    return attention.minmax(attention.divide_by_mean(_diffpng_phrase_maps(image, queries)), exclusive).cpu().numpy()


def _diffpng_cross_self(image: ImageAttention, queries: Sequence[Query], exclusive: bool) -> Maps:
    """DiffPNG's segmentation: the self-attention of the phrase map's anchors."""
    ((grid, self_attention),) = image.recorded("diffpng_cross_self", "self", queries).items()
    anchors = attention.locate(_diffpng_phrase_maps(image, queries), grid, image.params.diffpng.anchor)
    return attention.minmax(attention.divide_by_mean(attention.spread(self_attention, anchors, grid)), exclusive).cpu().numpy()


def _diffpng_phrase_maps(image: ImageAttention, queries: Sequence[Query]) -> torch.Tensor:
    cross = image.recorded("diffpng_cross", "cross", queries)
    grid = attention.find_grid(cross, image.params.diffpng.cross_side, "baselines.diffpng.cross_side")
    return attention.phrase_maps(cross[grid], grid, image.semantic_weights(queries))


def _diffseg(image: ImageAttention, queries: Sequence[Query], exclusive: bool) -> Maps:
    """DiffSeg's segments at native size, assigned to the phrases."""
    maps = attention.combined_maps(image.recorded("diffseg", "cross", queries), image.token_weights("diffseg", queries))
    return attention.assign(image.segments, attention.divide_by_mean(maps).cpu().numpy(), not exclusive)


METHODS = {
    "cross_attention": Method(_cross_attention, "cross_attention"),
    "diffpng_cross": Method(_diffpng_cross, "diffpng"),
    "diffpng_cross_self": Method(_diffpng_cross_self, "diffpng"),
    "diffpng_sam": Method(_diffpng_cross_self, "diffpng", sam=True),
    "diffseg": Method(_diffseg, "diffseg", choose_threshold=False),
}
