"""A study as the Snakefile uses it: paths, and the params, resources and commands of the rules."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genseg.artifacts.files import write_text
from genseg.errors import UserError
from genseg.params import Params, canonical_json, digest, read_document, validate_params
from genseg.phases import GS_PHASES, PHASES, code_hash


def open_study(config: dict[str, Any], files: list[str | Path]) -> "Study":
    """Validate the params that Snakemake read from `files`, and complete its config with the defaults.

    With `--config sweep=FILE`, return the studies of this sweep of the study. A user error ends Snakemake with a message of
    one line and exit code 2.
    """
    try:
        for file in files:
            read_document(os.path.relpath(file), "configfile")  # Snakemake's own reader accepts duplicate keys
        document = {key: value for key, value in config.items() if key != "sweep"}
        params = validate_params(document, ", ".join(os.path.relpath(file) for file in files))
        study = Study(params)
        if "sweep" in config:
            from genseg.dag.sweep import SweepStudies  # imports this module
            from genseg.sweeps import load_sweep

            study = SweepStudies(load_sweep(config["sweep"], params))
        for each in study.all():
            if not Path(each.params_file).exists():
                write_text(each.params_file, canonical_json(each.values.model_dump(mode="json")))
    except UserError as error:
        print(f"snakemake: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    config.update(params.model_dump(mode="json"))
    # The rules call `genseg`, which is not on PATH when Snakemake was called by its path without activating the environment.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    return study


class Study:
    """Paths, params, resources and commands of the rules of one study."""

    def __init__(self, params: Params) -> None:
        self.values = params
        self.data = params.data_dir.as_posix()
        self.results = params.results_dir.as_posix()
        self.work = params.work_dir.as_posix()
        # The resolved params, which the commands read; the file is named by its content.
        self.params_file = f"{self.work}/params/{digest(params.model_dump(mode='json'))}.json"

    def at(self, wildcards: Any) -> "Study":
        """Return the study of a job."""
        return self

    def all(self) -> list["Study"]:
        """Return all studies of the DAG."""
        return [self]

    def file(self, phase: str) -> str:
        """Return the params file that the commands of a phase read."""
        return self.params_file

    def params(self, phase: str, only: Sequence[str] = (), at_size: bool = False) -> dict[str, Any]:
        """Return the params of a rule: the values that it depends on and the hash of its code. A change reruns the rule.

        With `only`, the rule depends on these dotted keys instead of all keys of its phase. With `at_size`, it depends only on
        the operating points whose image size is the wildcard `size`.
        """

        # These are functions because Snakemake looks for wildcards in strings with braces. It does not track functions that
        # take `resources`, so a new name of the params file alone reruns nothing.
        def uses(wildcards: Any) -> str:
            study = self.at(wildcards)
            if at_size:
                return study._uses_at_size(int(wildcards.size))
            return canonical_json(study.values.subtree(*(only or PHASES[phase].keys)))

        def file(wildcards: Any, resources: Any) -> str:
            return self.at(wildcards).file(phase)

        return {"uses": uses, "code": code_hash(phase), "file": file}

    def threads(self, phase: str) -> int:
        """Return the CPU threads of one job of a phase."""
        return self.values.job(phase).threads

    def resources(self, phase: str, gpu: bool = True) -> dict[str, int]:
        """Return GPUs (none if the study's device is cpu), memory (MB) and time limit (minutes) of one job."""
        job = self.values.job(phase)
        return {"gpu": job.gpu if gpu and self.values.device != "cpu" else 0, "mem_mb": job.mem_mb, "runtime": job.runtime}

    def log(self, name: str) -> str:
        """Return the path of a rule's log."""
        return f"{self.work}/logs/{name}.log"

    def benchmark(self, name: str) -> str:
        """Return the path of the file in which Snakemake records time and memory of a rule's job."""
        return f"{self.work}/benchmarks/{name}.tsv"

    @staticmethod
    def command(command: str) -> str:
        """Return the shell command of a rule that runs a `genseg` command on leased GPUs."""
        return f"exec genseg lease --log {{log}} --gpus {{resources.gpu}} -- genseg {command} --params {{params.file}}"

    def _uses_at_size(self, size: int) -> str:
        sample = self.values.sample
        points = {"main": [sample.main], "grid": sample.test_subset_points(), "val": sample.val_points()}
        at_size = {
            group: sorted(point.model_dump_json() for point in members if point.size == size)
            for group, members in points.items()
        }
        other_keys = set(type(sample).model_fields) - {"main", "base", "grid", "operating_points"}
        keys = [key for key in PHASES["sample"].keys if key != "sample"] + sorted(f"sample.{key}" for key in other_keys)
        return canonical_json(self.values.subtree(*keys) | {"points": at_size})

    def sample_marker(self, size: str, shard: str) -> str:
        """Return the file that a `sample_shard` job writes last."""
        return f"{self.work}/samples/size={size}.shard={shard}-of-{self.values.resources.sample.shards}.json"

    def sample_markers(self) -> list[str]:
        """Return the markers of all sampling jobs."""
        sizes, shards = self.values.sample.run_sizes(), self.values.resources.sample.shards
        return [self.sample_marker(f"{size:04d}", str(shard)) for size in sizes for shard in range(shards)]

    def refine_marker(self, shard: str) -> str:
        """Return the file that a `refine_shard` job writes last."""
        return f"{self.work}/refined/shard={shard}-of-{self.values.resources.refine.shards}.json"

    def refine_markers(self) -> list[str]:
        """Return the markers of all refinement jobs."""
        return [self.refine_marker(str(shard)) for shard in range(self.values.resources.refine.shards)]

    def models(self) -> list[str]:
        """Return the manifests of the models that are sampled."""
        runs = self.values.sample.runs
        names = ["gs", "discriminative"] if "controls" in runs else ["gs"] if runs else []
        return [f"{self.results}/model/{name}/manifest.json" for name in names]

    def predictions(self) -> list[str]:
        """Return the manifest of the predictions; none if the study has no runs."""
        return [f"{self.results}/predictions/manifest.json"] if self.values.sample.runs else []

    def results_of_gs(self) -> list[tuple[str, str, str]]:
        """Return (file, caption, category) of the results in Snakemake's report that a study without runs does not have."""
        results = [
            ("tables/table2.csv", "../report/table2.rst", "Tables"),
            ("figures/examples.png", "../report/examples.rst", "Figures"),
            ("figures/evolution.png", "../report/evolution.rst", "Figures"),
            ("figures/failures.png", "../report/failures.rst", "Figures"),
            ("figures/narratives.png", "../report/narratives.rst", "Figures"),
            ("figures/readouts.png", "../report/readouts.rst", "Figures"),
        ]
        return results if self.values.sample.runs else []

    def refinement(self) -> list[str]:
        """Return the manifests of baselines and refinement; none if the study does not have them."""
        folders = ("baselines", "refined") if self.values.sample.has_tables() else ()
        return [f"{self.results}/{folder}/manifest.json" for folder in folders]

    def preflight(self) -> str:
        """Return the file that the first job of the study writes."""
        return f"{self.results}/preflight/backbones.json"

    def manifests(self) -> list[str]:
        """Return the manifests of all phases that the study's `sample.runs` allow."""
        manifests = [path.format(study=self.values.study) for phase in PHASES.values() for path in phase.manifests]
        optional = {*PHASES["train"].manifests}
        if not self.values.sample.runs:
            optional |= {path for phase in GS_PHASES for path in PHASES[phase].manifests}
        if not self.values.sample.has_tables():
            optional |= {path for phase in ("baselines", "refine", "tables") for path in PHASES[phase].manifests}
        unused = {path.format(study=self.values.study) for path in optional} - set(self.models())
        return [path for path in manifests if path not in unused]

    def local_backbone(self) -> list[str]:
        """Return the files of the pipeline that the backbone starts from; none if it is on the hub or has random weights."""
        init = self.values.backbone.init
        return sorted(path.as_posix() for path in Path(init).rglob("*") if path.is_file()) if init else []

    def imported(self) -> list[str]:
        """Return the imported predictions of other methods."""
        return sorted(path.as_posix() for path in self.values.imported_dir.glob("*.parquet"))

    def seeds(self) -> list[str]:
        """Return the scores over several trainings, which sweeps of the study have written and its tables read."""
        return sorted(path.as_posix() for path in Path(self.results).glob("sweeps/*/seeds.json"))

    def published(self) -> list[str]:
        """Return the published results that tables quote."""
        return sorted(path.as_posix() for path in Path("data/published").glob("*.csv"))
