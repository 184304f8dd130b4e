"""Images, refiners, paths and keys of a study's refinement.

`results/<study>/refined/<refiner>/<baseline>.parquet` holds the refined masks of the phrases, and
`<baseline>_class_phrases.parquet` the refined labelling, disjoint masks of the class phrases. The files carry a key, a digest
of all their inputs, so that up-to-date files are not recomputed.
"""

from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from genseg.artifacts.files import file_sha256
from genseg.artifacts.phrases import REFINED, choose_images, miou_phrases
from genseg.artifacts.predictions import maps_path
from genseg.artifacts.reuse import has_key
from genseg.baselines.registry import CLASSES, Baseline
from genseg.errors import UserError
from genseg.interchange.labels import Background
from genseg.models.source import chosen_backbone
from genseg.params import Params, digest
from genseg.params.refine import Refine
from genseg.phases import code_hash, module_hash

G4SEG = "g4seg"
RANDOM = "random"


# ------------------------------------------------------------------------------------------------------------ images
def refined_images(params: Params, phrases: pd.DataFrame) -> list[int]:
    """Return the sorted ids of the test images that are refined: a fraction of `refine.test_fraction`, chosen by hash."""
    test = phrases.loc[phrases["split"] == "test", "image_id"].to_numpy()
    return sorted(choose_images(test, params.refine.test_fraction, params.seed, REFINED))


def refined_tables(
    params: Params, phrases: pd.DataFrame, class_phrases: pd.DataFrame, background: int | None
) -> dict[bool, pd.DataFrame]:
    """Return the rows of the phrase table (False) and of the class phrases (True) that are refined.

    There are no class phrases where mIoU is not scored. Those of the background class, whose `phrase_id` is `background`, are
    left out.
    """
    images = refined_images(params, class_phrases)  # includes images without phrases, which mIoU counts
    scored = miou_phrases(params, class_phrases)
    tables = {False: phrases, True: scored if background is None else scored[scored["phrase_id"] != background]}
    return {classes: table[(table["split"] == "test") & table["image_id"].isin(images)] for classes, table in tables.items()}


# ---------------------------------------------------------------------------------------------------------- refiners
def variants(refine: Refine) -> dict[str, Refine]:
    """Return the params of G4Seg, its controls (except `crf` and `trained`) and its sensitivity analysis, by name.

    `random` has G4Seg's own params: it flips as many pixels as G4Seg did, in the same area, at random.
    """
    changes: dict[str, dict[str, Any]] = {
        G4SEG: {},
        "alpha_zero": {"alpha": 0.0},
        "no_gate" if refine.gate else "gate": {"gate": not refine.gate},
        "no_choice": {"cut_quantiles": []},
        "no_generation": {"generation": 0.0, "cut_quantiles": []},
        "as_summarised": {"gate": True, "cut_quantiles": [], "evidence_timesteps": [], "readout": "bilinear"},
        "unconditioned": {"reference": "unconditioned"},
        RANDOM: {},
    }
    return {name: refine.model_copy(update=change) for name, change in (changes | sensitivity(refine)).items()}


def find_variant(refine: Refine, method: str) -> Refine:
    """Return the params of the variant `method`. Raises UserError if there is no such variant."""
    known = variants(refine)
    if method not in known:
        raise UserError(f"--method {method}: expected one of {', '.join(known)}")
    return known[method]


def sensitivity(refine: Refine) -> dict[str, dict[str, Any]]:
    """Return the variants of the sensitivity analysis, each a change of one of G4Seg's params, by name, e.g. `alpha=0.25`."""
    values = refine.sensitivity
    changes: dict[str, dict[str, Any]] = {f"alpha={value:g}": {"alpha": value} for value in values.alpha}
    changes |= {f"beta={value:g}": {"beta": value} for value in values.beta}
    changes |= {f"timestep={value}": {"timesteps": [value]} for value in values.timestep}
    changes |= {f"iterations={value}": {"iterations": value} for value in values.iterations}
    return changes | {f"layer={value}": {"layers": [value]} for value in values.layer}


def forward_passes(refine: Refine) -> int:
    """Return the number of U-Net forward passes for one mask."""
    if not refine.iterations:
        return 0
    references = 2 if refine.reference == "unconditioned" else 1
    generations = 0
    if refine.generation:
        generations = refine.iterations if refine.alpha else 1  # without injection, all iterations generate the same image
    count = len(refine.timesteps) * (references + 2 * generations)
    if refine.cut_quantiles and refine.alpha:
        hypotheses = 2 + len(refine.cut_quantiles)  # cut at 0, cuts at the quantiles, and P itself
        count += refine.iterations * hypotheses * len(refine.choice_timesteps)
    return count


def variant_facts(refine: Refine, method: str) -> dict[str, Any]:
    """Return the params that the variant `method` depends on, as JSON values."""
    unrelated = {"backbone", "revision", "test_fraction", "controls", "sensitivity", "trained", "pictures"}
    return variants(refine)[method].model_dump(mode="json", exclude=unrelated)


def refiners(params: Params, baseline: str) -> list[str]:
    """Return the names of a baseline's refiners, each once.

    These are G4Seg, `refine.controls` and, for the baselines in `refine.sensitivity.baselines`, the sensitivity analysis. Of
    `gate` and `no_gate`, the one that is G4Seg itself is left out.
    """
    refine = params.refine
    names = [G4SEG, *refine.controls]
    if baseline in refine.sensitivity.baselines:
        names += [*refine.sensitivity.controls, *sensitivity(refine)]
    return list(dict.fromkeys(name for name in names if name not in ("gate", "no_gate") or name in variants(refine)))


