"""The steps of G4Seg (ours) for a block of phrases.

A reimplementation: the paper's equations and values are not public, so most choices are params. The sections of this file
are these steps:

    1. Setup               latents z_0 = E(I), noise, prompt with phrase tokens S, P^0 from the coarse mask
    2. Injection           P^k in cross- and self-attention, with strength alpha
    3. Generation          z0_hat from z_t in one step, under the injected mask
    4. Features            F_o of z_0 and F_g of z0_hat, from forward passes without injection
    5. Discrepancy         distances D = 1 - F_o F_g^T, confusion area U, discrepancy g, margin d_b - d_f
    6. Choice of the cut   threshold of the margin under whose mask the generated image is nearest to z_0
    7. Update              P^{k+1} = P^k + (1 - beta) g 1_U (Q - P^k)
    8. Read-out            mask at native size from P^K and the coarse mask, by a dense CRF

`refine_block` runs all of them, `run_iterations` repeats steps 2 to 7. A block has B phrases; the feature grid has N = h * w
cells; P [N] is the foreground probability and D [N, N] are the distances between two sets of features.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from genseg.artifacts import masks
from genseg.artifacts.masks import Mask
from genseg.artifacts.parquet import KEY
from genseg.artifacts.resample import Map, area_reduce, bilinear
from genseg.artifacts.seeds import derive_seed
from genseg.models.attention_control import MaskInjection, attention_control
from genseg.models.text_to_image import TextToImage
from genseg.models.vae import image_tensor
from genseg.params.refine import Refine
from genseg.refine.crf import Kernels, binary_crf
from genseg.refine.inputs import load_picture

MIN_PROBABILITY = 0.05
"""P^0 is clipped to [MIN_PROBABILITY, 1 - MIN_PROBABILITY], so that a hard coarse mask can be revised."""
CONFIDENT_FRACTION = 0.05
"""Fraction of the cells, the most or the least probable ones, that form a confident region if no cell reaches its threshold."""


@dataclass
class Evidence:
    """Evidence from the features in one iteration; tensors are [N]. g and the margin are 0 outside U."""

    probability: torch.Tensor  # P^k in [0, 1]
    discrepancy: torch.Tensor  # g in [0, 1]
    margin: torch.Tensor  # d_b - d_f, positive where a cell is nearer to the confident foreground
    confusion: torch.Tensor  # confusion area U, bool

    @property
    def is_constant(self) -> bool:
        """Whether U is empty or H (see `evidence`) is constant in it; then g and the margin are 0 everywhere."""
        return not self.discrepancy.any()


@dataclass
class Update(Evidence):
    """One iteration of one phrase: the evidence, and the target and probability that follow from it."""

    target: torch.Tensor  # Q in [0, 1]
    after: torch.Tensor  # P^{k+1} in [0, 1]


@dataclass
class RefinedMask:
    """Result of refining one mask; arrays are [H, W] at native size."""

    mask: Mask
    area: Mask  # pixels that were allowed to change
    change: Map  # change of the foreground probability; 0 outside `area`

    def apply(self, soft: Map, side: int) -> Map:
        """Add the change to a soft map [H, W] in [0, 1] and reduce the sum to [side, side]."""
        return area_reduce(np.where(self.area, np.clip(soft + self.change, 0, 1), soft), side, side)


@dataclass
class Trace:
    """One phrase with all intermediate results of its refinement."""

    key: tuple[Any, ...]  # (image_id, narrative_id, phrase_id)
    phrase: str
    picture: NDArray[np.uint8]  # [H, W, 3], native
    coarse: Mask  # [H, W], native
    result: RefinedMask
    updates: list[Update] = field(default_factory=list)  # one per iteration; none for a mask that is empty or full
    generated: list[torch.Tensor] = field(default_factory=list)
    """z0_hat [4, h', w'] of each iteration at the first timestep; empty without generation."""


def refine_block(rows: pd.DataFrame, model: TextToImage, refine: Refine, seed: int) -> Iterator[Trace]:
    """Refine the masks of a block of phrases, each phrase alone, and yield their traces in order.

    A mask that is empty or full has no boundary and is unchanged. Raises UserError as `load_picture` does.

    Args:
        rows: predictions joined with `file_name`, `phrase`, `height` and `width` of their phrases.
    """
    traces = load_traces(rows)
    refinable = [trace for trace in traces if trace.coarse.any() and not trace.coarse.all()]
    p_0 = {trace.key: first_probability(trace.coarse, refine) for trace in refinable}
    if refinable and refine.iterations:
        run_iterations(refinable, torch.stack(list(p_0.values())), model, refine, seed)
    kernels: dict[Any, Kernels] = {}  # of each image
    for trace in traces:
        if trace.key in p_0:
            trace.result = _read_out_trace(trace, p_0[trace.key], refine, kernels)
        yield trace


def run_iterations(traces: list[Trace], probability: torch.Tensor, model: TextToImage, refine: Refine, seed: int) -> None:
    """Run steps 2 to 7 `refine.iterations` times from P^0 [B, N], and append each iteration's update to the traces."""
    block = PhraseBlock(traces, model, refine, seed)
    probability = probability.to(model.device)
    original = reference_features(block)
    offsets = refine.spatial_weight * squared_offsets(block.grid, model.device)
    matching = correspondence(original, original)
    under_mask: torch.Tensor | None = None
    for _ in range(refine.iterations):
        # Generate under P^k (without injection, all iterations generate the same image) and measure D.
        distances = matching
        if refine.generation:
            if under_mask is None or refine.alpha:
                under_mask = correspondence(original, generated_features(block, probability))
            distances = torch.lerp(matching, under_mask, refine.generation)
        distances = distances + offsets

        # Weigh the evidence, choose the cut of each phrase, and update P.
        evidences = [evidence(p, d, block.grid, refine) for p, d in zip(probability, distances, strict=True)]
        chosen = choose_cuts(block, evidences)
        updates = [update(observed, cut, refine) for observed, cut in zip(evidences, chosen, strict=True)]
        for trace, step in zip(traces, updates, strict=True):
            trace.updates.append(step)
        probability = torch.stack([step.after for step in updates])


