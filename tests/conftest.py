"""Fixtures and helpers: Snakemake runs one smoke study per test session, which all workers and tests share."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from genseg.params import load_params
from genseg.params.text import to_yaml

PROJECT = Path(__file__).resolve().parents[1]
SOURCES = ("Snakefile", "dvc.yaml", "params.yaml", "params", "workflow", ".dvcignore")


def copy_project(target: Path) -> Path:
    """Copy the files of a fresh clone that a study needs: rules, params, shipped data and backbone, without .git and .dvc."""
    target.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, target / name)
        else:
            shutil.copy(source, target / name)
    (target / "data").mkdir()
    for name in ("published", "backbone", "classes", "imported"):
        shutil.copytree(PROJECT / "data" / name, target / "data" / name)
    return target


def run(*command: str, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run a command with the programs of this environment first on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path} | environment,
        stdin=subprocess.DEVNULL,
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} exited with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory) -> Path:
    """A project folder after `snakemake` has run the smoke study. It is shared, so tests must not write to it.

    The environment variable GENSEG_FINISHED_STUDY names a finished study to use instead, which saves two minutes.
    """
    if "GENSEG_FINISHED_STUDY" in os.environ:
        return Path(os.environ["GENSEG_FINISHED_STUDY"])
    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    target = root / "finished_study"
    with open(root / "finished_study.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "done").exists():
            shutil.rmtree(target, ignore_errors=True)
            copy_project(target)
            done = run(
                *("snakemake", "--cores", "all", "--resources", "gpu=8", "--configfile", "params/smoke.yaml"), cwd=target
            )
            (target / "done").write_text(done.stdout + done.stderr)
    return target


def make_repository(finished: Path, target: Path) -> Path:
    """Copy a finished study into a git and DVC repository with its own source; params.yaml holds the smoke study's params."""
    shutil.copytree(finished, target)
    for name in ("Makefile", "README.md", ".gitignore", "pyproject.toml", "requirements.txt"):
        shutil.copy(PROJECT / name, target)
    for name in ("benchmarks", "src"):
        shutil.copytree(PROJECT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copytree(PROJECT / ".dvc", target / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    (target / "profiles").symlink_to("workflow/profiles")
    (target / "params.yaml").write_text(to_yaml(load_params(target / "params/smoke.yaml")))
    author = {f"GIT_{role}_{key}": "t@t" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    for command in (["git", "init", "-q"], ["git", "add", "-A"], ["git", "commit", "-qm", "study"]):
        run(*command, cwd=target, **author)
    return target


@pytest.fixture
def study_copy(finished_study, tmp_path) -> Path:
    """A private copy of the finished study that keeps the modification times of its files."""
    target = tmp_path / "study"
    shutil.copytree(finished_study, target, symlinks=True)
    return target
