"""The phase `latents`: every image through the VAE once per size, every phrase through the text encoders once.

Label latents are not stored: they are the area reduction of the masks' run-length codes, cheaper to make than to read
(at paper scale they would be 12 GB).
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pandas as pd
import torch

from genseg.artifacts.files import file_sha256, write_json
from genseg.artifacts.latents import LatentStore, write_store
from genseg.artifacts.manifest import code_hash, read_manifest, write_manifest
from genseg.artifacts.phrases import choose_images, read_phrases
from genseg.data.images import load_image
from genseg.models.backbone import load_text_encoders, load_vae
from genseg.models.device import DTYPES, choose_device, describe
from genseg.models.text import TextEmbedding, encode_phrases
from genseg.models.vae import encode_images, image_tensor, psnr, vae_factor
from genseg.params import Params, digest

CODE = ("params.py", "artifacts", "data/images.py", "models", "latents.py")
PSNR_IMAGES = 64


def latents_dir(params: Params) -> Path:
    return params.results_dir / "latents"


def image_store(params: Params, size: int) -> Path:
    return latents_dir(params) / "images" / f"size={size:04d}"


def text_store(params: Params) -> Path:
    return latents_dir(params) / "text"


def grid_phrases(params: Params, phrases: pd.DataFrame) -> pd.DataFrame:
    """The fixed subset of test that the grid runs on: all phrases of images chosen by hash (the paper took 7 % of test)."""
    test = phrases[phrases["split"] == "test"]
    chosen = choose_images(test["image_id"].to_numpy(), params.sample.grid_fraction, params.seed, "grid")
    return test[test["image_id"].isin(chosen)]


def val_phrases(params: Params, phrases: pd.DataFrame) -> pd.DataFrame:
    """The fixed subset of val that operating points are compared on: all phrases of images chosen by hash."""
    val = phrases[phrases["split"] == "val"]
    chosen = choose_images(val["image_id"].to_numpy(), params.sample.select_fraction, params.seed, "operating points")
    return val[val["image_id"].isin(chosen)]


def images_by_size(params: Params, phrases: pd.DataFrame, class_phrases: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """Which images are needed at which size: (image_id, file_name), each image once per size.

    The training size holds train and val, the main size all of test (an image without a narrative still has class
    phrases) and the subset of val, every other size of the grid its subset.
    """
    wanted: dict[int, list[pd.DataFrame]] = {params.train.size: [phrases[phrases["split"] != "test"]]}
    tests = [table[table["split"] == "test"] for table in (phrases, class_phrases)]
    wanted.setdefault(params.sample.main.size, []).extend([*tests, val_phrases(params, phrases)])
    for size in params.sample.sizes():
        wanted.setdefault(size, []).append(grid_phrases(params, phrases))
    columns = ["image_id", "file_name"]
    return {
        size: pd.concat(parts)[columns].drop_duplicates("image_id").sort_values("image_id") for size, parts in wanted.items()
    }


def compute_latents(params: Params, only_training: bool = False) -> None:
    """Write the stores below `results/<study>/latents` and, last, its manifest; finished shards are kept.

    Args:
        only_training: write what training reads (the images at `train.size`, all texts) and then `train.json`, which holds
            no times: made again of the same things it is the same, and nothing is trained again.

    Raises:
        UserError: an image is missing or corrupt, the backbone cannot be loaded, the disk is full, no GPU for `cuda`.
    """
    started = time.time()
    device = choose_device(params.device, params.resources["latents"].threads)
    print(f"latents: device {describe(device)}", flush=True)
    backbone = read_manifest(params.results_dir / "backbone" / "manifest.json")
    source, revision = backbone["pipeline"], backbone["revision"]
    phrases = read_phrases(params.data_dir / "phrases.parquet")
    class_phrases = read_phrases(params.data_dir / "class_phrases.parquet")
    origin = [file_sha256(params.data_dir / "phrases.parquet"), backbone["weights"], params.latents.model_dump(mode="json")]

    images = images_by_size(params, phrases, class_phrases)
    if only_training:
        images = {params.train.size: images[params.train.size]}
    texts = sorted({"", *phrases["phrase"], *class_phrases["phrase"]})
    image_key, text_key = digest(origin), digest([backbone["weights"], texts])
    facts = _encode_images(params, images, source, revision, device, image_key)
    truncated = _encode_texts(params, texts, source, revision, device, text_key)
    if truncated:
        print(
            f"latents: {len(truncated)} phrases are over the tokenizer's limit and were cut, e.g. {truncated[0]!r}",
            file=sys.stderr,
        )
    if only_training:
        facts = {"version": 1, "size": params.train.size, "images": image_key, "texts": text_key}
        write_json(latents_dir(params) / "train.json", facts)
        return
    for store in sorted(set((latents_dir(params) / "images").iterdir()) - {image_store(params, size) for size in images}):
        shutil.rmtree(store)
        print(f"latents: removed {store}, which the study no longer has", flush=True)
    write_manifest(
        latents_dir(params) / "manifest.json",
        "latents",
        params.subtree("latents", "train.size", "sample", "seed"),
        [params.data_dir / "manifest.json", params.results_dir / "backbone" / "manifest.json"],
        [latents_dir(params) / "images", latents_dir(params) / "text"],
        started,
        describe(device),
        code=code_hash(*CODE),
        truncated_phrases=truncated,
        texts=len(texts),
        **facts,
    )


def _encode_images(
    params: Params, wanted: dict[int, pd.DataFrame], source: str, revision: str | None, device: torch.device, key: str
) -> dict[str, object]:
    vae = load_vae(source, revision, DTYPES[params.latents.encode_precision]).to(device)
    factor = vae_factor(vae)
    psnrs: dict[str, float] = {}
    counts: dict[str, int] = {}
    for size, images in sorted(wanted.items()):
        files = dict(zip(map(str, images["image_id"]), images["file_name"], strict=True))

        def encode(ids: Sequence[str], size: int = size, files: dict[str, str] = files) -> dict[str, torch.Tensor]:
            parts = []
            for start in range(0, len(ids), params.latents.batch):
                batch = torch.stack(
                    [image_tensor(load_image(files[i]), size) for i in ids[start : start + params.latents.batch]]
                )
                parts.append(encode_images(vae, batch.to(device)).cpu().to(DTYPES[params.latents.precision]))
            return {"latent": torch.cat(parts)}

        begun, made = time.monotonic(), 0
        for done, fresh in write_store(
            image_store(params, size), list(files), params.latents.shard_rows, f"{key}:{size}", encode
        ):
            made += params.latents.shard_rows if fresh else 0
            rate = min(made, done) / max(time.monotonic() - begun, 1e-9)
            print(f"latents: size {size}: {done}/{len(files)} images, {rate:.1f} images/s", flush=True)
        some = list(files.values())[:: max(1, len(files) // PSNR_IMAGES)][:PSNR_IMAGES]
        values = [psnr(vae, image_tensor(load_image(path), size, device)[None]).item() for path in some]
        psnrs[str(size)] = sum(values) / len(values)
        counts[str(size)] = len(files)
        print(f"latents: size {size}: the VAE restores {len(some)} of the images at {psnrs[str(size)]:.2f} dB PSNR", flush=True)
    return {"vae_psnr_db": psnrs, "images": counts, "vae_factor": factor}


def _encode_texts(
    params: Params, texts: list[str], source: str, revision: str | None, device: torch.device, key: str
) -> list[str]:
    encoders = load_text_encoders(source, revision)
    for model in encoders.models:
        model.to(device)
    truncated: list[str] = []

    def encode(part: list[str]) -> dict[str, torch.Tensor]:
        embeddings = encode_phrases(encoders, part)
        truncated.extend(text for text, embedding in zip(part, embeddings, strict=True) if embedding.truncated)
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
    """Text embeddings by phrase; those last asked for are kept, not all (SDXL's for a million narratives are 15 GB)."""

    KEPT = 4096

    def __init__(self, store: Path, device: torch.device) -> None:
        self._store, self._device = LatentStore(store), device
        self._read = lru_cache(self.KEPT)(self._embedding)

    def __getitem__(self, phrase: str) -> TextEmbedding:
        return self._read(phrase)

    def _embedding(self, phrase: str) -> TextEmbedding:
        row = self._store[phrase]
        return TextEmbedding(row["tokens"].to(self._device), row["pooled"].to(self._device), truncated=False)
