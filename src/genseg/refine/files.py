"""Refine one predictions file with G4Seg or one of its variants, and draw the intermediate results."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from genseg.artifacts.files import atomic_path, file_sha256
from genseg.artifacts.parquet import read_metadata
from genseg.artifacts.parts import Parts, Piece, make_parts
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import as_levels, maps_path
from genseg.errors import UserError
from genseg.models.device import DTYPES, choose_device, describe
from genseg.models.source import chosen_backbone, find_commit, weights_hash
from genseg.models.text_to_image import TextToImage
from genseg.models.vae import decode_latents
from genseg.params import Params, digest
from genseg.phases import code_hash
from genseg.refine.coarse import CoarsePredictions
from genseg.refine.g4seg import refine_predictions
from genseg.refine.g4seg_steps import Trace
from genseg.refine.inputs import join_phrases, read_coarse
from genseg.refine.layout import G4SEG, find_variant, forward_passes, variant_facts

TILE = 192
"""Side of the tiles of a picture in pixels."""


def refine_file(
    params: Params,
    phrases: str | Path,
    predictions: str | Path,
    out: str | Path,
    method: str = G4SEG,
    source: str | None = None,
    images: str | Path | None = None,
    pictures: str | Path | None = None,
) -> None:
    """Refine a predictions file and its soft maps, if any. Nothing is done if `out` was already made from the same inputs.

    Args:
        method: a name in `variants`.
        source: directory or hub id of a Stable Diffusion; None: `refine.backbone`, or else the study's backbone.
        images: folder that the table's file names are relative to; None: the working directory.
        pictures: folder for the pictures of `write_trace`; None: no pictures.

    Raises UserError if the method is unknown, `out` is an input file, a file is unreadable, a prediction has no phrase, a
    phrase has no image, the soft maps do not match the predictions, or the device is `cuda` and there is no GPU.
    """
    # 1. Check the arguments.
    out = Path(out)
    if out.resolve() in (Path(phrases).resolve(), Path(predictions).resolve()):
        raise UserError(f"--out {out}: is also an input file; choose another name")
    refine = params.refine
    evaluations = forward_passes(find_variant(refine, method))
    (coarse, shape), table = read_coarse(predictions), read_phrases(phrases)
    without_file = table["file_name"].isna()
    if without_file.any():
        row = int(without_file.to_numpy().argmax())
        raise UserError(f"{phrases}: row {row} has no file_name; refinement needs the image of every phrase")
    if images is not None:
        table["file_name"] = [str(Path(images) / name) for name in table["file_name"]]

    # 2. Return early if the output exists and has the same inputs.
    if source is None:
        source, revision, weights = chosen_backbone(params, refine)
    else:
        revision = find_commit(source, None).sha
        weights = weights_hash(source, revision)
    input_paths = (phrases, predictions, *([maps_path(predictions)] if shape else []))
    input_hashes = [file_sha256(path) for path in input_paths]
    key = digest([method, variant_facts(refine, method), params.seed, weights, input_hashes, code_hash("refine")])
    if read_metadata(out).get("key") == key and not pictures and maps_path(out).exists() == bool(shape and refine.maps):
        print(f"refine: {out} already exists", flush=True)
        return

    # 3. Load the model.
    device = choose_device(params.device, params.resources.refine.threads)
    print(f"refine: {method}, device {describe(device)}, {evaluations} U-Net forward passes per mask", flush=True)
    model = TextToImage(source, revision, device, DTYPES[refine.precision])

    # 4. Refine and write.
    join_phrases(table, coarse, "phrase")  # report unknown phrases before hours of work
    inputs = CoarsePredictions(table, coarse, Path(predictions) if shape else None, np.arange(len(coarse)), classes=False)
    groups, observe = inputs.groups(), partial(write_trace, model=model, folder=Path(pictures)) if pictures else None
    parts = Parts(out.with_suffix(".parts"), key)

    def refined(group: int) -> dict[str, Piece]:
        part = inputs.part(groups[group])
        maps = part.soft_maps if shape else None
        frame, soft = refine_predictions(part.phrases, part.predictions, model, refine, params.seed, method, maps, observe)
        return {method: (frame, None if soft is None else as_levels(soft))}

    make_parts({method: parts}, groups, refined, f"refine: {method}: group of images")
    count, seconds = parts.gather(out, method=method, evaluations=str(evaluations)), parts.seconds(groups)
    parts.remove()
    print(f"refine: {out}: {count} masks, {count / max(seconds, 1e-9):.1f} masks/s", flush=True)


def write_trace(trace: Trace, model: TextToImage, folder: Path) -> None:
    """Write the picture of a trace to `<image_id>_<narrative_id>_<phrase_id>.png` in a folder.

    The first row shows image, coarse mask and refined mask; the row of iteration k shows P^k, discrepancy g, target Q,
    confusion area U, P^{k+1} and, if one was generated, the decoded mask-conditioned image.
    """
    # 1. Collect the tiles.
    rows = [[_tile(trace.picture), _tile(trace.coarse), _tile(trace.result.mask)]]
    for number, update in enumerate(trace.updates):
        maps = (update.probability, update.discrepancy, update.target, update.confusion, update.after)
        side = round(len(update.probability) ** 0.5)
        row = [_tile(values.float().view(side, side).cpu().numpy()) for values in maps]
        if trace.generated:
            decoded = decode_latents(model.vae, trace.generated[min(number, len(trace.generated) - 1)][None])[0]
            row.append(_tile(((decoded.float() + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()))
        rows.append(row)

    # 2. Place them on a white sheet.
    sheet = np.full((len(rows) * TILE, max(map(len, rows)) * TILE, 3), 255, np.uint8)
    for top, row in enumerate(rows):
        sheet[top * TILE : (top + 1) * TILE, : len(row) * TILE] = np.concatenate(row, axis=1)
    with atomic_path(folder / f"{'_'.join(map(str, trace.key))}.png") as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")


def _tile(values: NDArray) -> NDArray[np.uint8]:
    """Return an image [H, W, 3] uint8, or a mask or map [h, w] in [0, 1], as a tile [TILE, TILE, 3]."""
    if values.ndim == 2:
        values = np.repeat(np.rint(values.astype(np.float32) * 255).astype(np.uint8)[..., None], 3, axis=2)
    return np.asarray(Image.fromarray(values).resize((TILE, TILE), Image.Resampling.NEAREST))
