"""Every command of the README runs: on the finished smoke study, and at paper scale as a dry run."""

import re
import sys
from pathlib import Path

import pytest

from conftest import PROJECT, make_repository, run

LINES = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", (PROJECT / "README.md").read_text(), re.S)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
ELSEWHERE = {
    "make": "the main job",
    "make test": "this test suite",
    "python -m benchmarks.memory": "tests/test_parts.py, with fewer rows",
    "snakemake --cores all --resources gpu=8": "the fixture finished_study",
    "genseg publish NAME/gs-mini --private": "test_publish.py",
    "genseg sweep sweeps/architecture.yaml --tables": "tests/test_sweeps.py",
}
SLURM = "sbatch "  # the command for two nodes runs in tests/cluster/test_slurm.py
DRY = (
    ("snakemake ", "snakemake --dry-run "),
    ("dvc repro", "dvc repro --dry"),
    ("dvc exp run ", "dvc exp run --queue "),
    ("make ", "make --dry-run "),
    ("python -m benchmarks.run ", "python -m benchmarks.run --tiny "),
)

SWEEP = "matrix: {train.token_injection: [true, false]}\n"
"""A sweep of two trainings, because a dry run of the shipped ones takes longer."""


@pytest.fixture(scope="module")
def repository(finished_study, tmp_path_factory) -> Path:
    """The finished study as a repository whose environment is marked as installed."""
    target = make_repository(finished_study, tmp_path_factory.mktemp("readme") / "study")
    (target / "sweeps").mkdir()
    (target / "sweeps/architecture.yaml").write_text(SWEEP)
    (target / ".venv").mkdir()
    (target / ".venv/installed").touch()
    return target


def test_readme_has_commands():
    assert len(LINES) > 20
    assert set(ELSEWHERE) <= set(LINES), "a command that is tested elsewhere is missing from the README"


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.S))
def test_python_example_runs(repository, block):
    run(sys.executable, "-c", block.replace("mini", "smoke"), cwd=repository)


@pytest.mark.parametrize("line", [line for line in LINES if line not in ELSEWHERE and not line.startswith(SLURM)])
def test_command_runs(repository, line):
    line = line.replace("mini", "smoke")
    for prefix, dry in DRY:
        if line.startswith(prefix) and "--dry" not in line and "--queue" not in line:
            line = line.replace(prefix, dry, 1)
    if line.startswith("cp -r results/backbone"):
        line = "cp -r results/smoke/backbone/pipeline/. data/copied"
        (repository / "data/copied").mkdir()
    done = run("bash", "-c", line, cwd=repository, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
