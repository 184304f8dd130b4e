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
class Evidence:
    """What the features say of P, all [N]: P itself, discrepancy g in [0, 1], d_b - d_f (positive: nearer to the confident
    foreground), confusion area U. Outside U the middle two are 0; `silent`: there is no discrepancy anywhere."""

    before: torch.Tensor
    discrepancy: torch.Tensor
    nearer: torch.Tensor
    confusion: torch.Tensor
    silent: bool


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


def evidence(probability: torch.Tensor, distances: torch.Tensor, grid: tuple[int, int], refine: Refine) -> Evidence:
    """Hausdorff discrepancy and evidence of the cells in the confusion area.

    With Omega_f, Omega_b the confident cells and d_l(p) the mean of the k smallest distances to Omega_l:
    H(p) = max(d_l(F_o(p) -> F_g), d_l(F_g(p) -> F_o)) for p's own label l, whose maximum over p is the Hausdorff distance
    of the two sets; g = minmax(H) over the confusion area, 0 where H is constant; d_b - d_f is the mean of both directions.

    Args:
        probability: P [N].
        distances: D [N, N], rows of F_o, columns of F_g.
    """
    low, high = refine.confident
    area = confusion_area(probability, grid, low, high, refine.band)
    cells = area.nonzero()[:, 0]
    discrepancy, nearer = torch.zeros_like(probability), torch.zeros_like(probability)
    if not len(cells):
        return Evidence(probability, discrepancy, nearer, area, silent=True)
    regions = confident(probability, low, high)
    forward = [set_distance(distances[cells], region, refine.neighbours) for region in regions]
    backward = [set_distance(distances.T[cells], region, refine.neighbours) for region in regions]
    own = probability[cells] >= 0.5
    hausdorff = torch.maximum(torch.where(own, forward[0], forward[1]), torch.where(own, backward[0], backward[1]))
    spread = hausdorff.max() - hausdorff.min()
    if spread > 0:
        discrepancy[cells] = (hausdorff - hausdorff.min()) / spread
        nearer[cells] = (forward[1] + backward[1] - forward[0] - backward[0]) / 2
    return Evidence(probability, discrepancy, nearer, area, silent=not spread > 0)


def cuts(found: Evidence, levels: Sequence[float]) -> torch.Tensor:
    """Values [1 + K] at which the evidence may be cut: 0, where both regions are equally near, and its quantiles in U."""
    zero = found.nearer.new_zeros(1)
    if found.silent or not levels:
        return zero
    return torch.cat([zero, torch.quantile(found.nearer[found.confusion], found.nearer.new_tensor(levels))])


def hypothesis(found: Evidence, cut: torch.Tensor) -> torch.Tensor:
    """The mask [N] in {0, 1} that a cut makes inside U; outside it is P's own."""
    return torch.where(found.confusion, found.nearer > cut, found.before > 0.5).to(found.before)


def update(found: Evidence, cut: torch.Tensor | None, refine: Refine) -> Step:
    """P^{k+1} = P^k + (1 - beta) g 1_U (Q - P^k), Q = sigmoid((d_b - d_f - cut) / T).

    Outside U, where there is no discrepancy at all, and without a cut, P stays and Q is P.
    """
    target, after = found.before.clone(), found.before.clone()
    if cut is not None and not found.silent:
        area = found.confusion
        target[area] = torch.sigmoid((found.nearer[area] - cut) / refine.temperature)
        weight = (1 - refine.beta) * (found.discrepancy[area] if refine.gate else 1.0)
        after[area] += weight * (target[area] - after[area])
    return Step(found.before, found.discrepancy, target, found.confusion, after)