def refiner_passes(refine: Refine, refiner: str, classes: bool = False) -> int:
    """Return the number of U-Net forward passes that a refiner needs for one mask of a phrase, or of a class phrase.

    Classes that compete need none of their own but `evidence_passes`, and one for each image's features.
    """
    if refiner in ("crf", "trained"):
        return 0
    variant = variants(refine)[refiner]
    return 0 if classes and variant.evidence_timesteps else forward_passes(variant)


def evidence_passes(refine: Refine) -> int:
    """Return the number of U-Net forward passes for one class phrase of an image, which all baselines and refiners share."""
    return len(refine.evidence_timesteps) * refine.evidence_noises if refine.generation else 0


# ------------------------------------------------------------------------------------------------------------- paths
def coarse_paths(params: Params, baseline: Baseline) -> dict[bool, Path]:
    """Return `Baseline.paths` without the files that an imported baseline lacks."""
    paths = baseline.paths(params)
    return {classes: path for classes, path in paths.items() if baseline.family != "imported" or path.exists()}


def refined_dir(params: Params) -> Path:
    return params.results_dir / "refined"


def refined_path(params: Params, refiner: str, baseline: str, classes: bool) -> Path:
    return refined_dir(params) / refiner / f"{baseline}{CLASSES if classes else ''}.parquet"


def discrepancy_path(params: Params, baseline: str) -> Path:
    """Return the predictions file of the figure's phrases; its soft maps are G4Seg's discrepancy."""
    return refined_dir(params) / "discrepancy" / f"{baseline}.parquet"


def network_dir(params: Params) -> Path:
    return refined_dir(params) / "network"


def network_manifest(params: Params) -> Path:
    return refined_dir(params) / "network.json"


def timing_path(params: Params, refiner: str, baseline: str) -> Path:
    return params.work_dir / "refine_seconds" / refiner / f"{baseline}.json"


def parts_dir(params: Params, path: Path) -> Path:
    """Return the folder of the parts of an unfinished file below `refined_dir`."""
    return params.work_dir / "refined" / path.relative_to(refined_dir(params)).with_suffix("")


def evidence_path(params: Params, key: str, image_id: int) -> Path:
    """Return the file of the classes' evidence in an image, which all baselines share."""
    return params.work_dir / "refined" / "evidence" / key / f"{image_id}.npy"


def shard_marker(params: Params, shard: int, shards: int) -> Path:
    return params.work_dir / "refined" / f"shard={shard}-of-{shards}.json"


# -------------------------------------------------------------------------------------------------------------- keys
def network_key(params: Params) -> str:
    """Return a digest of the trained control's inputs: params, seed, phrases and code."""
    trained = params.refine.trained.model_dump(mode="json")
    data = file_sha256(params.data_dir / "phrases.parquet")
    return digest([trained, params.seed, data, module_hash("refine.trained")])


class Keys:
    """Keys of a study's refined predictions, under a background rule for class phrases; predictions files are hashed once."""

    def __init__(self, params: Params, rule: Background) -> None:
        self.params = params
        self._hash = cache(file_sha256)
        data = [file_sha256(params.data_dir / f"{name}.parquet") for name in ("phrases", "class_phrases")]
        self._facts = [params.seed, params.refine.test_fraction, params.score.miou, str(rule), data, code_hash("refine")]

    @cached_property
    def weights(self) -> str:
        """Hash of the backbone's weights."""
        return chosen_backbone(self.params, self.params.refine)[2]

    def key(self, baseline: Baseline, refiner: str) -> str:
        """Return the key of a baseline's files refined by one refiner. Raises UserError if the baseline has no predictions."""
        refine = self.params.refine
        coarse = coarse_paths(self.params, baseline)
        for path in coarse.values():
            if not path.exists():
                raise UserError(f"{path}: no such file; run `genseg {'sample' if baseline.family == 'run' else 'baseline'}`")
        soft = [maps_path(path) for classes, path in coarse.items() if classes and maps_path(path).exists()]
        facts: list[Any] = [*self._facts, refiner, [[path.name, self._hash(path)] for path in (*coarse.values(), *soft)]]
        if refiner == "crf":
            facts.append(refine.crf.model_dump(mode="json"))
        if refiner == "trained":
            facts += [network_key(self.params), refine.feature_size]
        if refiner not in ("crf", "trained"):
            facts += [variant_facts(refine, refiner), self.weights]
        if refiner == G4SEG:
            facts.append(refine.pictures)
        return digest(facts)

    @cached_property
    def evidence(self) -> str:
        """Key of the evidence of classes, which depends neither on the baseline nor on the variant of G4Seg."""
        return digest([*self._facts, variant_facts(self.params.refine, G4SEG), self.weights])

    def is_refined(self, baseline: Baseline, refiner: str) -> bool:
        """Return whether all files of a baseline refined by one refiner exist and have the current key."""
        coarse = coarse_paths(self.params, baseline)
        paths = {classes: refined_path(self.params, refiner, baseline.name, classes) for classes in coarse}
        by_products = [discrepancy_path(self.params, baseline.name)] if refiner == G4SEG and False in coarse else []
        return has_key(self.key(baseline, refiner), *paths.values(), *by_products)
