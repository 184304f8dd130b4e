"""Every command of the README runs: on the finished smoke study, at paper scale as a dry run."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from conftest import PROJECT, run

LINES = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", (PROJECT / "README.md").read_text(), re.S)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
ELSEWHERE = {
    "make": "the main job: what a user types first",
    "make test": "this suite",
    "snakemake --cores all --resources gpu=8": "makes the finished study that these tests start from",
    "snakemake --workflow-profile workflow/profiles/slurm --configfile params/paper.yaml": "test_slurm_profile_plans_the_jobs",
}
DRY = (
    ("snakemake ", "snakemake --dry-run "),
    ("dvc repro", "dvc repro --dry"),
    ("dvc exp run ", "dvc exp run --queue "),
    ("make ", "make --dry-run "),
    ("python -m benchmarks.run ", "python -m benchmarks.run --tiny "),
)

SWEEP = """
variants:
  few: {evaluations: 2, params: {sample.points: [{steps: 1, guidance: 1.0}, {steps: 2, guidance: 1.0}]}}
picks:
  few: {evaluations: [1, 2]}
"""
"""Of the smoke study, which the shipped sweep's numbers of steps do not fit."""


@pytest.fixture(scope="module")
def repository(finished_study, tmp_path_factory) -> Path:
    """The finished study as a git + DVC repository whose params.yaml is the smoke study."""
    target = tmp_path_factory.mktemp("readme") / "study"
    shutil.copytree(finished_study, target)
    for name in ("Makefile", "README.md", ".gitignore", "pyproject.toml", "requirements.txt"):
        shutil.copy(PROJECT / name, target)
    shutil.copytree(PROJECT / "benchmarks", target / "benchmarks")
    shutil.copytree(PROJECT / "src", target / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copytree(PROJECT / ".dvc", target / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    shutil.copy(target / "params/smoke.yaml", target / "params.yaml")
    (target / "sweeps").mkdir()
    (target / "sweeps/objectives.yaml").write_text(SWEEP)
    (target / ".venv").mkdir()
    (target / ".venv/installed").touch()
    for command in (["git", "init", "-q"], ["git", "add", "-A"], ["git", "commit", "-qm", "study"]):
        run(
            *command, cwd=target, GIT_AUTHOR_NAME="t", GIT_AUTHOR_EMAIL="t@t", GIT_COMMITTER_NAME="t", GIT_COMMITTER_EMAIL="t@t"
        )
    return target


def test_the_readme_has_commands():
    assert len(LINES) > 20
    assert set(ELSEWHERE) <= set(LINES), "a command that is tested elsewhere is gone from the README"


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.S))
def test_python(repository, block):
    run(sys.executable, "-c", block.replace("mini", "smoke"), cwd=repository)


@pytest.mark.parametrize("line", [line for line in LINES if line not in ELSEWHERE])
def test_command(repository, line):
    line = line.replace("mini", "smoke")
    for prefix, dry in DRY:
        if line.startswith(prefix) and "--dry" not in line and "--queue" not in line:
            line = line.replace(prefix, dry, 1)
    if line.startswith("cp params/paper.yaml"):
        line = "cp params/paper.yaml /dev/null && dvc repro --dry"
    if line.startswith("cp -r results/backbone"):
        line = "cp -r results/smoke/backbone/pipeline/. data/copied"
        (repository / "data/copied").mkdir()
    done = run("bash", "-c", line, cwd=repository, check=False)
    assert done.returncode == (1 if line.startswith("diff") else 0), done.stdout[-2000:] + done.stderr[-4000:]


def test_slurm_profile_plans_the_jobs(repository):
    profile = (repository / "workflow/profiles/slurm").glob("*.yaml")
    text = next(profile).read_text()
    local = repository / "local-profile"
    local.mkdir()
    (local / "config.yaml").write_text(re.sub(r"(?m)^(executor|slurm-).*\n", "", text))
    command = ("snakemake", "--workflow-profile", "local-profile", "--configfile", "params/paper.yaml", "--dry-run")
    done = run(*command, cwd=repository)
    assert "train_gs" in done.stdout + done.stderr
