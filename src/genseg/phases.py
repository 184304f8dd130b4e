"""The phases of a study: what each phase depends on and what it writes, declared in one place.

Manifests, cache keys, Snakemake's rules and `dvc.yaml` are derived from `PHASES`. A phase depends on the values of its params
keys, on its inputs, and on its code: the syntax trees, without comments and docstrings, of its modules and of everything in
genseg that they import. The command line and the DAG (`cli`, `dag`) decide where and when a phase runs, not what it computes,
and are not part of its code.
"""

import ast
import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

_SOURCE = Path(__file__).resolve().parent
_NOT_HASHED = ("genseg", "genseg.errors", "genseg.params", "genseg.params.base", "genseg.phases")
"""Modules that are not hashed: params enter by their values, and `PHASES` by the keys and inputs of a phase."""


@dataclass(frozen=True)
class Phase:
    """One phase: a file of rules in Snakemake and a stage in DVC. Paths are relative to the project, with `{study}` in them."""

    keys: tuple[str, ...]
    """Dotted params keys on whose values the outputs depend (`device` and `resources` never do)."""
    modules: tuple[str, ...]
    """Modules of genseg that compute the outputs. The modules that they import also belong to the phase's code."""
    inputs: tuple[str, ...]
    """Outputs of other phases, and files of the project. Indirect inputs are omitted: they change the direct ones."""
    outs: tuple[str, ...]
    """Folders that only this phase writes to."""
    manifests: tuple[str, ...]
    """Manifests, each written after the outputs that it describes."""
    metrics: tuple[str, ...] = ()
    """Small files of metrics, which git tracks and DVC does not cache."""
    not_called: tuple[str, ...] = ()
    """Imported modules that the phase never calls. They do not belong to its code."""


PREFLIGHT = "results/{study}/preflight"
"""Output of the phase `preflight`: the commits of the backbones."""

PHASES = {
    "preflight": Phase(
        keys=(),  # it runs once, before all other jobs of a study
        modules=("plan.preflight",),
        inputs=(),
        outs=(PREFLIGHT,),
        manifests=(f"{PREFLIGHT}/backbones.json",),
    ),
    "data": Phase(
        keys=("data",),
        modules=("data.assemble",),
        inputs=(PREFLIGHT,),
        outs=("data/{study}",),
        manifests=("data/{study}/manifest.json",),
    ),
    "backbone": Phase(
        keys=("seed", "backbone"),
        modules=("training.backbone",),
        inputs=(PREFLIGHT, "data/{study}", "data/backbone"),
        outs=("results/{study}/backbone",),
        manifests=("results/{study}/backbone/manifest.json",),
    ),
    "latents": Phase(
        keys=(
            "seed",
            "latents",
            "train.size",
            "sample.main.size",
            "sample.base.size",
            "sample.grid.sizes",
            "sample.grid_fraction",
            "sample.select_fraction",
        ),
        modules=("latents",),
        inputs=("results/{study}/backbone",),
        outs=("results/{study}/latents",),
        manifests=("results/{study}/latents/manifest.json",),
    ),
    "train": Phase(
        keys=("seed", "latents", "train"),
        modules=("training.train",),
        # Image latents are not listed, because a new sampling size adds image latents and must not restart training. The texts,
        # the backbone and the params above determine everything that training reads.
        inputs=("results/{study}/backbone", "results/{study}/latents/text"),
        outs=("results/{study}/model",),
        manifests=("results/{study}/model/gs/manifest.json", "results/{study}/model/discriminative/manifest.json"),
        not_called=("diffusion.sampling",),
    ),
    "baselines": Phase(
        keys=("seed", "baselines", "sample.runs", "score.miou"),
        modules=("baselines.make",),
        inputs=(PREFLIGHT, "results/{study}/backbone", "data/imported"),
        outs=("results/{study}/baselines",),
        manifests=("results/{study}/baselines/manifest.json",),
    ),
    "sample": Phase(
        keys=("seed", "latents", "sample", "score.miou"),
        modules=("sampling.shard",),
        inputs=("results/{study}/latents", "results/{study}/model"),
        outs=("results/{study}/predictions",),
        manifests=("results/{study}/predictions/manifest.json",),
    ),
    "refine": Phase(
        keys=(
            "seed",
            "baselines.attention",
            "baselines.inexact",
            "sample.runs",
            "refine",
            "score.miou",
            "score.background_threshold",
        ),
        modules=("refine.study",),
        inputs=(PREFLIGHT, "results/{study}/predictions", "results/{study}/baselines"),
        outs=("results/{study}/refined",),
        manifests=("results/{study}/refined/manifest.json",),
    ),
    "score": Phase(
        keys=("seed", "score", "sample.runs", "sample.main", "sample.base", "sample.readout", "sample.threshold"),
        modules=("metrics.study",),
        inputs=("results/{study}/predictions", "results/{study}/baselines", "results/{study}/refined"),
        outs=("results/{study}/scores",),
        manifests=("results/{study}/scores/manifest.json",),
        metrics=("metrics/{study}.json",),
    ),
    "tables": Phase(
        keys=("seed", "data.source", "data.class_template", "sample", "refine", "score", "tables"),
        modules=("report.write",),
        inputs=("data/published", "results/{study}/scores"),
        outs=("results/{study}/tables", "results/{study}/figures"),
        manifests=("results/{study}/tables/manifest.json",),
    ),
}

