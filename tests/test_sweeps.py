"""Sweeps: expansion, refused params, shared phases, the jobs of the DAG, the choice on val, and the table of differences."""

import json
import os
import subprocess
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_study import ROOT, FakeStudy
from genseg.artifacts.files import write_json
from genseg.artifacts.scores import write_scores
from genseg.cli import main
from genseg.dag.stages import track_sweep
from genseg.diffusion.guidance import count_evaluations
from genseg.errors import UserError
from genseg.metrics.bootstrap import paired_difference, trainings_difference
from genseg.metrics.soft_maps import choose_point
from genseg.params import load_params
from genseg.params.text import differences
from genseg.phases import PHASES
from genseg.report import compare as comparison
from genseg.report.compare import compare
from genseg.sampling.runs import study_runs
from genseg.sweeps import load_sweep

SMOKE = load_params(ROOT / "params/smoke.yaml")
INJECTION = {"train.token_injection": [True, False]}
SPLITS = ("overall", "things", "stuff", "singulars", "plurals")


def sweep_of(folder: Path, base=SMOKE, **document):
    path = folder / "some.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return load_sweep(path, base)


# --------------------------------------------------------------------------------------------------------- documents
VALUES = {
    "train.token_injection": st.lists(st.booleans(), min_size=1, max_size=2, unique=True),
    "train.cond_drop_prob": st.lists(st.sampled_from([0.0, 0.1, 0.5]), min_size=1, unique=True),
    "train.optimizer.lr": st.lists(st.sampled_from([5e-4, 1e-3]), min_size=1, unique=True),
}


@settings(deadline=None, max_examples=20)
@given(st.fixed_dictionaries({}, optional=VALUES), st.sampled_from(["one-at-a-time", "product"]), st.booleans())
def test_matrix_expands_to_every_row_that_differs_from_the_baseline(tmp_path_factory, matrix, mode, is_changed):
    own = {"train.token_injection": True, "train.cond_drop_prob": 0.1, "train.optimizer.lr": 5e-4}
    baseline = {"train.cond_drop_prob": 0.5} if is_changed else {}
    sweep = sweep_of(tmp_path_factory.mktemp("sweep"), baseline=baseline, matrix=matrix, mode=mode, seeds=[3, 4])
    rows = {tuple((own | baseline | {key: value}).items()) for key, values in matrix.items() for value in values}
    if mode == "product":
        rows = {tuple((own | baseline | dict(zip(matrix, row, strict=True))).items()) for row in product(*matrix.values())}
    rows.add(tuple((own | baseline).items()))
    found = [tuple(params.subtree(*own).items()) for params in {t.variant: t.params for t in sweep.trainings}.values()]
    assert len(found) == len(set(found))
    assert set(found) == rows
    assert [training.seed for training in sweep.trainings] == [3, 4] * len(rows)


def test_training_differs_from_the_study_in_its_params_and_seed_only(tmp_path):
    sweep = sweep_of(tmp_path, matrix=INJECTION, variants={"two": {"train.text": "pooled", "train.steps": 9}}, seeds=[0, 1])
    names = ["baseline", "token_injection=false", "two"]
    assert list(sweep.variants) == names
    changed = {
        training.params.study: {key for key, _, _ in differences(SMOKE, training.params)} for training in sweep.trainings
    }
    expected = [set(), {"train.token_injection"}, {"train.text", "train.steps"}]
    always = {"study", "sample.runs", "sample.main.guidance_scale", "sample.main.num_inference_steps"}  # selected on val
    assert changed == {
        f"smoke-some-{name}-seed{seed}": keys | always | ({"train.seed"} if seed else set())
        for name, keys in zip(names, expected, strict=True)
        for seed in (0, 1)
    }


