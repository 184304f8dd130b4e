"""Sweeps: variants are valid studies of equal budget, val chooses, test is asked once, what agrees is shared."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fake_study import BIN, ROOT, FakeStudy
from genseg.artifacts.files import write_json
from genseg.artifacts.scores import write_scores
from genseg.cli import main
from genseg.dag.sweep import selected, share
from genseg.errors import UserError
from genseg.metrics.operating import choose_point
from genseg.params import Cell, load_params
from genseg.report.compare import compare
from genseg.sampling.runs import cell_path, study_runs
from genseg.sweeps import Choice, budget, load_sweep

SMOKE = load_params(ROOT / "params/smoke.yaml")
NOISE = {"train.prediction": "noise", "train.zero_terminal_snr": False, "train.task_weight": 0.0}


def sweep_of(folder: Path, variants, picks=None, study=SMOKE):
    path = folder / "some.yaml"
    path.write_text(yaml.safe_dump({"variants": variants, "picks": picks or {}}, sort_keys=False))
    return load_sweep(path, study)


# --------------------------------------------------------------------------------------------------------- documents
def test_the_shipped_sweep_has_what_it_promises():
    study = load_params(ROOT / "params.yaml")
    sweep = load_sweep(ROOT / "sweeps/objectives.yaml", study)
    assert {budget(params) for params in sweep.variants.values()} == {budget(study)}
    trainings = [params.train for params in sweep.variants.values()]
    assert {train.prediction for train in trainings} == {"noise", "v", "x0"}
    assert {stage.objective for train in trainings for stage in train.stages} == {"distill", "task"}
    assert {train.label for train in trainings} == {"mask", "vae"}
    assert {train.p_last for train in trainings} == {0.0, study.train.p_last, 0.6}
    paper = load_params(ROOT / "params/paper.yaml")
    same = (
        "prediction",
        "zero_terminal_snr",
        "label_scale",
        "task_weight",
        "p_last",
        "image_columns",
        "p_drop",
        "stages",
        "ema",
    )
    for name in sweep.groups()["literal"]:
        train = sweep.variants[name].train
        assert all(getattr(train, key) == getattr(paper.train, key) for key in same)
        assert train.optimizer.model_copy(update={"lr": 1e-7}) == paper.train.optimizer
        assert [point.evaluations for point in sweep.variants[name].sample.points] == [paper.sample.main.evaluations] == [100]


def test_a_variant_first_asks_val_alone_and_then_adds_its_main_row(tmp_path):
    sweep = sweep_of(tmp_path, {"noise": {"evaluations": 2, "params": NOISE}})
    first = sweep.variants["noise"]
    assert first.study == "smoke-noise"
    assert {run.role for run in study_runs(first)} == {"val"}
    assert all(point.evaluations <= 2 for point in first.sample.operating_points())
    cell = first.sample.operating_points()[1]
    second = sweep.params("noise", Choice(cell, 0.35))
    assert (second.sample.main, second.sample.threshold) == (cell, 0.35)
    assert {run.role for run in study_runs(second)} == {"main", "val"}
    assert set(second.sample.operating_points()) == set(first.sample.operating_points())


@pytest.mark.parametrize(
    ("variants", "picks", "told"),
    [
        (
            {"a": {"evaluations": 2, "params": {"train.predicton": "v"}}},
            {},
            "unknown key train.predicton; did you mean train.pr",
        ),
        (
            {"a": {"evaluations": 2, "params": {"trian.prediction": "v"}}},
            {},
            "variant a: unknown key trian; did you mean train?",
        ),
        ({"a": {"evaluations": 2, "parms": {}}}, {}, "unknown key variants.a.parms; did you mean variants.a.params?"),
        ({"a": {"evaluations": 2, "params": {"sample.main.steps": 1}}}, {}, "sample.main.steps is set by the sweep"),
        ({"a": {"evaluations": 2, "params": {"train.steps": 9}}}, {}, "variant a: trains 72 samples, study smoke 64 samples"),
        (
            {"a": {"evaluations": 1, "params": {"sample.points": [{"steps": 2, "guidance": 1}]}}},
            {},
            "no point of sample.points",
        ),
        ({"a": {"evaluations": 2, "params": {"train.stages.0": 1}}}, {}, "stages holds no keys"),
        ({"A b": {"evaluations": 2, "params": {}}}, {}, "variants.A b"),
        ({"smoke": {"evaluations": 2, "params": {}}}, {}, "has the name of the study"),
        ({"a": {"evaluations": 2, "params": {}}}, {"p": {"variants": ["b"]}}, "pick 'p': no variant b; it has a"),
    ],
)
def test_mistakes_are_one_line(tmp_path, variants, picks, told):
    with pytest.raises(UserError) as error:
        sweep_of(tmp_path, variants, picks)
    assert str(error.value).startswith(str(tmp_path / "some.yaml"))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_stages_are_part_of_the_budget(tmp_path):
    stage = {"objective": "task", "steps": 3, "lr_factor": 1.0, "guidance": None}
    sweep = sweep_of(tmp_path, {"task": {"evaluations": 2, "params": {"train.steps": 5, "train.stages": [stage]}}})
    assert budget(sweep.variants["task"]) == budget(SMOKE)


@given(st.integers(1, 12), st.sampled_from([1, 2, 4, 8, 16]), st.booleans())
def test_left_out_steps_are_what_stages_leave_of_the_budget(tmp_path_factory, steps, batch, two):
    stage = {"objective": "task", "steps": steps, "lr_factor": 1.0, "guidance": None}
    params = {"train.batch": batch, "train.micro_batch": 1, "train.stages": [stage] * (1 + two)}
    left = 64 - batch * steps * (1 + two)  # samples; smoke trains 8 steps of 8
    folder = tmp_path_factory.mktemp("sweep")
    if left < batch:
        with pytest.raises(UserError, match=f"variant task: its stages take {64 - left} of the 64 samples"):
            sweep_of(folder, {"task": {"evaluations": 2, "params": params}})
    else:
        sweep = sweep_of(folder, {"task": {"evaluations": 2, "params": params}})
        assert sweep.variants["task"].train.steps * batch == left


@pytest.mark.parametrize("params", ["params.yaml", "params/camvid.yaml", "params/coco_narrated.yaml"])
def test_the_shipped_sweep_is_one_of_every_shipped_study(params):
    study = load_params(ROOT / params)
    sweep = load_sweep(ROOT / "sweeps/objectives.yaml", study)
    assert {budget(variant) for variant in sweep.variants.values()} == {budget(study)}


# -------------------------------------------------------------------------------------------------------------- choice
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1), st.integers(1, 9))
def test_choice_is_the_argmax_of_val_among_the_affordable(points, most):
    rows = [{"name": str(i), "evaluations": cost, "best_ar": ar / 5} for i, (cost, ar) in enumerate(points)]
    if affordable := [row for row in rows if row["evaluations"] <= most]:
        chosen = choose_point(rows, most)
        best = max(row["best_ar"] for row in affordable)
        assert chosen["best_ar"] == best
        assert chosen["evaluations"] == min(row["evaluations"] for row in affordable if row["best_ar"] == best)


# ------------------------------------------------------------------------------------------------------------- sharing
def test_selection_closes_over_groups_and_shared_trainings(tmp_path):
    some = {"evaluations": 2, "params": NOISE}
    slow = {"evaluations": 2, "group": "lr", "params": {"train.optimizer.lr": 0.1}}
    slower = {"evaluations": 2, "group": "lr", "params": {"train.optimizer.lr": 0.2}}
    sweep = sweep_of(tmp_path, {"noise": some, "again": some, "slow": slow, "slower": slower})
    assert selected(sweep, ["again"]) == ["noise", "again"]
    assert selected(sweep, ["slower"]) == ["slow", "slower"]
    assert selected(sweep, []) == ["noise", "again", "slow", "slower"]
    with pytest.raises(UserError, match="--only nois: no such variant"):
        selected(sweep, ["nois"])


def test_shared_folders_follow_their_origin_and_own_ones_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = ("data/smoke", "results/smoke/backbone", "results/smoke/latents", "results/smoke/model")
    for folder in folders:
        write_json(f"{folder}/manifest.json", folder)
    sweep = sweep_of(tmp_path, {"same": {"evaluations": 2, "params": {}}, "noise": {"evaluations": 2, "params": NOISE}})
    share(sweep, "same")
    share(sweep, "noise")
    for folder in folders:
        assert Path(folder.replace("smoke", "smoke-same"), "manifest.json").samefile(f"{folder}/manifest.json")
    assert Path("results/smoke-noise/latents/manifest.json").exists()
    assert not Path("results/smoke-noise/model").exists()

    write_json("results/smoke/model/manifest.json", "trained again")  # a new file in the old one's place
    assert Path("results/smoke-same/model/manifest.json").read_text() != "trained again"
    share(sweep, "same")
    assert json.loads(Path("results/smoke-same/model/manifest.json").read_text()) == "trained again"

    write_json("results/smoke-noise/model/manifest.json", "its own")
    changed = {"same": {"evaluations": 2, "params": {"train.optimizer.lr": 0.1}}, "noise": {"evaluations": 2, "params": {}}}
    sweep = sweep_of(tmp_path, changed)
    share(sweep, "same")
    assert not Path("results/smoke-same/model").exists()
    assert Path("results/smoke-same/latents/manifest.json").exists()
    share(sweep, "noise")
    assert json.loads(Path("results/smoke-noise/model/manifest.json").read_text()) == "its own"


def test_killed_sweep_goes_on_and_makes_nothing_twice(tmp_path):
    study = FakeStudy.make(tmp_path / "study")
    study.call("bash", "-c", "rm params.yaml && cp $0 params.yaml", str(ROOT / "params/smoke.yaml"))
    sweep = sweep_of(study.folder, {"noise": {"evaluations": 2, "params": NOISE}, "same": {"evaluations": 2, "params": {}}})
    for name, params in sweep.variants.items():  # what scoring would say, which the fake command does not
        points = [point.model_dump() | {"name": str(i), "evaluations": point.evaluations, "best_ar": i, "best_threshold": 0.3}
                  for i, point in enumerate(params.sample.operating_points())]  # fmt: skip
        write_json(study.folder / f"results/smoke-{name}/scores/operating_points.json", {"points": points})
    script = (
        "from genseg.dag.sweep import run_sweep; from genseg.params import load_params; from genseg.sweeps import load_sweep;"
        "run_sweep(load_sweep('some.yaml', load_params('params.yaml')), [], '1')"
    )
    command = [str(BIN / "python"), "-c", script]
    run = subprocess.Popen(
        command, cwd=study.folder, env=study.environment | {"FAKE_SLOW": "latents"}, stdout=subprocess.DEVNULL
    )
    pid = study.folder / "slow.pid"
    _wait(lambda: pid.exists() and pid.read_text().strip())
    job = int(pid.read_text())
    run.send_signal(signal.SIGKILL)
    run.wait()
    _wait(lambda: not _alive(job))
    assert study.ran().keys() == {"data", "backbone", "latents for training"}
    study.call(*command)
    ran = study.ran()
    assert "data" not in ran
    assert "backbone" not in ran
    assert ran["train gs"] == 2  # the study's and noise's
    assert ran["train discriminative"] == 1  # variants have no controls
    assert "tables" not in ran
    for name, params in sweep.variants.items():
        choice = json.loads((study.folder / f"work/smoke-{name}/choice.json").read_text())
        assert Cell.model_validate(choice["cell"]) == params.sample.operating_points()[-1]
        assert choice["threshold"] == 0.3
    study.call(*command)
    assert not study.ran()


def _alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _wait(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited for a minute in vain")


# ---------------------------------------------------------------------------------------------------------- comparison
def _summary(run, ious):
    every = {split: float(np.mean(ious)) for split in ("overall", "things", "stuff", "singulars", "plurals")}
    return {
        "protocol": "native",
        "split": "test",
        "run": run,
        "ar": every,
        "interval": {split: [0.1, 0.9] for split in every},
        "ceiling": every,
        "ceiling_latent": None,
        "boundary_iou": every,
        "counts": {"phrases": len(ious), "images": len(ious) // 2},
    }


def _write_scores(params, cell, ious, path, shift=0):
    frame = pd.DataFrame({"image_id": np.arange(len(ious)) // 2, "narrative_id": "n", "phrase_id": np.arange(len(ious))})
    frame = frame.assign(is_thing=True, is_plural=False, iou=ious, boundary_iou=ious, area=np.arange(len(ious)) + shift)
    write_scores(frame, _summary({"name": path.stem, "evaluations": cell.evaluations, **cell.model_dump()}, ious), path)


def _finished(params, choice, best, ious, shift=0):
    """Scores of a study whose operating points have the given AR on val, and whose main point was scored on test."""
    scores = params.results_dir / "scores"
    points = []
    for cell, ar in zip(params.sample.operating_points(), best, strict=True):
        path = scores / "val" / f"{cell_path(cell)}.json"
        _write_scores(params, cell, np.full(6, ar), path)
        facts = {"name": str(cell), "evaluations": cell.evaluations, "ar": ar, "best_ar": ar, "best_threshold": 0.4}
        points.append(facts | {"threshold": choice[1], "phrases": 6, "scores": str(path)} | cell.model_dump())
    write_json(scores / "operating_points.json", {"points": points})
    if ious is not None:
        _write_scores(params, choice[0], ious, scores / "main.json", shift)
    write_json(params.results_dir / "model" / "manifest.json", {"params": params.subtree("seed", "train", "latents")})


@pytest.fixture
def finished_sweep(tmp_path, monkeypatch):
    """A study, a pair of variants that compete and one more, with scores drawn at random."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    pair = {"evaluations": 2, "group": "pair", "params": NOISE}
    variants = {"a": pair, "b": pair | {"params": {**NOISE, "train.p_drop": 0.2}}, "c": {"evaluations": 5, "params": {}}}
    picks = {"few": {"evaluations": [1, 2]}, "c": {"variants": ["c"]}, "nobody": {"evaluations": [90, 100]}}
    sweep = sweep_of(tmp_path, variants, picks)
    ious = {name: random.random(40) for name in ("smoke", "a", "c")}
    cells = {name: params.sample.operating_points() for name, params in sweep.variants.items()}
    _finished(SMOKE, (SMOKE.sample.main, SMOKE.sample.threshold), [0.5, 0.4, 0.4, 0.4], ious["smoke"])
    _finished(sweep.variants["a"], (cells["a"][1], 0.4), [0.3, 0.6], ious["a"])
    _finished(sweep.variants["b"], (cells["b"][0], 0.4), [0.55, 0.2], None)
    _finished(sweep.variants["c"], (cells["c"][2], 0.4), [0.3, 0.4, 0.7], ious["c"])
    return sweep, ious


