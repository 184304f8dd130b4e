"""The refiner between files: one call, one refined set of predictions."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from genseg.artifacts.files import file_sha256
from genseg.artifacts.manifest import code_hash
from genseg.artifacts.parquet import read_metadata
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import maps_path, maps_shape, read_maps, read_predictions, write_with_maps
from genseg.errors import UserError
from genseg.models.device import DTYPES, choose_device, describe
from genseg.models.text_to_image import TextToImage
from genseg.params import Params, Refine, digest
from genseg.refine.g4seg import Trace, passes, refine_predictions, variants
from genseg.refine.pictures import write_trace
from genseg.training.prepare import chosen_backbone, find_commit, weights_hash

CODE = ("params.py", "artifacts", "data/images.py", "models", "refine", "training/prepare.py")


def refine_file(
    params: Params,
    phrases: str | Path,
    predictions: str | Path,
    out: str | Path,
    method: str = "g4seg",
    source: str | None = None,
    images: str | Path | None = None,
    pictures: str | Path | None = None,
) -> None:
    """Refine a predictions file by the phrases of a table; what is made already, of the same things, is not made again.

    Soft maps beside the coarse predictions are refined with them.

    Args:
        method: see `g4seg.variants`.
        source: Stable Diffusion to refine with; the one of `refine.backbone`, else the study's backbone, when None.
        images: folder that the table's file names start from; the working directory when None.
        pictures: folder for the pictures of `pictures.write_trace`; none when None.

    Raises:
        UserError: unknown method, unreadable file, a prediction of no phrase, soft maps that do not fit, no GPU for `cuda`.
    """
    out = Path(out)
    if out.resolve() in (Path(phrases).resolve(), Path(predictions).resolve()):
        raise UserError(f"--out {out}: would overwrite what is read; choose another name")
    refine = params.refine
    if method not in variants(refine):
        raise UserError(f"--method {method}: none of {', '.join(variants(refine))}")
    coarse, table, shape = read_predictions(predictions), read_phrases(phrases), maps_shape(predictions)
    nameless = table["file_name"].isna()
    if nameless.any():
        row = int(nameless.to_numpy().argmax())
        raise UserError(f"{phrases}: row {row} has no file_name, so nothing tells which picture to refine by")
    if source is None:
        source, revision, weights = chosen_backbone(params, refine)
    else:
        revision = find_commit(source, None)
        weights = weights_hash(source, revision)
    made_of = [file_sha256(path) for path in (phrases, predictions, *([maps_path(predictions)] if shape else []))]
    key = digest([method, variant_facts(refine, method), params.seed, weights, made_of, code_hash(*CODE)])
    if read_metadata(out).get("key") == key and not pictures and maps_path(out).exists() == bool(shape and refine.maps):
        print(f"refine: {out} is there already", flush=True)
        return
    device = choose_device(params.device, params.resources["refine"].threads)
    print(f"refine: {method}, device {describe(device)}, {passes(variants(refine)[method])} U-Net passes a mask", flush=True)
    if shape is not None and shape[0] != len(coarse):
        raise UserError(f"{maps_path(predictions)}: {shape[0]} soft maps for {len(coarse)} predictions; remove it or both")
    if images is not None:
        table["file_name"] = [str(Path(images) / name) for name in table["file_name"]]
    model = TextToImage(source, revision, device, DTYPES[refine.precision])
    started = time.monotonic()

    def draw(trace: Trace) -> None:
        write_trace(trace, model, Path(str(pictures)))

    frame, maps = refine_predictions(
        table,
        coarse,
        model,
        refine,
        params.seed,
        method,
        maps=None
        if shape is None
        else lambda rows: np.concatenate([read_maps(predictions, slice(row, row + 1)) for row in rows]),
        observe=draw if pictures else None,
    )
    seconds = time.monotonic() - started
    write_with_maps(frame, maps, out, key=key, method=method, evaluations=str(passes(variants(refine)[method])))
    print(f"refine: {out}: {len(frame)} masks, {len(frame) / max(seconds, 1e-9):.1f} masks/s", flush=True)


def variant_facts(refine: Refine, method: str) -> dict[str, Any]:
    """The params that one of `g4seg.variants` uses."""
    elsewhere = {"backbone", "revision", "test_fraction", "controls", "sensitivity", "crf", "trained", "pictures", "shards"}
    return variants(refine)[method].model_dump(mode="json", exclude=elsewhere)