def test_evaluation_does_not_depend_on_the_seed_of_training():
    other = SMOKE.model_copy(update={"train": SMOKE.train.model_copy(update={"seed": 5})})
    for phase in set(PHASES) - {"train"}:
        assert SMOKE.subtree(*PHASES[phase].keys) == other.subtree(*PHASES[phase].keys)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"matrix": {"tables.dpi": [1, 2]}}, "tables.dpi is read by none of the compared phases (for masks, data, backbone, "),
        ({"matrix": {"resources.train.gpu": [0, 2]}}, "resources.train.gpu is read by none of the compared phases"),
        ({"matrix": {"score.bootstrap": [9]}}, "score.bootstrap is read by none of the compared phases"),
        ({"matrix": {"sample.grid.sizes": [[96]]}}, "sample.grid.sizes is read by no run of the compared phases (data, "),
        ({"matrix": {"refine.crf.iterations": [3], "refine.controls": [["crf"]]}}, "refine.controls is read by no run"),
        ({"matrix": {"seed": [0, 1]}}, "seed cannot differ between variants"),
        ({"matrix": {"train.seed": [0, 1]}}, "list the seeds of training as `seeds`"),
        ({"matrix": {"refine.test_fraction": [0.3]}}, "all variants are scored on the same images"),
        ({"matrix": {"sample.threshold": [0.3]}}, "sample.threshold is selected on val"),
        ({"matrix": {"sample.select_fraction": [0.3]}, "select": "fixed"}, "sample.select_fraction is read by no run"),
        ({"matrix": {"refine.alpha": [1.0], "train.text": ["pooled"]}}, "write two sweeps"),
        ({"matrix": {"refine.alpha": [1.0]}, "seeds": [0, 1]}, "seeds of training do not change refinement"),
        ({"matrix": {"train.txet": ["pooled"]}}, "unknown key train.txet; did you mean train.text?"),
        ({"matrix": {"train.text": ["poled"]}}, "variant text=poled: train.text"),
        ({"variants": {"a": {"train.stages.0": 1}}}, "stages is not a section"),
        ({"variants": {"A b": {"train.text": "pooled"}}}, "variants.A b"),
        ({"matrx": INJECTION}, "unknown key matrx; did you mean matrix?"),
        ({"matrix": INJECTION, "seeds": [1, 1]}, "seeds must differ"),
        ({"seeds": [1]}, "nothing to compare"),
        ({"variants": {"a": {"sample.operating_points": []}}}, "sample.operating_points is empty"),
    ],
)
def test_mistake_is_reported_in_one_line(tmp_path, document, message):
    with pytest.raises(UserError) as error:
        sweep_of(tmp_path, **document)
    assert str(error.value).startswith(str(tmp_path / "some.yaml"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("params", ["params.yaml", "params/camvid.yaml", "params/coco_photos.yaml", "params/smoke.yaml"])
@pytest.mark.parametrize("name", ["architecture", "objectives", "seeds"])
def test_shipped_sweep_is_valid_for_every_trained_study(params, name):
    sweep = load_sweep(ROOT / f"sweeps/{name}.yaml", load_params(ROOT / params))
    assert sweep.compared == "masks"


def test_shipped_sweep_of_objectives_contains_the_paper():
    sweep = load_sweep(ROOT / "sweeps/objectives.yaml", load_params(ROOT / "params.yaml"))
    trainings = {training.variant: training.params for training in sweep.trainings}
    paper = load_params(ROOT / "params/paper.yaml")
    keys = ("prediction_type", "zero_terminal_snr", "label_scale", "mask_loss_weight", "terminal_timestep_prob")
    keys += ("terminal_warmup", "conv_in_init", "stages", "ema")
    for name in ("literal-lr1e-4", "literal-lr5e-4"):
        train = trainings[name].train
        assert all(getattr(train, key) == getattr(paper.train, key) for key in keys)
        assert train.optimizer.model_copy(update={"lr": 1e-7}) == paper.train.optimizer
        assert count_evaluations(trainings[name].sample.main) == 100
    assert {comparison.training_samples(params) for params in trainings.values()} == {(0, 19200)}


# -------------------------------------------------------------------------------------------------------------- choice
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1), st.integers(1, 9))
def test_choice_has_the_highest_ar_on_val_within_the_evaluation_budget(points, most):
    rows = [{"name": str(i), "evaluations": cost, "best_ar": ar / 5} for i, (cost, ar) in enumerate(points)]
    if affordable := [row for row in rows if row["evaluations"] <= most]:
        chosen = choose_point(rows, most)
        best = max(row["best_ar"] for row in affordable)
        assert chosen["best_ar"] == best
        assert chosen["evaluations"] == min(row["evaluations"] for row in affordable if row["best_ar"] == best)


