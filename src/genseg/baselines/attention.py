"""What the attention baselines do with attention: pure functions of recorded maps.

A *grid* is the (h, w) of a layer's image tokens, N = h * w. Cross-attention is [K, N, L] for K phrases and L text tokens,
self-attention [N, N]; rows sum to 1 (`models.attention_control.AttentionStore`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from genseg.artifacts.resample import bilinear, bilinear_matrix

Grid = tuple[int, int]
TINY = 1e-12


# ----------------------------------------------------------------------------------------------------- phrase maps
def enlarge(maps: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Bilinear interpolation of maps [K, h, w] to a grid.

    By products with the axes' weights: torch's own needs several copies of the result where algorithms must be
    deterministic, on GPUs alone.
    """
    rows, columns = (
        torch.from_numpy(bilinear_matrix(source, target).toarray()).to(maps)
        for source, target in zip(maps.shape[1:], grid, strict=True)
    )
    return rows @ maps @ columns.T


def nearest_grid(grids: Iterable[Grid], side: int) -> Grid:
    """The grid whose height is nearest to `side`, the coarser of two."""
    return min(grids, key=lambda grid: (abs(grid[0] - side), grid))


def phrase_maps(cross: torch.Tensor, grid: Grid, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean over a phrase's tokens: cross-attention [K, N, L] and weights [K, L] -> maps [K, h, w]."""
    return torch.einsum("knl,kl->kn", cross, weights / weights.sum(1, keepdim=True)).unflatten(1, grid)


def combined_maps(cross: Mapping[Grid, torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Phrase maps [K, h, w] of all grids on the finest one, each in proportion to its side, as DiffSeg weighs them."""
    finest, total = max(cross), sum(grid[0] for grid in cross)
    parts = [enlarge(phrase_maps(part, grid, weights), finest) * (grid[0] / total) for grid, part in sorted(cross.items())]
    return torch.stack(parts).sum(0)


def lift(maps: torch.Tensor) -> torch.Tensor:
    """Each map [K, h, w] over its own mean: phrases whose tokens attract more attention everywhere become comparable."""
    return maps / maps.mean((1, 2), keepdim=True).clamp_min(TINY)


def minmax(maps: torch.Tensor, together: bool = False) -> torch.Tensor:
    """Maps [K, h, w] to [0, 1], each by its own range or all by one (`together`: they compete); constant ones to 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    if together:
        low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
    span = high - low
    return torch.where(span > TINY, (maps - low) / span.clamp_min(TINY), torch.zeros_like(maps))


# --------------------------------------------------------------------------------------------------------- DiffPNG
def locate(maps: torch.Tensor, grid: Grid, anchor: float) -> torch.Tensor:
    """DiffPNG's first step: phrase maps [K, h, w], enlarged and min-max scaled; anchors [K, N] bool are those over `anchor`."""
    return (minmax(enlarge(maps, grid)) > anchor).flatten(1)


def spread(self_attention: torch.Tensor, anchors: torch.Tensor, grid: Grid) -> torch.Tensor:
    """DiffPNG's second step: mean of the self-attention rows [K, N, N] at the anchors [K, N] -> maps [K, h, w].

    A mean, not its sum: scaled to [0, 1] it is the same, and maps of several phrases compare. Zero without an anchor.
    """
    weights = anchors.to(self_attention) / anchors.sum(1, keepdim=True).clamp_min(1)
    return torch.einsum("kn,knm->km", weights, self_attention).unflatten(1, grid)


# --------------------------------------------------------------------------------------------------------- DiffSeg
def aggregate(self_attention: Mapping[Grid, torch.Tensor]) -> torch.Tensor:
    """DiffSeg's attention aggregation: [N, N] of every grid -> distributions [H * W, H * W] on the finest grid (H, W).

    The last two dimensions are interpolated bilinearly, the first two repeated; weights in proportion to the side.
    """
    finest, total = max(self_attention), sum(grid[0] for grid in self_attention)
    result = torch.zeros(())
    for grid, maps in sorted(self_attention.items()):
        large = enlarge(maps.double().unflatten(1, grid), finest).flatten(1)
        large = large / large.sum(1, keepdim=True)
        rows, columns = (torch.arange(finest[axis]) * grid[axis] // finest[axis] for axis in (0, 1))
        result = result + large[(rows[:, None] * grid[1] + columns).flatten().to(large.device)] * (grid[0] / total)
    return result


def anchor_indices(grid: Grid, side: int) -> torch.Tensor:
    """Rows of an evenly spaced `side` x `side` grid of anchors, clipped to the grid that there is."""
    axes = [(torch.arange(min(side, length)) * 2 + 1) * length // (2 * min(side, length)) for length in grid]
    return (axes[0][:, None] * grid[1] + axes[1]).flatten()


def divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Half the symmetric Kullback-Leibler divergence, (KL(p|q) + KL(q|p)) / 2, of distributions [A, M] and [B, M]: [A, B]."""
    p, q = first + TINY, second + TINY
    log_p, log_q = p.log(), q.log()
    own = (p * log_p).sum(1)[:, None] + (q * log_q).sum(1)
    return ((own - p @ log_q.T - log_p @ q.T) / 2).clamp_min(0)


def merge(maps: torch.Tensor, anchors: torch.Tensor, tau: float, iterations: int) -> torch.Tensor:
    """DiffSeg's iterative merging: distributions [M, M] and anchors' rows [A] -> proposals [P, M].

    First every anchor becomes the mean of all maps nearer than tau; each further iteration goes through the proposals in
    order, and the first that belongs to no group takes all ungrouped ones nearer than tau into its own: their mean.
    """
    near = (divergence(maps[anchors], maps) < tau).to(maps)
    near[torch.arange(len(anchors)), anchors] = 1  # its own divergence is 0 but for rounding
    proposals = near @ maps / near.sum(1, keepdim=True)
    for _ in range(iterations - 1):
        close = (divergence(proposals, proposals) < tau).cpu().numpy()
        free, groups = np.ones(len(proposals), bool), []
        for first in range(len(proposals)):
            if free[first]:
                members = free & close[first]
                members[first] = True
                free &= ~members
                groups.append(proposals[torch.from_numpy(members).to(maps.device)].mean(0))
        proposals = torch.stack(groups)
    return proposals


def segment(proposals: torch.Tensor, grid: Grid, height: int, width: int) -> NDArray[np.int64]:
    """Segments [height, width]: at every pixel the proposal that is highest there; ties to the first."""
    return bilinear(proposals.float().unflatten(1, grid).cpu().numpy(), height, width).argmax(0)


def assign(segments: NDArray[np.int64], maps: NDArray[np.float32], every_phrase: bool) -> NDArray[np.float32]:
    """Our adaptation of DiffSeg to phrases: each segment goes to the phrase whose map has the highest mean over it.

    Args:
        segments: [H, W]. maps: [K, h, w], non-negative and comparable between phrases.
        every_phrase: a phrase that won nothing takes the segment of its own highest mean (a narrative's phrases are all
            grounded; the classes of a list are not all there).

    Returns:
        [K, H, W]: inside a phrase's segments its part of all phrases' means, in (0, 1]; 0 outside.
    """
    large = bilinear(maps, *segments.shape).reshape(len(maps), -1)
    _, index = np.unique(segments, return_inverse=True)
    index = index.ravel()
    means = np.stack([np.bincount(index, weights=row) for row in large]) / np.bincount(index)  # (K, segments)
    shares = (means + TINY) / (means + TINY).sum(0)
    wins = shares.argmax(0) == np.arange(len(maps))[:, None]
    if every_phrase:
        lost = np.flatnonzero(~wins.any(1))
        wins[lost, means[lost].argmax(1)] = True
    return np.where(wins, shares, 0).astype(np.float32)[:, index].reshape(len(maps), *segments.shape)
