"""A fresh project, a host of the data and a hub, in which the commands of the README run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from PIL import Image

from rehearsal.coco import mirror_sources, published_files
from rehearsal.repositories import write_repositories
from rehearsal.servers import Hub, Server, serving

PROJECT = Path(__file__).resolve().parents[2]
TRACKED = ("Snakefile", "dvc.yaml", "params.yaml", "params", "workflow", "data/published", "data/classes", "data/imported")
CONFIGS = ("params/paper.yaml", "params/overlays/rehearsal.yaml")
TABLES = (
    *("table2", "table3", "table4", "table5", "protocols", "controls", "comparisons", "breakdown", "evaluations", "readouts"),
    *("refinement", "refinement_controls", "refinement_sensitivity", "shares", "failures"),
)
FIGURES = ("examples", "narratives", "failures", "evolution", "readouts", "evaluations", "refined", "gain", "reliability")
TRAIN_IMAGES, TEST_IMAGES = 24, 8


class Rehearsal:
    """Context with a fresh clone in `folder`, whose sources are served by `data` and whose hub is `hub`."""

    def __init__(self, folder: Path) -> None:
        # 1. Copy the project.
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.iterdir()):
            sys.exit(f"{folder}: not empty; remove it and run again")
        for name in TRACKED:
            copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
            (self.folder / name).parent.mkdir(exist_ok=True)
            copy(PROJECT / name, self.folder / name)

        # 2. Write the files of both hosts.
        self.data = Server()
        self.data.files = published_files(TRAIN_IMAGES, TEST_IMAGES)
        counts = {"train2017": TRAIN_IMAGES, "val2017": TEST_IMAGES}
        sources = mirror_sources(PROJECT / "data/sources.csv", self.data.files, self.data.url(), counts)
        (self.folder / "data/sources.csv").write_text(sources)
        narratives = [item for split in counts for item in json.loads(self.data.files[f"png_coco_{split}.json"])]
        write_repositories(self.folder / "hub", [item["caption"] for item in narratives])
        self.hub = Hub(self.folder / "hub")
        self._servers = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._servers.enter_context(serving(self.data))
        self._servers.enter_context(serving(self.hub))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._servers.close()

    def run(self, command: list[str], output: Path | None = None, **environment: str) -> int:
        """Run a command in the project with an empty cache of the hub, and return its exit status."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        hub = {"HF_ENDPOINT": self.hub.url(), "HF_HOME": str(self.folder / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        with open(output or os.devnull, "wb") as handle:
            stdout = {"stdout": handle, "stderr": subprocess.STDOUT} if output else {}
            env = os.environ | {"PATH": path} | hub | environment
            return subprocess.run(command, cwd=self.folder, env=env, stdin=subprocess.DEVNULL, check=False, **stdout).returncode

    def check_results(self) -> str:
        """Check that every table and figure exists and that the page shows it. Return a summary, or raise AssertionError."""
        results = self.folder / "results/rehearsal"
        page = (results / "tables/index.html").read_text()
        for name in TABLES:
            rows = (results / f"tables/{name}.csv").read_text().splitlines()
            assert len(rows) > 1, f"{name}.csv has no rows"
            assert "\\bottomrule" in (results / f"tables/{name}.tex").read_text(), f"{name}.tex is not complete"
            assert f'id="{name}"' in page, f"index.html lacks {name}"
        for name in FIGURES:
            with Image.open(results / f"figures/{name}.png") as image:
                assert len(image.convert("L").getcolors(256) or []) > 2, f"{name}.png is blank"
            assert f"{name}.png" in page, f"index.html lacks {name}"
        return f"{len(TABLES)} tables and {len(FIGURES)} figures"
