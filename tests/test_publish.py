"""The model card, `genseg publish` to a local hub, and the published model in a process that has only the package."""

import base64
import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from conftest import run
from genseg.cli.main import main
from genseg.diffusion.pipeline import GSPipeline
from genseg.errors import UserError
from genseg.params import load_params
from genseg.publish import scored_card

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import sys
import numpy as np
from genseg import GSPipeline
from PIL import Image

pipe = GSPipeline.from_pretrained("lab/gs")
np.save(sys.argv[2], pipe(Image.open(sys.argv[1]), ["the grass", "a star"], 2, 2.0).maps)
"""


class Hub(BaseHTTPRequestHandler):
    """The endpoints of the Hugging Face hub that create a repository, commit files, list them, and download them."""

    files: dict[str, bytes]
    repositories: list[dict]

    def log_message(self, *args):
        pass

    def answer(self, body, status=200, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer secret":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.repositories.append(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/lab/gs"})
        elif self.path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []})
        elif self.path.startswith("/api/models/lab/gs/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path.startswith("/api/models/lab/gs/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"http://{self.headers['Host']}/lab/gs/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({"error": "not found"}, 404)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        name = path.removeprefix("/lab/gs/resolve/").partition("/")[2]
        if path.startswith(("/api/models/lab/gs/tree/", "/api/models/lab/gs/paths-info/")):
            self.answer(
                [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in self.files.items()]
            )
        elif path.startswith("/api/models/lab/gs"):
            siblings = [{"rfilename": name} for name in sorted(self.files)]
            self.answer({"id": "lab/gs", "modelId": "lab/gs", "sha": COMMIT, "siblings": siblings, "tags": []})
        elif path.startswith("/lab/gs/resolve/") and name in self.files:
            self.answer(self.files[name], ETag=f'"{hashlib.sha1(self.files[name]).hexdigest()}"')
        else:
            self.answer({"error": "not found"}, 404, **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET


@pytest.fixture
def hub():
    """A hub on this machine; `files` holds what was committed to lab/gs."""
    handler = type("Handler", (Hub,), {"files": {}, "repositories": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


def test_published_model_loads_by_its_id_where_only_the_package_is(finished_study, tmp_path, hub):
    endpoint, repository = hub
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "publisher"), "HF_TOKEN": "secret"}
    command = ("genseg", "publish", "lab/gs", "--params", "params/smoke.yaml", "--private")
    done = run(*command, cwd=finished_study, **environment)
    assert done.stdout.strip() == f"published {endpoint}/lab/gs"
    assert repository.repositories[0]["visibility"] == "private"

    # 1. All files are those of the model, and the card says that it is scored.
    folder = finished_study / "results/smoke/model/gs"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    card = repository.files.pop("README.md").decode()
    assert repository.files == {name: data for name, data in files.items() if name != "README.md"}
    assert "| AR, overall |" in card
    assert 'GSPipeline.from_pretrained("lab/gs")' in card
    repository.files["README.md"] = card.encode()

    # 2. Another process without the project loads it.
    picture = next((finished_study / "data/smoke/scenes/val2017").glob("*.jpg"))
    (tmp_path / "elsewhere").mkdir()
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "user"), "HF_TOKEN": ""}
    run(sys.executable, "-c", LOAD, str(picture), "maps.npy", cwd=tmp_path / "elsewhere", **environment)
    expected = GSPipeline.from_pretrained(folder)(Image.open(picture), ["the grass", "a star"], 2, 2.0).maps
    assert np.array_equal(np.load(tmp_path / "elsewhere/maps.npy"), expected)
    predict = ("genseg", "predict", str(picture), "--phrase", "the grass", "--model", "lab/gs", "--out", "out")
    assert "1 masks in out" in run(*predict, cwd=tmp_path / "elsewhere", **environment).stdout


@pytest.mark.parametrize("is_reachable", [True, False])
def test_publishing_that_fails_is_reported_in_one_line(finished_study, tmp_path, hub, is_reachable):
    endpoint = hub[0] if is_reachable else "http://127.0.0.1:9"
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": "wrong"}
    command = ("genseg", "publish", "lab/gs", "--params", "params/smoke.yaml")
    done = run(*command, cwd=finished_study, check=False, **environment)
    assert done.returncode == 2
    (message,) = done.stderr.strip().splitlines()
    assert message.startswith("genseg publish: error: lab/gs: not published (")
    assert message.endswith("check HF_ENDPOINT, and log in with `hf auth login`")
    assert not hub[1].files


def test_card_has_the_scores_of_this_model_only(study_copy, monkeypatch):
    monkeypatch.chdir(study_copy)
    params = load_params("params/smoke.yaml")
    trained = ModelCard.load("results/smoke/model/gs/README.md")
    summary = json.loads(Path("results/smoke/scores/main.json").read_text())
    assert trained.data.license == "apache-2.0"
    assert "has not been scored" in trained.text
    phrases = summary["counts"]["phrases"]
    card = scored_card(params, "gs")
    low, high = summary["interval"]["overall"]
    assert f"| AR, overall | {100 * summary['ar']['overall']:.1f} | {100 * low:.1f} to {100 * high:.1f} |" in card.text
    assert f"{phrases:,} phrases, protocol `native`" in card.text
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"average_recall": summary["ar"]["overall"], "mean_iou": summary["miou"]["mean"]}
    assert "one forward pass" in scored_card(params, "discriminative").text
    manifest = Path("results/smoke/model/gs/manifest.json")
    manifest.write_text(manifest.read_text() + "\n")  # another model
    assert str(scored_card(params, "gs")) == str(trained)


def test_incomplete_model_is_not_published(study_copy, monkeypatch, capsys):
    monkeypatch.chdir(study_copy)
    Path("results/smoke/model/gs/unet/config.json").unlink()
    assert main(["publish", "lab/gs", "--params", "params/smoke.yaml"]) == 2
    assert "unet/config.json: missing" in capsys.readouterr().err
    Path("results/smoke/model/gs/README.md").unlink()
    with pytest.raises(UserError, match=r"README\.md: no model card; run `genseg train --model gs` again"):
        scored_card(load_params("params/smoke.yaml"), "gs")
