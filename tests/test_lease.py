"""GPU leases: no device is leased to two jobs at once, and a killed job releases its devices."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from genseg.dag import jobs as leasing

GENSEG = str(Path(sys.executable).parent / "genseg")
ALL_DEVICES = "d0,d1,d2,d3,d4,d5,d6,d7"


@pytest.fixture
def environment(tmp_path):
    """Eight fake devices with their own lock files."""
    inherited = {name: value for name, value in os.environ.items() if name != leasing.VISIBLE}
    return inherited | {leasing.DEVICES: ALL_DEVICES, "TMPDIR": str(tmp_path)}


def start_leased(gpus, script, environment, *options, **arguments):
    command = [GENSEG, "lease", "--gpus", str(gpus), *options, "--", "bash", "-c", script]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **arguments)


def run_leased(*arguments, **keywords):
    process = start_leased(*arguments, **keywords)
    output, error = process.communicate(timeout=20)
    return process.returncode, output.strip(), error.strip()


def wait_for(condition):
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("condition not met within 10 seconds")


def test_no_device_is_leased_to_two_jobs_at_once(environment, tmp_path):
    held = tmp_path / "held"
    held.mkdir()
    # A job fails if the folder of one of its devices exists, because another job then holds the device.
    devices = f"${{{leasing.VISIBLE}//,/ }}"
    script = f"cd {held}; for d in {devices}; do mkdir $d || exit 9; done; sleep 0.05; rmdir {devices}"
    jobs = [
        (gpus, start_leased(gpus, script + f"; echo ${leasing.VISIBLE}", environment)) for gpus in [1, 1, 1, 4, 8, 1, 4] * 4
    ]
    for gpus, job in jobs:
        output, error = job.communicate(timeout=60)
        assert job.returncode == 0, error
        assert len(set(output.strip().split(","))) == gpus


def test_killed_job_releases_its_devices(environment, tmp_path):
    holder = start_leased(8, f"touch {tmp_path}/up; exec sleep 60", environment)
    wait_for((tmp_path / "up").exists)
    waiting = start_leased(1, "true", environment)
    time.sleep(0.5)
    assert waiting.poll() is None  # all devices are leased, so the second job waits
    holder.kill()
    assert waiting.wait(timeout=10) == 0
    holder.communicate()
    waiting.communicate()


@pytest.mark.parametrize(
    ("gpus", "extra", "seen"),
    [
        (2, {}, "d0,d1"),
        (0, {}, ""),
        (2, {leasing.VISIBLE: "5"}, "5"),  # chosen by a scheduler
        (2, {leasing.DEVICES: ""}, "unset"),  # no GPU on this machine
    ],
)
def test_command_sees_only_its_devices(environment, gpus, extra, seen):
    assert run_leased(gpus, f"echo ${{{leasing.VISIBLE}-unset}}", environment | extra) == (0, seen, "")


def test_mistake_is_reported_in_one_line(environment):
    code, _, error = run_leased(9, "true", environment)
    assert code == 2
    assert error == "genseg lease: error: 9 GPUs requested, but this machine has 8; lower resources.*.gpu in the params"
    missing = subprocess.run(
        [GENSEG, "lease", "--gpus", "0", "--", "no-such-command"], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 2
    assert missing.stderr.startswith("genseg lease: error: no-such-command: ")


def test_exit_code_is_kept_and_output_is_logged(environment, tmp_path):
    log = tmp_path / "logs" / "job.log"
    code, output, error = run_leased(
        1, "echo one; echo two >&2; printf '10%%\\r20%%\\r30%%\\nlast'; exit 7", environment, "--log", log
    )
    assert code == 7
    assert (output, error) == ("", "one\ntwo\n30%\nlast")
    wait_for(lambda: log.read_text() == "one\ntwo\n30%\nlast")
    assert run_leased(1, "echo new", environment, "--log", log)[0] == 0
    wait_for(lambda: log.read_text() == "new\n")


def test_command_sees_a_terminal_if_there_is_one(environment, tmp_path):
    ours, theirs = pty.openpty()
    script = "test -t 2 && echo terminal"
    command = [GENSEG, "lease", "--gpus", "0", "--log", str(tmp_path / "log"), "--", "bash", "-c", script]
    assert subprocess.run(command, env=environment, stdout=theirs, stderr=theirs, check=False).returncode == 0
    assert os.read(ours, 100).split() == [b"terminal"]
    wait_for(lambda: (tmp_path / "log").read_text() == "terminal\n")


def test_second_job_with_the_same_log_waits_for_the_first(environment, tmp_path):
    log = tmp_path / "log"
    first = start_leased(0, f"touch {tmp_path}/up; sleep 0.7; echo first", environment, "--log", log)
    wait_for((tmp_path / "up").exists)
    code, _, error = run_leased(0, "echo second", environment, "--log", log)
    assert first.wait() == 0
    assert code == 0
    assert "waiting until it ends" in error
    first.communicate()


def test_job_ends_with_its_parent(environment, tmp_path):
    script = f"echo $$ > {tmp_path}/pid; touch {tmp_path}/up; exec sleep 60"
    parent = subprocess.Popen(["bash", "-c", f"{GENSEG} lease --gpus 1 -- bash -c '{script}'; true"], env=environment)
    wait_for((tmp_path / "up").exists)
    job = int((tmp_path / "pid").read_text())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not Path(f"/proc/{job}").exists() or " Z " in Path(f"/proc/{job}/stat").read_text())


def test_devices_are_parsed_from_a_listing():
    listing = (
        "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-aa)\n"
        "  MIG 3g.40gb     Device  0: (UUID: MIG-11)\n"
        "  MIG 3g.40gb     Device  1: (UUID: MIG-22)\n"
        "GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-bb)\n"
        "GPU 2: NVIDIA A100-SXM4-80GB (UUID: GPU-cc)\n"
        "  MIG 7g.80gb     Device  0: (UUID: MIG-33)\n"
    )
    assert leasing.parse_devices(listing) == ["MIG-11", "MIG-22", "GPU-bb", "MIG-33"]
