"""G4Seg (ours): refine coarse masks by what a pretrained text-to-image model generates under them.

For each phrase: a mask-conditioned image is generated in one step from the noised original, the coarse mask injected into
cross- and self-attention; features of the original and of the generated image are compared; near the mask's boundary (and as
far as they disagree, with `refine.gate`) the foreground probability moves towards the label its features correspond to. How
much evidence a label needs there is the generator's decision, too: of several masks that the features allow, the one under
which the generated image is nearest to the original, or the mask as it is. A few times over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from genseg.artifacts import masks
from genseg.artifacts.masks import Mask
from genseg.artifacts.parquet import KEY
from genseg.artifacts.resample import area_reduce, bilinear
from genseg.artifacts.seeds import derive_seed
from genseg.data.images import load_image
from genseg.errors import UserError
from genseg.models.attention_control import MaskInjection, attention_control
from genseg.models.text_to_image import Prompts, TextToImage
from genseg.models.vae import image_tensor
from genseg.params import Refine
from genseg.refine.correspondence import (
    Evidence,
    Step,
    confusion_area,
    correspondence,
    cuts,
    evidence,
    hypothesis,
    squared_offsets,
    unit_features,
    update,
)
from genseg.refine.upsampling import guided_filter

Maps = NDArray[np.float32]
RANDOM = "random"
LOG_SECONDS = 10


@dataclass
class Trace:
    """Everything in between of one phrase, for pictures; maps are [h, w] on the feature grid."""

    key: tuple[Any, ...]
    phrase: str
    picture: NDArray[np.uint8]
    """[H, W, 3], native."""
    coarse: Mask
    refined: Mask
    refined_by: Refined | None = None
    """How `refined` came about, of G4Seg itself where `refined` is the random control's."""
    steps: list[Step] = field(default_factory=list)
    generated: list[torch.Tensor] = field(default_factory=list)
    """z0_hat [4, h, w] of every iteration at the first timestep and noise; empty without generation."""


def variants(refine: Refine) -> dict[str, Refine]:
    """G4Seg, its controls and its sensitivity, by name: every row of the refinement tables that needs no other program.

    `random` has no params of its own: it flips as many pixels as G4Seg did, in the same area, at random.
    """

    def but(**changes: Any) -> Refine:
        return refine.model_copy(update=changes)

    found = {
        "g4seg": refine,
        "alpha_zero": but(alpha=0.0),
        **({"no_gate": but(gate=False)} if refine.gate else {"gate": but(gate=True)}),
        "no_choice": but(levels=[]),
        "no_generation": but(generation=0.0, levels=[]),
        "upsampling_only": but(iterations=0),
        "unconditioned": but(reference="unconditioned"),
        RANDOM: refine,
    }
    return found | sensitivity(refine)


def sensitivity(refine: Refine) -> dict[str, Refine]:
    """G4Seg with one constant changed, by name."""
    tried = refine.sensitivity
    found: dict[str, dict[str, Any]] = {}
    found |= {f"alpha={value:g}": {"alpha": value} for value in tried.alpha}
    found |= {f"beta={value:g}": {"beta": value} for value in tried.beta}
    found |= {f"timestep={value}": {"timesteps": [value]} for value in tried.timestep}
    found |= {f"iterations={value}": {"iterations": value} for value in tried.iterations}
    found |= {f"layer={value}": {"layers": [value]} for value in tried.layer}
    return {name: refine.model_copy(update=changes) for name, changes in found.items()}


def passes(refine: Refine) -> int:
    """U-Net passes for one phrase."""
    generated = refine.iterations if refine.alpha else 1
    each = 1 + (refine.reference == "unconditioned") + 2 * generated * (refine.generation > 0)
    compared = len(refine.choice.timesteps) * refine.choice.noises * (2 + len(refine.levels)) * refine.iterations
    chosen = compared if refine.levels and refine.alpha else 0
    return len(refine.timesteps) * refine.noises * each + chosen if refine.iterations else 0


