"""The log of a training run (lines, a CSV file, curves) and the measured speed in it."""

from __future__ import annotations

import csv
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from genseg.models.flops import find_gpu


class TrainLog:
    """The log of a training run in three forms: printed lines, a CSV file of the reproducible values, and DVCLive curves of
    all values.

    The log survives a resume: rows after the resumed step are dropped, and the curves are redrawn up to that step.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], resume_step: int, name: str) -> None:
        from dvclive import Live  # takes a second to import, and only training needs it

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
        # Speed and memory are not in the CSV file, and Live starts empty: read them from the old curves.
        curves = _read_curves(path.parent / "curves")
        self._live = Live(str(path.parent / "curves"), report="html", save_dvc_exp=False, dvcyaml=None)
        for row in rows:
            self._draw(curves.get(int(row["step"]), {}) | row)

    def write(self, row: dict[str, Any], measurements: dict[str, float], minutes_left: float) -> None:
        """Append a row to the CSV file, and print it with `measurements`, which differ from run to run (see `Meter.read`)."""
        with self.path.open("a", newline="") as handle:
            csv.DictWriter(handle, self.columns).writerow(row)
        self._draw(row | measurements)
        self._live.make_summary()
        values = "  ".join(f"{key} {value}" for key, value in row.items() if value != "")
        speed = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in measurements.items())
        print(f"{self.name}: {values}  | {speed}, {minutes_left:.1f} min left", flush=True)

    def report(self) -> None:
        """Write the curves to `curves/report.html` next to the CSV file."""
        self._live.make_report()

    def _draw(self, row: dict[str, Any]) -> None:
        self._live.step = int(row["step"])
        for key, value in row.items():
            if key != "step" and value != "":
                self._live.log_metric(key, float(value))


def _read_curves(folder: Path) -> dict[int, dict[str, str]]:
    """Return step -> {name: value} from DVCLive's files, without a last line that a kill cut short."""
    values: dict[int, dict[str, str]] = {}
    for path in sorted(folder.glob("plots/metrics/*.tsv")):
        for line in path.read_text().splitlines(keepends=True)[1:]:
            step, _, value = line.partition("\t")
            if value.endswith("\n"):
                values.setdefault(int(step), {})[path.stem] = value.strip()
    return values


class Meter:
    """Measures the speed of training since the last log line, without validation and checkpoints.

    Args:
        processes: number of processes.
        flops: floating-point operations of one training sample. Operations that gradient checkpointing repeats are not
            counted.
    """

    def __init__(self, device: torch.device, processes: int, flops: float = 0.0) -> None:
        self.device, self.processes, self.flops = device, processes, flops
        self._samples, self._seconds, self._waited = 0, 0.0, 0.0

    def add(self, samples: int, start_time: float, waited: float) -> None:
        """Count a step that ends now.

        Args:
            samples: samples of the step in all processes.
            start_time: `time.monotonic()` at the start of the step.
            waited: seconds that the step waited for its data.
        """
        self._samples += samples
        self._seconds += time.monotonic() - start_time
        self._waited += waited

    def read(self) -> dict[str, float]:
        """Return the measurements since the last call.

        `samples_per_s` of all processes; `data_wait_percent`, the share of time that this process waited for data;
        `memory_gib`, its peak memory (of the device, or resident). On a GPU also `tflops` per process and, where the
        GPU's peak is known, `mfu_percent` of the dense 16-bit peak.
        """
        rate = self._samples / self._seconds
        values = {"samples_per_s": rate, "data_wait_percent": 100 * self._waited / self._seconds}
        values["memory_gib"] = _peak_bytes(self.device) / 2**30
        self._samples, self._seconds, self._waited = 0, 0.0, 0.0
        if self.device.type == "cuda":
            flops_per_s = rate * self.flops / self.processes
            values["tflops"] = flops_per_s / 1e12
            if gpu := find_gpu(torch.cuda.get_device_name(self.device)):
                values["mfu_percent"] = 100 * flops_per_s / gpu.half
        return values


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
