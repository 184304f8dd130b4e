"""The jobs that Snakemake runs after each change, tested with fake commands."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fake_study import BIN, ROOT, FakeStudy, changed, rules_in
from genseg import phases
from genseg.params import load_params
from genseg.phases import PHASES, code_hash, imported_modules, module_hash

SIZES = [f"{size:04d}" for size in load_params(ROOT / "params.yaml").sample.sizes()]
MAIN, BASE = (f"sample_shard {getattr(load_params(ROOT / 'params.yaml').sample, cell).size:04d}" for cell in ("main", "base"))
SHARDS = {f"sample_shard {size}" for size in SIZES}
TABLES = {"tables"}
SCORE = {"score"} | TABLES
REFINE = {"refine_shard", "refine"} | SCORE
BASELINES = {"baselines"} | REFINE
GATHER = {"sample"} | REFINE
SAMPLE = SHARDS | GATHER
TRAIN = {"train_gs", "train_discriminative"} | SAMPLE
NEW_SIZE = {"latents"} | SAMPLE
LATENTS = {"latents_train", "latents"} | TRAIN
BACKBONE = {"backbone"} | LATENTS | BASELINES
ALL = {"data", "refine_train"} | BACKBONE

# params key, another value, rules that Snakemake then runs
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
    ("train.seed", 7, TRAIN),
    ("sample.grid.sizes", [72], NEW_SIZE - SHARDS | {"sample_shard 0072", MAIN, BASE}),  # no training
    ("sample.grid.guidance_scale", [9.5], {BASE} | GATHER),
    ("sample.grid.num_inference_steps", [17], {BASE} | GATHER),
    ("sample.main.guidance_scale", 3.25, {MAIN} | GATHER),
    ("sample.threshold", 0.375, SAMPLE),
    ("sample.grid_fraction", 0.375, NEW_SIZE),
    ("sample.operating_points", [{"num_inference_steps": 3, "guidance_scale": 1.5}], {MAIN} | GATHER),
    ("sample.select_fraction", 0.375, NEW_SIZE),
    ("sample.runs", ["main", "val"], {MAIN, "sample", "score"}),  # no controls, no tables
    ("resources.sample.shards", 3, SAMPLE),
    ("baselines.diffseg.tau", 0.375, BASELINES),
    ("refine.alpha", 0.375, REFINE),  # no sampling
    ("refine.trained.steps", 77, {"refine_train"} | REFINE),
    ("refine.test_fraction", 0.375, REFINE),
    ("resources.refine.threads", 7, set()),
    ("score.miou", 0.375, SAMPLE | BASELINES),
    ("score.bootstrap", 77, SCORE),
    ("tables.dpi", 77, TABLES),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A fake study after `snakemake`."""
    study = FakeStudy.make(tmp_path_factory.mktemp("dag") / "study")
    study.call("snakemake", "--cores", "all", "--resources", "gpu=8")
    return study


@pytest.fixture(scope="module")
def outputs(study):
    """Output by name: dry runs with each change, unchanged params, no runs, a misspelled key and defaults, and the rules."""
    params = study.params()
    documents = {key: changed(params, key, value) for key, value, _ in CHANGES}
    documents["unchanged"] = params
    documents["no_runs"] = changed(params, "sample.runs", [])
    documents["typo"] = changed(params, "sample.threshhold", 0.5)
    documents["defaults"] = {"study": "mini"}
    runs = {name: ["--dry-run", "--configfile", study.write_params(f"{name}.yaml", doc)] for name, doc in documents.items()}
    study.write_params("params.yaml", changed(params, "seed", 7))  # must not leak into a study that does not list the key
    outputs = study.snakemakes(runs | {"rules": ["--list-rules"]})
    study.write_params("params.yaml", params)
    return outputs


def test_second_run_does_nothing(outputs):
    assert rules_in(outputs["unchanged"]) == set()


@pytest.mark.parametrize(("key", "value", "rules"), CHANGES, ids=[key for key, _, _ in CHANGES])
def test_changed_params_rerun_the_expected_rules(outputs, key, value, rules):
    assert rules_in(outputs[key]) == rules


def test_study_without_runs_does_not_train_or_sample(outputs):
    assert rules_in(outputs["no_runs"]) == BASELINES


def test_import_reruns_the_baselines_and_later_phases(study):
    imported = study.folder / "data/imported/mini/theirs.parquet"
    imported.parent.mkdir()
    imported.touch()
    runs = study.snakemakes({"imported": ["--dry-run"]})
    imported.unlink()
    assert rules_in(runs["imported"]) == BASELINES
    assert rules_in(study.snakemakes({"removed": ["--dry-run"]})["removed"]) == set()


