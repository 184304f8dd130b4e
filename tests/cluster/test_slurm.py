"""The smoke study on a Slurm cluster of two nodes: same bytes as a local run, own devices per job, two-node training."""

import filecmp
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from slurm_cluster import Cluster, free_ports, missing

from conftest import PROJECT, copy_project, run
from genseg.artifacts.manifest import read_manifest
from genseg.params import load_params

MODEL = "results/smoke/model/gs"

pytestmark = pytest.mark.skipif(
    bool(missing()), reason=f"not installed: {', '.join(missing())}; tests/cluster/install.sh installs them"
)
pytest.importorskip("snakemake_executor_plugin_slurm")

# A `genseg` that records job, command, node, device and time of each command before and after it runs.
RECORDING = """#!/bin/bash
if [ "$1" = lease ]; then exec BIN/genseg "$@"; fi
record() { echo "$1 $SLURM_JOB_ID $SLURMD_NODENAME ${CUDA_VISIBLE_DEVICES:-none} $(date +%s.%N) $2" >> RECORD; }
record start "$1"; BIN/genseg "$@"; code=$?; record end "$1"; exit $code
"""


class Job(NamedTuple):
    """A command that ran on the cluster, with its node, device (`none` without a GPU), and times in seconds."""

    id: str
    command: str
    node: str
    device: str
    start: float
    end: float


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def study(cluster, tmp_path_factory) -> Path:
    """A project folder after the smoke study has run on the cluster, with the jobs in jobs.txt."""
    folder = copy_project(tmp_path_factory.mktemp("slurm") / "study")
    program = cluster.folder / "bin/genseg"
    program.write_text(RECORDING.replace("BIN", str(Path(sys.executable).parent)).replace("RECORD", str(folder / "jobs.txt")))
    program.chmod(0o755)
    snakemake(cluster, folder, "--configfile", "params/smoke.yaml")
    return folder


@pytest.fixture(scope="module")
def jobs(study) -> list[Job]:
    return recorded_jobs(study)


def snakemake(cluster: Cluster, folder: Path, *arguments: str) -> None:
    """Run Snakemake with the Slurm profile; only the times between its queries are shorter than the profile's."""
    times = ("--slurm-init-seconds-before-status-checks", "2", "--seconds-between-status-checks", "2")
    profile = ("--workflow-profile", "workflow/profiles/slurm")
    run("snakemake", *profile, *times, *arguments, cwd=folder, **cluster.environment)


def recorded_jobs(study: Path) -> list[Job]:
    """Return the jobs in the order in which they ended."""
    started: dict[str, list[str]] = {}
    jobs = []
    for line in (study / "jobs.txt").read_text().splitlines():
        what, job_id, node, device, seconds, command = line.split()
        if what == "start":
            started[job_id] = [job_id, command, node, device, seconds]
        else:
            *facts, start = started.pop(job_id)
            jobs.append(Job(*facts, float(start), float(seconds)))
    assert not started
    return jobs


def files(folder: Path) -> set[Path]:
    """Return the files of scores, tables and figures."""
    paths = (path for kind in ("scores", "tables", "figures") for path in (folder / "results/smoke" / kind).rglob("*"))
    return {path.relative_to(folder) for path in paths if path.is_file()}


def test_results_are_those_of_a_local_run(study, finished_study):
    assert files(study) == files(finished_study)
    different = [path for path in files(study) if not filecmp.cmp(study / path, finished_study / path, shallow=False)]
    assert different == []


def test_concurrent_jobs_have_devices_of_their_own(jobs):
    with_gpu = [job for job in jobs if job.device != "none"]
    assert {job.command for job in with_gpu} == {"backbone", "latents", "train", "baseline", "sample", "refine"}
    at_once = [pair for pair in combinations(with_gpu, 2) if max(job.start for job in pair) < min(job.end for job in pair)]
    assert len(at_once) >= 2  # both trainings, and both image sizes of sampling
    for first, second in at_once:
        assert (first.node, first.device) != (second.node, second.device)


def test_jobs_without_gpu_see_none(jobs):
    assert {job.command for job in jobs if job.device == "none"} == {"data", "sample", "refine", "score", "tables"}


def test_slurm_knows_the_resources_of_each_job(cluster, study, jobs):
    params = load_params(study / "params/smoke.yaml")
    records = cluster.finished_jobs()
    phases = {"baseline": "baselines"}
    for job in jobs:
        wanted, record = params.job(phases.get(job.command, job.command)), records[job.id]
        assert record["TimeLimit"] == str(wanted.runtime)
        assert f"mem={wanted.mem_mb}M," in record["Tres"]


def test_devices_of_a_job_are_on_one_node(cluster, study):
    """While one GPU of each node is taken, a job with two GPUs waits. Without `nodes=1`, Slurm would spread it over both."""
    smoke = (study / "params/smoke.yaml").read_text()
    (study / "two.yaml").write_text(smoke.replace("train: {mem_mb", "train: {gpu: 2, mem_mb"))
    holders = [cluster.submit("--gpus=1", f"--nodelist={node}", "--wrap", "sleep 600") for node in ("node1", "node2")]
    arguments = ("--configfile", "two.yaml", "--allowed-rules", "train_gs", "--forcerun", "train_gs", "--")
    with ThreadPoolExecutor() as pool:
        finished = pool.submit(snakemake, cluster, study, *arguments, f"{MODEL}/manifest.json")
        while not finished.done() and "(Resources)" not in cluster.call("squeue"):
            time.sleep(0.5)
        waited = not finished.done()
        cluster.call("scancel", *holders)
        finished.result()
    assert waited
    assert recorded_jobs(study)[-1].device == "0,1"


def test_training_on_two_nodes(cluster, study, tmp_path):
    """The command of the README. The two processes sum gradients in another order than one process, so losses agree nearly."""
    folder = tmp_path / "study"
    shutil.copytree(study, folder, symlinks=True)
    shutil.rmtree(folder / MODEL)
    shutil.rmtree(folder / "work/smoke/train")
    [command] = [line for line in (PROJECT / "README.md").read_text().splitlines() if line.startswith("sbatch ")]
    changes = {"per-node 8": "per-node 1", "params/paper.yaml": "params/smoke.yaml", "29500": str(*free_ports(1))}
    for of_paper, here in changes.items():
        assert of_paper in command
        command = command.replace(of_paper, here)
    command = command.replace("sbatch ", "sbatch --parsable --wait --output two.log ", 1)
    job = run("bash", "-c", command, cwd=folder, **cluster.environment).stdout.strip()
    assert cluster.finished_jobs()[job]["NodeList"] == "node[1-2]"
    assert read_manifest(folder / MODEL / "manifest.json")["device"].endswith(" x 2, ddp")
    one, two = (pd.read_csv(path / MODEL / "log.csv") for path in (study, folder))
    pd.testing.assert_frame_equal(one, two, rtol=1e-3)
