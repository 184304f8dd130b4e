"""A sweep as the Snakefile uses it: the rules of a study with the wildcard `study`, and links to shared outputs."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from genseg.dag.rules import Study
from genseg.params import Params, canonical_json
from genseg.phases import PHASES, module_hash
from genseg.sweeps import Sweep

Files = Callable[[Any], list[str]]
"""Input function of a rule: wildcards -> files."""

_CHOSEN = ("sample", "score")
"""Phases whose params are completed by the choice on val."""
_LINKED = {phase: (PHASES[phase].outs[0], PHASES[phase].manifests) for phase in ("data", "backbone", "baselines", "sample")}
_LINKED["latents"] = ("results/{study}/latents", ("results/{study}/latents/train.json", *PHASES["latents"].manifests))
_LINKED["train"] = ("results/{study}/model/gs", ("results/{study}/model/gs/manifest.json",))
"""Phase that studies can share -> its folder and its manifests."""


class SweepStudies(Study):
    """The studies of a sweep. Paths contain the wildcard `study`, and inputs and params are those of the study it names."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(sweep.base)
        self.sweep = sweep
        self.data, self.results, self.work = "data/{study}", "results/{study}", "work/{study}"
        self.donors = sweep.donors()
        self.studies = {name: _Member(params, sweep.is_chosen(name)) for name, params in sweep.studies().items()}

    def at(self, wildcards: Any) -> Study:
        return self.studies[wildcards.study]

    def all(self) -> list[Study]:
        return list(self.studies.values())

    def manifests(self) -> list[str]:
        return [f"{self.sweep.folder}/manifest.json"]

    def names(self) -> str:
        """Return the regular expression of the wildcard `study`."""
        return _one_of(self.studies)

    # Inputs that differ between the studies. Snakemake calls these functions for each job.
    def local_backbone(self) -> Files:  # type: ignore[override]
        return lambda wildcards: self.at(wildcards).local_backbone()

    def imported(self) -> Files:  # type: ignore[override]
        return lambda wildcards: self.at(wildcards).imported()

    def models(self) -> Files:  # type: ignore[override]
        return lambda wildcards: self.at(wildcards).models()

    def predictions(self) -> Files:  # type: ignore[override]
        return lambda wildcards: self.at(wildcards).predictions()

    def refinement(self) -> Files:  # type: ignore[override]
        return lambda wildcards: self.at(wildcards).refinement()

    def sample_markers(self) -> Files:  # type: ignore[override]
        return lambda wildcards: self.at(wildcards).sample_markers()

    # The rules of workflow/rules/sweep.smk.
    def links(self) -> list[str]:
        """Return the phases that studies can share."""
        return list(_LINKED)

    def linking(self, phase: str) -> str:
        """Return the regular expression of the studies that link the outputs of a phase."""
        return _one_of([study for study, shared in self.donors.items() if phase in shared])

    def linked_manifests(self, phase: str) -> list[str]:
        """Return the manifests of a phase, with the wildcard `study`."""
        return list(_LINKED[phase][1])

    def linked_folder(self, phase: str) -> str:
        """Return the folder of a phase, with the wildcard `study`."""
        return _LINKED[phase][0]

    def donor_manifests(self, phase: str) -> Files:
        """Return the input function of the link: the manifests of the study whose outputs are linked."""
        return lambda wildcards: [path.format(study=self.donors[wildcards.study][phase]) for path in _LINKED[phase][1]]

    def donor_folder(self, phase: str) -> Callable[[Any], str]:
        """Return the function from wildcards to the folder that is linked."""
        return lambda wildcards: _LINKED[phase][0].format(study=self.donors[wildcards.study][phase])

    def sweep_params(self, of_member: bool = False) -> dict[str, Any]:
        """Return the params of the rules that call `genseg sweep`, for one member of the sweep or for the comparison."""

        def uses(wildcards: Any) -> str:
            sweep = self.sweep
            if of_member:
                return canonical_json(self.at(wildcards).values.model_dump(mode="json"))
            return canonical_json([sweep.document.model_dump(mode="json"), sweep.base.subtree("seed", "score", "tables")])

        def file(wildcards: Any, resources: Any) -> str:
            return self.params_file

        code = module_hash("metrics.soft_maps" if of_member else "report.compare")
        return {"uses": uses, "code": code, "file": file, "sweep": self.sweep.file}

    def scores(self) -> list[str]:
        """Return the manifests of the scores, or of the refined masks, that the sweep compares."""
        folder = "refined" if self.sweep.compared == "refinement" else "scores"
        return [f"results/{training.params.study}/{folder}/manifest.json" for training in self.sweep.trainings]


class _Member(Study):
    """One study of a sweep. `is_chosen`: its operating point and threshold are in a file that the rule `choose` writes."""

    def __init__(self, params: Params, is_chosen: bool) -> None:
        super().__init__(params)
        self.chosen = [f"{self.work}/chosen.json"] if is_chosen else []

    def file(self, phase: str) -> str:
        return self.chosen[0] if self.chosen and phase in _CHOSEN else super().file(phase)

    def models(self) -> list[str]:
        return [*super().models(), *self.chosen]

    def predictions(self) -> list[str]:
        return [*super().predictions(), *self.chosen]


def _one_of(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names)) or "(?!)"  # matches nothing
