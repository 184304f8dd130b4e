"""Params of a study: one typed, validated document with one section per phase.

The default of every key is its value in the embedded study. A params file lists the keys that differ from the defaults. An
unknown key is an error, which names the nearest valid key. The larger sections are defined in the other modules.
"""

from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from genseg.params.backbone import Backbone
from genseg.params.base import Fraction, Precision, Section, canonical_json, digest, read_document, validate
from genseg.params.baselines import Baselines
from genseg.params.data import Data
from genseg.params.refine import Refine
from genseg.params.sample import OperatingPoint, Readout, Sample
from genseg.params.train import Train

__all__ = ["OperatingPoint", "Params", "canonical_json", "digest", "load_params", "read_document", "validate_params"]

DevicePreference = Literal["auto", "cpu", "cuda"]
Protocol = Literal["native", "png-official", "ppmn"]


class Latents(Section):
    """Image latents and text embeddings."""

    batch: PositiveInt = 32
    """Batch size of image encoding."""
    shard_rows: PositiveInt = 512
    """Rows of a safetensors shard. An interrupted run resumes after the last complete shard."""
    precision: Precision = "fp32"
    """Precision of the stored latents."""
    encode_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the VAE. SDXL's VAE returns NaN in fp16."""


class Score(Section):
    """Scores."""

    protocol: Protocol = "native"
    """Protocol of the main scores."""
    extra_protocols: list[Protocol] = ["png-official", "ppmn"]
    """Additional protocols of the measured rows of Table 2."""
    bootstrap: NonNegativeInt = 1000
    """Bootstrap replicates for the 95 % intervals."""
    boundary_ratio: PositiveFloat = 0.02
    """Width of the band of boundary IoU, as a fraction of the image diagonal; 0.02 as published."""
    miou: Fraction = 1.0
    """Fraction of test, chosen by a hash of the image id, on which every class is predicted and mIoU is scored; 0: none. At the
    paper's scale, GS on all of test needs five times the evaluations of all other runs together."""
    background_threshold: Fraction = 0.5
    """Score below which a pixel counts as background in mIoU, for data with a background class."""

    @property
    def protocols(self) -> list[Protocol]:
        """All protocols, each once, that of the main scores first."""
        return list(dict.fromkeys([self.protocol, *self.extra_protocols]))


class Tables(Section):
    """Tables and figures."""

    examples: PositiveInt = 6
    """Examples in the figure, at equidistant quantiles of the main row's IoU."""
    dpi: PositiveInt = 150
    """Resolution of figures in dots per inch."""


class JobResources(Section):
    """Resources of one job."""

    gpu: NonNegativeInt
    """GPUs."""
    mem_mb: PositiveInt
    """Memory in MB."""
    runtime: PositiveInt
    """Time limit in minutes."""
    threads: PositiveInt
    """CPU threads."""


class ShardedResources(JobResources):
    """Resources of one job of a phase whose work is divided among several jobs."""

    shards: PositiveInt
    """Number of jobs."""


class Resources(Section):
    """Resources of one job: GPUs, memory in MB, time limit in minutes, CPU threads; shards: number of jobs of the phase.

    The results do not depend on them.
    """

    data: JobResources = JobResources(gpu=0, mem_mb=2000, runtime=30, threads=2)
    """Data assembly."""
    backbone: JobResources = JobResources(gpu=1, mem_mb=4000, runtime=120, threads=2)
    """Training or inspection of the backbone."""
    latents: JobResources = JobResources(gpu=1, mem_mb=4000, runtime=30, threads=2)
    """Image latents and text embeddings."""
    train: JobResources = JobResources(gpu=1, mem_mb=6000, runtime=60, threads=1)
    """Training of one model."""
    baselines: JobResources = JobResources(gpu=1, mem_mb=4000, runtime=60, threads=2)
    """Baselines."""
    sample: ShardedResources = ShardedResources(gpu=1, mem_mb=4000, runtime=60, threads=1, shards=2)
    """Sampling at one image size."""
    refine: ShardedResources = ShardedResources(gpu=1, mem_mb=4000, runtime=60, threads=1, shards=2)
    """Refinement."""
    score: JobResources = JobResources(gpu=0, mem_mb=2000, runtime=30, threads=2)
    """Scores."""
    tables: JobResources = JobResources(gpu=0, mem_mb=2000, runtime=30, threads=1)
    """Tables and figures."""


class Params(Section):
    """Params of a study."""

    study: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.=-]*$")] = "mini"
    """Name of the study, which is part of all its paths."""
    device: DevicePreference = "auto"
    """Device of the networks; auto: a GPU if there is one; cuda: an error if there is none."""
    seed: int = 0
    """Seed of all random numbers after data assembly, except those of training (`train.seed`)."""
    data: Data = Data()
    backbone: Backbone = Backbone()
    latents: Latents = Latents()
    train: Train = Train()
    baselines: Baselines = Baselines()
    sample: Sample = Sample()
    refine: Refine = Refine()
    score: Score = Score()
    tables: Tables = Tables()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        sample, train = self.sample, self.train
        if sample.timestep_spacing == "leading" and train.zero_terminal_snr:
            raise ValueError(
                "sample.timestep_spacing leading omits the last timestep, from which sampling starts when "
                "train.zero_terminal_snr is true; use trailing"
            )
        if sample.timestep_spacing == "leading" and any(p.num_inference_steps == 1000 for p in sample.test_subset_points()):
            raise ValueError("sample.timestep_spacing leading has no grid of 1000 steps; use trailing or at most 999 steps")
        if train.label == "vae" and (sample.clip_sample or sample.readout == "vae"):
            raise ValueError(
                "train.label vae needs sample.clip_sample false (VAE latents are unbounded) and sample.readout bilinear or "
                "nearest (its maps are decoded during sampling)"
            )
        return self

    def other_readouts(self) -> list[Readout]:
        """Return the read-outs to compare with `sample.readout`. Maps of VAE labels are already decoded."""
        readouts: list[Readout] = ["bilinear", "nearest", "vae"] if self.train.label == "mask" else ["bilinear", "nearest"]
        return [readout for readout in readouts if readout != self.sample.readout]

    def job(self, phase: str) -> JobResources:
        """Return the resources of one job of a phase."""
        return getattr(self.resources, phase)

    @property
    def data_dir(self) -> Path:
        """Folder of the assembled data."""
        return Path("data") / self.study

    @property
    def imported_dir(self) -> Path:
        """Folder of predictions imported from other methods (`genseg import`), an input of the study."""
        return Path("data/imported") / self.study

    @property
    def results_dir(self) -> Path:
        """Folder of the results, which DVC tracks."""
        return Path("results") / self.study

    @property
    def work_dir(self) -> Path:
        """Folder of checkpoints, partial results, logs and times, which DVC does not track."""
        return Path("work") / self.study

    def model_dir(self, kind: str) -> Path:
        """Return the folder of a trained model; `kind` is "gs" or "discriminative"."""
        return self.results_dir / "model" / kind

    def subtree(self, *keys: str) -> dict[str, Any]:
        """Return the values at dotted keys as JSON values, e.g. `subtree("seed", "sample.main")`."""
        document = self.model_dump(mode="json")
        return {key: reduce(getitem, key.split("."), document) for key in keys}


def load_params(path: str | Path) -> Params:
    """Read and validate a params file (YAML or JSON). Raises UserError as `read_document` and `validate` do."""
    return validate_params(read_document(path, "params"), origin=str(path))


def validate_params(document: Any, origin: str = "params") -> Params:
    """Validate a parsed params document, such as Snakemake's config. Raises UserError as `validate` does."""
    return validate(Params, document, origin)
