"""The phase `latents`: stored values, resume, and invalid input."""

import time

import numpy as np
import torch
from PIL import Image

from genseg.artifacts.latents import LatentStore
from genseg.artifacts.manifest import read_manifest
from genseg.cli import main
from genseg.data.images import load_image
from genseg.latents import image_store, text_store
from genseg.models.backbone import load_text_encoders, load_vae
from genseg.models.text import encode_phrases
from genseg.models.vae import encode_images, image_tensor
from genseg.params import load_params


def test_stored_rows_equal_the_encoders_output(finished_study, monkeypatch):
    monkeypatch.chdir(finished_study)
    params = load_params("params/smoke.yaml")
    source = read_manifest("results/smoke/backbone/manifest.json")["pipeline"]
    vae, encoders = load_vae(source), load_text_encoders(source)
    for size in (48, 64):
        store = LatentStore(image_store(params, size))
        for image_id in store.ids()[:2] + store.ids()[-1:]:
            split = "train2017" if int(image_id) < 500_000 else "val2017"
            image = load_image(f"data/smoke/scenes/{split}/{int(image_id):012d}.jpg")
            expected = encode_images(vae, image_tensor(image, size)[None])[0]
            assert torch.allclose(store[image_id]["latent"], expected, atol=1e-4)
    texts = LatentStore(text_store(params))
    assert "" in texts
    for phrase in texts.ids()[::40]:
        expected = encode_phrases(encoders, [phrase])[0]
        assert texts[phrase]["tokens"].shape == expected.tokens.shape
        assert torch.allclose(texts[phrase]["tokens"], expected.tokens, atol=1e-5)
        assert torch.allclose(texts[phrase]["pooled"], expected.pooled, atol=1e-5)
    assert len(LatentStore(image_store(params, 64))) == 60
    assert len(LatentStore(image_store(params, 48))) < 12, "sizes of the grid have only the images of the grid"


def test_resume_writes_only_missing_shards_with_the_same_bytes(study_copy, monkeypatch):
    monkeypatch.chdir(study_copy)
    store = image_store(load_params("params/smoke.yaml"), 64)
    shards = sorted(store.glob("shard-*"))
    before = {path.name: path.read_bytes() for path in shards}
    times = {path.name: path.stat().st_mtime_ns for path in shards}
    shards[0].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:500])  # truncated
    time.sleep(0.01)
    assert main(["latents", "--params", "params/smoke.yaml"]) == 0
    after = {path.name: path.read_bytes() for path in sorted(store.glob("shard-*"))}
    assert after == before
    rewritten = {path.name for path in shards if path.stat().st_mtime_ns != times[path.name]}
    assert rewritten == {shards[0].name, shards[2].name}


def test_training_names_a_truncated_shard_of_latents(study_copy, monkeypatch, capsys):
    monkeypatch.chdir(study_copy)
    store = image_store(load_params("params/smoke.yaml"), 64)
    for shard in store.glob("shard-*"):
        shard.write_bytes(shard.read_bytes()[:500])
    (study_copy / "work/smoke/train").rename(study_copy / "work/smoke/train.old")
    (study_copy / "results/smoke/model/gs/model_index.json").unlink()
    assert main(["train", "--params", "params/smoke.yaml"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "shard-" in error
    assert "run `genseg latents`" in error


def test_corrupt_image_is_named_and_other_colour_modes_are_read(study_copy, monkeypatch, capsys):
    monkeypatch.chdir(study_copy)
    folder = study_copy / "data/smoke/scenes/train2017"
    pictures = sorted(folder.glob("*.jpg"))
    colour = Image.open(pictures[0])
    colour.convert("L").save(pictures[0])
    colour.convert("CMYK").save(pictures[1])
    store = image_store(load_params("params/smoke.yaml"), 64)
    for shard in store.glob("shard-*"):
        shard.unlink()
    assert main(["latents", "--params", "params/smoke.yaml"]) == 0
    assert np.isfinite(LatentStore(store)["1"]["latent"].numpy()).all()
    for shard in store.glob("shard-*"):
        shard.unlink()
    pictures[3].write_bytes(pictures[3].read_bytes()[:300])
    assert main(["latents", "--params", "params/smoke.yaml"]) == 2
    error = capsys.readouterr().err
    assert pictures[3].name in error
    assert "Traceback" not in error