def refine_predictions(
    phrases: pd.DataFrame,
    predictions: pd.DataFrame,
    model: TextToImage,
    refine: Refine,
    seed: int,
    method: str = "g4seg",
    maps: Callable[[NDArray[np.int64]], Maps] | None = None,
    observe: Callable[[Trace], None] | None = None,
) -> tuple[pd.DataFrame, Maps | None]:
    """Refine the prediction of every phrase that has one, each phrase alone.

    A mask that is empty or full has no boundary and stays as it is; scores stay, too.

    Args:
        phrases: phrase table (`file_name`, `phrase`, `height`, `width`).
        predictions: of any method; masks at native size.
        maps: rows of `predictions` -> their soft maps [n, h, w] in [0, 1]; refined ones are then given back.
        method: a name of `variants`.
        observe: called with every phrase's trace, in key order.

    Returns:
        Predictions in key order, and soft maps [N, side, side] (`refine.maps`) in the same order or None.

    Raises:
        UserError: a prediction of no phrase in the table, an image missing, a layer that the U-Net does not have.
    """
    chosen = variants(refine).get(method)
    if chosen is None:
        raise UserError(f"--method {method}: none of {', '.join(variants(refine))}")
    layers = len(model.unet.up_blocks)
    if max(chosen.layers) >= layers:
        raise UserError(f"refine.layers: there is no up-block {max(chosen.layers)}; the U-Net has {layers}, counted from 0")
    numbered = predictions.assign(row=np.arange(len(predictions)))
    rows = numbered.merge(
        phrases[[*KEY, "file_name", "phrase", "height", "width"]], on=KEY, how="left", validate="one_to_one"
    ).sort_values(KEY, kind="stable", ignore_index=True)
    unknown = rows["phrase"].isna()
    if unknown.any():
        image, narrative, phrase = rows.loc[unknown, KEY].iloc[0]
        raise UserError(f"predictions for (image_id, narrative_id, phrase_id) = ({image}, {narrative!r}, {phrase}), "
                        "which the phrase table lacks; give the table that they were made for")  # fmt: skip
    codes, soft = [], []
    last = time.monotonic()
    for start in range(0, len(rows), chosen.batch):
        block = rows.iloc[start : start + chosen.batch]
        for trace, refined in _refine_block(block, model, chosen, seed):
            trace.refined_by = refined
            shown = at_random(trace, seed) if method == RANDOM else refined
            trace.refined = mask = shown.mask
            codes.append(masks.encode(mask))
            if maps is not None and chosen.maps:
                before = bilinear(maps(block["row"].to_numpy()[[len(codes) - 1 - start]]), *mask.shape)[0]
                soft.append(shown.applied(before, chosen.maps))
            if observe is not None:
                observe(trace)
        if time.monotonic() - last > LOG_SECONDS:
            last = time.monotonic()
            print(f"refine: {method}: {len(codes)} of {len(rows)} masks", flush=True)
    frame = rows[[*KEY, "score"]].assign(mask=codes)
    return frame, np.stack(soft) if soft else None


@dataclass
class Refined:
    """At native size [H, W]: the mask, where it was allowed to change, and the change of probability there."""

    mask: Mask
    area: Mask
    change: Maps

    def applied(self, before: Maps, side: int) -> Maps:
        """A soft map [H, W] with the change, reduced to [side, side]."""
        return area_reduce(np.where(self.area, np.clip(before + self.change, 0, 1), before), side, side)


def _refine_block(rows: pd.DataFrame, model: TextToImage, refine: Refine, seed: int) -> Iterator[tuple[Trace, Refined]]:
    grid = (refine.grid, refine.grid)
    pictures = {file: np.asarray(load_image(file)) for file in rows["file_name"].unique()}
    traces = []
    for row in rows.to_dict("records"):
        picture, coarse = pictures[row["file_name"]], masks.decode(row["mask"], row["height"], row["width"])
        if picture.shape[:2] != coarse.shape:
            raise UserError(f"{row['file_name']}: its size is not the phrase table's {row['height']} x {row['width']}")
        traces.append(Trace(tuple(row[name] for name in KEY), row["phrase"], picture, coarse, coarse))
    busy = [trace for trace in traces if trace.coarse.any() and not trace.coarse.all()]
    start = {trace.key: first_probability(trace.coarse, refine) for trace in busy}
    if busy and refine.iterations:
        _iterate(busy, torch.stack([start[trace.key] for trace in busy]), model, refine, seed)
    for trace in traces:
        if trace.key not in start:
            yield trace, Refined(trace.coarse, np.zeros_like(trace.coarse), np.zeros(trace.coarse.shape, np.float32))
            continue
        before = after = start[trace.key]
        area = confusion_area(before, grid, *refine.confident, refine.band)
        for step in trace.steps:
            after, area = step.after.cpu(), area | step.confusion.cpu()
        p_0, p_k, changed = (value.view(grid).numpy() for value in (before, after, area))
        yield trace, read_out(trace.coarse, trace.picture, p_0, p_k, changed, refine)


