"""Sweeps: variants have equal budgets, points are chosen on val, test is scored once, and equal phases are shared."""

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
from genseg.diffusion.guidance import count_evaluations
from genseg.errors import UserError
from genseg.metrics.soft_maps import choose_point
from genseg.params import OperatingPoint, load_params
from genseg.report.compare import compare
from genseg.sampling.runs import point_path, study_runs
from genseg.sweeps import Choice, load_sweep, training_budget

SMOKE = load_params(ROOT / "params/smoke.yaml")
EPSILON = {
    "train.prediction_type": "epsilon",
    "train.zero_terminal_snr": False,
    "train.mask_loss_weight": 0.0,
    "train.self_estimate_prob": 0.0,
}
MASK_LOSS = {"objective": "mask_loss", "lr_factor": 1.0, "guidance_scale": None}


def sweep_of(folder: Path, variants, picks=None):
    path = folder / "some.yaml"
    path.write_text(yaml.safe_dump({"variants": variants, "picks": picks or {}}, sort_keys=False))
    return load_sweep(path, SMOKE)


# --------------------------------------------------------------------------------------------------------- documents
def test_shipped_sweep_compares_the_documented_trainings():
    study = load_params(ROOT / "params.yaml")
    sweep = load_sweep(ROOT / "sweeps/objectives.yaml", study)
    trainings = [params.train for params in sweep.variants.values()]
    assert {train.prediction_type for train in trainings} == {"epsilon", "v_prediction", "sample"}
    assert {stage.objective for train in trainings for stage in train.stages} == {"distill", "mask_loss"}
    assert {train.label for train in trainings} == {"mask", "vae"}
    assert {train.terminal_timestep_prob for train in trainings} >= {0.0, study.train.terminal_timestep_prob, 1.0}
    assert {train.terminal_warmup for train in trainings} == {0.0, study.train.terminal_warmup}
    paper = load_params(ROOT / "params/paper.yaml")
    paper_keys = (
        "prediction_type",
        "zero_terminal_snr",
        "label_scale",
        "mask_loss_weight",
        "terminal_warmup",
        "terminal_timestep_prob",
        "conv_in_init",
        "cond_drop_prob",
        "stages",
        "ema",
    )
    for name in sweep.groups()["literal"]:
        train = sweep.variants[name].train
        assert all(getattr(train, key) == getattr(paper.train, key) for key in paper_keys)
        assert train.optimizer.model_copy(update={"lr": 1e-7}) == paper.train.optimizer
        [point] = sweep.variants[name].sample.operating_points
        assert count_evaluations(point) == count_evaluations(paper.sample.main) == 100


def test_variant_runs_on_val_and_after_the_choice_also_as_main_row(tmp_path):
    sweep = sweep_of(tmp_path, {"epsilon": {"evaluations": 2, "params": EPSILON}})
    first = sweep.variants["epsilon"]
    assert first.study == "smoke-epsilon"
    assert {run.role for run in study_runs(first)} == {"val"}
    assert all(count_evaluations(point) <= 2 for point in first.sample.val_points())
    point = first.sample.val_points()[1]
    second = sweep.params("epsilon", Choice(point, 0.35))
    assert (second.sample.main, second.sample.threshold) == (point, 0.35)
    assert {run.role for run in study_runs(second)} == {"main", "val"}
    assert set(second.sample.val_points()) == set(first.sample.val_points())


