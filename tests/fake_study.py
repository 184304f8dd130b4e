"""A project with the real Snakefile, rules and params, and fake `genseg` commands that only write manifests.

It shows in seconds which jobs run after which change.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from genseg.phases import PHASES, imported_modules, source_file

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

# Each command appends its name to ran.txt. With FAKE_SLOW=<command>, that command sleeps for a minute.
GENSEG = """#!/bin/bash
set -euo pipefail
command=$1; shift
if [ "$command" = lease ] || [ "$command" = dvc ]; then exec BIN/genseg "$command" "$@"; fi
if [ "$command" = sweep ]; then  # FILE --params PARAMS (--choose STUDY | --tables)
  if [ "$4" = --choose ]; then echo "choose" >> ran.txt; echo "$RANDOM" > "work/$5/chosen.json"; exit; fi
  echo "sweep" >> ran.txt
  name=$(basename "$1" .yaml)
  touch "results/$(cut -d/ -f2 <<< "$3")/sweeps/$name"/{manifest.json,"$name".csv,"$name".tex,"$name".md}; exit
fi
model= size= shard= shards= gather= training= network=
while [ $# -gt 0 ]; do
  case $1 in --gather) gather=1; shift;; --only-training) training=1; shift;;
    --train) network=1; shift;; *) declare "${1#--}=$2"; shift 2;; esac
done
[ -f "$params" ]
study=$(cut -d/ -f2 <<< "$params")
part=${network:+ training}; if [ "$command$gather" = refine ] && [ "$shard" ]; then part=" shard"; fi
echo "$command${model:+ $model}${size:+ $size}$part${training:+ for training}" >> ran.txt
if [ "${FAKE_SLOW:-}" = "$command" ]; then echo $$ > slow.pid; exec sleep 60; fi
manifest() {
  mkdir -p "$1"; echo "$command $RANDOM$RANDOM" > "$1/manifest.json"
  { cat "$1/runs.txt" || true; echo "$command"; } 2> /dev/null > "$1/runs.new"; mv "$1/runs.new" "$1/runs.txt"
}
results=results/$study
case $command in
  preflight) mkdir -p $results/preflight; echo "{}" > $results/preflight/backbones.json;;
  data) manifest data/$study;;
  train) manifest $results/model/$model; echo step,loss > $results/model/$model/log.csv;;
  sample)
    if [ "$gather" ]; then manifest $results/predictions
    else mkdir -p work/$study/samples; echo > work/$study/samples/size=$size.shard=$shard-of-$shards.json; fi;;
  baseline) manifest $results/baselines;;
  refine)
    if [ "$network" ]; then mkdir -p $results/refined; echo > $results/refined/network.json
    elif [ "$gather" ]; then manifest $results/refined
    else mkdir -p work/$study/refined; echo > work/$study/refined/shard=$shard-of-$shards.json; fi;;
  latents)
    mkdir -p $results/latents/text; echo > $results/latents/text/index.parquet
    if [ "$training" ]; then echo > $results/latents/train.json; else manifest $results/latents; fi;;
  score) manifest $results/scores; mkdir -p metrics; echo '{"AR": {"overall": 50.0}}' > metrics/$study.json;;
  tables)
    manifest $results/figures; manifest $results/tables
    touch $results/{tables/{index.html,table2.csv},figures/{examples,evolution,failures,narratives,readouts}.png};;
  *) manifest $results/$command;;
esac
"""

# Runs Snakemake several times as forks of one process. The imports, which take most of a dry run, then happen only once.
SNAKEMAKES = """
import json, os, sys
import genseg.dag.rules, pandas, requests, snakemake.cli, snakemake.dag, snakemake.report, snakemake.workflow
for name, arguments in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        log = os.open(name + ".out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            snakemake.cli.main(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    os.waitpid(child, 0)
"""


class FakeStudy:
    """A copy of the project's DAG with the fake commands on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        self.environment |= {"PATH": f"{folder}/bin:{BIN}:{os.environ['PATH']}", "GENSEG_DEVICES": "", "TMPDIR": str(folder)}

    @staticmethod
    def make(folder: Path) -> FakeStudy:
        folder.mkdir(parents=True)
        for name in ("Snakefile", "params.yaml", "dvc.yaml", ".dvcignore", ".gitignore"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "workflow", folder / "workflow")
        shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
        (folder / "profiles").symlink_to("workflow/profiles")
        for phase in PHASES.values():
            inputs = [path for path in phase.inputs if "{study}" not in path]
            modules = imported_modules(phase.modules, phase.not_called)
            for path in [*inputs, *(f"src/genseg/{source_file(module)}" for module in modules)]:
                _stand_in(folder / path)
        fake = folder / "bin" / "genseg"
        fake.parent.mkdir()
        fake.write_text(GENSEG.replace("BIN", str(BIN)))
        fake.chmod(0o755)
        (folder / ".gitignore").open("a").write("/bin/\n/ran.txt\n/slow.pid\n")
        return FakeStudy(folder)

    def call(self, *command: str, check: bool = True, **environment: str) -> str:
        """Run a command in the study's folder and return both of its output streams."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stdout
        return done.stdout

    def params(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "params.yaml").read_text())

    def ran(self) -> Counter[str]:
        """Return the commands that ran since the last call, with counts."""
        log = self.folder / "ran.txt"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return Counter(lines)

    def snakemakes(self, runs: dict[str, list[str]]) -> dict[str, str]:
        """Run Snakemake once per name with the given arguments, which must start no job. Return the outputs by name."""
        self.call(sys.executable, "-c", SNAKEMAKES, json.dumps(runs))
        return {name: (self.folder / f"{name}.out").read_text() for name in runs}

    def write_params(self, name: str, document: dict[str, Any]) -> str:
        (self.folder / name).write_text(yaml.safe_dump(document))
        return name


def changed(document: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a copy of a params document with another value at a dotted key."""
    head, _, rest = key.partition(".")
    return document | {head: changed(document.get(head, {}), rest, value) if rest else value}


def rules_in(output: str) -> set[str]:
    """Return the rules in the output of a dry run; `sample_shard` is followed by its image size."""
    assert "Nothing to be done" in output or "This was a dry-run" in output, output
    rules = set()
    for block in re.split(r"^(?=(?:local)?rule )", output, flags=re.MULTILINE)[1:]:
        name, size = re.match(r"\w+ (\w+)", block), re.search(r"wildcards: .*size=(\d+)", block)
        assert name
        rules.add(f"{name[1]} {size[1]}" if size else name[1])
    return rules - {"all"}


def _stand_in(path: Path) -> None:
    """Write a file that stands in for a source file, or a folder with one file."""
    if not path.suffix:
        path.mkdir(parents=True, exist_ok=True)
        path = path / "content.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("stand-in\n")
