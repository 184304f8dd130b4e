"""The phase `latents`: VAE latents of every image, once per size, and text embeddings of every phrase.

Label latents are not stored: they are area-reduced masks, which are cheaper to compute from the run lengths than to read
(they would be 12 GB at paper scale).
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import pandas as pd
import torch
from diffusers import AutoencoderKL

from genseg.artifacts.files import file_sha256, write_json
from genseg.artifacts.latents import LatentStore, write_store
from genseg.artifacts.manifest import code_hash, read_manifest, write_manifest
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.subsets import grid_phrases, val_phrases
from genseg.data.images import load_image
from genseg.models.backbone import load_text_encoders, load_vae
from genseg.models.device import DTYPES, choose_device, describe
from genseg.models.text import TextEmbedding, encode_phrases
from genseg.models.vae import encode_images, image_tensor, psnr, vae_factor
from genseg.params import Params, digest

CODE = ("params.py", "artifacts", "data/images.py", "models", "latents.py")
PSNR_IMAGES = 64


def latents_dir(params: Params) -> Path:
    """Return the folder of all stores."""
    return params.results_dir / "latents"


def image_store(params: Params, size: int) -> Path:
    """Return the store of the latents of images resized to `size` pixels."""
    return latents_dir(params) / "images" / f"size={size:04d}"


def text_store(params: Params) -> Path:
    """Return the store of the text embeddings."""
    return latents_dir(params) / "text"


def images_by_size(params: Params, phrases: pd.DataFrame, class_phrases: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """Return the images to encode at each size, as tables (image_id, file_name) with one row per image.

    The training size has train and val. The main size has all of test (an image without a narrative still has class phrases)
    and the subset of val. Every other size of the grid has the grid's subset of test.
    """
    tables: dict[int, list[pd.DataFrame]] = {params.train.size: [phrases[phrases["split"] != "test"]]}
    tests = [table[table["split"] == "test"] for table in (phrases, class_phrases)]
    tables.setdefault(params.sample.main.size, []).extend([*tests, val_phrases(params, phrases)])
    for size in params.sample.sizes():
        tables.setdefault(size, []).append(grid_phrases(params, phrases))
    columns = ["image_id", "file_name"]
    return {
        size: pd.concat(parts)[columns].drop_duplicates("image_id").sort_values("image_id") for size, parts in tables.items()
    }


def compute_latents(params: Params, only_training: bool = False) -> None:
    """Write the stores in `results/<study>/latents` and, last, their manifest. Complete shards are not computed again.

    Args:
        only_training: write only what training reads (the images at `train.size`, all texts) and then `train.json`. That file
            holds no times, so a rerun with the same inputs writes the same bytes and does not trigger training.

    Raises:
        UserError: an image is missing or corrupt, the backbone cannot be loaded, the disk is full, or there is no GPU for
            `device: cuda`.
    """
    start_time = time.time()
    device = choose_device(params.device, params.resources["latents"].threads)
    print(f"latents: device {describe(device)}", flush=True)

    # 1. Load the inputs and hash them.
    backbone = read_manifest(params.results_dir / "backbone" / "manifest.json")
    source, revision = backbone["pipeline"], backbone["revision"]
    phrases = read_phrases(params.data_dir / "phrases.parquet")
    class_phrases = read_phrases(params.data_dir / "class_phrases.parquet")
    images = images_by_size(params, phrases, class_phrases)
    if only_training:
        images = {params.train.size: images[params.train.size]}
    texts = sorted({"", *phrases["phrase"], *class_phrases["phrase"]})
    phrases_hash, encoding = file_sha256(params.data_dir / "phrases.parquet"), params.latents.model_dump(mode="json")
    image_key = digest([phrases_hash, backbone["weights"], encoding])
    text_key = digest([backbone["weights"], texts])

    # 2. Encode images and texts.
    facts = _encode_images(params, images, source, revision, device, image_key)
    truncated = _encode_texts(params, texts, source, revision, device, text_key)
    if truncated:
        print(
            f"latents: warning: {len(truncated)} phrases exceed the tokenizer's limit and are truncated, e.g. {truncated[0]!r}",
            file=sys.stderr,
        )

    # 3. Remove stores of sizes that the study no longer uses, and write the manifest.
    if only_training:
        facts = {"version": 1, "size": params.train.size, "images": image_key, "texts": text_key}
        write_json(latents_dir(params) / "train.json", facts)
        return
    for store in sorted(set((latents_dir(params) / "images").iterdir()) - {image_store(params, size) for size in images}):
        shutil.rmtree(store)
        print(f"latents: removed {store}, which the study no longer uses", flush=True)
    write_manifest(
        latents_dir(params) / "manifest.json",
        "latents",
        params.subtree("latents", "train.size", "sample", "seed"),
        [params.data_dir / "manifest.json", params.results_dir / "backbone" / "manifest.json"],
        [latents_dir(params) / "images", latents_dir(params) / "text"],
        start_time,
        describe(device),
        code=code_hash(*CODE),
        truncated_phrases=truncated,
        texts=len(texts),
        **facts,
    )


def _encode_images(
    params: Params, images: dict[int, pd.DataFrame], source: str, revision: str | None, device: torch.device, key: str
) -> dict[str, object]:
    """Write the image stores, one per size, and return facts for the manifest."""
    vae = load_vae(source, revision, DTYPES[params.latents.encode_precision]).to(device)
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

        # Measure how well the VAE restores a sample of them.
        paths = list(files.values())[:: max(1, len(files) // PSNR_IMAGES)][:PSNR_IMAGES]
        values = [psnr(vae, image_tensor(load_image(path), size, device)[None]).item() for path in paths]
        psnrs[str(size)] = sum(values) / len(values)
        counts[str(size)] = len(files)
        print(f"latents: size {size}: VAE PSNR {psnrs[str(size)]:.2f} dB on {len(paths)} images", flush=True)
    return {"vae_psnr_db": psnrs, "images": counts, "vae_factor": vae_factor(vae)}


def _image_latents(
    vae: AutoencoderKL, params: Params, size: int, files: dict[str, str], device: torch.device, ids: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return the latents [N, C, h, w] of N images. files: image id -> path."""
    latents = []
    for start in range(0, len(ids), params.latents.batch):
        batch_ids = ids[start : start + params.latents.batch]
        batch = torch.stack([image_tensor(load_image(files[image_id]), size) for image_id in batch_ids])
        latents.append(encode_images(vae, batch.to(device)).cpu().to(DTYPES[params.latents.precision]))
    return {"latent": torch.cat(latents)}


def _encode_texts(
    params: Params, texts: list[str], source: str, revision: str | None, device: torch.device, key: str
) -> list[str]:
    """Write the text store and return the truncated texts among those encoded now."""
    encoders = load_text_encoders(source, revision)
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

    for done, _ in write_store(text_store(params), texts, 8 * params.latents.shard_rows, key, encode):
        print(f"latents: {done}/{len(texts)} phrases encoded", flush=True)
    return truncated


class Texts:
    """Text embeddings by phrase. The most recently used ones are cached, not all (SDXL's embeddings of a million narratives
    are 15 GB)."""

    CACHED = 4096

    def __init__(self, store: Path, device: torch.device) -> None:
        self._store, self._device = LatentStore(store), device
        self._cached = lru_cache(self.CACHED)(self._read)

    def __getitem__(self, phrase: str) -> TextEmbedding:
        return self._cached(phrase)

    def _read(self, phrase: str) -> TextEmbedding:
        row = self._store[phrase]
        return TextEmbedding(row["tokens"].to(self._device), row["pooled"].to(self._device), truncated=False)