@pytest.mark.parametrize(
    ("variants", "picks", "message"),
    [
        (
            {"a": {"evaluations": 2, "params": {"train.predicton_type": "v_prediction"}}},
            {},
            "unknown key train.predicton_type; did you mean train.prediction_type?",
        ),
        (
            {"a": {"evaluations": 2, "params": {"trian.prediction_type": "v_prediction"}}},
            {},
            "variant a: unknown key trian; did you mean train?",
        ),
        ({"a": {"evaluations": 2, "parms": {}}}, {}, "unknown key variants.a.parms; did you mean variants.a.params?"),
        ({"a": {"evaluations": 2, "params": {"sample.main.size": 1}}}, {}, "sample.main.size is set by the sweep"),
        (
            {"a": {"evaluations": 2, "params": {"train.steps": 9}}},
            {},
            "variant a trains on 72 samples and study smoke on 64 samples",
        ),
        (
            {"a": {"evaluations": 1, "params": {"sample.operating_points": [{"num_inference_steps": 2, "guidance_scale": 1}]}}},
            {},
            "no point of sample.operating_points",
        ),
        ({"a": {"evaluations": 2, "params": {"train.stages.0": 1}}}, {}, "stages is not a section"),
        ({"A b": {"evaluations": 2, "params": {}}}, {}, "variants.A b"),
        ({"smoke": {"evaluations": 2, "params": {}}}, {}, "has the name of the study"),
        (
            {"a": {"evaluations": 2, "params": {}}},
            {"p": {"variants": ["b"]}},
            "pick 'p': unknown variant b; the variants are a",
        ),
    ],
)
def test_mistake_is_reported_in_one_line(tmp_path, variants, picks, message):
    with pytest.raises(UserError) as error:
        sweep_of(tmp_path, variants, picks)
    assert str(error.value).startswith(str(tmp_path / "some.yaml"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_stages_are_part_of_the_budget(tmp_path):
    params = {"train.steps": 5, "train.stages": [MASK_LOSS | {"steps": 3}]}
    sweep = sweep_of(tmp_path, {"staged": {"evaluations": 2, "params": params}})
    assert training_budget(sweep.variants["staged"]) == training_budget(SMOKE)


@given(st.integers(1, 12), st.sampled_from([1, 2, 4, 8, 16]), st.booleans())
def test_omitted_steps_are_the_budget_minus_the_stages(tmp_path_factory, steps, batch, two):
    stages = [MASK_LOSS | {"steps": steps}] * (1 + two)
    params = {"train.batch": batch, "train.micro_batch": 1, "train.stages": stages}
    left = 64 - batch * steps * (1 + two)  # samples; smoke trains 8 steps of 8
    folder = tmp_path_factory.mktemp("sweep")
    if left < batch:
        with pytest.raises(UserError, match=f"variant staged: its stages use {64 - left} of the 64 samples"):
            sweep_of(folder, {"staged": {"evaluations": 2, "params": params}})
    else:
        sweep = sweep_of(folder, {"staged": {"evaluations": 2, "params": params}})
        assert sweep.variants["staged"].train.steps * batch == left


@pytest.mark.parametrize("params", ["params.yaml", "params/camvid.yaml", "params/coco_photos.yaml"])
def test_shipped_sweep_is_valid_for_every_trained_study(params):
    study = load_params(ROOT / params)
    sweep = load_sweep(ROOT / "sweeps/objectives.yaml", study)
    assert {training_budget(variant) for variant in sweep.variants.values()} == {training_budget(study)}


# -------------------------------------------------------------------------------------------------------------- choice
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1), st.integers(1, 9))
def test_choice_has_the_highest_ar_on_val_within_the_evaluation_budget(points, most):
    rows = [{"name": str(i), "evaluations": cost, "best_ar": ar / 5} for i, (cost, ar) in enumerate(points)]
    if affordable := [row for row in rows if row["evaluations"] <= most]:
        chosen = choose_point(rows, most)
        best = max(row["best_ar"] for row in affordable)
        assert chosen["best_ar"] == best
        assert chosen["evaluations"] == min(row["evaluations"] for row in affordable if row["best_ar"] == best)


# ------------------------------------------------------------------------------------------------------------- sharing
def test_selection_includes_groups_and_shared_trainings(tmp_path):
    epsilon = {"evaluations": 2, "params": EPSILON}
    slow = {"evaluations": 2, "group": "lr", "params": {"train.optimizer.lr": 0.1}}
    slower = {"evaluations": 2, "group": "lr", "params": {"train.optimizer.lr": 0.2}}
    sweep = sweep_of(tmp_path, {"epsilon": epsilon, "copy": epsilon, "slow": slow, "slower": slower})
    assert selected(sweep, ["copy"]) == ["epsilon", "copy"]
    assert selected(sweep, ["slower"]) == ["slow", "slower"]
    assert selected(sweep, []) == ["epsilon", "copy", "slow", "slower"]
    with pytest.raises(UserError, match="--only epsilo: unknown variant"):
        selected(sweep, ["epsilo"])


