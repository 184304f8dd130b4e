"""Peak memory of the phases that read and write predictions, at N and at 10 N rows, each in a process of its own.

    python -m benchmarks.memory [--only NAME ...] [--rows N]
    python -m benchmarks.memory --only gather --rows 66500      # 665,000 maps in the second process

Soft maps are 128 x 128, images 240 x 320. The ratio of the two peaks (maximum resident set size) includes the libraries and the
tables; `maps` is the memory that the additional soft maps would take as float32.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.harness import markdown
from genseg.artifacts.masks import encode
from genseg.artifacts.parts import PART_ROWS, Parts, Piece, make_parts
from genseg.artifacts.phrases import write_phrases
from genseg.artifacts.predictions import iterate_maps, read_levels, read_predictions

SIDE, HEIGHT, WIDTH = 128, 240, 320
BLOCK, SHARDS, CLASSES = 16, 8, 133


def block_rows(block: int, rows: int = BLOCK, per_image: int = BLOCK) -> Piece:
    """Return the predictions of a block of phrases, with soft maps of random boxes."""
    rng = np.random.default_rng(block)
    levels = np.zeros((rows, SIDE, SIDE), np.uint8)
    for level in levels:
        top, left = rng.integers(0, SIDE // 2, 2)
        level[top : top + SIDE // 2, left : left + SIDE // 2] = rng.integers(1, 256, (SIDE // 2, SIDE // 2))
    number = np.arange(block * rows, (block + 1) * rows)
    frame = pd.DataFrame({"image_id": number // per_image, "narrative_id": "n", "phrase_id": number % per_image})
    masks = [encode(np.kron(level[::16, ::16] > 0, np.ones((HEIGHT // 8, WIDTH // 8), bool))) for level in levels]
    return frame.assign(mask=masks, score=np.float32(0.5)), levels


def write(folder: Path, rows: int) -> None:
    """Parts of 8 shards, as sampling, baselines and refinement write them."""
    blocks = -(-rows // BLOCK)
    for shard in range(SHARDS):
        parts = Parts(folder / "parts", "k")
        make_parts({"a": parts}, range(shard, blocks, SHARDS), lambda block: {"a": block_rows(block)}, "block")


def gather(folder: Path, rows: int) -> None:
    Parts(folder / "parts", "k").gather(folder / "out.parquet")


def prepare_rows(folder: Path, rows: int) -> None:
    """Predictions, and a phrase table of the same masks."""
    parts = Parts(folder / "parts", "k")
    make_parts({"a": parts}, range(-(-rows // CLASSES)), lambda i: {"a": block_rows(i, CLASSES, CLASSES)}, "image")
    parts.gather(folder / "out.parquet")
    frame = read_predictions(folder / "out.parquet").drop(columns="score")
    frame = frame.assign(split="test", file_name="", height=HEIGHT, width=WIDTH, caption="", phrase="a thing", is_thing=True)
    nulls = {"segment_ids": None, "tags": None}
    write_phrases(frame.assign(is_plural=False, class_id=frame["phrase_id"], **nulls), folder / "phrases.parquet")


def score(folder: Path, rows: int) -> None:
    """IoU, boundary IoU and calibration of every row."""
    from genseg.artifacts.phrases import read_phrases
    from genseg.metrics.scoring import score_run
    from genseg.metrics.soft_maps import calibration_counts

    phrases, predictions = read_phrases(folder / "phrases.parquet"), read_predictions(folder / "out.parquet")
    score_run(phrases, predictions, boundary_ratio=0.02, latent=(SIDE, SIDE))
    calibration_counts(phrases, iterate_maps(folder / "out.parquet"))


def miou(folder: Path, rows: int) -> None:
    """Pixel counts of 133 classes per image, from their soft maps."""
    from genseg.artifacts.phrases import read_phrases
    from genseg.metrics.scoring import mask_pairs, match
    from genseg.metrics.semantic import count_pixels

    path, names = folder / "out.parquet", ("phrases", "predictions")
    table, _ = match(read_phrases(folder / "phrases.parquet"), read_predictions(path), "test", False, names)
    table = table.assign(area=mask_pairs(table, names).truth_area)

    def maps(numbers: np.ndarray) -> np.ndarray:
        return read_levels(path, slice(int(numbers[0]), int(numbers[-1]) + 1)) / np.float32(255)

    count_pixels(table, maps, [{"name": str(index)} for index in range(CLASSES)], 0.5)


def inexact(folder: Path, rows: int) -> None:
    """Dilated ground truth, as `genseg baseline inexact_dilated` makes it after it has chosen the amount."""
    from genseg.artifacts.phrases import read_phrases
    from genseg.baselines.inexact import inexact_masks

    images = {int(str(image_id)): group for image_id, group in read_phrases(folder / "phrases.parquet").groupby("image_id")}
    parts = Parts(folder / "inexact", "k")
    make_parts({"a": parts}, images, lambda i: {"a": (inexact_masks(images[i], "dilated", 0.2, 0), None)}, "image")
    parts.gather(folder / "inexact.parquet")


PHASES: dict[str, tuple[Callable[[Path, int], None] | None, Callable[[Path, int], None]]] = {
    "write": (None, write),
    "gather": (write, gather),
    "score": (prepare_rows, score),
    "miou": (prepare_rows, miou),
    "inexact": (prepare_rows, inexact),
}
"""Phase -> what it reads, prepared in another process, and the phase."""


def measure(function: str, folder: Path, rows: int) -> dict[str, float]:
    """Run a function of this module in a process of its own; return its peak resident set size and its seconds."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", function, "--folder", str(folder), "--rows", str(rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_child(function: str, folder: Path, rows: int) -> None:
    started = time.monotonic()
    globals()[function](folder, rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "seconds": time.monotonic() - started, "cpu": time.process_time()}))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES), metavar="NAME", help=", ".join(PHASES))
    parser.add_argument("--rows", type=int, default=2 * PART_ROWS, metavar="N", help="rows of the first process")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child, arguments.folder, arguments.rows)
        return 0
    table = []
    for name in arguments.only:
        prepare, phase = PHASES[name]
        results = []
        for rows in (arguments.rows, 10 * arguments.rows):
            with tempfile.TemporaryDirectory() as folder:
                if prepare is not None:
                    measure(prepare.__name__, Path(folder), rows)
                results.append(measure(phase.__name__, Path(folder), rows))
        few, many = results
        row = {"phase": name, "rows": arguments.rows, "MB": few["peak"] / 1e6, "MB at 10 x": many["peak"] / 1e6}
        row |= {"ratio": many["peak"] / few["peak"], "maps, MB": 9 * arguments.rows * SIDE**2 * 4 / 1e6}
        table.append(row | {"seconds at 10 x": many["seconds"], "CPU seconds at 10 x": many["cpu"]})
        print(markdown(table[-1:]), file=sys.stderr, flush=True)
    print(markdown(table), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