def first_probability(coarse: Mask, refine: Refine) -> torch.Tensor:
    """P^0 [N]: the coarse mask on the feature grid, blurred and kept off 0 and 1."""
    reduced = area_reduce(coarse, refine.grid, refine.grid)
    blurred = gaussian_filter(reduced, refine.blur, mode="nearest") if refine.blur else reduced
    return torch.from_numpy(blurred.clip(refine.clip, 1 - refine.clip)).flatten()


def read_out(coarse: Mask, picture: NDArray[np.uint8], before: Maps, after: Maps, area: Mask, refine: Refine) -> Refined:
    """The mask at native size: the refined map, up-sampled and cut at 0.5, inside the confusion area; the coarse outside."""
    height, width = coarse.shape
    old, new = bilinear(np.stack([before, after]), height, width).astype(np.float64)
    if refine.upsampling is not None:
        radius = max(1, round(refine.upsampling.radius * max(height, width)))
        for _ in range(refine.upsampling.rounds):
            new = guided_filter(picture / 255.0, new[..., None], radius, refine.upsampling.epsilon)[..., 0]
    inside = bilinear(area.astype(np.float32), height, width) > 0
    mask = np.where(inside, new >= 0.5, coarse)
    return Refined(mask, inside, np.where(inside, new - old, 0).astype(np.float32))


def at_random(trace: Trace, seed: int) -> Refined:
    """What G4Seg did to a mask, dealt anew: as many pixels of the confusion area flipped as it flipped there, and its changes
    of probability, each at another pixel of that area."""
    by = trace.refined_by
    assert by is not None
    rng = np.random.default_rng(derive_seed(seed, "random refiner", *trace.key))
    area, count = np.flatnonzero(by.area), int((by.mask != trace.coarse).sum())
    mask, change = trace.coarse.copy(), np.zeros_like(by.change)
    mask.flat[rng.choice(area, size=count, replace=False)] ^= True
    change.flat[area] = rng.permutation(by.change.flat[area])
    return Refined(mask, by.area, change)


# ------------------------------------------------------------------------------------------------------ the network
def _iterate(traces: list[Trace], probability: torch.Tensor, model: TextToImage, refine: Refine, seed: int) -> None:
    """Fill in every trace's steps, from P^0 [B, N]."""
    run = _Passes(traces, model, refine, seed)
    probability = probability.to(model.device)
    original = run.references()
    offsets = refine.spatial * squared_offsets(run.grid, model.device)
    matching = correspondence(original, original)
    under_mask: torch.Tensor | None = None
    for _ in range(refine.iterations):
        distances = matching
        if refine.generation:
            if under_mask is None or refine.alpha:  # without injection every iteration generates the same
                under_mask = correspondence(original, run.generated(probability))
            distances = torch.lerp(matching, under_mask, refine.generation)
        distances = distances + offsets
        found = [evidence(p, d, run.grid, refine) for p, d in zip(probability, distances, strict=True)]
        steps = [update(one, cut, refine) for one, cut in zip(found, run.chosen_cuts(found), strict=True)]
        for trace, step in zip(traces, steps, strict=True):
            trace.steps.append(step)
        probability = torch.stack([step.after for step in steps])


