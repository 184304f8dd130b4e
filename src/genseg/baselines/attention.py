"""Phrase maps from recorded attention, as pure functions.

A *grid* is the (h, w) of a layer's image tokens, N = h * w. Cross-attention is [K, N, L] for K phrases and L text tokens,
self-attention is [N, N]; rows sum to 1 (`models.attention_control.AttentionStore`).
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from genseg.artifacts.resample import bilinear, bilinear_matrix
from genseg.errors import UserError

Grid = tuple[int, int]
TINY = 1e-12
"""Added to denominators and probabilities, or their lower bound, to avoid division by zero and log(0)."""


# ----------------------------------------------------------------------------------------------------- phrase maps
def enlarge(maps: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Interpolate maps [K, h, w] bilinearly to a grid.

    With deterministic algorithms, torch's own interpolation would need several copies of the result on GPUs.
    """
    rows, columns = (
        torch.from_numpy(bilinear_matrix(source, target).toarray()).to(maps)
        for source, target in zip(maps.shape[1:], grid, strict=True)
    )
    return rows @ maps @ columns.T


def find_grid(grids: Iterable[Grid], side: int, key: str) -> Grid:
    """Return the grid of this side. Raises UserError with the `key` of the params if the U-Net has none."""
    by_side = {max(grid): grid for grid in grids}
    if side not in by_side:
        sides = ", ".join(map(str, sorted(by_side, reverse=True)))
        raise UserError(
            f"{key}: the U-Net has no attention on {side} x {side} tokens at this image size; its sides are {sides}"
        )
    return by_side[side]


