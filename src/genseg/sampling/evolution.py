"""Labels of a few phrases at the base point: x_t and the estimates of x_0 over the timesteps (Fig. 5), and for Fig. 4."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from genseg.artifacts.files import atomic_path
from genseg.artifacts.latents import LatentStore
from genseg.artifacts.parquet import KEY
from genseg.diffusion.pipeline import GSPipeline
from genseg.diffusion.sampling import phrase_generators
from genseg.latents import Texts, image_store
from genseg.params import Params, canonical_json, digest
from genseg.sampling.readout import VaeReadout
from genseg.sampling.runs import base_run, run_rows

PHRASES = 4
"""Number of recorded phrases: by image id, the first thing and the first stuff of an image, then other phrases."""


def evolution_path(folder: Path) -> Path:
    """Return the path of the evolution file in a folder of predictions or parts."""
    return folder / "evolution.safetensors"


def evolution_key(run_key: str) -> str:
    """Return the hash of everything that the evolution depends on, given the key of the base run."""
    return digest([run_key, "evolution"])


def has_evolution(path: Path, key: str) -> bool:
    """Return whether an evolution file exists and has this key."""
    try:
        with safe_open(path, "np") as handle:
            return json.loads(handle.metadata()["evolution"])["key"] == key
    except (SafetensorError, OSError, KeyError, TypeError):
        return False


def write_evolution(path: Path, params: Params, pipeline: GSPipeline, texts: Texts, phrases: pd.DataFrame, key: str) -> None:
    """Write maps of K phrases as uint8 (0 to 255), and as metadata timesteps [T], the keys of the phrases, and `key`.

    `xt` and `x0` are soft maps [K, T, h, w] of the noisy label and of its estimate, and `unguided` [K, h, w] of x_0 with w = 1.
    `decoded` [K, H, W] is the VAE decoding of the raw x_0; VAE labels, whose maps are decoded already, do not have it.
    """
    base = params.sample.base
    rows = run_rows(params, base_run(params), phrases, phrases.iloc[:0]).sort_values(KEY)
    rows = pd.concat([rows.drop_duplicates(["image_id", "is_thing"]), rows]).drop_duplicates(KEY).head(PHRASES)
    images = LatentStore(image_store(params, base.size))
    latents = torch.stack([images[image_id]["latent"] for image_id in rows["image_id"]]).to(pipeline.device)
    keys = list(zip(*(rows[name] for name in KEY), strict=True))
    texts_of_rows = [texts[text] for text in rows["text"]]
    states: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def observe(t: int, x_t: torch.Tensor, x_0: torch.Tensor) -> None:
        states.append((t, x_t, x_0))

    pipeline.label_maps(latents, texts_of_rows, phrase_generators(params.seed, keys, base), base, observe=observe)
    without_guidance = base.model_copy(update={"guidance_scale": 1.0})
    generators = phrase_generators(params.seed, keys, without_guidance)
    unguided = pipeline.label_maps(latents, texts_of_rows, generators, without_guidance).mean(0)

    def as_uint8(maps: NDArray[np.float32]) -> NDArray[np.uint8]:
        return np.rint(maps * 255).astype(np.uint8)

    def soft(labels: list[torch.Tensor]) -> NDArray[np.uint8]:
        return as_uint8(torch.stack([pipeline.soft_labels(label) for label in labels], dim=1).cpu().numpy())  # (K, T, h, w)

    facts = {
        "timesteps": [t for t, _, _ in states],
        "keys": [[int(image_id), str(narrative_id), int(phrase_id)] for image_id, narrative_id, phrase_id in keys],
        "key": key,
    }
    metadata = {"evolution": canonical_json(facts)}  # a single entry, because safetensors does not fix the order of entries
    tensors = {"xt": soft([x_t for _, x_t, _ in states]), "x0": soft([x_0 for _, _, x_0 in states])}
    tensors["unguided"] = as_uint8(unguided.cpu().numpy())
    if pipeline.config.label == "mask":
        labels = (states[-1][2][:, 0] / pipeline.config.label_scale).cpu().numpy()  # raw: neither softened nor rounded
        tensors["decoded"] = as_uint8(VaeReadout(pipeline.vae, base.size)(labels))
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
