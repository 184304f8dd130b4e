"""G4Seg's arithmetic, free of networks: correspondence distances, Hausdorff discrepancy, confusion area, update.

A reimplementation: the paper's equations and values are not public, every choice is a param. N = h * w cells of the
feature grid, P [N] the foreground probability, D [N, N] correspondence distances between two sets of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from genseg.params import Refine

LEAST_CONFIDENT = 0.05
"""Where no cell is confident, this part of the cells is: the most and the least probable ones."""


@dataclass
class Step:
    """What one update saw and did, all [N]: P before, discrepancy g in [0, 1], target Q, confusion area U, P after."""

    before: torch.Tensor
    discrepancy: torch.Tensor
    target: torch.Tensor
    confusion: torch.Tensor
    after: torch.Tensor


def unit_features(feature: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Features [B, C, h', w'] on a grid (bilinear), without their mean over the picture, L2-normalised: [B, N, C]."""
    if feature.shape[-2:] != grid:
        feature = F.interpolate(feature, grid, mode="bilinear")
    cells = feature.float().flatten(2).transpose(1, 2)
    return F.normalize(cells - cells.mean(1, keepdim=True), dim=-1)


def correspondence(original: Sequence[torch.Tensor], generated: Sequence[torch.Tensor]) -> torch.Tensor:
    """D = 1 - F_o F_g^T [B, N, N], averaged over layers, timesteps and noises; in [0, 2]."""
    similar = original[0] @ generated[0].transpose(1, 2)
    for f_o, f_g in zip(original[1:], generated[1:], strict=True):
        similar += f_o @ f_g.transpose(1, 2)
    return 1 - similar / len(original)


def squared_offsets(grid: tuple[int, int], device: torch.device | None = None) -> torch.Tensor:
    """Squared distance [N, N] between cells, in units of the picture's side."""
    ys, xs = torch.meshgrid(*((torch.arange(side, device=device) + 0.5) / side for side in grid), indexing="ij")
    places = torch.stack([ys.flatten(), xs.flatten()], dim=1)
    return (places[:, None] - places[None]).square().sum(-1)


def confident(probability: torch.Tensor, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells taken for foreground (P >= high) and background (P <= low), as indices; never empty."""
    least = max(1, round(LEAST_CONFIDENT * len(probability)))
    foreground, background = (probability >= high).nonzero()[:, 0], (probability <= low).nonzero()[:, 0]
    if not len(foreground):
        foreground = probability.topk(least).indices
    if not len(background):
        background = (-probability).topk(least).indices
    return foreground, background


def set_distance(distances: torch.Tensor, members: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Mean distance to the `neighbours` nearest members of a set: [n] for D [n, N]."""
    part = distances[:, members]
    return part.topk(min(neighbours, part.shape[1]), dim=1, largest=False).values.mean(1)


def confusion_area(probability: torch.Tensor, grid: tuple[int, int], low: float, high: float, band: float) -> torch.Tensor:
    """U [N] bool: undecided cells (low < P < high) and a band about the mask's boundary, `band` of the side to each side."""
    radius = round(band * max(grid))
    mask = (probability > 0.5).float().view(1, 1, *grid)
    size = 2 * radius + 1
    grown = F.max_pool2d(mask, size, 1, radius)
    shrunk = 1 - F.max_pool2d(1 - mask, size, 1, radius)
    return (grown > shrunk).flatten() | ((probability > low) & (probability < high))


def update(probability: torch.Tensor, distances: torch.Tensor, grid: tuple[int, int], refine: Refine) -> Step:
    """P^{k+1} = P^k + (1 - beta) g 1_U (Q - P^k).

    With Omega_f, Omega_b the confident cells and d_l(p) the mean of the k smallest distances to Omega_l:
    H(p) = max(d_l(F_o(p) -> F_g), d_l(F_g(p) -> F_o)) for p's own label l, whose maximum over p is the Hausdorff distance
    of the two sets; g = minmax(H) over the confusion area, 0 where H is constant; Q = sigmoid((d_b - d_f) / T), d the mean
    of both directions. Outside U, and where there is no discrepancy at all, P stays and Q is P.

    Args:
        probability: P^k [N].
        distances: D [N, N], rows of F_o, columns of F_g.
    """
    low, high = refine.confident
    area = confusion_area(probability, grid, low, high, refine.band)
    cells = area.nonzero()[:, 0]
    discrepancy, target, after = torch.zeros_like(probability), probability.clone(), probability.clone()
    if len(cells):
        regions = confident(probability, low, high)
        forward = [set_distance(distances[cells], region, refine.neighbours) for region in regions]
        backward = [set_distance(distances.T[cells], region, refine.neighbours) for region in regions]
        own = probability[cells] >= 0.5
        hausdorff = torch.maximum(torch.where(own, forward[0], forward[1]), torch.where(own, backward[0], backward[1]))
        spread = hausdorff.max() - hausdorff.min()
        if spread > 0:
            discrepancy[cells] = (hausdorff - hausdorff.min()) / spread
            nearer = (forward[1] + backward[1] - forward[0] - backward[0]) / 2
            target[cells] = torch.sigmoid(nearer / refine.temperature)
            weight = (1 - refine.beta) * (discrepancy[cells] if refine.gate else 1.0)
            after[cells] += weight * (target[cells] - after[cells])
    return Step(probability, discrepancy, target, area, after)
