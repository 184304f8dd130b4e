"""One real smoke study, made by the real DAG once per test session and shared by all workers and tests."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
SOURCES = ("Snakefile", "dvc.yaml", "params.yaml", "params", "workflow", ".dvcignore")


def copy_project(target: Path) -> Path:
    """The project as a fresh clone has it, but for git and DVC: sources, published data, shipped backbone."""
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
    """Run a command with this environment's programs first on PATH."""
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
    """A project folder in which `snakemake` ran the smoke study to its end. Shared: tests must not write to it."""
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


@pytest.fixture
def study_copy(finished_study, tmp_path) -> Path:
    """A private copy of the finished study, with the times of its files."""
    target = tmp_path / "study"
    shutil.copytree(finished_study, target, symlinks=True)
    return target