GS_PHASES = ("latents", "train", "sample")
"""Phases that a study without runs (`sample.runs: []`) does not have."""


# --------------------------------------------------------------------------------------------------------------- code
@cache
def code_hash(phase: str) -> str:
    """Return the hash of a phase's code, including the params sections that it reads."""
    declared = PHASES[phase]
    sections = {f"genseg.params.{key.split('.')[0]}" for key in declared.keys} & set(_modules())
    return _hash({*sections, *imported_modules(declared.modules, declared.not_called)})


@cache
def module_hash(*modules: str) -> str:
    """Return the hash of the code of modules of genseg, such as "refine.trained", and of everything that they import."""
    return _hash(imported_modules(modules))


def imported_modules(modules: tuple[str, ...], not_called: tuple[str, ...] = ()) -> set[str]:
    """Return the full names of modules of genseg and of the modules of genseg that they import, directly or not."""
    excluded = {*_NOT_HASHED, *(f"genseg.{name}" for name in not_called)}
    imported: set[str] = set()
    queue = [f"genseg.{name}" for name in modules]
    while queue:
        name = queue.pop()
        if name not in imported and name not in excluded:
            imported.add(name)
            queue += _direct_imports(name)
    return imported


def source_file(module: str) -> Path:
    """Return the file of a module, relative to the package."""
    return _modules()[module].relative_to(_SOURCE)


@cache
def _modules() -> dict[str, Path]:
    """Return the files of all modules of genseg by their full names."""
    modules = {}
    for path in sorted(_SOURCE.rglob("*.py")):
        parts = ("genseg", *path.relative_to(_SOURCE).with_suffix("").parts)
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


@cache
def _direct_imports(module: str) -> list[str]:
    """Return the modules of genseg that a module imports anywhere in its file, and the packages that contain them."""
    names: list[str] = []
    for node in ast.walk(ast.parse(_modules()[module].read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    with_packages = (accumulate(name.split("."), "{}.{}".format) for name in names)  # "a", "a.b" and "a.b.c" for "a.b.c"
    return [ancestor for ancestors in with_packages for ancestor in ancestors if ancestor in _modules()]


@cache
def _module_digest(module: str) -> str:
    """Return the hash of a module's syntax tree without docstrings. Comments and layout are not part of the tree."""
    tree = ast.parse(_modules()[module].read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # A statement that is only a constant, such as a docstring, has no effect.
            node.body = [
                child for child in node.body if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant))
            ]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _hash(modules: set[str]) -> str:
    return hashlib.sha256("".join(f"{name} {_module_digest(name)}\n" for name in sorted(modules)).encode()).hexdigest()[:16]
