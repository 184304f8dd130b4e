"""Training: exact resume after kill -9, independence from micro-batches, what is trained, what is logged."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from genseg.artifacts.manifest import read_manifest
from genseg.cli import main
from genseg.diffusion.pipeline import load_pipeline
from genseg.params import Optimizer, load_params, validate_params
from genseg.training.gs import (
    Networks,
    PhraseData,
    Texts,
    build_networks,
    image_store,
    parameter_groups,
    step_indices,
    text_store,
    total_steps,
)
from genseg.training.loop import check_finite, load_checkpoint, lr_factor, save_checkpoint


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{k}": v
        for part in ("unet", "adapter")
        for k, v in load_file(next((folder / part).glob("*.safetensors"))).items()
    }


def variant(study: Path, name: str, **changes) -> str:
    """A params file of the finished study with other values; returns its path relative to the study."""
    document = yaml.safe_load((study / "params/smoke.yaml").read_text())
    for key, value in changes.items():
        node = document
        *parents, last = key.split("__")
        for part in parents:
            node = node[part]
        node[last] = value
    (study / f"params/{name}.yaml").write_text(yaml.safe_dump(document))
    return f"params/{name}.yaml"


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 40))
def test_every_row_is_seen_once_an_epoch_whatever_the_batch(seed, batch, count):
    steps = -(-count // batch)
    seen = [index for step in range(steps) for index in step_indices(seed, step, batch, count)][:count]
    assert Counter(seen) == Counter(range(count))


def test_learning_rate_schedule():
    values = [lr_factor(step, 100, 10, "cosine") for step in range(100)]
    assert values[0] == pytest.approx(1 / 11, rel=1e-3)
    assert max(values) == pytest.approx(values[10], rel=0.05)
    assert values[-1] < 0.001
    assert lr_factor(99, 100, 0, "constant") == 1


def test_a_bad_loss_stops_before_it_reaches_the_weights():
    from genseg.errors import UserError

    with pytest.raises(UserError, match="step 7: the loss is nan"):
        check_finite(torch.tensor(float("nan")), 7)


def test_a_torn_checkpoint_is_passed_over(tmp_path, capsys):
    save_checkpoint(tmp_path, 1, {"x": torch.ones(3)})
    save_checkpoint(tmp_path, 2, {"x": torch.zeros(3)})
    newest = sorted(tmp_path.glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    assert load_checkpoint(tmp_path)["step"] == 1
    assert "unreadable" in capsys.readouterr().out


def test_killed_training_ends_with_the_same_weights(study_copy, monkeypatch):
    """kill -9 after some checkpoint, run again: the final weights are those of the uncut run, bit for bit."""
    expected = weights(study_copy / "results/smoke/model")
    log = (study_copy / "results/smoke/model/log.csv").read_bytes()
    shutil.rmtree(study_copy / "results/smoke/model")
    shutil.rmtree(study_copy / "work/smoke/train")
    command = [str(Path(sys.executable).parent / "genseg"), "train", "--params", "params/smoke.yaml", "--model", "gs"]
    process = subprocess.Popen(
        command, cwd=study_copy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    deadline = time.time() + 240
    while not list((study_copy / "work/smoke").glob("train/*/step-*.pt")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (study_copy / "results/smoke/model").exists(), "killed in the middle"
    monkeypatch.chdir(study_copy)
    assert main(["train", "--params", "params/smoke.yaml", "--model", "gs"]) == 0
    found = weights(study_copy / "results/smoke/model")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (study_copy / "results/smoke/model/log.csv").read_bytes() == log


def test_micro_batches_change_rounding_only(study_copy, monkeypatch):
    monkeypatch.chdir(study_copy)
    before = weights(study_copy / "results/smoke/model")
    params = variant(study_copy, "whole", train__micro_batch=8)
    assert main(["train", "--params", params]) == 0
    after = weights(study_copy / "results/smoke/model")
    start = weights_at_start(study_copy)
    moved = torch.cat([(before[name] - start[name]).abs().flatten() for name in start]).mean()
    apart = torch.cat([(before[name] - after[name]).abs().flatten() for name in start]).mean()
    assert moved > 1e-5
    assert apart < 0.01 * moved


def weights_at_start(study: Path) -> dict[str, torch.Tensor]:
    params = load_params("params/smoke.yaml")
    backbone = read_manifest(study / "results/smoke/backbone/manifest.json")
    texts = Texts(text_store(params), torch.device("cpu"))
    networks = build_networks(params, backbone["pipeline"], None, texts[""])
    parts = {"unet": networks.unet, "adapter": networks.adapter}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}


def test_all_of_the_networks_is_trained_and_new_layers_have_their_rate(finished_study, monkeypatch):
    monkeypatch.chdir(finished_study)
    start, end = weights_at_start(finished_study), weights(finished_study / "results/smoke/model")
    still = [name for name in start if torch.equal(start[name], end[name])]
    assert not still
    params = load_params("params/smoke.yaml")
    pipeline = load_pipeline("results/smoke/model")
    networks = Networks(pipeline.unet, pipeline.adapter)
    groups = parameter_groups(networks, params.train.optimizer)
    assert [group["lr"] for group in groups] == [params.train.optimizer.lr, params.train.optimizer.lr_new]
    new = {id(parameter) for parameter in groups[1]["params"]}
    assert {id(p) for p in networks.adapter.parameters()} <= new
    assert {id(p) for p in pipeline.unet.conv_in.parameters()} <= new
    assert sum(len(group["params"]) for group in groups) == len(list(networks.parameters()))
    one = Optimizer.model_validate(params.train.optimizer.model_dump() | {"lr_new": None})
    assert len(parameter_groups(networks, one)) == 1, "the paper has one Adam group"


def test_the_log_has_validation_loss_per_timestep_band(finished_study):
    with open(finished_study / "results/smoke/model/log.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    last = rows[-1]
    assert int(last["step"]) == 8
    bands = [float(last[name]) for name in ("val_t0_249", "val_t250_499", "val_t500_749", "val_t750_999")]
    assert float(last["val_loss"]) == pytest.approx(sum(bands) / 4, rel=1e-4)


def test_labels_are_the_area_reduced_masks_and_mirrored_with_the_image(finished_study, monkeypatch):
    from genseg.artifacts.latents import LatentStore
    from genseg.artifacts.phrases import read_phrases, row_mask

    monkeypatch.chdir(finished_study)
    params = load_params("params/smoke.yaml")
    phrases = read_phrases(params.data_dir / "phrases.parquet")
    rows = phrases[phrases["split"] == "train"]
    data = PhraseData(
        rows, LatentStore(image_store(params, 64)), Texts(text_store(params), torch.device("cpu")), torch.device("cpu")
    )
    batch = data.batch([0, 0], [False, True])
    mask = torch.from_numpy(row_mask(rows.iloc[0])).float()
    assert torch.allclose(batch.label[0, 0], mask.reshape(16, 4, 16, 4).mean((1, 3)), atol=1e-6)
    assert torch.equal(batch.label[1], batch.label[0].flip(-1))
    assert torch.equal(batch.image[1], batch.image[0].flip(-1))


def test_epochs_become_steps():
    document = yaml.safe_load((Path(__file__).resolve().parents[1] / "params.yaml").read_text())
    document["train"] |= {"steps": None, "epochs": 3}
    assert total_steps(validate_params(document).train, 100) == -(-300 // document["train"]["batch"])


OTHER_CHOICES = {
    "no injection, noise": {
        "train__prediction": "noise",
        "train__zero_terminal_snr": False,
        "train__task_weight": 0.0,
        "train__inject": "none",
    },
    "v, pooled text, one group": {
        "train__prediction": "v",
        "train__text": "pooled",
        "train__image_columns": "masked_image",
        "train__ema": None,
        "train__precision": "bf16",
        "train__gradient_checkpointing": True,
        "train__optimizer__lr_new": None,
        "train__optimizer__name": "adam",
    },
}


@pytest.mark.parametrize("changes", OTHER_CHOICES.values(), ids=OTHER_CHOICES)
def test_other_choices_train_and_predict(study_copy, monkeypatch, changes):
    monkeypatch.chdir(study_copy)
    params = variant(study_copy, "other", train__steps=2, **changes)
    assert main(["train", "--params", params]) == 0
    assert json.loads((study_copy / "results/smoke/model/manifest.json").read_text())["steps"] == 2
    picture = next((study_copy / "data/smoke/scenes/val2017").glob("*.jpg"))
    out = study_copy / "out"
    assert main(["predict", str(picture), "--phrase", "the grass", "--model", "results/smoke/model", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"mask_0.png", "overlay.png", "predictions.json"}


def test_a_full_disk_is_one_line_and_training_goes_on_when_there_is_space(study_copy, monkeypatch, capsys):
    expected = weights(study_copy / "results/smoke/model")
    disk = study_copy / "work/smoke/train"
    shutil.rmtree(disk)
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        monkeypatch.chdir(study_copy)
        assert main(["train", "--params", "params/smoke.yaml"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "the disk is full" in error
        assert "work/smoke/train" in error
        assert not list(disk.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        assert main(["train", "--params", "params/smoke.yaml"]) == 0
        found = weights(study_copy / "results/smoke/model")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    finally:
        subprocess.run(["umount", disk], check=True)