def test_shared_folders_follow_their_origin_and_own_folders_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = ("data/smoke", "results/smoke/backbone", "results/smoke/latents", "results/smoke/model/gs")
    for folder in folders:
        write_json(f"{folder}/manifest.json", folder)
    sweep = sweep_of(tmp_path, {"same": {"evaluations": 2, "params": {}}, "epsilon": {"evaluations": 2, "params": EPSILON}})
    share(sweep, "same")
    share(sweep, "epsilon")
    for folder in folders:
        assert Path(folder.replace("smoke", "smoke-same"), "manifest.json").samefile(f"{folder}/manifest.json")
    assert Path("results/smoke-epsilon/latents/manifest.json").exists()
    assert not Path("results/smoke-epsilon/model").exists()

    write_json("results/smoke/model/gs/manifest.json", "trained again")  # replaces the file
    assert Path("results/smoke-same/model/gs/manifest.json").read_text() != "trained again"
    share(sweep, "same")
    assert json.loads(Path("results/smoke-same/model/gs/manifest.json").read_text()) == "trained again"

    write_json("results/smoke-epsilon/model/gs/manifest.json", "own")
    changed = {"same": {"evaluations": 2, "params": {"train.optimizer.lr": 0.1}}, "epsilon": {"evaluations": 2, "params": {}}}
    sweep = sweep_of(tmp_path, changed)
    share(sweep, "same")
    assert not Path("results/smoke-same/model").exists()
    assert Path("results/smoke-same/latents/manifest.json").exists()
    share(sweep, "epsilon")
    assert json.loads(Path("results/smoke-epsilon/model/gs/manifest.json").read_text()) == "own"


def test_killed_sweep_continues_and_repeats_no_job(tmp_path):
    study = FakeStudy.make(tmp_path / "study")
    study.call("bash", "-c", "rm params.yaml && cp $0 params.yaml", str(ROOT / "params/smoke.yaml"))
    sweep = sweep_of(study.folder, {"epsilon": {"evaluations": 2, "params": EPSILON}, "same": {"evaluations": 2, "params": {}}})
    for name, params in sweep.variants.items():  # the fake command writes no scores
        points = [
            {"point": point.model_dump(), "name": str(i), "evaluations": count_evaluations(point), "best_ar": i}
            | {"best_threshold": 0.3}
            for i, point in enumerate(params.sample.val_points())
        ]
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
    assert study.ran().keys() - {"refine training"} == {"data", "backbone", "latents for training"}
    study.call(*command)
    ran = study.ran()
    assert "data" not in ran
    assert "backbone" not in ran
    assert ran["train gs"] == 2  # of the study and of the variant epsilon
    assert ran["train discriminative"] == 1  # variants have no discriminative control
    assert "tables" not in ran
    for name, params in sweep.variants.items():
        choice = json.loads((study.folder / f"work/smoke-{name}/choice.json").read_text())
        assert OperatingPoint.model_validate(choice["point"]) == params.sample.val_points()[-1]
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
    raise AssertionError("condition not met within a minute")


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


