"""The small form of `make rehearsal`: the paper's study from the download of its data and its backbone to a trained model."""

from __future__ import annotations

import json
from pathlib import Path

from genseg.models import sdxl
from rehearsal.project import CONFIGS, Rehearsal
from rehearsal.servers import Fault

SHARDS = ("unet/diffusion_pytorch_model-00001-of-00003.safetensors", "vae/diffusion_pytorch_model.safetensors")


def test_paper_study_is_trained_from_what_its_hosts_publish(tmp_path: Path) -> None:
    with Rehearsal(tmp_path / "project") as rehearsal:
        steps = rehearsal.folder / "params/overlays/one_step.yaml"
        steps.write_text("train: {epochs: null, steps: 1}\n")
        rehearsal.data.faults = [Fault(cut=5000), Fault(status=503), Fault(announced=1000, cut=1000)]
        log, model = tmp_path / "log", "results/rehearsal/model/gs"
        command = ["snakemake", "--cores", "1", "--resources", "gpu=8", "--configfile", *CONFIGS, str(steps)]
        rehearsal.hub.faults = [Fault(cut=5000), Fault(flip=-1)]  # the weights of the VAE arrive with one changed byte
        assert rehearsal.run([*command, "--", f"{model}/manifest.json"], log) != 0
        assert "run again to download it again" in log.read_text(), log.read_text()[-5000:]
        assert rehearsal.run([*command, "--", f"{model}/manifest.json"], log) == 0, log.read_text()[-5000:]

    # The backbone is the repository's commit, in full precision, and its weights were downloaded once, but for the faults.
    repository = rehearsal.hub.repositories[sdxl.HUB_ID]
    manifest = json.loads((rehearsal.folder / "results/rehearsal/backbone/manifest.json").read_text())
    assert (manifest["pipeline"], manifest["revision"]) == (sdxl.HUB_ID, repository.commit)
    downloads = [path for path, _ in rehearsal.hub.requests if path.startswith("/cdn/")]
    assert len(downloads) == len(set(downloads)) + 2
    assert {f"/cdn/{sdxl.HUB_ID}/{shard}" for shard in SHARDS} <= set(downloads)
    assert not [path for path in downloads if "fp16" in path]
    # The training made one step, and the data are those that the host served.
    assert len((rehearsal.folder / model / "log.csv").read_text().splitlines()) == 2
    assert (rehearsal.folder / "data/inputs/png/png_coco_val2017.json").read_bytes() == rehearsal.data.files[
        "png_coco_val2017.json"
    ]
    assert rehearsal.data.faults == []
