"""The trained control of a study: trained once on its training phrases, kept beside what it refines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from genseg.artifacts.files import file_sha256, read_json
from genseg.artifacts.manifest import code_hash, write_manifest
from genseg.artifacts.phrases import read_phrases
from genseg.errors import UserError
from genseg.models.device import choose_device
from genseg.params import Params, digest
from genseg.refine.layout import CODE_HERE, refined_dir
from genseg.refine.trained import Refiner, train_refiner


def network_dir(params: Params) -> Path:
    return refined_dir(params) / "network"


def network_manifest(params: Params) -> Path:
    return refined_dir(params) / "network.json"


def network_key(params: Params) -> str:
    trained = params.refine.trained.model_dump(mode="json")
    data = file_sha256(params.data_dir / "phrases.parquet")
    return digest([trained, params.seed, data, code_hash("artifacts", "data/images.py", "refine/trained.py")])


def train_network(params: Params) -> None:
    """Write the weights of the trained control to `results/<study>/refined/network`; finished ones are kept."""
    started, key, folder = time.time(), network_key(params), network_dir(params)
    if "trained" not in params.refine.controls:
        print("refine: no trained control in refine.controls", flush=True)
    elif _is_made(params, key):
        print(f"refine: {folder} is there already", flush=True)
        return
    else:
        choose_device("cpu", params.resources["refine"].threads)
        trained = params.refine.trained
        phrases = read_phrases(params.data_dir / "phrases.parquet")
        settings: dict[str, Any] = trained.model_dump()
        last = time.monotonic()
        for step, loss in enumerate(train_refiner(phrases, folder, **settings, seed=params.seed), start=1):
            if step == trained.steps or time.monotonic() - last > 10:
                last = time.monotonic()
                print(f"refine: trained control, step {step} of {trained.steps}, loss {loss:.4f}", flush=True)
    outputs = [folder] if "trained" in params.refine.controls else []
    inputs = [params.data_dir / "phrases.parquet"]
    write_manifest(
        network_manifest(params),
        "refine",
        params.subtree("seed", "refine.trained"),
        inputs,
        outputs,
        started,
        code=code_hash(*CODE_HERE),
        key=key,
    )


def load_network(params: Params) -> Refiner:
    """The trained control. Raises UserError where it is not trained, or with other params or code."""
    if not _is_made(params, network_key(params)):
        raise UserError(f"{network_dir(params)}: the trained control is not trained; run `genseg refine --train`")
    choose_device("cpu", params.resources["refine"].threads)
    return Refiner(network_dir(params))


def _is_made(params: Params, key: str) -> bool:
    path = network_manifest(params)
    return path.exists() and (network_dir(params) / "refiner.safetensors").exists() and read_json(path).get("key") == key
