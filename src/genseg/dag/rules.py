"""What the Snakefile asks about the study: its params as each rule sees them, paths and resources."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from genseg.artifacts.files import write_text
from genseg.artifacts.manifest import code_hash
from genseg.dag.phases import PHASES
from genseg.errors import UserError
from genseg.params import Params, canonical_json, digest, read_document, validate_params


def open_study(config: dict[str, Any], files: list[str | Path]) -> Study:
    """The study of a params document that was read from `files`; a user's mistake ends Snakemake with one line and exit
    code 2."""
    try:
        for file in files:
            read_document(os.path.relpath(file), "configfile")  # Snakemake's own reader lets a later of two equal keys win
        study = Study(validate_params(dict(config), ", ".join(os.path.relpath(file) for file in files)))
        study.write_params()
    except UserError as error:
        print(f"snakemake: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    # The rules call `genseg`, also when this environment's snakemake was called by its path, not activated.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    return study


class Study:
    """One study's params, as the rules use them."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.data = params.data_dir.as_posix()
        self.results = params.results_dir.as_posix()
        self.work = params.work_dir.as_posix()
        document = params.model_dump(mode="json")
        self._params_file = f"{self.work}/params/{digest(document)}.json"

    def write_params(self) -> None:
        """Write the resolved params that the commands read to a file named by its content."""
        if not Path(self._params_file).exists():
            write_text(self._params_file, canonical_json(self.params.model_dump(mode="json")))

    @property
    def params_file(self) -> Callable[..., str]:
        """Path of the resolved params, as a function of `resources`: Snakemake does not track such a param, so a change
        of the file's name alone reruns nothing."""
        return lambda wildcards, resources: self._params_file

    def uses(self, phase: str, only: Sequence[str] = ()) -> Callable[..., str]:
        """The params a phase uses (or a rule of it that uses `only` some), as canonical JSON: when it changes, the rule runs
        again. A function, because Snakemake looks for wildcards in the braces of a text."""
        return lambda wildcards: canonical_json(self.params.subtree(*(only or PHASES[phase].keys)))

    def uses_at_size(self, wildcards: Any) -> str:
        """The params one `sample_shard` job uses: of the cells only those of its size."""
        size, sample = int(wildcards.size), self.params.sample
        keys = set(PHASES["sample"].keys) - {"sample.main", "sample.base", "sample.grid", "sample.points"}
        cells = {
            "main": [sample.main],
            "base": [sample.base],
            "grid": sample.grid_cells(),
            "points": sample.operating_points(),
        }
        chosen = {
            name: sorted(canonical_json(cell.model_dump(mode="json")) for cell in members if cell.size == size)
            for name, members in cells.items()
        }
        return canonical_json(self.params.subtree(*keys) | {"cells": chosen})

    def code(self, phase: str) -> str:
        """Hash of the source a phase runs."""
        return code_hash(*PHASES[phase].rooms)

    def threads(self, phase: str) -> int:
        return self.params.resources[phase].threads  # type: ignore[index]

    def resources(self, phase: str) -> dict[str, int]:
        """gpu, mem_mb and runtime (minutes) of one job of a phase; no GPU where the study says `device: cpu`."""
        asked = self.params.resources[phase]  # type: ignore[index]
        gpu = 0 if self.params.device == "cpu" else asked.gpu
        return {"gpu": gpu, "mem_mb": asked.mem_mb, "runtime": asked.runtime}

    def shard(self, size: str, shard: str) -> str:
        """What one `sample_shard` job writes last."""
        return f"{self.work}/samples/size={size}.shard={shard}-of-{self.params.sample.shards}.json"

    def shards(self) -> list[str]:
        """What the gather waits for."""
        sample = self.params.sample
        return [self.shard(f"{size:04d}", str(shard)) for size in sample.run_sizes() for shard in range(sample.shards)]

    def models(self) -> list[str]:
        """Manifests of the models that are sampled."""
        folders = ["model", *(["control"] if "controls" in self.params.sample.runs else [])]
        return [f"{self.results}/{folder}/manifest.json" for folder in folders]

    def refined_shard(self, shard: str) -> str:
        """What one `refine_shard` job writes last."""
        return f"{self.work}/refined/shard={shard}-of-{self.params.refine.shards}.json"

    def refined_shards(self) -> list[str]:
        return [self.refined_shard(str(shard)) for shard in range(self.params.refine.shards)]

    def refinement(self) -> list[str]:
        """Manifests of the baselines and of what was refined, which studies with some of the runs only go without."""
        folders = ("baselines", "refined") if self.params.sample.is_whole() else ()
        return [f"{self.results}/{folder}/manifest.json" for folder in folders]

    def manifests(self) -> list[str]:
        """Manifests of every phase, as far as the runs of the study call for them."""
        every = [target.format(study=self.params.study) for phase in PHASES.values() for target in phase.targets]
        control, *last = (f"{self.results}/{name}/manifest.json" for name in ("control", "baselines", "refined", "tables"))
        unwanted = {control} - set(self.models()) | (set() if self.params.sample.is_whole() else set(last))
        return [target for target in every if target not in unwanted]

    def local_backbone(self) -> list[str]:
        """Files of the pipeline that the backbone starts from, where that is a folder here and no name on the hub."""
        init = self.params.backbone.init
        return sorted(path.as_posix() for path in Path(init).rglob("*") if path.is_file()) if init else []

    def imported(self) -> list[str]:
        """Other people's predictions that the study has."""
        return sorted(path.as_posix() for path in self.params.imported_dir.glob("*.parquet"))

    def published(self) -> list[str]:
        """The published results that the tables repeat."""
        return sorted(path.as_posix() for path in Path("data/published").glob("*.csv"))