def test_mistake_in_params_is_reported_in_one_line(outputs):
    [line] = [line for line in outputs["typo"].splitlines() if not line.startswith("Using")]
    assert line == ("snakemake: error: typo.yaml: unknown key sample.threshhold; did you mean sample.threshold?")


def test_configfile_replaces_params_yaml(outputs):
    """Keys that a study does not list have the schema's defaults, not the values of an edited params.yaml."""
    assert rules_in(outputs["defaults"]) == set()


def test_phase_names_are_targets(outputs):
    assert set(PHASES) <= set(outputs["rules"].split())


def test_each_job_ran_once(study):
    ran = study.ran()
    params = load_params(ROOT / "params.yaml")
    shards, parts = params.resources.sample.shards, params.resources.refine.shards
    assert {name: times for name, times in ran.items() if times != 1} == {
        name: count
        for name in ran
        for start, count in (("sample ", shards), ("refine shard", parts))
        if name.startswith(start) and count != 1
    }
    assert ran.keys() == {
        "preflight",
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
            *(
                "preflight",
                "data",
                "backbone",
                "latents",
                "latents_train",
                "train_gs",
                "train_discriminative",
                "baselines",
                "sample",
            ),
            *("refine_train", "refine", "score", "tables"),
        )
    } | {f"sample.size={size}.shard={shard}.log" for size in SIZES for shard in range(shards)} | {
        f"refine.shard={shard}.log" for shard in range(parts)
    }


def test_changed_code_reruns_the_phases_that_import_it(study):
    """The digest of one module of the installed package is replaced, as if the sampler had changed."""
    wrapper = (
        "import sys, genseg.phases as phases, genseg.dag.rules; real = phases._module_digest;"
        "phases._module_digest = lambda name: real(name) + ('x' if name == 'genseg.diffusion.sampling' else '');"
        "import snakemake.cli; snakemake.cli.main(['--dry-run', '--quiet', 'host'])"
    )
    assert rules_in(study.call(sys.executable, "-c", wrapper)) == SAMPLE


def test_code_hash_ignores_comments_docstrings_and_layout(tmp_path, monkeypatch):
    """A phase's hash changes only if code changes in a module that the phase imports."""
    package = tmp_path / "genseg"
    shutil.copytree(ROOT / "src/genseg", package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(phases, "_SOURCE", package)

    def hashes() -> dict[str, str]:
        for cached in (phases._modules, phases._direct_imports, phases._module_digest, code_hash, module_hash):
            cached.cache_clear()
        return {phase: code_hash(phase) for phase in PHASES}

    before = hashes()
    for file in package.rglob("*.py"):
        text = file.read_text()
        file.write_text(f'"""Another docstring."""\n# a comment\n{text}\n\n# another comment\n')
    assert hashes() == before

    sampler = package / "diffusion/sampling.py"
    sampler.write_text(sampler.read_text().replace("eta = 0.", "eta = 0, reworded."))
    assert hashes() == before
    sampler.write_text(sampler.read_text().replace("alpha_next.sqrt() * x_0 +", "alpha_next.sqrt() * 1.0 * x_0 +"))
    after = hashes()
    changed_phases = {phase for phase in PHASES if after[phase] != before[phase]}
    assert changed_phases == {"preflight", "sample"}  # the preflight plans all phases, and is not rerun for its code
    for cached in (phases._modules, phases._direct_imports, phases._module_digest, code_hash, module_hash):
        cached.cache_clear()


def test_killed_snakemake_leaves_no_orphan_process_and_the_next_run_continues(tmp_path):
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
    raise AssertionError("condition not met within 20 seconds")


@pytest.mark.parametrize("phase", PHASES)
def test_code_hash_of_a_phase_covers_all_modules_that_its_command_imports(phase):
    """The static analysis is compared with the modules that a separate process imports."""
    names = [f"genseg.{name}" for name in PHASES[phase].modules]
    script = f"import sys, {', '.join(names)}; print(*(name for name in sys.modules if name.split('.')[0] == 'genseg'))"
    imported = set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split())
    declared = PHASES[phase]
    hashed = imported_modules(declared.modules, declared.not_called) | imported_modules(declared.not_called)
    not_hashed = {*phases._NOT_HASHED, *(f"genseg.{name}" for name in declared.not_called)}
    assert {name for name in imported if not name.startswith("genseg.params")} <= hashed | not_hashed


def test_dvc_yaml_is_up_to_date():
    subprocess.run([BIN / "genseg", "dvc", "--check"], cwd=ROOT, check=True)


def test_lint():
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    subprocess.run(["snakemake", "--lint"], cwd=ROOT, check=True, env=environment)
    subprocess.run(["snakefmt", "--check", "Snakefile", "workflow"], cwd=ROOT, check=True, env=environment)
