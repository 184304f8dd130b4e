"""Snakemake and DVC with fake commands: each takes over up-to-date outputs of the other, and refuses unknown ones.

Outputs travel from one clone to another through a folder and through an S3 server.
"""

import json
import shutil
import subprocess
from collections import Counter

import pytest
import requests

from fake_study import BIN, FakeStudy, changed, rules_in

GENSEG = str(BIN / "genseg")


def git(study, *arguments):
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    study.call("git", *identity, *arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study in git after `snakemake` and `genseg sync`."""
    study = FakeStudy.make(tmp_path_factory.mktemp("sync") / "study")
    git(study, "init", "-q")
    study.call("snakemake", "--cores", "2")
    assert study.call(GENSEG, "sync").startswith("DVC has recorded the outputs of Snakemake: preflight, data")
    git(study, "add", "--all")
    git(study, "commit", "-qm", "outputs")
    study.ran()
    return study


@pytest.fixture(params=["folder", "s3"])
def remote(request, tmp_path):
    """The commands that add an empty remote storage to a clone."""
    add = ("dvc", "remote", "add", "--force", "--default", "--local", "store")
    if request.param == "folder":
        yield [(*add, str(tmp_path / "store"))]
        return
    pytest.importorskip("dvc_s3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    requests.put(f"{address}/bucket", timeout=60).raise_for_status()
    options = {"endpointurl": address, "access_key_id": "key", "secret_access_key": "secret", "region": "us-east-1"}
    modify = ("dvc", "remote", "modify", "--local", "store")
    yield [(*add, "s3://bucket/store"), *((*modify, name, value) for name, value in options.items())]
    server.stop()


@pytest.fixture
def clone(finished, remote, tmp_path):
    """A fresh clone with outputs pulled from a remote, of which DVC has a record and Snakemake has none."""
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", finished.folder, folder], check=True)
    shutil.copytree(finished.folder / "bin", folder / "bin")
    clone = FakeStudy(folder)
    for study, transfer in ((finished, "push"), (clone, "pull")):
        for command in remote:
            study.call(*command)
        study.call("dvc", transfer, "--quiet")
    for name in ("data/mini", "results/mini"):
        assert contents(clone.folder / name) == contents(finished.folder / name) != {}
    return clone


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_dvc_has_nothing_to_do_after_snakemake(finished):
    assert "Data and pipelines are up to date." in finished.call("dvc", "repro")
    assert finished.ran() == Counter()
    metrics = json.loads(finished.call("dvc", "metrics", "show", "--json"))
    assert metrics[""]["data"]["metrics/mini.json"]["data"] == {"AR": {"overall": 50.0}}
    assert len(finished.call("dvc", "dag").splitlines()) <= 60


def test_a_reverted_value_restores_the_results_and_runs_nothing(finished):
    tables, params = finished.folder / "results/mini/tables/manifest.json", finished.params()
    before = tables.read_bytes()
    finished.write_params("params.yaml", changed(params, "tables.dpi", 77))
    assert "Running stage 'tables'" in finished.call("dvc", "repro")
    assert finished.ran() == Counter({"tables": 1})
    assert tables.read_bytes() != before
    finished.write_params("params.yaml", params)
    assert "Stage 'tables' is cached - skipping run, checking out outputs" in finished.call("dvc", "repro")
    assert finished.ran() == Counter()
    assert tables.read_bytes() == before


def test_a_stage_finds_its_earlier_outputs_in_place(finished):
    params, runs = finished.params(), finished.folder / "results/mini/tables/runs.txt"
    before = runs.read_text().splitlines()
    finished.write_params("params.yaml", changed(params, "tables.dpi", 78))
    finished.call("dvc", "repro", "--quiet")
    assert len(runs.read_text().splitlines()) > len(before)  # the job adds a line to the file that it finds
    finished.write_params("params.yaml", params)
    finished.call("dvc", "repro", "--quiet")
    finished.ran()


def test_both_tools_have_nothing_to_do_after_pull_and_sync_and_see_a_change(clone):
    assert clone.call(GENSEG, "sync").startswith("Snakemake has recorded the outputs of DVC: preflight, data, backbone")
    params = clone.params()
    clone.write_params("dpi.yaml", changed(params, "tables.dpi", 77))
    clone.write_params("guidance.yaml", changed(params, "sample.grid.guidance_scale", [9.5]))
    runs = {name: ["--dry-run", "--configfile", f"{name}.yaml"] for name in ("params", "dpi", "guidance")}
    outputs = clone.snakemakes(runs)
    assert rules_in(outputs["params"]) == set()
    assert rules_in(outputs["dpi"]) == {"tables"}
    assert {rule.split()[0] for rule in rules_in(outputs["guidance"])} == {
        *("sample_shard", "sample", "refine_shard", "refine", "score", "tables")  # refinement reuses its files
    }

    assert json.loads(clone.call("dvc", "status", "--json")) == {}
    clone.write_params("params.yaml", changed(params, "tables.dpi", 77))
    assert list(json.loads(clone.call("dvc", "status", "--json"))) == ["tables"]
    clone.call("dvc", "repro", "--quiet")
    assert clone.ran() == Counter({"tables": 1})


@pytest.mark.parametrize("remote", ["folder"], indirect=True)
def test_sync_refuses_pulled_outputs_of_other_params(clone):
    """Without a record of the pulled files, Snakemake sees no change of params. `sync` must not rely on it."""
    clone.write_params("params.yaml", changed(clone.params(), "tables.dpi", 77))
    refusal = clone.call(GENSEG, "sync", check=False)
    assert refusal.startswith(
        "genseg sync: error: both tools have something to run (DVC: tables; Snakemake: preflight, data, backbone"
    )
    clone.call("dvc", "repro", "--quiet")
    assert clone.ran() == Counter({"tables": 1})
    assert clone.call(GENSEG, "sync").startswith("Snakemake has recorded the outputs of DVC: preflight, data, backbone")