# ----------------------------------------------------------------------------------------------------------- 1. Setup
def load_traces(rows: pd.DataFrame) -> list[Trace]:
    """Return traces of unchanged masks. Rows are as in `refine_block`. Raises UserError as `load_picture` does."""
    files = list(rows[["file_name", "height", "width"]].itertuples(index=False, name=None))
    pictures = {file: load_picture(*file) for file in dict.fromkeys(files)}
    traces = []
    for file, row in zip(files, rows.to_dict("records"), strict=True):
        coarse = masks.decode(row["mask"], row["height"], row["width"])
        unchanged = RefinedMask(coarse, np.zeros_like(coarse), np.zeros(coarse.shape, np.float32))
        key = tuple(row[column] for column in KEY)
        traces.append(Trace(key, row["phrase"], pictures[file], coarse, unchanged))
    return traces


def first_probability(coarse: Mask, refine: Refine) -> torch.Tensor:
    """Return P^0 [N]: the coarse mask [H, W], area-reduced to the feature grid and clipped away from 0 and 1."""
    reduced = area_reduce(coarse, refine.feature_size, refine.feature_size)
    return torch.from_numpy(reduced.clip(MIN_PROBABILITY, 1 - MIN_PROBABILITY)).flatten()


class PhraseBlock:
    """Inputs of the networks that are the same in all iterations.

    Attributes:
        latents: z_0 [B, 4, h', w'] of each phrase's image.
        noise: [B, 4, h', w'], the same for all phrases of an image, in any block.
        prompts: prompts of the B phrases; `phrase_tokens` is S.
    """

    def __init__(self, traces: Sequence[Trace], model: TextToImage, refine: Refine, seed: int) -> None:
        self.traces, self.model, self.refine = traces, model, refine
        self.grid = (refine.feature_size, refine.feature_size)
        latents, noise = {}, {}
        for image_id, picture in {trace.key[0]: trace.picture for trace in traces}.items():
            latent = model.encode(image_tensor(Image.fromarray(picture), refine.size)[None])[0].float()
            generator = torch.Generator().manual_seed(derive_seed(seed, "g4seg noise", image_id, 0))
            latents[image_id], noise[image_id] = latent, torch.randn(latent.shape, generator=generator).to(latent)
        self.latents = torch.stack([latents[trace.key[0]] for trace in traces])
        self.noise = torch.stack([noise[trace.key[0]] for trace in traces])
        self.prompts = model.embed([trace.phrase for trace in traces], refine.prompt)


def add_noise(block: PhraseBlock, z: torch.Tensor, t: int) -> torch.Tensor:
    """Return z_t = sqrt(alpha_bar_t) z + sqrt(1 - alpha_bar_t) noise."""
    alpha_bar = block.model.alphas[t]
    return alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * block.noise