def test_comparison_agrees_with_brute_force(finished_sweep):
    sweep, ious = finished_sweep
    folder = compare(sweep)
    assert folder == Path("results/smoke/sweeps/some")
    table = pd.read_csv(folder / "variants.csv").set_index("variant")
    assert list(table.index) == ["smoke", "a", "b", "c"]
    assert table["val_ar"].tolist() == pytest.approx([50, 60, 55, 70])
    for name, found in ious.items():
        assert table.loc[name, "overall"] == pytest.approx(100 * found.mean())
    assert np.isnan(table.loc["b", "overall"])  # lost on val: test was not asked
    for name in ("a", "c"):
        assert table.loc[name, "difference"] == pytest.approx(100 * (ious["smoke"] - ious[name]).mean())
        per_image = (ious["smoke"] - ious[name]).reshape(-1, 2).mean(1)
        draws = np.random.default_rng(1).integers(20, size=(4000, 20))
        expected = np.percentile(100 * per_image[draws].mean(1), [2.5, 97.5])
        assert table.loc[name, ["difference_low", "difference_high"]].tolist() == pytest.approx(expected, abs=3)
    picks = pd.read_csv(folder / "picks.csv").set_index("pick")
    assert picks["variant"].to_dict() == {"few": "a", "c": "c"}
    [pair] = pd.read_csv(folder / "differences.csv").to_dict("records")
    assert (pair["a"], pair["b"]) == ("few", "c")
    assert pair["difference"] == pytest.approx(100 * (ious["a"] - ious["c"]).mean())
    points = pd.read_csv(folder / "points.csv")
    for _, rows in points[points["variant"] != "smoke"].groupby("variant"):
        assert rows["val_ar"].idxmax() == rows["chosen"].idxmax()
    for name in ("variants", "points", "picks", "differences"):
        assert (folder / f"{name}.tex").read_text().count(r"\toprule") == 1
        assert (folder / f"{name}.md").exists()
    assert (folder / "evaluations.png").stat().st_size > 5000


