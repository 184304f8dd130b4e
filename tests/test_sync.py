"""Snakemake and DVC, on fake commands: what one made the other takes over, and neither takes over what it cannot know."""

import json
import shutil
import subprocess
from collections import Counter

import pytest

from fake_study import BIN, FakeStudy, changed, rules_in

GENSEG = str(BIN / "genseg")


def git(study, *arguments):
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    study.call("git", *identity, *arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study in git that `snakemake` alone has made, and then `genseg sync` was called."""
    study = FakeStudy.make(tmp_path_factory.mktemp("sync") / "study")
    git(study, "init", "-q")
    study.call("snakemake", "--cores", "2")
    assert study.call(GENSEG, "sync").startswith("DVC has recorded what Snakemake made: data, backbone")
    git(study, "add", "--all")
    git(study, "commit", "-qm", "made")
    study.ran()
    return study


@pytest.fixture
def clone(made, tmp_path):
    """A fresh clone with the outputs pulled from a remote: DVC knows them, Snakemake has never seen them."""
    made.call("dvc", "remote", "add", "--force", "--default", "--local", "store", str(tmp_path / "store"))
    made.call("dvc", "push", "--quiet")
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", made.folder, folder], check=True)
    shutil.copytree(made.folder / "bin", folder / "bin")
    clone = FakeStudy(folder)
    clone.call("dvc", "remote", "add", "--default", "--local", "store", str(tmp_path / "store"))
    clone.call("dvc", "pull", "--quiet")
    return clone


def test_after_snakemake_dvc_has_nothing_to_do(made):
    assert "Data and pipelines are up to date." in made.call("dvc", "repro")
    assert made.ran() == Counter()
    metrics = json.loads(made.call("dvc", "metrics", "show", "--json"))
    assert metrics[""]["data"]["results/mini/scores/main.json"]["data"] == {"ar": {"overall": 0.5}}
    assert len(made.call("dvc", "dag").splitlines()) <= 50


def test_after_pull_snakemake_has_nothing_to_do(clone):
    params = clone.params()
    # Snakemake has no record of pulled files and sees no change of params; neither `sync` nor `dvc repro` may believe it.
    clone.write_params("params.yaml", changed(params, "tables.dpi", 77))
    refusal = clone.call(GENSEG, "sync", check=False)
    assert refusal.startswith("genseg sync: error: both have something to do (DVC: tables; Snakemake: data, backbone")
    clone.call("dvc", "repro", "--quiet")
    assert clone.ran() == Counter({"tables": 1})

    assert clone.call(GENSEG, "sync").startswith("Snakemake has taken over what DVC vouches for: data, backbone")
    clone.write_params("guidance.yaml", changed(clone.params(), "sample.grid.guidance", [9.5]))
    outputs = clone.snakemakes({"same": ["--dry-run"], "guidance": ["--dry-run", "--configfile", "guidance.yaml"]})
    assert rules_in(outputs["same"]) == set()
    assert {rule.split()[0] for rule in rules_in(outputs["guidance"])} == {
        *("sample_shard", "sample", "refine_shard", "refine", "score", "tables")  # refining finds its files made
    }
