"""Shared parts of the benchmarks: timing, access to the study, and the report."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from genseg.artifacts.files import write_json
from genseg.artifacts.phrases import read_phrases
from genseg.diffusion.pipeline import GSPipeline, load_pipeline
from genseg.errors import UserError
from genseg.params import Params

Call = Callable[[], Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """Amount of work: `effort(usual, tiny)` returns `tiny` in tests, which run everything once on little data."""

    tiny: bool
    images: int = 2
    """Images that the benchmark `refinement` refines."""

    def __call__(self, usual: int, tiny: int) -> int:
        return tiny if self.tiny else usual


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_call(call: Call, repeats: int) -> list[float]:
    """Return the seconds of each repetition of a call, including its work on the GPU."""
    return interleaved({"": call}, repeats)[""]


def interleaved(calls: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each call in each repetition.

    Each repetition runs all calls in turn, so that other load and the temperature of the machine affect all calls alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            gc.collect()
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def evaluations_per_mask(steps: int, guidance: float) -> int:
    """Return the number of U-Net evaluations of one mask. A guided step costs two."""
    return steps * (1 if guidance == 1 else 2)


def versus(case: str, ours: list[float], reference: list[float], count: int, wanted: float | None = None, **facts: Any) -> Row:
    """Return a row that compares our seconds with those of a reference.

    Times are medians per unit of work. The ratio reference / ours of each repetition gives a median, minimum and maximum.

    Args:
        count: number of units of work in one repetition.
        wanted: target for the ratio.
        facts: further columns.
    """
    ratios = [reference_seconds / our_seconds for our_seconds, reference_seconds in zip(ours, reference, strict=True)]
    return {
        "case": case,
        "ours_s": statistics.median(ours) / count,
        "reference_s": statistics.median(reference) / count,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "wanted": wanted,
        "repeats": len(ratios),
        **facts,
    }


class Stopwatch:
    """Seconds spent in the forward passes of modules, by name, including their work on the GPU."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def inside(self, modules: Mapping[str, list[torch.nn.Module]]) -> Iterator[None]:
        start_times: dict[str, float] = {}
        hooks = []
        for name, members in modules.items():
            self.seconds[name] = 0.0

            def before(*_: Any, name: str = name) -> None:
                synchronize()
                start_times[name] = time.perf_counter()

            def after(*_: Any, name: str = name) -> None:
                synchronize()
                self.seconds[name] += time.perf_counter() - start_times[name]

            for module in members:
                hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def stage_modules(pipeline: GSPipeline) -> dict[str, list[torch.nn.Module]]:
    return {
        "text": [pipeline.text_encoder, pipeline.text_encoder_2],
        "VAE": [pipeline.vae.encoder],
        "U-Net": [pipeline.unet],
    }


class Study:
    """Phrases and model of a finished study. Raises UserError if either is missing."""

    def __init__(self, params: Params) -> None:
        self.params = params
        for path, phase in ((params.data_dir / "phrases.parquet", "data"), (params.model_dir("gs"), "train")):
            if not path.exists():
                raise UserError(f"{path}: not found; run `make` first, or `snakemake -- {phase}`")
        self.phrases = read_phrases(params.data_dir / "phrases.parquet")

    def pipeline(self) -> GSPipeline:
        """Load the label-diffusion model in fp32 on the CPU."""
        pipeline = load_pipeline(self.params.model_dir("gs"))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def narrative(self) -> pd.DataFrame:
        """Return the phrases of the first test narrative with the median number of phrases."""
        test = self.phrases[self.phrases["split"] == "test"]
        narratives = [rows for _, rows in test.groupby(["image_id", "narrative_id"])]
        median = statistics.median_high(len(rows) for rows in narratives)
        return next(rows for rows in narratives if len(rows) == median)

    def part(self, split: str, count: int) -> list[pd.DataFrame]:
        """Return the first `count` phrases of a split, one table per image."""
        tables: list[pd.DataFrame] = []
        for _, rows in self.phrases[self.phrases["split"] == split].groupby("image_id"):
            missing = count - sum(map(len, tables))
            if missing <= 0:
                break
            tables.append(rows.head(missing))
        return tables


def machine(device: torch.device) -> dict[str, Any]:
    """Return the processor, device, threads and versions of this machine."""
    is_cuda = device.type == "cuda"
    return {
        "processor": torch.cuda.get_device_name(device) if is_cuda else platform.processor() or platform.machine(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def markdown(rows: list[Row]) -> str:
    """Return a Markdown table of rows; its columns are in the order of their first occurrence."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_format(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _format(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, bool | str | int):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def report(document: dict[str, Any], path: Path) -> str:
    """Write the document to `path` as JSON, and its tables as Markdown next to it. Return the Markdown and both paths."""
    parts = [f"# {document['title']}", ", ".join(f"{name}: {value}" for name, value in document["machine"].items())]
    for name, entry in document["benchmarks"].items():
        table = markdown(entry["rows"]) if entry.get("rows") else entry.get("skipped", "Not run yet.")
        parts += [f"## {name}", entry["what"], table]
    text = "\n\n".join(parts) + "\n"
    write_json(path, document)
    path.with_suffix(".md").write_text(text)
    return f"{text}\n{path} and {path.with_suffix('.md')}"
