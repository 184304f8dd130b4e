"""The phase `latents`: VAE latents of every image, once per size, and text embeddings of every phrase.

Label latents are not stored. They are area-reduced masks, which are faster to compute from the run lengths than to read from
disk, and would take 12 GB at paper scale.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import AutoencoderKL

from genseg.artifacts.files import file_sha256, write_json
from genseg.artifacts.latents import LatentStore, is_current_store, write_store
from genseg.artifacts.manifest import is_current, read_manifest, write_manifest
from genseg.artifacts.phrases import grid_phrases, read_phrases, val_phrases
from genseg.artifacts.reuse import prune
from genseg.data.images import load_image
from genseg.models.backbone import load_text_encoders, load_vae
from genseg.models.device import DTYPES, choose_device, describe
from genseg.models.text import TextEmbedding, encode_phrases
from genseg.models.vae import encode_images, image_tensor, psnr, vae_factor
from genseg.params import Params, digest

PSNR_IMAGES = 64
TEXT_ROWS = 8  # ratio of texts per shard to images per shard


def image_store(params: Params, size: int) -> Path:
    """Return the store of the latents of images resized to `size` pixels."""
    return params.results_dir / "latents" / "images" / f"size={size:04d}"


def text_store(params: Params) -> Path:
    """Return the store of the text embeddings."""
    return params.results_dir / "latents" / "text"


def images_by_size(params: Params, phrases: pd.DataFrame, class_phrases: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """Return the images to encode at each size, as tables (image_id, file_name) with one row per image.

    At the training size: train and val. At the main size: all of test (an image without a narrative still has class phrases),
    and the subset of val. At every other size of the grid: the grid's subset of test.
    """
    tables: dict[int, list[pd.DataFrame]] = defaultdict(list)
    tables[params.train.size].append(phrases[phrases["split"] != "test"])
    tables[params.sample.main.size] += [table[table["split"] == "test"] for table in (phrases, class_phrases)]
    tables[params.sample.main.size].append(val_phrases(params, phrases))
    for size in params.sample.sizes():
        tables[size].append(grid_phrases(params, phrases))
    images = {size: pd.concat(parts)[["image_id", "file_name"]] for size, parts in tables.items()}
    return {size: table.drop_duplicates("image_id").sort_values("image_id") for size, table in images.items()}


def compute_latents(params: Params, only_training: bool = False) -> None:
    """Write the stores in `results/<study>/latents` and then their manifest. Complete shards are not computed again.

    Args:
        only_training: write only what training reads (the images at `train.size` and all texts) and then `train.json`. Its
            bytes change only with that data, so a rerun does not trigger training.

    Raises:
        UserError: an image is missing or corrupt, the backbone cannot be loaded, the disk is full, or `device` is cuda and
            there is no GPU.
    """
    folder, backbone_path = params.results_dir / "latents", params.results_dir / "backbone" / "manifest.json"
    inputs = [params.data_dir / "manifest.json", backbone_path]
    if not only_training and is_current(folder / "manifest.json", "latents", params, inputs):
        return

    # 1. Load the inputs and hash them.
    backbone = read_manifest(backbone_path)
    phrases = read_phrases(params.data_dir / "phrases.parquet")
    class_phrases = read_phrases(params.data_dir / "class_phrases.parquet")
    images = images_by_size(params, phrases, class_phrases)
    if only_training:
        images = {params.train.size: images[params.train.size]}
    texts = sorted({"", *phrases["phrase"], *class_phrases["phrase"]})
    phrases_hash = file_sha256(params.data_dir / "phrases.parquet")
    image_key = digest([phrases_hash, backbone["weights"], params.latents.model_dump(mode="json")])
    text_key = digest([backbone["weights"], texts])
    train_record = {"version": 1, "size": params.train.size, "images": image_key, "texts": text_key}
    if only_training and _are_current(params, images[params.train.size], texts, image_key, text_key):
        print(f"latents: {folder / 'train.json'} is up to date", flush=True)
        write_json(folder / "train.json", train_record)
        return

    # 2. Encode images and texts.
    device = choose_device(params.device, params.resources.latents.threads)
    print(f"latents: device {describe(device)}", flush=True)
    facts = _encode_images(params, images, backbone, device, image_key)
    truncated = _encode_texts(params, texts, backbone, device, text_key)
    if truncated:
        warning = f"{len(truncated)} phrases exceed the tokenizer's limit and are truncated, e.g. {truncated[0]!r}"
        print(f"latents: warning: {warning}", file=sys.stderr)

    # 3. Remove stores of sizes that the study no longer uses, and write the manifest.
    if only_training:
        write_json(folder / "train.json", train_record)
        return
    prune(folder / "images", [image_store(params, size) for size in images], "latents")
    facts = {"truncated_phrases": truncated, "texts": len(texts)} | facts
    outputs = [folder / "images", folder / "text"]
    write_manifest(folder / "manifest.json", "latents", params, inputs, outputs, describe(device), **facts)


def _are_current(params: Params, images: pd.DataFrame, texts: list[str], image_key: str, text_key: str) -> bool:
    """Return whether the stores contain the latents of the images at `train.size` and the embeddings of all texts."""
    size, rows = params.train.size, params.latents.shard_rows
    store, image_ids = image_store(params, size), list(map(str, images["image_id"]))
    return is_current_store(store, image_ids, rows, f"{image_key}:{size}") and is_current_store(
        text_store(params), texts, TEXT_ROWS * rows, text_key
    )


def _encode_images(
    params: Params, images: dict[int, pd.DataFrame], backbone: dict[str, Any], device: torch.device, key: str
) -> dict[str, Any]:
    """Write the image stores, one per size, and return facts for the manifest."""
    vae = load_vae(backbone["pipeline"], backbone["revision"], DTYPES[params.latents.encode_precision]).to(device)
    psnrs: dict[str, float] = {}
    counts: dict[str, int] = {}
    for size, table in sorted(images.items()):
        # Encode the images.
        files = dict(zip(map(str, table["image_id"]), table["file_name"], strict=True))
        encode = partial(_image_latents, vae, params, size, files, device)
        rows = params.latents.shard_rows
        start_time, encoded = time.monotonic(), 0
        for done, is_new in write_store(image_store(params, size), list(files), rows, f"{key}:{size}", encode):
            encoded += rows if is_new else 0
            rate = min(encoded, done) / max(time.monotonic() - start_time, 1e-9)
            print(f"latents: size {size}: {done}/{len(files)} images, {rate:.1f} images/s", flush=True)

        # Measure the VAE's reconstruction error on a sample of the images.
        paths = list(files.values())[:: max(1, len(files) // PSNR_IMAGES)][:PSNR_IMAGES]
        values = [psnr(vae, image_tensor(load_image(path), size, device)[None]).item() for path in paths]
        psnrs[str(size)] = sum(values) / len(values)
        counts[str(size)] = len(files)
        print(f"latents: size {size}: VAE PSNR {psnrs[str(size)]:.2f} dB on {len(paths)} images", flush=True)
    return {"vae_psnr_db": psnrs, "images": counts, "vae_factor": vae_factor(vae)}


def _image_latents(
    vae: AutoencoderKL, params: Params, size: int, files: dict[str, str], device: torch.device, ids: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return the latents [N, C, h, w] of the images `ids`; `files` maps image ids to paths."""
    latents = []
    for start in range(0, len(ids), params.latents.batch):
        batch_ids = ids[start : start + params.latents.batch]
        batch = torch.stack([image_tensor(load_image(files[image_id]), size) for image_id in batch_ids])
        latents.append(encode_images(vae, batch.to(device)).cpu().to(DTYPES[params.latents.precision]))
    return {"latent": torch.cat(latents)}


