"""Code changes under Snakemake and DVC: comments repeat no work, and a changed sampler reruns sampling and later phases."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from conftest import make_repository, run


@pytest.fixture(scope="module")
def repository(finished_study, tmp_path_factory) -> Path:
    """A finished study whose outputs both Snakemake and DVC have recorded, with its own source."""
    target = make_repository(finished_study, tmp_path_factory.mktemp("code") / "study")
    call(target, "genseg", "sync")
    return target


def call(repository: Path, *command: str) -> str:
    """Run a command with the repository's source and return its output."""
    done = run(*command, cwd=repository, PYTHONPATH=os.fspath(repository / "src"))
    return done.stdout + done.stderr


def changed_stages(repository: Path) -> set[str]:
    return set(json.loads(run("dvc", "status", "--json", cwd=repository, PYTHONPATH=os.fspath(repository / "src")).stdout))


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_changed_comments_rerun_no_snakemake_job_and_repeat_no_work(repository):
    before = hashes(repository / "results") | hashes(repository / "data/smoke")
    for file in (repository / "src").rglob("*.py"):
        file.write_text(f"# A comment.\n{file.read_text()}\n# Another comment.\n")
    assert "Nothing to be done" in call(repository, "snakemake", "--dry-run")
    assert len(changed_stages(repository)) == 10, "DVC compares the bytes of the source"
    output = call(repository, "dvc", "repro")
    assert output.count("is up to date") == 9, "data, backbone, both latents, two models, the trained control, score, tables"
    assert "0 of 21 runs are missing" in output
    assert "baseline: 0 of" in output
    for work in ("images read", "images/s", "samples per s", "evaluations per mask", "masks in", "AR 0."):
        assert work not in output, work
    assert hashes(repository / "results") | hashes(repository / "data/smoke") == before
    assert changed_stages(repository) == set()


def test_changed_sampler_reruns_sampling_and_later_phases(repository):
    sampler = repository / "src/genseg/diffusion/sampling.py"
    sampler.write_text(sampler.read_text().replace("alpha_next.sqrt() * x_0 +", "alpha_next.sqrt() * 1.0 * x_0 +"))
    planned = call(repository, "snakemake", "--dry-run", "--quiet", "host")
    for rule in ("sample_shard", "sample", "refine_shard", "refine", "score", "tables"):
        assert f"rule {rule}:" in planned, rule
    for rule in ("data", "backbone", "latents", "train_gs", "train_discriminative", "baselines"):
        assert f"rule {rule}:" not in planned, rule
    assert changed_stages(repository) >= {"sample"}
    models = hashes(repository / "results/smoke/model")
    output = call(repository, "dvc", "repro", "sample")
    assert "21 of 21 runs are missing" in output
    assert hashes(repository / "results/smoke/model") == models
    assert {"refine", "score"} <= changed_stages(repository)