def test_a_variant_that_was_not_run_is_named_and_its_group_has_no_winner(finished_sweep):
    sweep, _ = finished_sweep
    (sweep.variants["b"].results_dir / "scores/operating_points.json").unlink()
    folder = compare(sweep)
    assert "Not run: b." in (folder / "variants.md").read_text()
    table = pd.read_csv(folder / "variants.csv").set_index("variant")
    assert np.isnan(table.loc["a", "overall"])


def test_comparison_refuses_what_does_not_belong(finished_sweep, tmp_path, capsys):
    sweep, ious = finished_sweep
    params, cells = sweep.variants["c"], sweep.variants["c"].sample.operating_points()
    _finished(params, (cells[2], 0.4), [0.3, 0.4, 0.7], ious["c"], shift=1)
    with pytest.raises(UserError, match="other test phrases than study smoke"):
        compare(sweep)
    _finished(params, (cells[1], 0.4), [0.3, 0.4, 0.7], ious["c"])
    with pytest.raises(UserError, match="not at the point chosen on val"):
        compare(sweep)
    _finished(params, (cells[2], 0.4), [0.3, 0.4, 0.7], ious["c"])
    write_json(params.results_dir / "model" / "manifest.json", {"params": {}})
    Path("params.yaml").write_text((ROOT / "params/smoke.yaml").read_text())
    assert main(["compare", "--sweep", str(tmp_path / "some.yaml")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("trained with other params than the sweep's; run `genseg sweep`")


# ------------------------------------------------------------------------------------------------------------ sampling
def test_another_threshold_is_read_from_the_stored_maps(study_copy, monkeypatch, capsys):
    """Choosing a threshold on val after the points were sampled must not sample them again."""
    import genseg.sampling.shard as shard
    from test_training import variant

    monkeypatch.chdir(study_copy)
    changed = variant(study_copy, "changed", sample__threshold=0.3, sample__runs=["val"])
    assert os.path.exists("results/smoke/predictions/grid")
    with monkeypatch.context() as patched:
        patched.setattr(shard.Sampler, "pipeline", None)  # nothing may be sampled
        assert main(["sample", "--params", changed]) == 0
    assert not os.path.exists("results/smoke/predictions/grid")
    stored = {path: path.read_bytes() for path in Path("results/smoke/predictions").rglob("predictions.parquet")}
    assert stored
    for path in stored:
        path.unlink()
    for folder in Path("work/smoke/samples").glob("val"):
        subprocess.run(["rm", "-r", str(folder)], check=True)
    assert main(["sample", "--params", changed]) == 0
    assert {path: path.read_bytes() for path in stored} == stored
