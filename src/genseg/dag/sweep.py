"""Running a sweep: each variant a study of its own through the DAG, sharing what it has in common with earlier ones."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from genseg.artifacts.files import read_json, write_json
from genseg.dag.lease import devices, die_with_parent
from genseg.dag.phases import PHASES
from genseg.errors import UserError
from genseg.params import Cell, Params
from genseg.sweeps import Choice, Sweep

_SHARED = {
    "data": "data/{study}",
    "backbone": "results/{study}/backbone",
    "latents": "results/{study}/latents",
    "train": "results/{study}/model",
}
"""Folders that studies have in common when their params for these phases agree."""


def run_sweep(sweep: Sweep, only: Iterable[str], cores: str) -> None:
    """Make the study and its variants (or those in `only`, with what they compete with or share a training with): every
    variant's operating points on val first, then the chosen main point of each group's best one on test.

    Killed at any time, it goes on where it was.

    Raises:
        UserError: no such variant, or a Snakemake failed.
    """
    chosen = selected(sweep, only)
    _make(sweep.base, cores)
    for variant in chosen:
        share(sweep, variant)
        _make(sweep.params(variant, _kept(sweep, variant)), cores)
    for group in sweep.groups().values():
        if group[0] not in chosen:
            continue
        best = sweep.best_of(group)
        for variant in group:
            choice = sweep.choose(variant)[0] if variant == best else None
            if choice == _kept(sweep, variant):
                continue
            file = _choice_file(sweep, variant)
            if choice is None:
                file.unlink()
            else:
                write_json(file, {"cell": choice.cell.model_dump(mode="json"), "threshold": choice.threshold})
            _make(sweep.params(variant, choice), cores)


def selected(sweep: Sweep, only: Iterable[str]) -> list[str]:
    """Variants to make, in the document's order: those named, what is in a group with them, and whose training they share."""
    only, groups = list(only) or list(sweep.variants), sweep.groups()
    for unknown in set(only) - set(sweep.variants):
        raise UserError(f"--only {unknown}: no such variant; the sweep has {', '.join(sweep.variants)}")
    wanted: set[str] = set()
    while only:
        variant = only.pop()
        if variant not in wanted:
            wanted.add(variant)
            only += next(group for group in groups.values() if variant in group)
            only += set(_donors(sweep, variant).values()) & set(sweep.variants)
    return [variant for variant in sweep.variants if variant in wanted]


def _choice_file(sweep: Sweep, variant: str) -> Path:
    return sweep.variants[variant].work_dir / "choice.json"


def _kept(sweep: Sweep, variant: str) -> Choice | None:
    """What an earlier run chose, so that its main row is not thrown away before val was asked again."""
    file = _choice_file(sweep, variant)
    if not file.exists():
        return None
    found = read_json(file)
    return Choice(Cell.model_validate(found["cell"]), found["threshold"])


def _make(params: Params, cores: str) -> None:
    """Run Snakemake up to the scores of a study; it and its jobs end when this process does.

    Two processes never make the same study: the lock of this file holds as long as Snakemake lives, and unlike Snakemake's own
    it is gone after a kill.
    """
    file = params.work_dir / "sweep.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    print(f"sweep: study {params.study}, {', '.join(params.sample.runs)}", flush=True)
    command = [sys.executable, "-m", "snakemake", "--cores", cores, "--nolock", "--rerun-incomplete"]
    command += ["--quiet", "rules", "host", "reason", "--configfile", str(file)]
    if available := devices():
        command += ["--resources", f"gpu={len(available)}"]

    def die() -> None:
        die_with_parent()
        if sys.platform == "linux":  # at once: told to end, Snakemake would wait for the training that runs
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)

    with open(params.work_dir / "sweep.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"sweep: study {params.study} is being made by another sweep; waiting", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        write_json(file, params.model_dump(mode="json"))
        done = subprocess.run([*command, "--", "score"], check=False, preexec_fn=die, pass_fds=[lock.fileno()])
    if done.returncode:
        logs = params.work_dir / "logs"
        raise UserError(f"study {params.study} failed; see {logs}, then run again: what is done is kept")


# ------------------------------------------------------------------------------------------------------------ sharing
def share(sweep: Sweep, variant: str) -> None:
    """Link (hard) what an earlier study of the sweep made from the same params, so that it is not made again.

    What was linked follows its origin: it is linked anew when that was made again, and removed when the params no longer
    agree. A folder that the variant made itself is left to Snakemake. No artifact is ever written in place, so nothing that
    is done to one study changes the other.
    """
    study, donors = sweep.variants[variant].study, _donors(sweep, variant)
    record = sweep.variants[variant].work_dir / "shared.json"
    linked: dict[str, str] = read_json(record) if record.exists() else {}
    for phase, folder in _SHARED.items():
        target = Path(folder.format(study=study))
        donor = donors.get(phase)
        origin = Path(folder.format(study=_study_name(sweep, donor))) if donor else None
        if target.exists() and phase not in linked:
            continue
        if origin and _same(origin / "manifest.json", target / "manifest.json"):
            continue
        linked.pop(phase, None)
        shutil.rmtree(target, ignore_errors=True)
        if origin:
            temporary = target.with_name(f".{target.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(origin, temporary, copy_function=os.link)
            linked[phase] = str(origin)
            write_json(record, linked)  # before the folder is there: after a kill it is taken for what it is
            temporary.rename(target)
    write_json(record, linked)


def _same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


def _study_name(sweep: Sweep, donor: str) -> str:
    return sweep.variants[donor].study if donor in sweep.variants else donor


def _donors(sweep: Sweep, variant: str) -> dict[str, str]:
    """Phase -> the study, or else the first variant before this one, whose params agree in that phase and those before."""
    earlier = list(sweep.variants)[: list(sweep.variants).index(variant)]
    params = {sweep.base.study: sweep.base} | {name: sweep.variants[name] for name in earlier}
    found: dict[str, str] = {}
    keys: list[str] = []
    for phase in _SHARED:
        keys += PHASES[phase].keys
        wanted = sweep.variants[variant].subtree(*keys)
        donor = next((name for name, other in params.items() if other.subtree(*keys) == wanted), None)
        if donor:
            found[phase] = donor
    return found
