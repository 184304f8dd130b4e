"""What the benchmarks share: interleaved repetitions, the study they read, and the report."""

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
    """How much is measured. `tiny` is for tests: everything is run once, on next to nothing."""

    tiny: bool
    images: int = 2
    """That are refined."""

    def __call__(self, usual: int, tiny: int) -> int:
        return tiny if self.tiny else usual


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(calls: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call in each repetition. A repetition runs all of them, so that whatever else the machine does and how
    warm it is weighs on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            gc.collect()
            synchronize()
            started = time.perf_counter()
            call()
            synchronize()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def versus(case: str, ours: list[float], reference: list[float], count: int, wanted: float | None = None, **facts: Any) -> Row:
    """A row: seconds per unit of work (medians) of ours and the reference, each of `count` units; the median of the
    repetitions' ratios, their least and greatest; and the ratio that is wanted of it."""
    ratios = [theirs / mine for mine, theirs in zip(ours, reference, strict=True)]
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
    """Seconds spent inside modules, by name; device work is waited for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def inside(self, modules: Mapping[str, list[torch.nn.Module]]) -> Iterator[None]:
        begun: dict[str, float] = {}
        hooks = []
        for name, members in modules.items():
            self.seconds[name] = 0.0

            def before(*_: Any, name: str = name) -> None:
                synchronize()
                begun[name] = time.perf_counter()

            def after(*_: Any, name: str = name) -> None:
                synchronize()
                self.seconds[name] += time.perf_counter() - begun[name]

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
    """What a finished study left for the benchmarks to run on."""

    def __init__(self, params: Params) -> None:
        self.params = params
        for path, phase in ((params.data_dir / "phrases.parquet", "data"), (params.results_dir / "model", "train")):
            if not path.exists():
                raise UserError(f"{path}: not there; run `make` first, or snakemake up to the phase {phase}")
        self.phrases = read_phrases(params.data_dir / "phrases.parquet")

    def pipeline(self) -> GSPipeline:
        pipeline = load_pipeline(self.params.results_dir / "model")
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def narrative(self) -> pd.DataFrame:
        """The phrases of the first test narrative that has the median number of them."""
        test = self.phrases[self.phrases["split"] == "test"]
        found = [rows for _, rows in test.groupby(["image_id", "narrative_id"])]
        middle = statistics.median_high(len(rows) for rows in found)
        return next(rows for rows in found if len(rows) == middle)

    def part(self, split: str, phrases: int) -> list[pd.DataFrame]:
        """Rows of the split's first images, image by image, until there are about that many phrases."""
        taken: list[pd.DataFrame] = []
        for _, rows in self.phrases[self.phrases["split"] == split].groupby("image_id"):
            if sum(map(len, taken)) >= phrases:
                break
            taken.append(rows.head(phrases - sum(map(len, taken))))
        return taken


def machine(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "processor": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def markdown(rows: list[Row]) -> str:
    """A table of rows; columns in the order in which they turn up."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_shown(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, bool | str | int):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def report(document: dict[str, Any], path: Path) -> str:
    """Write the document as JSON to `path` and its tables as Markdown beside it; returns the latter."""
    parts = [f"# {document['title']}", ", ".join(f"{name}: {value}" for name, value in document["machine"].items())]
    for name, found in document["benchmarks"].items():
        parts += [
            f"## {name}",
            found["what"],
            markdown(found["rows"]) if found.get("rows") else found.get("skipped", "Not reached."),
        ]
    text = "\n\n".join(parts) + "\n"
    write_json(path, document)
    path.with_suffix(".md").write_text(text)
    return f"{text}\n{path} and {path.with_suffix('.md')}"
