"""Leases: a job's GPUs, its log and its life are bound to its process, so that nothing is left over when it is killed.

Snakemake counts GPUs but hands out no device. Here a device is a lock file in the machine's temporary folder, held
through `flock` by a descriptor that survives `exec`: whoever holds it owns the device, and the kernel frees it when the
process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import NoReturn

from genseg.errors import UserError

DEVICES = "GENSEG_DEVICES"
"""Environment variable that names the machine's devices (comma-separated) instead of asking the driver."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
_POLL_SECONDS = 0.2


def run_leased(command: list[str], gpus: int, log: str | None) -> NoReturn:
    """Become `command`, holding `gpus` devices, with its output copied to `log`; never returns.

    The job dies with its parent: an orphan of a killed Snakemake would go on writing beside the next run. Where it does
    not (the parent is no Snakemake), a second job with the same log waits until the first has ended.

    Raises:
        UserError: more GPUs asked for than the machine has, or no such command.
    """
    die_with_parent()
    if log:
        _copy_output(_own_log(Path(log)))
    environment = dict(os.environ)
    available = [] if VISIBLE in environment else devices()
    if available:
        environment[VISIBLE] = ",".join(lease(gpus, available))
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}; is the environment active?") from None


def devices() -> list[str]:
    """Names of this machine's NVIDIA devices, as `CUDA_VISIBLE_DEVICES` takes them; empty where there is none.

    UUIDs, because CUDA numbers devices otherwise than nvidia-smi. A GPU cut into MIG instances counts as these.
    """
    if DEVICES in os.environ:
        return [name for name in os.environ[DEVICES].split(",") if name]
    nodes = list(Path("/dev").glob("nvidia[0-9]*"))
    if not nodes or shutil.which("nvidia-smi") is None:
        return [str(number) for number in range(len(nodes))]
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return listed(listing)


def listed(listing: str) -> list[str]:
    """UUIDs in the output of `nvidia-smi -L`, of a GPU cut into MIG instances theirs and not its own."""
    found: list[str] = []
    for name in re.findall(r"UUID: ((?:GPU|MIG)-[^)]+)", listing):
        if name.startswith("MIG") and found[-1].startswith("GPU"):
            found.pop()
        found.append(name)
    return found


def lease(count: int, available: list[str]) -> list[str]:
    """Wait for `count` free devices, take them all at once and keep them until this process (or what it becomes) ends.

    Waiting jobs stand in line, so that a job of 8 is not passed for ever by jobs of 1.

    Raises:
        UserError: `count` is more than there are.
    """
    if count > len(available):
        raise UserError(f"{count} GPUs asked for, this machine has {len(available)}: lower resources.*.gpu in the params")
    folder = Path(tempfile.gettempdir()) / "genseg-lease"
    folder.mkdir(exist_ok=True)
    queue = _open(folder / "queue")
    fcntl.flock(queue, fcntl.LOCK_EX)
    while len(taken := _take(count, available, folder)) < count:
        time.sleep(_POLL_SECONDS)
    os.close(queue)
    return taken


def _take(count: int, available: list[str], folder: Path) -> list[str]:
    """`count` devices that were free, their locks held by descriptors that survive `exec`; or none."""
    taken: dict[str, int] = {}
    for name in available:
        if len(taken) == count:
            break
        descriptor = _open(folder / f"{name}.lock")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        else:
            taken[name] = descriptor
    enough = len(taken) == count
    for descriptor in taken.values():
        if enough:
            os.set_inheritable(descriptor, True)
        else:
            os.close(descriptor)
    return list(taken) if enough else []


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)  # read-only: another user may have made the file


def _own_log(path: Path) -> int:
    """Open and empty a log; waits until no other job writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{path}: a job of an earlier run still writes here; waiting for it to end", file=sys.stderr, flush=True)
        fcntl.flock(log, fcntl.LOCK_EX)
    os.truncate(log, 0)
    os.set_inheritable(log, True)
    return log


def _copy_output(log: int) -> None:
    """From here on, stdout and stderr go to stderr and to the log, through a terminal where stderr is one (so that the
    command shows its progress bars)."""
    terminal = os.isatty(2)
    source, sink = os.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(sink, termios.tcgetwinsize(2))
    if os.fork() == 0:
        os.close(sink)
        _copy(source, log)
        os._exit(0)
    os.close(source)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)


def _copy(source: int, log: int) -> None:
    """Copy until every writer has ended. The log gets whole lines, a progress bar only as it was last; so does stderr where
    it is no terminal, and the lines of jobs side by side stay apart."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # the command decides when to end; its last words are wanted
    terminal, line = os.isatty(2), b""
    while chunk := _read(source):
        *complete, line = (line + chunk).split(b"\n")
        lines = b"".join(_last_state(part) + b"\n" for part in complete)
        _write(chunk if terminal else lines)
        os.write(log, lines)
    rest = _last_state(line)
    _write(b"" if terminal else rest)
    os.write(log, rest)


def _write(text: bytes) -> None:
    with contextlib.suppress(OSError):  # the terminal may have gone; the log goes on
        os.write(2, text)


def _last_state(line: bytes) -> bytes:
    return line.rstrip(b"\r").rpartition(b"\r")[2]


def _read(source: int) -> bytes:
    try:
        return os.read(source, 65536)
    except OSError:  # how a terminal tells that its last writer has ended
        return b""


def die_with_parent() -> None:
    """Have the kernel end this process (and what it becomes) when its parent ends, however that ends."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2); survives exec
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("the parent of this job has ended")
