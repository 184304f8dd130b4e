"""Run a sweep: Snakemake runs each variant as a study, and variants share outputs with equal params."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from genseg.artifacts.files import read_json, write_json
from genseg.dag.jobs import devices, die_with_parent
from genseg.errors import UserError
from genseg.params import OperatingPoint, Params
from genseg.phases import PHASES
from genseg.sweeps import Choice, Sweep

_SHARED = ("data", "backbone", "latents", "train")
"""Phases whose folders variants share if their params for these and earlier phases are equal."""


def run_sweep(sweep: Sweep, only: Iterable[str], cores: str) -> None:
    """Run the study and its variants: all operating points on val, then the selected point of each group's best variant on
    test.

    After a kill, running it again continues. Raises UserError if a variant is unknown or Snakemake failed.

    Args:
        only: variants to run, with their groups and the variants whose training they share; all variants if empty.
        cores: number of CPU cores for Snakemake, or "all".
    """
    # 1. Operating points on val.
    variants = selected(sweep, only)
    _run_study(sweep.base, cores)
    for variant in variants:
        share(sweep, variant)
        _run_study(sweep.params(variant, _recorded_choice(sweep, variant)), cores)

    # 2. The main point of the best variant of each group on test.
    for group in sweep.groups().values():
        if group[0] not in variants:
            continue
        best = sweep.best_of(group)
        for variant in group:
            choice = sweep.choose(variant)[0] if variant == best else None
            if choice == _recorded_choice(sweep, variant):
                continue
            if choice:
                record = {"point": choice.point.model_dump(mode="json"), "threshold": choice.threshold}
                write_json(_choice_file(sweep, variant), record)
            else:
                _choice_file(sweep, variant).unlink()
            _run_study(sweep.params(variant, choice), cores)


def selected(sweep: Sweep, only: Iterable[str]) -> list[str]:
    """Return the variants to run in the document's order: `only`, their groups, and variants whose training they share."""
    queue, groups = list(only) or list(sweep.variants), sweep.groups()
    for unknown in set(queue) - set(sweep.variants):
        raise UserError(f"--only {unknown}: unknown variant; the variants are {', '.join(sweep.variants)}")
    needed: set[str] = set()
    while queue:
        variant = queue.pop()
        if variant not in needed:
            needed.add(variant)
            queue += next(group for group in groups.values() if variant in group)
            donors = _donors(sweep, variant).values()
            queue += [name for name, params in sweep.variants.items() if params.study in donors]
    return [variant for variant in sweep.variants if variant in needed]


def _choice_file(sweep: Sweep, variant: str) -> Path:
    return sweep.variants[variant].work_dir / "choice.json"


def _recorded_choice(sweep: Sweep, variant: str) -> Choice | None:
    """Return the choice recorded by an earlier call; with it, the main row is kept until val is scored again."""
    file = _choice_file(sweep, variant)
    if not file.exists():
        return None
    record = read_json(file)
    return Choice(OperatingPoint.model_validate(record["point"]), record["threshold"])


def _run_study(params: Params, cores: str) -> None:
    """Run Snakemake up to the scores of a study. Snakemake and its jobs end when this process ends.

    A lock held while Snakemake runs keeps two processes from running the same study. Unlike Snakemake's own lock, it does not
    outlive a killed process.
    """
    file = params.work_dir / "sweep.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    print(f"sweep: study {params.study}, {', '.join(params.sample.runs)}", flush=True)
    command = [sys.executable, "-m", "snakemake", "--cores", cores, "--nolock", "--rerun-incomplete"]
    command += ["--quiet", "rules", "host", "reason", "--configfile", str(file)]
    if available := devices():
        command += ["--resources", f"gpu={len(available)}"]
    die_at_once = partial(die_with_parent, signal.SIGKILL)  # on SIGTERM, Snakemake would wait for the running training
    with open(params.work_dir / "sweep.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"sweep: another sweep is running study {params.study}; waiting", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        write_json(file, params.model_dump(mode="json"))
        process = subprocess.run([*command, "--", "score"], check=False, preexec_fn=die_at_once, pass_fds=[lock.fileno()])
    if process.returncode:
        raise UserError(f"study {params.study} failed; read {params.work_dir}/logs, then run again: finished work is kept")


# ------------------------------------------------------------------------------------------------------------ sharing
def share(sweep: Sweep, variant: str) -> None:
    """Hard-link the folders that an earlier study of the sweep wrote with the same params.

    A linked folder follows its origin: it is linked again when the origin has changed, and removed when the params are no
    longer equal. Folders that the variant wrote itself are left to Snakemake. No artifact is modified in place, so the studies
    do not affect each other.
    """
    study, donors = sweep.variants[variant].study, _donors(sweep, variant)
    record = sweep.variants[variant].work_dir / "shared.json"
    linked: dict[str, str] = read_json(record) if record.exists() else {}
    for phase in _SHARED:
        [folder], manifest, donor = PHASES[phase].outs, PHASES[phase].manifests[0], donors.get(phase)
        target, origin = Path(folder.format(study=study)), Path(folder.format(study=donor)) if donor else None
        if target.exists() and phase not in linked:
            continue
        manifests = [Path(manifest.format(study=name)) for name in (study, donor) if name]
        if donor and all(file.exists() for file in manifests) and manifests[0].samefile(manifests[1]):
            continue
        linked.pop(phase, None)
        shutil.rmtree(target, ignore_errors=True)
        if origin:
            temporary = target.with_name(f".{target.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(origin, temporary, copy_function=os.link)
            linked[phase] = str(origin)
            write_json(record, linked)  # first, so that after a kill the folder is known to be linked
            temporary.rename(target)
    write_json(record, linked)


def _donors(sweep: Sweep, variant: str) -> dict[str, str]:
    """Return phase -> study (the base or an earlier variant) with equal params of that phase and of the phases before it."""
    candidates = [sweep.base, *list(sweep.variants.values())[: list(sweep.variants).index(variant)]]
    donors: dict[str, str] = {}
    keys: list[str] = []
    for phase in _SHARED:
        keys += PHASES[phase].keys
        values = sweep.variants[variant].subtree(*keys)
        if donor := next((params.study for params in candidates if params.subtree(*keys) == values), None):
            donors[phase] = donor
    return donors
