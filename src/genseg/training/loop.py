"""What every training loop shares: learning-rate schedule, checkpoints for exact resume, the log and its figures."""

from __future__ import annotations

import csv
import math
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch

from genseg.artifacts.files import atomic_path
from genseg.artifacts.seeds import derive_seed
from genseg.errors import UserError
from genseg.models.flops import find_gpu

KEEP = 2
"""Checkpoints kept: the newest and, should its disk block be bad, the one before."""


def lr_factor(step: int, steps: int, warmup: int, schedule: Literal["constant", "cosine"]) -> float:
    """Factor in (0, 1] on the learning rate of 0-based `step`: linear warm-up, then constant or a half cosine to 0."""
    rise = min(1.0, (step + 1) / (warmup + 1))
    if schedule == "constant":
        return rise
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def step_rng(seed: int, *ids: object) -> random.Random:
    """Randomness of one step: a function of the seed and the step, so a resumed run draws what the whole run would."""
    return random.Random(derive_seed(seed, *ids))


def step_generator(seed: int, *ids: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, *ids))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `step-XXXXXXX.pt` atomically and remove all but the newest `KEEP`."""
    with atomic_path(folder / f"step-{step:07d}.pt") as temporary:
        torch.save({"step": step, **state}, temporary)
    for old in sorted(folder.glob("step-*.pt"))[:-KEEP]:
        old.unlink()


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint, or None; an unreadable one is named and passed over."""
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # processes share the pages
        except Exception as error:  # a torn file raises anything from EOFError to RuntimeError
            print(f"{path}: unreadable checkpoint passed over ({' '.join(str(error).split())[:120]})", flush=True)
    return None


class TrainLog:
    """The log of a training run, in three forms: lines, a CSV of the reproducible figures, and DVCLive curves of them all.

    It survives resume: rows after the resumed step are dropped, and the curves are drawn again up to there.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], resume_step: int, name: str) -> None:
        from dvclive import Live  # a second of imports that only training needs

        self.path, self.columns, self.name = path, columns, name
        rows: list[dict[str, str]] = []
        if resume_step and path.exists():
            with path.open(newline="") as handle:
                rows = [row for row in csv.DictReader(handle) if int(row["step"]) <= resume_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, columns)
            writer.writeheader()
            writer.writerows(rows)
        figures = _drawn(path.parent / "curves")  # of speed and memory stand in no CSV, and Live begins anew
        self._live = Live(str(path.parent / "curves"), report="html", save_dvc_exp=False, dvcyaml=None)
        for row in rows:
            self._draw(figures.get(int(row["step"]), {}) | row)

    def write(self, row: dict[str, Any], figures: dict[str, float], minutes_left: float) -> None:
        """Append a row and print it with `figures`, which differ from run to run (`Meter.figures`)."""
        with self.path.open("a", newline="") as handle:
            csv.DictWriter(handle, self.columns).writerow(row)
        self._draw(row | figures)
        self._live.make_summary()
        shown = "  ".join(f"{key} {value}" for key, value in row.items() if value != "")
        measured = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
        print(f"{self.name}: {shown}  | {measured}, {minutes_left:.1f} min left", flush=True)

    def report(self) -> None:
        """Draw the curves in `curves/report.html` beside the CSV."""
        self._live.make_report()

    def _draw(self, row: dict[str, Any]) -> None:
        self._live.step = int(row["step"])
        for key, value in row.items():
            if key != "step" and value != "":
                self._live.log_metric(key, float(value))


def _drawn(folder: Path) -> dict[int, dict[str, str]]:
    """Step -> what DVCLive drew there, by name; a line that a kill cut short is left out."""
    found: dict[int, dict[str, str]] = {}
    for path in sorted(folder.glob("plots/metrics/*.tsv")):
        for line in path.read_text().splitlines(keepends=True)[1:]:
            step, _, value = line.partition("\t")
            if value.endswith("\n"):
                found.setdefault(int(step), {})[path.stem] = value.strip()
    return found


class Meter:
    """Speed since the last log line, of training alone: validation and checkpoints do not count.

    Args:
        flops: floating-point operations of one training sample. What gradient checkpointing computes again is not useful
            and not counted.
    """

    def __init__(self, device: torch.device, processes: int, flops: float = 0.0) -> None:
        self.device, self.processes, self.flops = device, processes, flops
        self._samples, self._seconds, self._waited = 0, 0.0, 0.0

    def add(self, samples: int, begun: float, waited: float) -> None:
        """A step of `samples` in all processes that began at `time.monotonic()` = `begun` and waited for data."""
        self._samples += samples
        self._seconds += time.monotonic() - begun
        self._waited += waited

    def figures(self) -> dict[str, float]:
        """samples/s of all processes, % of the time that this one waited for data, its peak memory in GiB (of the device, or
        resident); on GPUs also TFLOP/s of each and, where its peak is known, MFU: % of the dense 16-bit peak."""
        rate = self._samples / self._seconds
        found = {"samples_per_s": rate, "data_wait_percent": 100 * self._waited / self._seconds}
        found["memory_gib"] = _peak_bytes(self.device) / 2**30
        self._samples, self._seconds, self._waited = 0, 0.0, 0.0
        if self.device.type == "cuda":
            done = rate * self.flops / self.processes
            found["tflops"] = done / 1e12
            if gpu := find_gpu(torch.cuda.get_device_name(self.device)):
                found["mfu_percent"] = 100 * done / gpu.half
        return found


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check_finite(value: torch.Tensor, step: int, name: str = "loss") -> None:
    """Stop before a bad step reaches the weights.

    Raises:
        UserError: the value is NaN or infinite.
    """
    if not torch.isfinite(value):
        raise UserError(
            f"step {step}: the {name} is {value.item()}; the last checkpoint is unharmed: lower train.optimizer.lr, "
            "or use train.precision bf16 or fp32, and run again"
        )