def _encode_texts(params: Params, texts: list[str], backbone: dict[str, Any], device: torch.device, key: str) -> list[str]:
    """Write the text store and return the truncated texts. Texts of complete shards are not checked again."""
    encoders = load_text_encoders(backbone["pipeline"], backbone["revision"])
    for model in encoders.models:
        model.to(device)
    truncated: list[str] = []

    def encode(phrases: list[str]) -> dict[str, torch.Tensor]:
        embeddings = encode_phrases(encoders, phrases)
        truncated.extend(text for text, embedding in zip(phrases, embeddings, strict=True) if embedding.truncated)
        lengths = torch.tensor([0, *(len(embedding.tokens) for embedding in embeddings)])
        return {
            "tokens": torch.cat([embedding.tokens for embedding in embeddings]).cpu(),
            "pooled": torch.stack([embedding.pooled for embedding in embeddings]).cpu(),
            "offsets": lengths.cumsum(0),
        }

    for done, _ in write_store(text_store(params), texts, TEXT_ROWS * params.latents.shard_rows, key, encode):
        print(f"latents: {done}/{len(texts)} phrases encoded", flush=True)
    return truncated


class Texts:
    """Text embeddings by phrase. The 4096 most recently used are cached (SDXL's for a million narratives are 15 GB)."""

    def __init__(self, store: Path, device: torch.device) -> None:
        self._store, self._device = LatentStore(store), device
        self._cached = lru_cache(4096)(self._read)

    def __getitem__(self, phrase: str) -> TextEmbedding:
        return self._cached(phrase)

    def _read(self, phrase: str) -> TextEmbedding:
        row = self._store[phrase]
        return TextEmbedding(row["tokens"].to(self._device), row["pooled"].to(self._device), truncated=False)
