"""What runs when: the DAG on fake commands, so that only its logic is seen."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fake_study import BIN, ROOT, FakeStudy, changed, rules_in
from genseg.dag.phases import PHASES
from genseg.params import load_params

SIZES = [f"{size:04d}" for size in load_params(ROOT / "params.yaml").sample.sizes()]
MAIN, BASE = (f"sample_shard {getattr(load_params(ROOT / 'params.yaml').sample, cell).size:04d}" for cell in ("main", "base"))
SHARDS = {f"sample_shard {size}" for size in SIZES}
TABLES = {"tables"}
SCORE = {"score"} | TABLES
REFINE = {"refine_shard", "refine"} | SCORE
BASELINES = {"baselines"} | REFINE
GATHER = {"sample"} | REFINE
SAMPLE = SHARDS | GATHER
TRAIN = {"train_gs", "train_control"} | SAMPLE
NEW_SIZE = {"latents"} | SAMPLE
LATENTS = {"latents_train", "latents"} | TRAIN
BACKBONE = {"backbone"} | LATENTS | BASELINES
ALL = {"data", "refine_train"} | BACKBONE

COMMANDS = {"baselines": "baseline"}
"""Commands that are not called as their phase."""

# params key, another value, what Snakemake then runs
CHANGES = [
    ("device", "cpu", set()),
    ("resources.train.threads", 7, set()),
    ("resources.train.gpu", 8, set()),
    ("seed", 12345, BACKBONE | {"refine_train"}),
    ("data.class_template", "some {name}", ALL),
    ("backbone.unet.lr", 0.123, BACKBONE),
    ("latents.batch", 77, LATENTS),
    ("train.size", 72, LATENTS),
    ("train.optimizer.lr", 0.123, TRAIN),
    ("sample.grid.sizes", [72], NEW_SIZE - SHARDS | {"sample_shard 0072", MAIN, BASE}),  # nothing is trained again
    ("sample.grid.guidance", [9.5], {BASE} | GATHER),
    ("sample.grid.steps", [17], {BASE} | GATHER),
    ("sample.main.guidance", 3.25, {MAIN} | GATHER),
    ("sample.threshold", 0.375, SAMPLE),
    ("sample.grid_fraction", 0.375, NEW_SIZE),
    ("sample.points", [{"steps": 3, "guidance": 1.5}], {MAIN} | GATHER),
    ("sample.select_fraction", 0.375, NEW_SIZE),
    ("sample.runs", ["main", "val"], {MAIN, "sample", "score"}),  # nor controls, nor tables
    ("sample.shards", 3, SAMPLE),
    ("baselines.diffseg.tau", 0.375, BASELINES),
    ("refine.alpha", 0.375, REFINE),  # nothing is sampled again
    ("refine.trained.steps", 77, {"refine_train"} | REFINE),
    ("refine.test_fraction", 0.375, REFINE),
    ("resources.refine.threads", 7, set()),
    ("score.bootstrap", 77, SCORE),
    ("tables.dpi", 77, TABLES),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A fake study that `snakemake` has made."""
    study = FakeStudy.make(tmp_path_factory.mktemp("dag") / "study")
    study.call("snakemake", "--cores", "all", "--resources", "gpu=8")
    return study


@pytest.fixture(scope="module")
def outputs(study):
    """What Snakemake says to each change, and to mistakes."""
    params = study.params()
    documents = {key: changed(params, key, value) for key, value, _ in CHANGES}
    documents["unchanged"] = params
    documents["typo"] = changed(params, "sample.threshhold", 0.5)
    documents["lacking"] = {key: value for key, value in params.items() if key != "seed"}
    dry = {name: ["--dry-run", "--configfile", study.write_params(f"{name}.yaml", doc)] for name, doc in documents.items()}
    return study.snakemakes(dry | {"rules": ["--list-rules"]})


def test_second_run_does_nothing(outputs):
    assert rules_in(outputs["unchanged"]) == set()


@pytest.mark.parametrize(("key", "value", "rules"), CHANGES, ids=[key for key, _, _ in CHANGES])
def test_change_of_params_runs(outputs, key, value, rules):
    assert rules_in(outputs[key]) == rules


def test_an_import_runs_what_follows_the_baselines(study):
    imported = study.folder / "data/imported/mini/theirs.parquet"
    imported.parent.mkdir()
    imported.touch()
    runs = study.snakemakes({"imported": ["--dry-run"]})
    imported.unlink()
    assert rules_in(runs["imported"]) == BASELINES
    assert rules_in(study.snakemakes({"removed": ["--dry-run"]})["removed"]) == set()


def test_mistake_in_params_is_one_line(outputs):
    [line] = [line for line in outputs["typo"].splitlines() if not line.startswith("Using")]
    assert line == ("snakemake: error: typo.yaml: unknown key sample.threshhold; did you mean sample.threshold?")