class _Passes:
    """The U-Net passes of one block of phrases, over all timesteps and noises."""

    def __init__(self, traces: Sequence[Trace], model: TextToImage, refine: Refine, seed: int) -> None:
        self.traces, self.model, self.refine, self.seed = traces, model, refine, seed
        self.grid = (refine.grid, refine.grid)
        unique = {trace.key[0]: trace.picture for trace in traces}
        encoded = {
            image_id: model.encode(image_tensor(_pillow(picture), refine.size)[None])[0].float()
            for image_id, picture in unique.items()
        }
        self.latents = torch.stack([encoded[trace.key[0]] for trace in traces])
        self.prompts: Prompts = model.embed([trace.phrase for trace in traces], refine.prompt)
        self.levels = [(t, self._noise(n, seed)) for t in refine.timesteps for n in range(refine.noises)]

    def _noise(self, number: int, seed: int) -> torch.Tensor:
        """The same for all phrases of an image, whatever is in the block."""
        drawn = {}
        for trace in self.traces:
            generator = torch.Generator().manual_seed(derive_seed(seed, "g4seg noise", trace.key[0], number))
            drawn[trace.key[0]] = torch.randn(self.latents.shape[1:], generator=generator)
        return torch.stack([drawn[trace.key[0]] for trace in self.traces]).to(self.latents)

    @torch.no_grad()
    def _predict(self, z_t: torch.Tensor, t: int) -> torch.Tensor:
        return self.model.predict(z_t, t, self.latents[:1], self.prompts.tokens, self.prompts.pooled).float()

    def _noised(self, z: torch.Tensor, t: int, noise: torch.Tensor) -> torch.Tensor:
        alpha = self.model.alphas[t]
        return alpha.sqrt() * z + (1 - alpha).sqrt() * noise

    def _features(self, z: torch.Tensor, t: int, noise: torch.Tensor) -> list[torch.Tensor]:
        """Unit features [B, N, C] of latents z, one per layer, from an uninjected pass."""
        with up_block_outputs(self.model.unet, self.refine.layers) as outputs:
            self._predict(self._noised(z, t, noise), t)
        return [unit_features(outputs[layer], self.grid) for layer in self.refine.layers]

    def one_step(self, t: int, noise: torch.Tensor, probability: torch.Tensor | None) -> torch.Tensor:
        """z0_hat [B, 4, h, w] from z_t in one step, under the mask P [B, N] or without one."""
        z_t, alpha = self._noised(self.latents, t, noise), self.model.alphas[t]
        control: Any = nullcontext()
        if probability is not None:
            mask = probability.view(-1, *self.grid)
            injection = MaskInjection(mask, self.prompts.phrase_tokens, self.refine.alpha, self.refine.inject)
            control = attention_control(self.model.unet, injection)
        with control:
            predicted = self._predict(z_t, t)
        if self.model.prediction_type == "v_prediction":
            return alpha.sqrt() * z_t - (1 - alpha).sqrt() * predicted
        return (z_t - (1 - alpha).sqrt() * predicted) / alpha.sqrt()

    def chosen_cuts(self, found: Sequence[Evidence]) -> list[torch.Tensor | None]:
        """For each phrase the cut whose mask, injected, lets the network predict the noise best: analysis by synthesis. None
        where that is P as it is.

        The error of the predicted noise is that of the generated latent, |z0_hat - z_0|^2, times the signal-to-noise ratio, so
        levels can be added. Without injection all masks are the same to the network, and the first cut, 0, stays.
        """
        candidates = [cuts(one, self.refine.levels) for one in found]
        if not self.refine.alpha or not self.refine.levels:
            return [values[0] for values in candidates]
        count = 1 + len(self.refine.levels)
        tried = [values.expand(count) if len(values) == 1 else values for values in candidates]
        clip = self.refine.clip  # as P is, so that softness is no advantage
        masks_ = [
            torch.stack([hypothesis(one, values[k]) for one, values in zip(found, tried, strict=True)]).clamp(clip, 1 - clip)
            for k in range(count)
        ]
        masks_.append(torch.stack([one.before for one in found]))
        errors = self.latents.new_zeros(len(found), len(masks_))
        for t in self.refine.choice.timesteps:
            ratio = self.model.alphas[t] / (1 - self.model.alphas[t])
            for number in range(self.refine.choice.noises):
                noise = self._noise(number, self.seed)
                for k, mask in enumerate(masks_):
                    generated = self.one_step(t, noise, mask)
                    errors[:, k] += ratio * (generated - self.latents).square().mean((1, 2, 3))
        return [None if best == count else values[best] for values, best in zip(tried, errors.argmin(1), strict=True)]

    def references(self) -> list[torch.Tensor]:
        """F_o: of the original, or of the image generated without a mask."""
        found = []
        for t, noise in self.levels:
            z = self.latents if self.refine.reference == "original" else self.one_step(t, noise, None)
            found += self._features(z, t, noise)
        return found

    def generated(self, probability: torch.Tensor) -> list[torch.Tensor]:
        """F_g of the images generated under P [B, N]."""
        found = []
        for number, (t, noise) in enumerate(self.levels):
            z = self.one_step(t, noise, probability)
            if number == 0:
                for trace, latent in zip(self.traces, z, strict=True):
                    trace.generated.append(latent)
            found += self._features(z, t, noise)
        return found


@contextmanager
def up_block_outputs(unet: Any, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """The outputs [B, C, h, w] of some up-blocks in the last pass inside the context."""
    outputs: dict[int, torch.Tensor] = {}
    hooks = [
        unet.up_blocks[layer].register_forward_hook(lambda _m, _a, output, layer=layer: outputs.__setitem__(layer, output))
        for layer in layers
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _pillow(picture: NDArray[np.uint8]) -> Any:
    from PIL import Image

    return Image.fromarray(picture)