# ------------------------------------------------------------------------------------------------------- 2. Injection
def injection(block: PhraseBlock, probability: torch.Tensor | None) -> AbstractContextManager[None]:
    """Return a context in which the U-Net's attention is conditioned on M = P [B, N]; the stock network if P is None.

    Cross-attention A: A' = (1 - alpha) A + alpha T, with T[n, j] = M[n] A[n, j] / sum_{i in S} A[n, i] for j in S and
    (1 - M[n]) A[n, j] / sum_{i not in S} A[n, i] for other tokens. Self-attention W: W' = (1 - alpha) W + alpha rownorm(W * G),
    with G = M M^T + (1 - M) (1 - M)^T. Both are computed by `MaskInjection`.
    """
    if probability is None:
        return nullcontext()
    refine, mask = block.refine, probability.view(-1, *block.grid)
    control = MaskInjection(mask, block.prompts.phrase_tokens, refine.alpha, refine.inject)
    return attention_control(block.model.unet, control)


# ------------------------------------------------------------------------------------------------------ 3. Generation
@torch.no_grad()
def predict(block: PhraseBlock, z_t: torch.Tensor, t: int) -> torch.Tensor:
    """Return the U-Net's output [B, 4, h', w'] at z_t, in float32."""
    return block.model.predict(z_t, t, block.latents[:1], block.prompts.tokens, block.prompts.pooled).float()


