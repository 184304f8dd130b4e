"""G4Seg (ours): coarse masks refined with a pretrained text-to-image model, predictions -> predictions.

For each phrase, an image is generated in one step from the noised original, with the coarse mask injected into cross- and
self-attention. Features of the original and of the generated image are compared. Near the mask's boundary, the
foreground probability of each cell moves towards the label that its features match (with `refine.gate`, in proportion to the
discrepancy). How much evidence a label needs is also decided by generation: among candidate masks and the unchanged mask, the
one is taken whose generated image is nearest to the original. `g4seg_steps` has the steps with their equations.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts import masks
from genseg.artifacts.parquet import KEY
from genseg.artifacts.resample import Map, bilinear
from genseg.artifacts.seeds import derive_seed
from genseg.errors import UserError
from genseg.models.text_to_image import TextToImage
from genseg.params.refine import Refine
from genseg.refine.g4seg_steps import RefinedMask, Trace, refine_block
from genseg.refine.inputs import join_phrases
from genseg.refine.layout import G4SEG, RANDOM, find_variant


def refine_predictions(
    phrases: pd.DataFrame,
    predictions: pd.DataFrame,
    model: TextToImage,
    refine: Refine,
    seed: int,
    method: str = G4SEG,
    maps: Callable[[NDArray[np.int64]], Map] | None = None,
    observe: Callable[[Trace], None] | None = None,
) -> tuple[pd.DataFrame, Map | None]:
    """Refine all predictions, each phrase alone. Scores, and masks without a boundary (empty or full), are unchanged.

    Args:
        maps: returns the soft maps [n, h, w] in [0, 1] of n rows of `predictions`; if given, refined maps are returned.
        observe: called with the trace of each phrase, in key order.

    Returns:
        Predictions in key order, and soft maps [N, side, side] (side = `refine.maps`) in the same order or None.

    Raises UserError for an unknown method (see `variants`), a prediction without a phrase in the table, a missing image or a
    missing U-Net layer.
    """
    variant = find_variant(refine, method)
    layers = len(model.unet.up_blocks)
    if max(variant.layers) >= layers:
        raise UserError(f"refine.layers: expected indices below {layers}, the U-Net's up-blocks, got {max(variant.layers)}")
    rows = join_phrases(phrases, predictions.assign(row=np.arange(len(predictions))), "phrase")
    encoded, soft = [], []
    for start in range(0, len(rows), variant.batch):
        block = rows.iloc[start : start + variant.batch]
        for row, trace in zip(block["row"], refine_block(block, model, variant, seed), strict=True):
            if method == RANDOM:
                trace.result = random_control(trace, seed)
            encoded.append(masks.encode(trace.result.mask))
            if maps is not None and variant.maps:
                before = bilinear(maps(np.array([row])), *trace.coarse.shape)[0]
                soft.append(trace.result.apply(before, variant.maps))
            if observe is not None:
                observe(trace)
    return rows[[*KEY, "score"]].assign(mask=encoded), np.stack(soft) if soft else None


def random_control(trace: Trace, seed: int) -> RefinedMask:
    """Return G4Seg's result with its changes moved to random positions in the same area.

    As many pixels are flipped as G4Seg flipped, and its changes of probability are permuted.
    """
    result = trace.result
    rng = np.random.default_rng(derive_seed(seed, "random refiner", *trace.key))
    area, count = np.flatnonzero(result.area), int((result.mask != trace.coarse).sum())
    mask, change = trace.coarse.copy(), np.zeros_like(result.change)
    mask.flat[rng.choice(area, size=count, replace=False)] ^= True
    change.flat[area] = rng.permutation(result.change.flat[area])
    return RefinedMask(mask, result.area, change)