def _write_scores(params, point, ious, path, shift=0):
    frame = pd.DataFrame({"image_id": np.arange(len(ious)) // 2, "narrative_id": "n", "phrase_id": np.arange(len(ious))})
    frame = frame.assign(is_thing=True, is_plural=False, iou=ious, boundary_iou=ious, area=np.arange(len(ious)) + shift)
    write_scores(frame, _summary({"name": path.stem, "point": point.model_dump()}, ious), path)


def _finished(params, choice, best, ious, shift=0):
    """Write scores of a study: the AR of its operating points on val, and the IoUs of its main point on test."""
    scores = params.results_dir / "scores"
    points = []
    for point, ar in zip(params.sample.val_points(), best, strict=True):
        path = scores / "val" / f"{point_path(point)}.json"
        _write_scores(params, point, np.full(6, ar), path)
        facts = {"name": str(point), "evaluations": count_evaluations(point), "ar": ar, "best_ar": ar, "best_threshold": 0.4}
        points.append(facts | {"threshold": choice[1], "phrases": 6, "scores": str(path), "point": point.model_dump()})
    write_json(scores / "operating_points.json", {"points": points})
    if ious is not None:
        _write_scores(params, choice[0], ious, scores / "main.json", shift)
    write_json(params.results_dir / "model" / "gs" / "manifest.json", {"params": params.subtree("seed", "train", "latents")})


@pytest.fixture
def finished_sweep(tmp_path, monkeypatch):
    """A study with two variants of one group and a third variant, with random scores."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    pair = {"evaluations": 2, "group": "pair", "params": EPSILON}
    variants = {
        "a": pair,
        "b": pair | {"params": {**EPSILON, "train.cond_drop_prob": 0.2}},
        "c": {"evaluations": 5, "params": {}},
    }
    picks = {"few": {"evaluations": [1, 2]}, "c": {"variants": ["c"]}, "none": {"evaluations": [90, 100]}}
    sweep = sweep_of(tmp_path, variants, picks)
    ious = {name: random.random(40) for name in ("smoke", "a", "c")}
    points = {name: params.sample.val_points() for name, params in sweep.variants.items()}
    _finished(SMOKE, (SMOKE.sample.main, SMOKE.sample.threshold), [0.5, 0.4, 0.4, 0.4], ious["smoke"])
    _finished(sweep.variants["a"], (points["a"][1], 0.4), [0.3, 0.6], ious["a"])
    _finished(sweep.variants["b"], (points["b"][0], 0.4), [0.55, 0.2], None)
    _finished(sweep.variants["c"], (points["c"][2], 0.4), [0.3, 0.4, 0.7], ious["c"])
    return sweep, ious


def test_comparison_agrees_with_brute_force(finished_sweep):
    sweep, ious = finished_sweep
    folder = compare(sweep)
    assert folder == Path("results/smoke/sweeps/some")
    table = pd.read_csv(folder / "variants.csv").set_index("variant")
    assert list(table.index) == ["smoke", "a", "b", "c"]
    assert table["val_ar"].tolist() == pytest.approx([50, 60, 55, 70])
    for name, values in ious.items():
        assert table.loc[name, "overall"] == pytest.approx(100 * values.mean())
    assert np.isnan(table.loc["b", "overall"])  # not the best of its group on val, so not scored on test
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


def test_missing_variant_is_named_and_its_group_has_no_test_row(finished_sweep):
    sweep, _ = finished_sweep
    (sweep.variants["b"].results_dir / "scores/operating_points.json").unlink()
    folder = compare(sweep)
    assert "Not run: b." in (folder / "variants.md").read_text()
    table = pd.read_csv(folder / "variants.csv").set_index("variant")
    assert np.isnan(table.loc["a", "overall"])


def test_comparison_rejects_scores_of_other_phrases_points_or_params(finished_sweep, tmp_path, capsys):
    sweep, ious = finished_sweep
    params, points = sweep.variants["c"], sweep.variants["c"].sample.val_points()
    _finished(params, (points[2], 0.4), [0.3, 0.4, 0.7], ious["c"], shift=1)
    with pytest.raises(UserError, match="other test phrases than study smoke"):
        compare(sweep)
    _finished(params, (points[1], 0.4), [0.3, 0.4, 0.7], ious["c"])
    with pytest.raises(UserError, match="not at the point chosen on val"):
        compare(sweep)
    _finished(params, (points[2], 0.4), [0.3, 0.4, 0.7], ious["c"])
    write_json(params.results_dir / "model" / "gs" / "manifest.json", {"params": {}})
    Path("params.yaml").write_text((ROOT / "params/smoke.yaml").read_text())
    assert main(["compare", "--sweep", str(tmp_path / "some.yaml")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("trained with other params than the sweep's; run `genseg sweep`")


# ------------------------------------------------------------------------------------------------------------ sampling
def test_another_threshold_uses_the_stored_maps(study_copy, monkeypatch, capsys):
    """Selecting a threshold on val after the points were sampled must not sample them again."""
    import genseg.sampling.shard as shard
    from test_training import variant

    monkeypatch.chdir(study_copy)
    changed = variant(study_copy, "changed", sample__threshold=0.3, sample__runs=["val"])
    assert os.path.exists("results/smoke/predictions/grid")
    with monkeypatch.context() as patched:
        patched.setattr(shard.Sampler, "pipeline", None)  # sampling would fail
        times = {path: path.read_bytes() for path in Path("work/smoke/times/sample/val").rglob("*.json")}
        assert times
        assert main(["sample", "--params", changed]) == 0
        assert {path: path.read_bytes() for path in times} == times, "reading out stored maps is not sampling"
    assert not os.path.exists("results/smoke/predictions/grid")
    stored = {path: path.read_bytes() for path in Path("results/smoke/predictions").rglob("predictions.parquet")}
    assert stored
    for path in stored:
        path.unlink()
    for folder in Path("work/smoke/samples").glob("val"):
        subprocess.run(["rm", "-r", str(folder)], check=True)
    assert main(["sample", "--params", changed]) == 0
    assert {path: path.read_bytes() for path in stored} == stored