def generate(block: PhraseBlock, t: int, probability: torch.Tensor | None) -> torch.Tensor:
    """Return z0_hat [B, 4, h', w'], generated from z_t in one step under the mask P [B, N], or without a mask if P is None."""
    z_t, alpha_bar = add_noise(block, block.latents, t), block.model.alphas[t]
    with injection(block, probability):
        predicted = predict(block, z_t, t)
    if block.model.prediction_type == "v_prediction":
        return alpha_bar.sqrt() * z_t - (1 - alpha_bar).sqrt() * predicted
    return (z_t - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()


# -------------------------------------------------------------------------------------------------------- 4. Features
def unit_features(feature: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return F [B, N, C]: features [B, C, h', w'] resized to the grid (bilinear), centred over the image, L2-normalised."""
    if feature.shape[-2:] != grid:
        feature = F.interpolate(feature, grid, mode="bilinear")
    cells = feature.float().flatten(2).transpose(1, 2)
    return F.normalize(cells - cells.mean(1, keepdim=True), dim=-1)


def features(block: PhraseBlock, z: torch.Tensor, t: int) -> list[torch.Tensor]:
    """Return the unit features [B, N, C] of latents z noised to timestep t, one tensor per layer, without injection."""
    with up_block_outputs(block.model.unet, block.refine.layers) as outputs:
        predict(block, add_noise(block, z, t), t)
    return [unit_features(outputs[layer], block.grid) for layer in block.refine.layers]


def reference_features(block: PhraseBlock) -> list[torch.Tensor]:
    """Return F_o of the original or, by `refine.reference`, of the image generated without a mask."""
    references = []
    for t in block.refine.timesteps:
        z = block.latents if block.refine.reference == "original" else generate(block, t, None)
        references += features(block, z, t)
    return references


def generated_features(block: PhraseBlock, probability: torch.Tensor) -> list[torch.Tensor]:
    """Return F_g of the images generated under P [B, N]; the latents of the first timestep are added to the traces."""
    generated = []
    for number, t in enumerate(block.refine.timesteps):
        z = generate(block, t, probability)
        if number == 0:
            for trace, latent in zip(block.traces, z, strict=True):
                trace.generated.append(latent)
        generated += features(block, z, t)
    return generated


@contextmanager
def up_block_outputs(unet: Any, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the outputs [B, C, h, w] of up-blocks, by their index, from the last forward pass inside the context."""
    outputs: dict[int, torch.Tensor] = {}

    def store_output(layer: int, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
        outputs[layer] = output

    hooks = [unet.up_blocks[layer].register_forward_hook(partial(store_output, layer)) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


# ----------------------------------------------------------------------------------------------------- 5. Discrepancy
def correspondence(original: Sequence[torch.Tensor], generated: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return D = 1 - F_o F_g^T [B, N, N] in [0, 2], averaged over layers and timesteps."""
    similarity = original[0] @ generated[0].transpose(1, 2)
    for f_o, f_g in zip(original[1:], generated[1:], strict=True):
        similarity += f_o @ f_g.transpose(1, 2)
    return 1 - similarity / len(original)


def squared_offsets(grid: tuple[int, int], device: torch.device | None = None) -> torch.Tensor:
    """Return the squared distances [N, N] between cells, in units of the image's side."""
    ys, xs = torch.meshgrid(*((torch.arange(side, device=device) + 0.5) / side for side in grid), indexing="ij")
    centres = torch.stack([ys.flatten(), xs.flatten()], dim=1)
    return (centres[:, None] - centres[None]).square().sum(-1)


def confident(probability: torch.Tensor, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the confident foreground Omega_f (P >= high) and background Omega_b (P <= low), never empty."""
    least = max(1, round(CONFIDENT_FRACTION * len(probability)))
    foreground, background = (probability >= high).nonzero()[:, 0], (probability <= low).nonzero()[:, 0]
    if not len(foreground):
        foreground = probability.topk(least).indices
    if not len(background):
        background = (-probability).topk(least).indices
    return foreground, background


def set_distance(distances: torch.Tensor, members: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Return d [n]: the mean of the `neighbours` smallest of the distances D [n, N] to the member cells of a set."""
    to_members = distances[:, members]
    return to_members.topk(min(neighbours, to_members.shape[1]), dim=1, largest=False).values.mean(1)


def confusion_area(probability: torch.Tensor, grid: tuple[int, int], low: float, high: float, band: float) -> torch.Tensor:
    """Return U [N] bool: cells with low < P < high, and cells within `band` sides of the grid from the mask's boundary."""
    radius = round(band * max(grid))
    mask = (probability > 0.5).float().view(1, 1, *grid)
    dilated = F.max_pool2d(mask, 2 * radius + 1, 1, radius)
    eroded = 1 - F.max_pool2d(1 - mask, 2 * radius + 1, 1, radius)
    return (dilated > eroded).flatten() | ((probability > low) & (probability < high))


def evidence(probability: torch.Tensor, distances: torch.Tensor, grid: tuple[int, int], refine: Refine) -> Evidence:
    """Compute the Hausdorff discrepancy g and the margin d_b - d_f of the cells in the confusion area.

    With Omega_f, Omega_b the confident cells and d_l(p) the mean of the k smallest distances to Omega_l:
    H(p) = max(d_l(F_o(p) -> F_g), d_l(F_g(p) -> F_o)) for p's own label l, whose maximum over p would be a Hausdorff
    distance; g = minmax(H) over the confusion area, 0 if H is constant; d_b - d_f is the mean of both directions.
    The rows of D belong to F_o, the columns to F_g.
    """
    low, high = refine.confidence_thresholds
    area = confusion_area(probability, grid, low, high, refine.boundary_width)
    cells = area.nonzero()[:, 0]
    discrepancy, margin = torch.zeros_like(probability), torch.zeros_like(probability)
    if not len(cells):
        return Evidence(probability, discrepancy, margin, area)
    regions = confident(probability, low, high)
    forward = [set_distance(distances[cells], region, refine.num_neighbours) for region in regions]
    backward = [set_distance(distances.T[cells], region, refine.num_neighbours) for region in regions]
    to_foreground, to_background = (torch.maximum(*pair) for pair in zip(forward, backward, strict=True))
    hausdorff = torch.where(probability[cells] >= 0.5, to_foreground, to_background)
    spread = hausdorff.max() - hausdorff.min()
    if spread > 0:
        discrepancy[cells] = (hausdorff - hausdorff.min()) / spread
        margin[cells] = (forward[1] + backward[1] - forward[0] - backward[0]) / 2
    return Evidence(probability, discrepancy, margin, area)


# ----------------------------------------------------------------------------------------------- 6. Choice of the cut
def cuts(observed: Evidence, quantiles: Sequence[float]) -> torch.Tensor:
    """Return the candidate cuts [1 + K] of the margin: 0 (both regions equally near) and its K quantiles in U.

    Constant evidence has only the cut 0.
    """
    zero = observed.margin.new_zeros(1)
    if observed.is_constant or not quantiles:
        return zero
    return torch.cat([zero, torch.quantile(observed.margin[observed.confusion], observed.margin.new_tensor(quantiles))])


def hypothesis(observed: Evidence, cut: torch.Tensor) -> torch.Tensor:
    """Return the mask [N] in {0, 1} of a cut: margin > cut inside U, P > 0.5 outside."""
    return torch.where(observed.confusion, observed.margin > cut, observed.probability > 0.5).to(observed.probability)


def choose_cuts(block: PhraseBlock, evidences: Sequence[Evidence]) -> list[torch.Tensor | None]:
    """Choose for each phrase the cut whose mask, injected, minimises the error of the predicted noise (analysis by synthesis).

    The error of the predicted noise is the error of the generated latent, |z0_hat - z_0|^2, times the signal-to-noise ratio, so
    errors can be summed over timesteps. Without injection all masks give the same error, and the first cut, 0, is chosen. The
    result for a phrase is None if its unchanged P has the smallest error.
    """
    refine = block.refine
    candidates = [cuts(observed, refine.cut_quantiles) for observed in evidences]
    if not refine.alpha or not refine.cut_quantiles:
        return [values[0] for values in candidates]
    count = 1 + len(refine.cut_quantiles)
    candidates = [values.expand(count) if len(values) == 1 else values for values in candidates]

    # The mask of each cut, clipped like P so that soft masks have no advantage, and P itself.
    hypotheses = []
    for cut in zip(*candidates, strict=True):
        binary = torch.stack([hypothesis(*pair) for pair in zip(evidences, cut, strict=True)])
        hypotheses.append(binary.clamp(MIN_PROBABILITY, 1 - MIN_PROBABILITY))
    hypotheses.append(torch.stack([observed.probability for observed in evidences]))

    # Error of each phrase under each mask.
    errors = block.latents.new_zeros(len(evidences), len(hypotheses))
    for t in refine.choice_timesteps:
        signal_to_noise = block.model.alphas[t] / (1 - block.model.alphas[t])
        for k, mask in enumerate(hypotheses):
            generated = generate(block, t, mask)
            errors[:, k] += signal_to_noise * (generated - block.latents).square().mean((1, 2, 3))
    best = errors.argmin(1)
    return [None if index == count else values[index] for values, index in zip(candidates, best, strict=True)]


# ---------------------------------------------------------------------------------------------------------- 7. Update
def update(observed: Evidence, cut: torch.Tensor | None, refine: Refine) -> Update:
    """Compute P^{k+1} = P^k + (1 - beta) g 1_U (Q - P^k) with Q = sigmoid((d_b - d_f - cut) / T).

    g is 1 without `refine.gate`. P is unchanged and Q = P outside U, for constant evidence, or if `cut` is None.
    """
    target, after = observed.probability.clone(), observed.probability.clone()
    if cut is not None and not observed.is_constant:
        area = observed.confusion
        target[area] = torch.sigmoid((observed.margin[area] - cut) / refine.temperature)
        weight = (1 - refine.beta) * (observed.discrepancy[area] if refine.gate else 1.0)
        after[area] += weight * (target[area] - after[area])
    return Update(**vars(observed), target=target, after=after)


# -------------------------------------------------------------------------------------------------------- 8. Read-out
def _read_out_trace(trace: Trace, p_0: torch.Tensor, refine: Refine, kernels: dict[Any, Kernels]) -> RefinedMask:
    grid = (refine.feature_size, refine.feature_size)
    p_k, area = p_0, confusion_area(p_0, grid, *refine.confidence_thresholds, refine.boundary_width)
    for step in trace.updates:
        p_k, area = step.after.cpu(), area | step.confusion.cpu()
    before, after, inside = (value.view(grid).numpy() for value in (p_0, p_k, area))
    if refine.readout == "crf" and trace.key[0] not in kernels:
        kernels[trace.key[0]] = Kernels(trace.picture, refine.crf)
    return read_out(trace.coarse, trace.picture, before, after, inside, refine, kernels.get(trace.key[0]))


def read_out(
    coarse: Mask,
    picture: NDArray[np.uint8],
    before: Map,
    after: Map,
    area: Mask,
    refine: Refine,
    kernels: Kernels | None = None,
) -> RefinedMask:
    """Return the mask at native size: the coarse mask changed by P^K - P^0, which keeps what is finer than the grid.

    With the read-out `crf`, the change is added to the probability `crf.confidence` of the coarse mask's labels, and the sum
    is the unary of a dense CRF; without a change this is the CRF control. With `bilinear`, P^K is cut at 0.5 inside the
    confusion area. `before` and `after` are P^0 and P^K [h, w] in [0, 1], and `area` [h, w] is the union of the confusion
    areas. `kernels` are those of the picture [H, W, 3].
    """
    height, width = coarse.shape
    old, new = bilinear(np.stack([before, after]), height, width)
    inside = bilinear(area.astype(np.float32), height, width) > 0
    if refine.readout == "crf":
        prior = np.where(coarse, refine.crf.confidence, 1 - refine.crf.confidence)
        unary = np.where(inside, prior + new - old, prior).clip(0, 1).astype(np.float32)
        new = binary_crf(unary[None], picture, refine.crf, kernels)[0]
        mask = new > 0.5
        inside = inside | (mask != coarse)
    else:
        mask = np.where(inside, new >= 0.5, coarse)
    return RefinedMask(mask, inside, np.where(inside, new - old, 0).astype(np.float32))
