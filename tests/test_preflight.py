"""The phase `preflight`: backbones from a local hub and from directories, wrong architectures, and too small a machine."""

import http.server
import json
import shutil
import socket
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml

from conftest import PROJECT
from genseg.cli import main
from genseg.models.source import chosen_backbone
from genseg.params import load_params
from genseg.plan import preflight
from genseg.plan.jobs import job_warnings

SHA = {"first": "1" * 40, "second": "2" * 40}


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories of the folder `root`, all at the commit `head`: the part of the hub's protocol that downloads use."""

    def __init__(self, root: Path, head: dict[str, str], *args) -> None:
        self.root, self.head = root, head
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api":
            found = self.root.joinpath(*parts[2:4]).is_dir()
            answer = {"id": "/".join(parts[2:4]), "sha": self.head["sha"], "cardData": {"license": "openrail++"}}
            body = json.dumps(answer).encode()
        else:  # owner/name/resolve/commit/file
            file = self.root.joinpath(*parts[:2], *parts[4:])
            found, body = file.is_file(), file.read_bytes() if file.is_file() else b""
        self.send_response(200 if found else 404)
        if not found:
            self.send_header("X-Error-Code", "RepoNotFound" if parts[0] == "api" else "EntryNotFound")
            body = b""
        self.send_header("X-Repo-Commit", self.head["sha"])
        self.send_header("ETag", f'"{len(body)}-{hash(self.path)}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_args) -> None:
        pass


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with the shipped backbone. Any connection to another machine is an error."""
    connect = socket.socket.connect

    def refuse(self, address):
        assert not isinstance(address, tuple) or address[0] in ("127.0.0.1", "localhost"), address
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    shutil.copytree(PROJECT / "data/backbone", tmp_path / "data/backbone")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def hub(project, monkeypatch):
    """A hub with the repository `lab/small`, a copy of the shipped backbone; yields its current commit."""
    head = {"sha": SHA["first"]}
    shutil.copytree("data/backbone", "hub/lab/small")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, project / "hub", head))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    yield head
    server.shutdown()


def check(capsys, **document) -> tuple[int, str]:
    """Return the exit code of `genseg preflight` on params with these sections, and its output."""
    Path("study.yaml").write_text(yaml.safe_dump({"study": "mini", "device": "cpu"} | document))
    capsys.readouterr()
    code = main(["preflight", "--params", "study.yaml"])
    captured = capsys.readouterr()
    return code, captured.err.strip() if code else captured.out


def edit(file: str, **changes) -> None:
    path = Path(file)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_local_backbones_need_no_network(project, capsys):
    assert check(capsys)[0] == 0
    records = json.loads(Path("results/mini/preflight/backbones.json").read_text())
    assert records == {"backbone.init": {"source": "data/backbone", "revision": None, "commit": None, "licence": None}}


def test_hub_id_is_resolved_once_and_phases_load_that_commit(hub, capsys):
    refine = {"backbone": "lab/small"}
    code, text = check(capsys, refine=refine)
    assert code == 0
    assert f"refine.backbone: lab/small at {SHA['first']}, licence: openrail++" in text
    params = load_params("study.yaml")
    assert chosen_backbone(params, params.refine).revision == SHA["first"]
    hub["sha"] = SHA["second"]
    assert check(capsys, refine=refine)[0] == 0
    assert chosen_backbone(params, params.refine).revision == SHA["first"], "a study never mixes two commits"
    assert main(["plan", "--json", "--params", "study.yaml"]) == 0
    planned = json.loads(capsys.readouterr().out)["memory"]["generators"]
    assert planned["refine"]["parameters"] == planned["baselines"]["parameters"], "read from the configs on the hub"
    shutil.rmtree("hub/lab")
    assert check(capsys, refine=refine)[0] == 0, "a recorded commit needs no hub"
    shutil.rmtree("results")
    code, line = check(capsys, refine=refine)
    assert code == 2
    assert "refine.backbone: lab/small: the hub has no such repository" in line


def test_cached_copy_is_used_when_the_hub_has_no_repository(hub, capsys):
    for file in Path("hub/lab/small").rglob("*.json"):
        huggingface_hub.hf_hub_download("lab/small", file.relative_to("hub/lab/small").as_posix())
    shutil.rmtree("hub/lab")
    code, text = check(capsys, refine={"backbone": "lab/small"})
    assert code == 0
    assert f"using the cached commit {SHA['first']}" in text


def test_missing_id_fails_with_key_id_and_remedy(hub, capsys):
    code, line = check(capsys, refine={"backbone": "lab/withdrawn"})
    assert code == 2
    assert "\n" not in line
    assert "refine.backbone: lab/withdrawn: the hub has no such repository (withdrawn, renamed or private); set" in line
    assert not Path("results/mini/preflight/backbones.json").exists(), "Snakemake would consider the job done"


WRONG = [
    ({"train": {"size": 130}}, {}, "train.size: 130: not a multiple of the VAE's factor 4; set it to 128 or 132"),
    ({"sample": {"grid": {"sizes": [64, 50]}}}, {}, "sample.grid.sizes: 50: not a multiple of the VAE's factor 4"),
    (
        {"baselines": {"diffpng": {"cross_side": 12}}},
        {},
        "baselines.diffpng.cross_side: the U-Net has no attention on 12 x 12 tokens",
    ),
    (
        {"baselines": {"diffpng": {"self_side": 64}}},
        {},
        "baselines.diffpng.self_side: the U-Net has no attention on 64 x 64 tokens at this image size; its sides are 16, 8",
    ),
    ({"refine": {"layers": [1, 3]}}, {}, "refine.layers: 3: the backbone has no such up-block; it has 0, 1, 2"),
    ({"refine": {"sensitivity": {"layer": [9]}}}, {}, "refine.sensitivity.layer: 9"),
    ({}, {"unet": {"in_channels": 4}}, "its U-Net has 4 input channels; set backbone.init to an in-painting U-Net (9)"),
    ({}, {"unet": {"addition_embed_type": None}}, "missing second text encoder; GS needs an SDXL-inpainting pipeline"),
    (
        {},
        {"unet": {"_class_name": "FluxTransformer2DModel"}},
        "its unet is a FluxTransformer2DModel; expected a UNet2DCondition",
    ),
    ({}, {"vae": {"latent_channels": 16}}, "its latents do not have 4 channels"),
    ({}, {"scheduler": {"prediction_type": "sample"}}, "prediction type sample; expected one of epsilon, v_prediction"),
]


@pytest.mark.parametrize(("document", "changes", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_what_the_backbone_does_not_have_is_one_line(project, document, changes, message, capsys):
    for folder, values in changes.items():
        edit(f"data/backbone/{folder}/{'scheduler_config' if folder == 'scheduler' else 'config'}.json", **values)
    code, line = check(capsys, **document)
    assert code == 2
    assert message in line
    assert "\n" not in line


def test_missing_component_is_named(project, capsys):
    shutil.rmtree("data/backbone/tokenizer_2")
    assert "backbone.init: data/backbone: missing tokenizer_2/tokenizer_config.json" in check(capsys)[1]


def test_machine_is_compared_with_the_plan(project, monkeypatch, capsys):
    """A GPU is simulated: its name and memory are those of the driver's answers."""
    memory, free = [80e9], [1e15]
    monkeypatch.setattr(preflight, "choose_device", lambda _preference: torch.device("cuda"))
    monkeypatch.setattr(preflight, "describe", str)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(total_memory=memory[0]))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=free[0]))
    code, text = check(capsys, device="auto", resources={"train": {"mem_mb": 1000}})
    assert code == 0
    assert "GB of host memory are planned, but resources.train.mem_mb is 1000; raise it" in text
    plan = json.loads(Path("work/mini/plan.json").read_text())
    [hours] = [row["hours"] for row in plan["jobs"] if row["job"] == "sample.size=0128"]
    [total] = [row for row in plan["phases"] if row["what"] == "all runs at 128"]
    assert hours == pytest.approx(total["flops"] / (989e12 * 0.4) / 3600 / 2), "two shards of one GPU each"
    memory[0] = 1e6
    line = check(capsys)[1]
    assert "GB are planned, but NVIDIA H100 80GB HBM3 has 0.0 GB; lower baselines.batch, or use a larger GPU" in line


def test_hours_above_the_runtime_are_a_warning_for_each_job():
    row = {"job": "sample.size=1024", "phase": "sample", "hours": 39.54, "runtime": 1440, "host_bytes": 1e9, "mem_mb": 2000}
    [warning] = job_warnings([row, row | {"hours": 23.9}])
    assert warning == (
        "sample.size=1024: 39.5 h are planned, but resources.sample.runtime is 24 h; raise resources.sample.shards or "
        "resources.sample.runtime"
    )


def test_downloads_that_do_not_fit_on_the_disk_are_an_error(project, monkeypatch, capsys):
    shutil.copy(PROJECT / "data/sources.csv", "data")
    folders = {"images": "data/coco", "annotations": "data/coco", "narratives": "data/png", "download": True}
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=30e9))
    code, line = check(capsys, data={"source": "png", "png": folders})
    assert code == 2
    assert "GB are needed, but the disk has 30.0 GB free; free some space" in line