def test_baseline_and_variants_are_chosen_by_the_same_rule(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params/smoke.yaml").read_text())
    sweep = sweep_of(tmp_path, matrix=INJECTION)
    candidates = SMOKE.sample.operating_points
    for training in sweep.trainings:
        study = training.params.study
        val = sweep.studies()[f"{study}-val"]
        assert {run.role for run in study_runs(val)} == {"val"}
        assert set(val.sample.val_points()) == set(candidates)
        best = candidates[0] if training.variant == "baseline" else candidates[2]
        rows = [
            {"point": point.model_dump(), "name": str(i), "evaluations": 1, "best_ar": float(point == best)}
            | {"best_threshold": 0.35}
            for i, point in enumerate(candidates)
        ]
        write_json(f"results/{study}-val/scores/operating_points.json", {"points": rows})
        assert main(["sweep", "some.yaml", "--choose", study]) == 0
        chosen = load_params(f"work/{study}/chosen.json")
        assert (chosen.sample.main, chosen.sample.threshold) == (best, 0.35)
        assert {run.name for run in study_runs(chosen)} == {"main", "class_phrases"}
        assert chosen.train == training.params.train
    assert main(["sweep", "some.yaml", "--choose", "smoke"]) == 2
    assert "not a study of some.yaml" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- sharing
@pytest.mark.parametrize(
    ("matrix", "shared"),
    [
        ({"train.text": ["pooled"]}, {"data", "backbone", "latents"}),
        ({"train.size": [48]}, {"data", "backbone"}),
        ({"sample.clip_sample": [False]}, {"data", "backbone", "latents", "train"}),
        ({"backbone.unet.lr": [0.1]}, {"data"}),
        ({"data.val_fraction": [0.3]}, set()),
    ],
)
def test_variant_shares_the_phases_that_its_params_do_not_reach(tmp_path, matrix, shared):
    sweep = sweep_of(tmp_path, matrix=matrix)
    [baseline, variant] = [training.params.study for training in sweep.trainings]
    donors = sweep.donors()
    assert set(donors.get(variant, {})) == shared
    assert set(donors[baseline]) == {"data", "backbone", "latents", "train"}
    assert set(donors.get(variant, {}).values()) <= {"smoke"}
    assert set(donors[f"{variant}-val"]) == {"data", "backbone", "latents", "train"}


def test_variant_of_refinement_shares_everything_before_it(tmp_path):
    sweep = sweep_of(tmp_path, matrix={"refine.alpha": [1.0]})
    assert sweep.compared == "refinement"
    assert {training.params.study for training in sweep.trainings} | {"smoke"} == set(sweep.studies())
    for training in sweep.trainings:
        assert sweep.donors()[training.params.study].keys() >= {"data", "backbone", "baselines", "sample"}
        assert training.params.refine.controls == []


def test_shared_phases_have_equal_params(tmp_path):
    """A linked phase is that of the first study in the list with the same params, so a donor runs it itself."""
    sweep = load_sweep(ROOT / "sweeps/objectives.yaml", load_params(ROOT / "params.yaml"))
    studies, donors = sweep.studies(), sweep.donors()
    for study, shared in donors.items():
        for phase, donor in shared.items():
            assert phase not in donors.get(donor, {})
            if not (sweep.is_chosen(study) and phase == "sample"):
                keys = PHASES[phase].keys
                assert studies[study].subtree(*keys) == studies[donor].subtree(*keys)
    trained = [study for study in studies if "train" not in donors.get(study, {})]
    assert len(trained) == len({json.dumps(studies[study].train.model_dump(mode="json")) for study in trained})


# ----------------------------------------------------------------------------------------------------------------- DAG
def test_snakemake_runs_each_distinct_phase_once_and_then_only_what_changes(tmp_path):
    study = FakeStudy.make(tmp_path / "study")
    study.write_params("params.yaml", SMOKE.model_dump(mode="json"))
    (study.folder / "sweeps").mkdir()
    command = ("snakemake", "--cores", "2", "--config", "sweep=sweeps/some.yaml")
    document = {"matrix": {"train.token_injection": [True, False], "sample.clip_sample": [False]}}
    study.write_params("sweeps/some.yaml", document)
    study.call(*command)
    ran = study.ran()
    assert ran == {
        **{"preflight": 1, "data": 1, "backbone": 1, "latents for training": 1, "latents": 1},
        "train gs": 2,  # the study's own, and without injection
        "sample 0064": 6,  # val and test of three variants
        **{"sample": 6, "score": 6, "choose": 3, "sweep": 1},
    }
    origin = study.folder / "results/smoke/model/gs/manifest.json"
    for name in ("baseline", "clip_sample=false"):
        for suffix in ("", "-val"):
            assert origin.samefile(study.folder / f"results/smoke-some-{name}-seed0{suffix}/model/gs/manifest.json")
    study.call(*command)
    assert not study.ran()

    study.write_params("sweeps/some.yaml", {"matrix": {**document["matrix"], "train.text": ["pooled"]}})
    study.call(*command)
    assert study.ran() == {"train gs": 1, "sample 0064": 2, "sample": 2, "score": 2, "choose": 1, "sweep": 1}
    study.write_params("params.yaml", SMOKE.model_dump(mode="json") | {"seed": 1})
    dry = study.call(*command, "-n", "--quiet", "host")
    assert "share_data" not in dry, "the data do not depend on the seed"
    assert "train_gs" in dry

    study.write_params("sweeps/dead.yaml", {"matrix": {"tables.dpi": [1, 2]}})
    output = study.call(*command[:-1], "sweep=sweeps/dead.yaml", check=False)
    assert output.splitlines()[-1].startswith("snakemake: error: sweeps/dead.yaml: tables.dpi is read by none")


def test_sweep_of_refinement_refines_without_training(tmp_path):
    study = FakeStudy.make(tmp_path / "study")
    study.write_params("params.yaml", SMOKE.model_dump(mode="json"))
    study.write_params("r.yaml", {"matrix": {"refine.alpha": [0.5, 1.0]}})
    output = study.call("snakemake", "--dry-run", "--quiet", "host", "--config", "sweep=r.yaml")
    counts = dict(line.split() for line in output.splitlines() if len(line.split()) == 2 and line.split()[1].isdigit())
    assert (counts["refine"], counts["refine_shard"], counts["share_sample"], counts["share_baselines"]) == ("2",) * 4
    assert (counts["train_gs"], counts["sample"], counts["baselines"]) == ("1",) * 3  # those of the study
    assert "score" not in counts


def test_tracked_sweep_is_a_dvc_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    masks = sweep_of(tmp_path / "sweeps", matrix=INJECTION)
    path = track_sweep(masks)
    track_sweep(masks)
    stages = yaml.safe_load(path.read_text())["stages"]
    assert stages["masks"]["matrix"] == {"name": ["some"]}
    assert "results/${study}/model" in stages["masks"]["deps"]
    track_sweep(sweep_of(tmp_path / "sweeps", matrix={"refine.alpha": [1.0]}))  # the document changed
    [(stage, entry)] = yaml.safe_load(path.read_text())["stages"].items()
    assert stage == "refinement"
    assert {"results/${study}/baselines", "results/${study}/predictions"} <= set(entry["deps"])
    with pytest.raises(UserError, match="move the file there"):
        track_sweep(sweep_of(tmp_path, matrix=INJECTION))


# ---------------------------------------------------------------------------------------------------------- comparison
def _scores(training, ious, area=9):
    """Write the scores of a training whose phrases, two in each image, have these IoUs."""
    params, n = training.params, len(ious)
    frame = pd.DataFrame({"image_id": np.arange(n) // 2, "narrative_id": "n", "phrase_id": np.arange(n)})
    frame = frame.assign(is_thing=True, is_plural=False, iou=ious, boundary_iou=ious, area=area)
    every = dict.fromkeys(SPLITS, float(np.mean(ious)))
    summary = {"protocol": "native", "split": "test", "ar": every, "boundary_iou": every, "ceiling": every}
    summary |= {"interval": {split: [0.1, 0.9] for split in SPLITS}, "ceiling_latent": None, "miou": {"mean": float(ious[0])}}
    summary |= {"run": {"name": "main", "point": params.sample.main.model_dump(mode="json")}}
    summary |= {"counts": {"phrases": n, "images": n // 2}}
    write_scores(frame, summary, params.results_dir / "scores/main.json")
    write_json(params.model_dir("gs") / "manifest.json", {"params": params.subtree(*PHASES["train"].keys)})


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Return a function from a document to its sweep with random scores, IoUs [trainings, phrases] and pixel counts."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)

    def make(**document):
        sweep = sweep_of(tmp_path, **document)
        ious = {(t.variant, t.seed): random.random(40) for t in sweep.trainings}
        pixels = {key: random.integers(1, 9, (20, 3, 4)) + np.array([[0], [9], [9]]) for key in ious}
        for training in sweep.trainings:
            _scores(training, ious[training.variant, training.seed])
        by_study = {t.params.study: pixels[t.variant, t.seed] for t in sweep.trainings}
        fake = SimpleNamespace(count=lambda path: SimpleNamespace(counts=by_study[path.parts[1]]))
        monkeypatch.setattr(comparison, "ClassPhrases", lambda params: fake)
        return sweep, ious, pixels

    return make


def test_table_agrees_with_brute_force(finished):
    sweep, ious, pixels = finished(matrix={**INJECTION, "train.cond_drop_prob": [0.1, 0.3]}, seeds=[0, 1, 2])
    folder = compare(sweep)
    table = pd.read_csv(folder / "some.csv").set_index("variant")
    assert list(table.index) == ["baseline", "token_injection=false", "cond_drop_prob=0.3"]
    assert table["train.token_injection"].tolist() == [True, False, True]
    assert table["train.cond_drop_prob"].tolist() == [0.1, 0.1, 0.3]
    random, means = np.random.default_rng(1), {}
    for name, row in table.iterrows():
        values = np.array([ious[name, seed] for seed in range(3)])
        means[name] = 100 * values.mean(1)
        assert row["overall"] == pytest.approx(means[name].mean())
        assert row["overall_sd"] == pytest.approx(np.std(means[name], ddof=1))
        assert row["miou"] == pytest.approx(100 * values[:, 0].mean())
        if name == "baseline":
            assert np.isnan(row["difference"])
            continue
        baseline = np.array([ious["baseline", seed] for seed in range(3)])
        assert row["difference"] == pytest.approx(100 * (values - baseline).mean())
        draws = []
        for _ in range(4000):
            images, trainings = random.integers(20, size=20), random.integers(3, size=3)
            drawn = np.stack([2 * images, 2 * images + 1], 1).ravel()
            draws.append(100 * np.mean([(values - baseline)[training][drawn].mean() for training in trainings]))
        expected = np.percentile(draws, [2.5, 97.5])
        assert row[["difference_low", "difference_high"]].tolist() == pytest.approx(expected, abs=2)
        iou = {key: (c.sum(0)[0] / (c.sum(0)[1] + c.sum(0)[2] - c.sum(0)[0])).mean() for key, c in pixels.items()}
        gains = [iou[name, seed] - iou["baseline", seed] for seed in range(3)]
        assert row["miou_difference"] == pytest.approx(100 * np.mean(gains))
    best = max(means, key=lambda name: means[name].mean())
    bold = [line for line in (folder / "some.tex").read_text().splitlines() if line.count(r"\textbf") >= 5]
    assert any(f"smoke-some-{best}-seed0" in line for line in bold)  # equal printed values are all in bold
    assert (folder / "some.tex").read_text().count(r"\toprule") == 1
    markdown = (folder / "some.md").read_text()
    assert "| token\\_injection | cond\\_drop\\_prob | Operating point | overall |" in markdown
    assert f"{table.loc['baseline', 'overall']:.1f} ± {table.loc['baseline', 'overall_sd']:.1f}" in markdown


def test_difference_of_one_training_is_the_paired_difference():
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"image_id": np.arange(30) // 3, "narrative_id": "n", "phrase_id": np.arange(30)})
    a, b = frame.assign(iou=random.random(30)), frame.assign(iou=random.random(30))
    sums = [side.assign(n=1.0).groupby("image_id")[["iou", "n"]].sum().to_numpy()[None] for side in (a, b)]
    found = trainings_difference(lambda total: total[..., 0] / total[..., 1], *sums, replicates=300, seed=4)
    expected = paired_difference(a, b, 300, 4)
    assert {**found, "n": 30} == pytest.approx(expected)


def test_unfinished_variant_and_other_budget_are_named(finished):
    sweep, _, _ = finished(variants={"slow": {"train.text": "pooled"}, "short": {"train.steps": 4}}, select="fixed")
    [slow] = [training.params for training in sweep.trainings if training.variant == "slow"]
    (slow.results_dir / "scores/main.json").unlink()
    text = (compare(sweep) / "some.md").read_text()
    assert "Not run: slow." in text
    assert "another number of samples than the baseline: short." in text


def test_scores_of_other_params_or_phrases_are_refused(finished):
    sweep, ious, _ = finished(matrix=INJECTION)
    variant = sweep.trainings[1]
    _scores(variant, ious[variant.variant, 0], area=10)
    with pytest.raises(UserError, match="other test phrases than the baseline's"):
        compare(sweep)
    write_json(variant.params.model_dir("gs") / "manifest.json", {"params": {}})
    with pytest.raises(UserError, match="made with other params than the sweep's"):
        compare(sweep)
    (sweep.trainings[0].params.results_dir / "scores/main.json").unlink()
    with pytest.raises(UserError, match="run `snakemake --cores all --config sweep="):
        compare(sweep)


def test_refinement_is_compared_on_the_real_baselines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = sweep_of(tmp_path, matrix={"refine.alpha": [0.5, 1.0]})
    random, replicates = np.random.default_rng(0), {}
    for training in sweep.trainings:
        entries = []
        for baseline, real in (("diffseg", True), ("gs", True), ("inexact_box", False)):
            paths = {side: f"{training.variant}/{baseline}/{side}" for side in ("coarse", "predictions")}
            entries.append({"refiner": "g4seg", "baseline": baseline, "real": real, **paths})
            entries[-1] |= {"coarse_classes": None, "class_predictions": None}
            replicates |= {path: 0.5 + 0.1 * random.random(200) for path in paths.values()}
        facts = {"params": training.params.subtree(*PHASES["refine"].keys), "images": [1, 2], "refined": entries, "outputs": {}}
        write_json(training.params.results_dir / "refined/manifest.json", facts)

    def measure(path, _):
        draws = replicates[path]
        return None, {"ar": (float(draws.mean()), draws), "miou": (float("nan"), np.full(200, np.nan))}

    monkeypatch.setattr(comparison, "RefinedPart", lambda *_: SimpleNamespace(measure=measure))
    monkeypatch.setattr(comparison, "read_phrases", lambda path: None)
    table = pd.read_csv(compare(sweep) / "some.csv").set_index("variant")
    draws = {name: np.mean([replicates[f"{name}/{b}/predictions"] for b in ("diffseg", "gs")], 0) for name in sweep.variants}
    [variant] = [name for name in draws if name != "baseline"]
    difference = draws[variant] - draws["baseline"]
    assert table.loc[variant, "ar"] == pytest.approx(100 * draws[variant].mean())
    assert table.loc[variant, "difference"] == pytest.approx(100 * difference.mean())
    bounds = table.loc[variant, ["difference_low", "difference_high"]].tolist()
    assert bounds == pytest.approx(100 * np.percentile(difference, [2.5, 97.5]))
    assert np.isnan(table.loc[variant, "miou"])


def test_trainings_of_the_study_itself_are_summarised_for_its_tables(finished):
    sweep, ious, _ = finished(seeds=[0, 1], select="fixed")
    summary = json.loads((compare(sweep) / "seeds.json").read_text())
    overall = [100 * ious["baseline", seed].mean() for seed in (0, 1)]
    assert summary["seeds"] == [0, 1]
    assert summary["points"]["overall"] == pytest.approx([np.mean(overall), np.std(overall, ddof=1)])
    other, _, _ = finished(seeds=[0, 1], baseline={"train.text": "pooled"}, select="fixed")
    assert not (compare(other) / "seeds.json").exists()


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
