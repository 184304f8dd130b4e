"""Snakemake and DVC each remember what they made; this hands the knowledge of one to the other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from genseg.dag.phases import PHASES
from genseg.dag.stages import snakemake, summary
from genseg.errors import UserError


def sync() -> str:
    """Bring the one that is behind up to date; returns what was done, in a sentence.

    Raises:
        UserError: both are behind, so that neither knows the files to be right.
    """
    stages, files = stale_stages(), stale_files()
    rules = ", ".join(files.values())
    if stages and files:
        raise UserError(
            f"both have something to do (DVC: {', '.join(stages)}; Snakemake: {rules}), so neither can vouch for the files; "
            "run `snakemake --cores all` or `dvc repro` first"
        )
    if stages:
        _dvc("commit", "--force", "--quiet", *PHASES)
        return f"DVC has recorded what Snakemake made: {', '.join(stages)}"
    if files:
        _forget_shards(files)
        snakemake("--touch", "--forceall", "--cores", "1")
        return f"Snakemake has taken over what DVC vouches for: {rules}"
    return "Snakemake and DVC agree, nothing to do"


def stale_stages() -> list[str]:
    """Stages that `dvc repro` would run."""
    status = json.loads(_dvc("status", "--json"))
    return [phase for phase in PHASES if phase in status]


def stale_files() -> dict[str, str]:
    """Outputs that Snakemake would make, or would keep only because it has no record of how they were made; with their
    rules. Shards of sampling and refinement are left out: they are means to the predictions and need not be there."""
    return {
        file: rule
        for file, _, rule, log, _, plan in summary()
        if not file.startswith("work/") and (plan != "no update" or log == "-")
    }


def _forget_shards(files: Iterable[str]) -> None:
    """Shards of an earlier run here say nothing about predictions that came from elsewhere."""
    for study in {file.split("/")[1] for file in files}:
        for folder in ("samples", "refined"):
            shutil.rmtree(Path("work") / study / folder, ignore_errors=True)


def _dvc(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"dvc {arguments[0]} failed: {' '.join(done.stderr.split())}")
    return done.stdout
