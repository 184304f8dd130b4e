"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd with device nodes that stand in for GPUs.

Everything lies in one folder, and all daemons belong to the current user and end with `stop`.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
GPUS = 2
"""Number of GPUs of a node."""
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
GresTypes=gpu
MpiDefault=none
ProctrackType=proctrack/linuxproc
OverTimeLimit=UNLIMITED
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
TaskPlugin=task/none
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=16000 Gres=gpu:{gpus}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=16000 Gres=gpu:{gpus}
PartitionName=batch Nodes=ALL Default=YES MaxTime=UNLIMITED
"""


class Cluster:
    """The daemons, and the environment in which Slurm's commands find them. Programs in `folder`/bin precede all others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Write the configuration, start the daemons, and wait until both nodes are idle."""
        folder, ports = self.folder, free_ports(3)
        host = socket.gethostname().split(".")[0]
        (folder / "state").mkdir(parents=True)
        folder.chmod(0o755)  # munged refuses a socket in a folder that others cannot enter
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, user=user, ports=ports, gpus=GPUS))
        gres = []
        for node in ("node1", "node2"):
            (folder / f"spool-{node}").mkdir()
            (folder / f"devices-{node}").mkdir()
            for number in range(GPUS):
                (folder / f"devices-{node}/gpu{number}").symlink_to("/dev/null")
            gres.append(f"NodeName={node} Name=gpu File={folder}/devices-{node}/gpu[0-{GPUS - 1}]\n")
        (folder / "gres.conf").write_text("".join(gres))
        # The executor plugin starts `srun` without SLURM_CONF, because a cluster's configuration is normally in /etc/slurm.
        (folder / "bin").mkdir()
        (folder / "bin/srun").write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
        (folder / "bin/srun").chmod(0o755)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)

        files = {name: folder / f"munge.{name}" for name in ("key", "socket", "log", "pid", "seed")}
        munge = [f"--{'key' if name == 'key' else name}-file={file}" for name, file in files.items() if name != "socket"]
        self._start("munged", "--foreground", "--force", f"--socket={files['socket']}", *munge)
        self._wait(lambda: files["socket"].exists(), "munged")
        self._start("slurmctld", "-D")
        for node in ("node1", "node2"):
            self._start("slurmd", "-D", "-N", node)
        self._wait(lambda: self.call("sinfo", "--noheader", "--format=%T %D").strip() == "idle 2", "two idle nodes")

    def stop(self) -> None:
        """Cancel all jobs, wait until they have ended, and stop the daemons."""
        if len(self._daemons) > 1:
            self.call("scancel", "--user", str(os.getuid()))
            for _ in range(20):
                if not self.call("squeue", "--noheader"):
                    break
                time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def call(self, *command: str) -> str:
        """Run one of Slurm's commands and return its output, also if it fails or gets no answer."""
        environment = os.environ | self.environment
        done = subprocess.run(["timeout", "60", *command], env=environment, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def submit(self, *arguments: str) -> str:
        """Submit a small job, wait until it runs, and return its id."""
        job = self.call("sbatch", "--parsable", "--output=/dev/null", "--mem=100", *arguments).strip()
        self._wait(lambda: self.call("squeue", "--noheader", f"--jobs={job}", "--format=%T").strip() == "RUNNING", f"job {job}")
        return job

    def finished_jobs(self) -> dict[str, dict[str, str]]:
        """Return Slurm's record of each finished job by id."""
        records = self.folder / "jobs.txt"
        jobs = (dict(re.findall(r"(\w+)=(\S*)", line)) for line in records.read_text().splitlines()) if records.exists() else ()
        return {job["JobId"]: job for job in jobs}

    def _start(self, *command: str) -> None:
        path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
        program = shutil.which(command[0], path=path)
        assert program, command[0]
        with (self.folder / "daemons.log").open("a") as log:
            self._daemons.append(
                subprocess.Popen(
                    [program, *command[1:]], env=os.environ | self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
                )
            )

    def _wait(self, condition, what: str) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and all(daemon.poll() is None for daemon in self._daemons):
            if condition():
                return
            time.sleep(0.1)
        logs = "".join(log.read_text()[-3000:] for log in sorted(self.folder.glob("*.log")))
        raise AssertionError(f"{what}: not seen within a minute\n{logs}")


def missing() -> list[str]:
    """Return the programs of a Slurm cluster that are not installed."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    return [name for name in DAEMONS if shutil.which(name, path=path) is None]


def free_ports(count: int) -> list[int]:
    """Return ports of this machine on which no program listens."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
