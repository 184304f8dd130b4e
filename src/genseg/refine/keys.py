"""What one refiner's bytes for a baseline depend on, as a key that the files carry: what has it need not be made again."""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

from genseg.artifacts.files import file_sha256
from genseg.artifacts.manifest import code_hash
from genseg.artifacts.parquet import read_metadata
from genseg.artifacts.predictions import maps_path
from genseg.baselines.registry import Baseline
from genseg.errors import UserError
from genseg.interchange.labels import Background
from genseg.params import Params, digest
from genseg.refine.files import variant_facts
from genseg.refine.layout import CODE_HERE, G4SEG, coarse_paths, discrepancy_path, refined_path
from genseg.refine.trained_control import network_key
from genseg.training.prepare import chosen_backbone


class Keys:
    def __init__(self, params: Params, rule: Background) -> None:
        self.params = params
        self._hash = cache(file_sha256)
        data = [file_sha256(params.data_dir / f"{name}.parquet") for name in ("phrases", "class_phrases")]
        self._facts = [params.seed, params.refine.test_fraction, str(rule), data, code_hash(*CODE_HERE)]

    @cached_property
    def weights(self) -> str:
        return chosen_backbone(self.params, self.params.refine)[2]

    def key(self, baseline: Baseline, refiner: str) -> str:
        """Raises UserError where the baseline has no predictions."""
        refine = self.params.refine
        coarse = coarse_paths(self.params, baseline)
        for path in coarse.values():
            if not path.exists():
                raise UserError(f"{path}: no such file; run `genseg {'sample' if baseline.family == 'run' else 'baseline'}`")
        soft = [maps_path(path) for classes, path in coarse.items() if classes and maps_path(path).exists()]
        facts: list[Any] = [*self._facts, refiner, [[path.name, self._hash(path)] for path in (*coarse.values(), *soft)]]
        if refiner in ("crf", "g4seg_crf"):
            facts.append(refine.crf.model_dump(mode="json"))
        if refiner == "trained":
            facts += [network_key(self.params), refine.maps, refine.grid]
        if refiner not in ("crf", "trained"):
            facts += [variant_facts(refine, G4SEG if refiner == "g4seg_crf" else refiner), self.weights]
        if refiner == G4SEG:
            facts.append(refine.pictures)
        return digest(facts)

    def is_made(self, baseline: Baseline, refiner: str) -> bool:
        """Whether all files of this refiner and baseline are there and have its key."""
        key, coarse = self.key(baseline, refiner), coarse_paths(self.params, baseline)
        paths = {classes: refined_path(self.params, refiner, baseline.name, classes) for classes in coarse}
        written = list(paths.values())
        if refiner == G4SEG and False in coarse:
            written.append(discrepancy_path(self.params, baseline.name))
        if not all(read_metadata(path).get("key") == key for path in written):
            return False
        soft = True in coarse and maps_path(coarse[True]).exists() and not refiner.endswith("crf")
        return True not in coarse or maps_path(paths[True]).exists() == soft