def test_configfile_replaces_params(outputs):
    """Merged into params.yaml, a study that lacks a key would silently take it from there."""
    assert "lacking.yaml: key seed is missing" in outputs["lacking"]


def test_phase_names_are_targets(outputs):
    assert set(PHASES) <= set(outputs["rules"].split())


def test_each_job_ran_once(study):
    ran = study.ran()
    params = load_params(ROOT / "params.yaml")
    shards, parts = params.sample.shards, params.refine.shards
    assert {name: times for name, times in ran.items() if times != 1} == {
        name: count
        for name in ran
        for start, count in (("sample ", shards), ("refine shard", parts))
        if name.startswith(start) and count != 1
    }
    assert ran.keys() == {
        "data",
        "backbone",
        "latents",
        "latents for training",
        "train gs",
        "train discriminative",
        "baseline",
        "sample",
        "refine training",
        "refine shard",
        "refine",
        "score",
        "tables",
    } | {f"sample {size}" for size in SIZES}
    assert {path.name for path in (study.folder / "work/mini/logs").iterdir()} == {
        f"{rule}.log"
        for rule in (
            *("data", "backbone", "latents", "latents_train", "train_gs", "train_control", "baselines", "sample"),
            *("refine_train", "refine", "score", "tables"),
        )
    } | {f"sample.size={size}.shard={shard}.log" for size in SIZES for shard in range(shards)} | {
        f"refine.shard={shard}.log" for shard in range(parts)
    }


def test_change_of_source_runs_the_phases_that_use_it(study):
    """`code_hash` reads the installed package; here its value is what changes."""
    wrapper = (
        "import sys, genseg.dag.rules as rules; real = rules.code_hash;"
        "rules.code_hash = lambda *rooms: real(*rooms) + ('x' if 'report' in rooms else '');"
        "import snakemake.cli; snakemake.cli.main(['--dry-run', '--quiet', 'host'])"
    )
    output = study.call(sys.executable, "-c", wrapper)
    assert "rule tables" in output
    assert "rule score" not in output


def test_killed_snakemake_leaves_no_orphan_and_the_next_run_goes_on(tmp_path):
    study = FakeStudy.make(tmp_path / "study")
    run = subprocess.Popen(
        ["snakemake", "--cores", "2"],
        cwd=study.folder,
        env=study.environment | {"FAKE_SLOW": "latents"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    pid = study.folder / "slow.pid"
    _wait(lambda: pid.exists() and pid.read_text().strip())
    job = Path("/proc") / pid.read_text().strip()
    run.send_signal(signal.SIGKILL)
    run.wait()
    _wait(lambda: not job.exists())
    before = study.ran().keys()
    assert before >= {"data", "backbone"}
    assert "latents" not in before
    study.call("snakemake", "--unlock")
    study.call("snakemake", "--cores", "2")
    after = study.ran().keys()
    assert after >= {"latents", "train gs", "tables"}
    assert not after & {"data", "backbone"}


def _wait(condition):
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited for 20 seconds in vain")


@pytest.mark.parametrize("phase", PHASES)
def test_rooms_hold_all_that_the_command_imports(phase):
    """Source that a phase runs and its `rooms` lack could change without a rerun."""
    exempt = {"errors.py", "params.py", "__init__.py", "cli/__init__.py", "cli/main.py"}
    imported = _imports(f"cli/{COMMANDS.get(phase, phase)}.py", set()) - exempt
    outside = {
        file for file in imported if not any(file == room or file.startswith(f"{room}/") for room in PHASES[phase].rooms)
    }
    assert not outside
    unused = {room for room in PHASES[phase].rooms if not any(file == room or file.startswith(f"{room}/") for file in imported)}
    assert not unused


def _imports(file: str, seen: set[str]) -> set[str]:
    """Modules of the package that a module imports, directly or not, as files."""
    if file in seen or file == "__init__.py":  # the package's own file imports lazily, for users of the library
        return seen
    seen.add(file)
    source = ROOT / "src" / "genseg"
    for node in ast.walk(ast.parse((source / file).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("genseg"):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("genseg")]
        else:
            continue
        for name in names:
            path = source.joinpath(*name.split(".")[1:])
            for candidate in (path.with_suffix(".py"), path / "__init__.py"):
                if candidate.exists():
                    _imports(candidate.relative_to(source).as_posix(), seen)
    return seen


def test_dvc_yaml_is_up_to_date():
    subprocess.run([BIN / "genseg", "dvc", "--check"], cwd=ROOT, check=True)


def test_lint():
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    subprocess.run(["snakemake", "--lint"], cwd=ROOT, check=True, env=environment)
    subprocess.run(["snakefmt", "--check", "Snakefile", "workflow"], cwd=ROOT, check=True, env=environment)
