"""The log of a training run (printed lines, a CSV file, curves) and the measurement of its speed."""

import csv
import re
import resource
import sys
import time
from pathlib import Path

import torch

from genseg.models.flops import find_gpu


class TrainLog:
    """The log of a training run: printed lines, a CSV file of the reproducible values, and DVCLive curves of all values.

    After a resume, the files keep their rows up to the resumed step.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], resume_step: int, name: str) -> None:
        from dvclive import Live  # takes a second to import, and only training needs it

        self.path, self.columns, self.name = path, columns, name
        curves = path.parent / "curves"
        for table in (path, *curves.glob("plots/metrics/*.tsv")):
            _cut(table, resume_step)
        (curves / "metrics.json").unlink(missing_ok=True)  # a killed run may have left it incomplete
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as handle:
                csv.DictWriter(handle, columns).writeheader()
        self._live = Live(str(curves), resume=resume_step > 0, report="html", save_dvc_exp=False, dvcyaml=None)

    def write(self, row: dict[str, str], measurements: dict[str, float], minutes_left: float) -> None:
        """Append a row to the CSV file; print it and add it to the curves, both with the `measurements` of `Meter.read`."""
        with self.path.open("a", newline="") as handle:
            csv.DictWriter(handle, self.columns).writerow(row)
        self._live.step = int(row["step"])
        for key, value in (row | measurements).items():
            if key != "step":
                self._live.log_metric(key, float(value))
        self._live.make_summary()
        values = "  ".join(f"{key} {value}" for key, value in row.items())
        speed = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in measurements.items())
        print(f"{self.name}: {values}  | {speed}, {minutes_left:.1f} min left", flush=True)

    def report(self) -> None:
        """Write the curves to `curves/report.html` next to the CSV file."""
        self._live.make_report()


def _cut(table: Path, step: int) -> None:
    """Remove rows after `step`, and a last row that is incomplete, from a table whose first column is the step."""
    lines = table.read_bytes().splitlines(keepends=True) if table.exists() else []
    rows = [line for line in lines[1:] if line.endswith(b"\n") and int(re.split(rb"[,\t]", line)[0]) <= step]
    if rows:
        table.write_bytes(b"".join([lines[0], *rows]))
    else:
        table.unlink(missing_ok=True)


class Meter:
    """Measures the speed of training since the last log line, without validation and checkpoints.

    `flops` is the number of operations of one training sample, without those that gradient checkpointing repeats.
    """

    def __init__(self, device: torch.device, processes: int, flops: float = 0.0) -> None:
        self.device, self.processes, self.flops = device, processes, flops
        self._samples, self._seconds, self._waited = 0, 0.0, 0.0

    def add(self, samples: int, start_time: float, waited: float) -> None:
        """Count a step of all processes that began at `start_time` (`time.monotonic()`), ends now, and waited `waited` seconds
        for its data."""
        self._samples += samples
        self._seconds += time.monotonic() - start_time
        self._waited += waited

    def read(self) -> dict[str, float]:
        """Return the measurements since the last call: `samples_per_s` of all processes; `data_wait_percent`, the share of time
        that this process waited for data; `memory_gib`, its peak memory (GPU memory, or resident memory without a GPU). On a
        GPU also `tflops` per process and, if its peak rate is known, `mfu_percent`, relative to the dense 16-bit peak."""
        rate = self._samples / self._seconds
        values = {"samples_per_s": rate, "data_wait_percent": 100 * self._waited / self._seconds}
        self._samples, self._seconds, self._waited = 0, 0.0, 0.0
        if self.device.type != "cuda":
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            return values | {"memory_gib": resident / 2**30}
        flops_per_s = rate * self.flops / self.processes
        values |= {"memory_gib": torch.cuda.max_memory_allocated(self.device) / 2**30, "tflops": flops_per_s / 1e12}
        if gpu := find_gpu(torch.cuda.get_device_name(self.device)):
            values["mfu_percent"] = 100 * flops_per_s / gpu.half
        return values
