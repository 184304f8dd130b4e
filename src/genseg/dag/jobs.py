"""Jobs: GPU leases, logs and processes. A lease and a log are locked by the process of a job, so a kill releases them.

Snakemake counts GPUs but does not assign devices. Here, a device is a lock file in the machine's temporary folder. A process
owns the device while it holds the file's `flock`, through a descriptor that survives `exec`. The kernel releases the lock when
the process ends.
"""

import contextlib
import ctypes
import fcntl
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from genseg.errors import UserError

if TYPE_CHECKING:  # the import would delay each leased job
    from genseg.params import Params

DEVICES = "GENSEG_DEVICES"
"""Environment variable with comma-separated names of devices, which replace those that the driver lists."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
_MARK = "GENSEG_LAUNCHED"
"""Environment variable that marks the processes started by `launch`."""


def run_leased(command: list[str], gpus: int, log: str | None) -> NoReturn:
    """Lease `gpus` devices and replace this process by `command`; the output of `command` is copied to `log`.

    The job ends with its parent. If Snakemake is killed, an orphan would otherwise write to the same files as the next run.
    If a job still outlives its parent, the next job with the same log waits until the first has ended. Raises
    UserError if the machine has fewer GPUs than requested, or the command does not exist.
    """
    die_with_parent()
    if log:
        _copy_output(_own_log(Path(log)))
    if VISIBLE not in os.environ and (available := devices()):
        os.environ[VISIBLE] = ",".join(lease(gpus, available))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}; is the environment active?") from None


def devices() -> list[str]:
    """Return the names of this machine's NVIDIA devices as `CUDA_VISIBLE_DEVICES` expects them; [] if there is none.

    They are UUIDs, because CUDA and nvidia-smi number devices differently. A GPU that is divided into MIG instances is listed
    as these instances.
    """
    if DEVICES in os.environ:
        return [name for name in os.environ[DEVICES].split(",") if name]
    nodes = list(Path("/dev").glob("nvidia[0-9]*"))
    if not nodes or shutil.which("nvidia-smi") is None:
        return [str(number) for number in range(len(nodes))]
    return parse_devices(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout)


def parse_devices(listing: str) -> list[str]:
    """Return the UUIDs in the output of `nvidia-smi -L`: for a GPU divided into MIG instances, those of its instances."""
    uuids: list[str] = []
    for uuid in re.findall(r"UUID: ((?:GPU|MIG)-[^)]+)", listing):
        if uuid.startswith("MIG") and uuids[-1].startswith("GPU"):
            uuids.pop()
        uuids.append(uuid)
    return uuids


def lease(count: int, available: list[str]) -> list[str]:
    """Wait for `count` free devices and lock them together until this process, or the one that replaces it, ends.

    Jobs wait in a queue, so that one-GPU jobs cannot delay an eight-GPU job indefinitely. Raises UserError if there are
    fewer than `count` devices.
    """
    if count > len(available):
        raise UserError(f"{count} GPUs requested, but this machine has {len(available)}; lower resources.*.gpu in the params")
    folder = Path(tempfile.gettempdir()) / "genseg-lease"
    folder.mkdir(exist_ok=True)
    queue = _open(folder / "queue")
    fcntl.flock(queue, fcntl.LOCK_EX)
    while len(locked := _try_lock(count, available, folder)) < count:
        time.sleep(0.2)
    os.close(queue)
    return locked


def _try_lock(count: int, available: list[str], folder: Path) -> list[str]:
    """Lock `count` free devices with descriptors that survive `exec`, or none. Return the locked devices."""
    descriptors: dict[str, int] = {}
    for name in available:
        if len(descriptors) == count:
            break
        descriptor = _open(folder / f"{name}.lock")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        else:
            descriptors[name] = descriptor
    if len(descriptors) < count:
        for descriptor in descriptors.values():
            os.close(descriptor)
        return []
    for descriptor in descriptors.values():
        os.set_inheritable(descriptor, True)
    return list(descriptors)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)  # read-only: the file may belong to another user


def _own_log(path: Path) -> int:
    """Open and truncate a log. Wait while another job writes to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{path}: a job of an earlier run is still writing to it; waiting until it ends", file=sys.stderr, flush=True)
        fcntl.flock(log, fcntl.LOCK_EX)
    os.truncate(log, 0)
    os.set_inheritable(log, True)
    return log


def _copy_output(log: int) -> None:
    """Copy all further output to stderr and to the log."""
    terminal = os.isatty(2)  # a pseudo-terminal lets the command show its progress bars
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
    """Copy output to stderr and the log until all writers have ended. Only complete lines are copied, with the final state of
    progress bars, so that lines of jobs do not mix; a terminal gets every byte."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # the command decides when to end, and its last lines are kept
    terminal, line = os.isatty(2), b""
    while chunk := _read(source):
        *complete, line = (line + chunk).split(b"\n")
        lines = b"".join(_last_state(part) + b"\n" for part in complete)
        with contextlib.suppress(OSError):  # the terminal may be closed; the log is still written
            os.write(2, chunk if terminal else lines)
        os.write(log, lines)
    with contextlib.suppress(OSError):
        os.write(2, b"" if terminal else _last_state(line))
    os.write(log, _last_state(line))


def _last_state(line: bytes) -> bytes:
    return line.rstrip(b"\r").rpartition(b"\r")[2]


def _read(source: int) -> bytes:
    try:
        return os.read(source, 65536)
    except OSError:  # reading a pseudo-terminal fails when its last writer has ended
        return b""


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Make the kernel send a signal to this process, or the one that replaces it, when its parent ends in any way."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG of prctl(2); survives exec
    if os.getppid() != parent:
        sys.exit("the parent of this job has ended")


# ----------------------------------------------------------------------------------------- commands with several processes
def processes(params: "Params") -> int:
    """Return the number of training processes: one per GPU of `resources.train.gpu`, at most the number of visible GPUs."""
    import torch  # counts the visible GPUs, which a scheduler or `genseg lease` may have limited

    return 1 if params.device == "cpu" else max(1, min(params.resources.train.gpu, torch.cuda.device_count()))


def launch(command: list[str], count: int, threads: int) -> None:
    """Run `genseg COMMAND` through torchrun in `count` processes of this machine, which end when this process ends.

    Waits for all of them. Raises UserError with the error of the first process that failed, or the signal that killed it.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ[_MARK] = "1"
    logging.disable(logging.ERROR)  # torchrun's own error message is a page long
    try:
        main(["--standalone", "--nproc-per-node", str(count), "--module", "genseg", *command])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if isinstance(failure.message, dict):
            raise UserError(failure.message["message"].removeprefix("UserError: ")) from None
        how = f"was killed by signal {-failure.exitcode}" if failure.exitcode < 0 else f"ended with {failure.exitcode}"
        raise UserError(f"process {rank} of {count} {how}; run again to continue from the last checkpoint") from None
    finally:
        logging.disable(logging.NOTSET)
        del os.environ[_MARK]


@contextlib.contextmanager
def one_of_several() -> Iterator[None]:
    """Context for the work of a process started by torchrun, `accelerate launch` or `launch`. It ends with its parent.

    All processes may raise the same user error; `launch` reports it once.
    """
    die_with_parent()
    try:
        yield
    except UserError as error:
        if _MARK not in os.environ:
            raise
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        sys.exit(2)