def phrase_maps(cross: torch.Tensor, grid: Grid, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean [K, h, w] over each phrase's tokens of cross-attention [K, N, L], with weights [K, L]."""
    return torch.einsum("knl,kl->kn", cross, weights / weights.sum(1, keepdim=True)).unflatten(1, grid)


def combined_maps(cross: Mapping[Grid, torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Return the mean over grids of the phrase maps, resized to the finest grid (h, w) and weighted by height as in DiffSeg."""
    finest, total = max(cross), sum(grid[0] for grid in cross)
    parts = [enlarge(phrase_maps(part, grid, weights), finest) * (grid[0] / total) for grid, part in sorted(cross.items())]
    return torch.stack(parts).sum(0)


def divide_by_mean(maps: torch.Tensor) -> torch.Tensor:
    """Divide each map [K, h, w] by its mean, so that phrases whose attention is high everywhere become comparable."""
    return maps / maps.mean((1, 2), keepdim=True).clamp_min(TINY)


def minmax(maps: torch.Tensor, together: bool = False) -> torch.Tensor:
    """Scale maps [K, h, w] to [0, 1], each by its own range, or all by a common range if `together`; constants become 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    if together:
        low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
    span = high - low
    return torch.where(span > TINY, (maps - low) / span.clamp_min(TINY), torch.zeros_like(maps))


# --------------------------------------------------------------------------------------------------------- DiffPNG
def similarity_weights(embeddings: torch.Tensor) -> torch.Tensor:
    """Return DiffPNG's weights [M] of a phrase's tokens from the embeddings [M, P] of each token alone; they sum to 1.

    The scalar products of all pairs are scaled to [0, 1]; the weights are the softmax of those with the last token.
    """
    products = embeddings @ embeddings.T
    span = products.max() - products.min()
    return ((products[-1] - products.min()) / span.clamp_min(TINY)).softmax(-1)


def locate(maps: torch.Tensor, grid: Grid, anchor: float) -> torch.Tensor:
    """Return DiffPNG's anchors [K, N] bool: tokens of a grid where the min-max scaled phrase maps [K, h, w] exceed `anchor`."""
    return (minmax(enlarge(maps, grid)) > anchor).flatten(1)


def spread(self_attention: torch.Tensor, anchors: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return DiffPNG's maps [K, h, w]: the mean self-attention row [K, N, N] of the anchors [K, N], 0 without anchors."""
    # DiffPNG takes the sum. After min-max scaling both are equal, but only means are comparable between phrases.
    weights = anchors.to(self_attention) / anchors.sum(1, keepdim=True).clamp_min(1)
    return torch.einsum("kn,knm->km", weights, self_attention).unflatten(1, grid)


# --------------------------------------------------------------------------------------------------------- DiffSeg
def aggregate(self_attention: Mapping[Grid, torch.Tensor]) -> torch.Tensor:
    """Aggregate self-attention [N, N] of all grids to distributions [H * W, H * W] on the finest grid (H, W), as in DiffSeg.

    Rows are repeated and their maps interpolated bilinearly. The weight of a grid is proportional to its height.
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
    """Return the token indices of `side` x `side` evenly spaced anchors in the middle of the grid (fewer on a smaller one)."""
    axes = []
    for length in grid:
        count = min(side, length)
        step = (length - 1) // max(1, count - 1)
        axes.append((length - 1 - step * (count - 1)) // 2 + step * torch.arange(count))
    return (axes[0][:, None] * grid[1] + axes[1]).flatten()


def divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return (KL(p|q) + KL(q|p)) / 2 for all pairs of distributions p [A, M] and q [B, M], as [A, B]."""
    p, q = first + TINY, second + TINY
    log_p, log_q = p.log(), q.log()
    negative_entropies = (p * log_p).sum(1)[:, None] + (q * log_q).sum(1)
    return ((negative_entropies - p @ log_q.T - log_p @ q.T) / 2).clamp_min(0)


def merge(maps: torch.Tensor, anchors: torch.Tensor, tau: float, iterations: int = 3) -> torch.Tensor:
    """Merge distributions [M, M] into proposals [P, M], starting from anchors [A] (DiffSeg's iterative attention merging).

    The first iteration makes a proposal for every anchor: the mean of all distributions closer to it than tau. Each further
    iteration goes through the proposals in order; one that no earlier one was close to becomes the mean of all proposals closer
    to it than tau, including those that an earlier mean contains. This is the merging of the authors' program (google/diffseg,
    `mask_merge`) with its settings for COCO-Stuff: no k-means refinement.
    """
    near = (divergence(maps[anchors], maps) < tau).to(maps)
    near[torch.arange(len(anchors)), anchors] = 1  # rounding may make the divergence from itself nonzero
    proposals = near @ maps / near.sum(1, keepdim=True)
    for _ in range(iterations - 1):
        close = (divergence(proposals, proposals) < tau).cpu().numpy()
        np.fill_diagonal(close, True)
        matched, groups = np.zeros(len(proposals), bool), []
        for first in range(len(proposals)):
            if not matched[first]:
                matched |= close[first]
                groups.append(proposals[torch.from_numpy(close[first]).to(maps.device)].mean(0))
        proposals = torch.stack(groups)
    return proposals


def segment(proposals: torch.Tensor, grid: Grid, height: int, width: int) -> NDArray[np.int64]:
    """Return the index [height, width] of the highest proposal at every pixel; on a tie the first one."""
    return bilinear(proposals.float().unflatten(1, grid).cpu().numpy(), height, width).argmax(0)


def assign(segments: NDArray[np.int64], maps: NDArray[np.float32], every_phrase: bool) -> NDArray[np.float32]:
    """Assign each segment to the phrase whose map has the highest mean over it. This adapts DiffSeg to phrases.

    Args:
        segments: [H, W].
        maps: [K, h, w], non-negative and comparable between phrases.
        every_phrase: whether a phrase without segments gets the segment where its mean is highest. All phrases of a narrative
            are in the image, but not all classes of a list.

    Returns:
        [K, H, W]: in the segments of a phrase, its mean divided by the sum of all phrases' means, in (0, 1]; 0 elsewhere.
    """
    large = bilinear(maps, *segments.shape).reshape(len(maps), -1)
    _, index = np.unique(segments, return_inverse=True)
    index = index.ravel()
    means = np.stack([np.bincount(index, weights=row) for row in large]) / np.bincount(index)  # (K, segments)
    shares = (means + TINY) / (means + TINY).sum(0)
    wins = shares.argmax(0) == np.arange(len(maps))[:, None]
    if every_phrase:
        unassigned = np.flatnonzero(~wins.any(1))
        wins[unassigned, means[unassigned].argmax(1)] = True
    return np.where(wins, shares, 0).astype(np.float32)[:, index].reshape(len(maps), *segments.shape)
