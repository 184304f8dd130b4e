"""Params files: complete, typed, and with errors that help."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from genseg.errors import UserError
from genseg.params import Cell, load_params, read_document, validate_params
from genseg.sampling.runs import cell_path, parse_cell

PROJECT = Path(__file__).resolve().parents[1]
FILES = [PROJECT / "params.yaml", *sorted((PROJECT / "params").glob("*.yaml"))]


@pytest.fixture
def document():
    return yaml.safe_load((PROJECT / "params.yaml").read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_shipped_file_is_valid(path):
    params = load_params(path)
    assert params.sample.cells()[0] == params.sample.base


NOISE = {"prediction": "noise", "zero_terminal_snr": False, "task_weight": 0.0}


def stage(objective, guidance):
    return {"objective": objective, "steps": 5, "lr_factor": 0.5, "guidance": guidance}


def test_studies_have_names_of_their_own():
    names = [load_params(path).study for path in FILES]
    assert len(set(names)) == len(names)


def test_paper_is_the_paper():
    paper = load_params(PROJECT / "params" / "paper.yaml")
    train, sample = paper.train, paper.sample
    assert (train.optimizer.name, train.optimizer.lr, train.optimizer.lr_new, train.optimizer.weight_decay) == (
        "adam",
        1e-7,
        None,
        0,
    )
    assert (train.batch, train.epochs, train.steps, train.prediction, train.zero_terminal_snr) == (
        128,
        10,
        None,
        "noise",
        False,
    )
    assert sample.base == sample.main == Cell(size=1024, steps=50, guidance=7.5)
    assert (sample.base.rule, sample.base.ensemble, sample.base.guidance_interval) == ("ddim", 1, None)
    assert (sample.spacing, sample.readout) == ("trailing", "bilinear")
    assert (train.label, train.p_last, train.stages) == ("mask", 0, [])
    assert (sample.grid.sizes, sample.grid.steps, sample.grid.guidance) == ([768, 512], [30, 20], [8.0, 7.0])
    assert sample.grid_fraction == 0.07
    assert paper.backbone.init == "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["train"].update(guidence=3), "train.guidence"),
        (lambda d: d["train"]["optimizer"].update(lrnew=3), "did you mean train.optimizer.lr_new"),
        (lambda d: d["sample"]["base"].update(step=3), "did you mean sample.base.steps"),
        (lambda d: d.update(smaple=d.pop("sample")), "did you mean sample"),
        (lambda d: d["train"].pop("p_drop"), "train.p_drop is missing"),
        (lambda d: d["train"].update(p_drop=1.5), "train.p_drop"),
        (lambda d: d["train"].update(prediction="noise"), "zero terminal SNR"),
        (lambda d: d["train"].update(batch=30), "micro_batch"),
        (lambda d: d["train"].update(epochs=2), "exactly one"),
        (lambda d: d["data"].update(source="png"), "data.png must not be null"),
        (lambda d: d["data"].update(class_template="a thing"), "{name}"),
        (lambda d: d["data"].update(class_template="the {name} of {foo}"), "no other braces"),
        (lambda d: d["data"].update(phrase_templates=["{name} {name}"]), "{name} where the class name goes, once"),
        (lambda d: d["data"]["scenes"].update(shapes=["ring", "star", "ring"]), "data.scenes.shapes: name each once"),
        (lambda d: d["data"]["scenes"]["radii"].update(small=[0.3, 0.1]), "data.scenes.radii: give small"),
        (lambda d: d["data"]["scenes"]["radii"].update(large=[0.2, 0.6]), "at most 0.5"),
        (lambda d: d["data"]["scenes"]["radii"].pop("large"), "data.scenes.radii: give small"),
        (lambda d: d["train"].update(p_drop=True), "train.p_drop: true and false are no numbers"),
        (lambda d: d["sample"]["grid"].update(steps=[30, True]), "sample.grid.steps.1: true and false are no numbers"),
        (lambda d: d["backbone"].update(init=None), "exactly one"),
        (lambda d: d["sample"]["grid"].update(guidance=[0.5]), "sample.grid.guidance"),
        (
            lambda d: d["sample"]["points"].append({"steps": 4, "guidance": 2.0, "rle": "ddpm"}),
            "did you mean sample.points.7.rule?",
        ),
        (lambda d: d["sample"]["main"].update(guidance_interval=[0.8, 0.2]), "must ascend"),
        (lambda d: d["train"].update(stages=[stage("distill", None)]), "guidance belongs to objective distill"),
        (lambda d: d["train"].update(stages=[stage("task", 2.0)]), "guidance belongs to objective distill"),
        (lambda d: d["train"].update(NOISE, stages=[stage("task", None)]), "objective task needs an estimate"),
        (lambda d: d["train"].update(NOISE, p_last=0.3), "train.p_last needs train.zero_terminal_snr"),
        (lambda d: d["sample"].update(spacing="leading"), "leading never asks at the last timestep"),
        (
            lambda d: (
                d["train"].update(NOISE, p_last=0.0),
                d["sample"].update(spacing="leading"),
                d["sample"]["points"].append({"steps": 1000, "guidance": 1.0}),
            ),
            "no grid of 1000 steps",
        ),
        (lambda d: d["train"].update(label="vae"), "BCE + Dice"),
        (lambda d: d["train"].update(label="vae", task_weight=0.0), "sample.clip_x_0 must be false"),
        (lambda d: d["resources"].pop("score"), "score"),
        (lambda d: d.update(study="a b"), "study"),
        (lambda d: d.update(device="gpu"), "device"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(document, change, message):
    change(document)
    with pytest.raises(UserError) as caught:
        validate_params(document, "params.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_params(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        load_params(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="mapping"):
        load_params(tmp_path / "list.yaml")
    (tmp_path / "latin.yaml").write_bytes("study: mini  # é".encode("latin1"))
    with pytest.raises(UserError, match="UTF-8"):
        load_params(tmp_path / "latin.yaml")
    (tmp_path / "twice.yaml").write_text("a: {b: 1}\nc:\n  d: 1\n  e: 2\n  d: 3\n")
    with pytest.raises(UserError, match=r"key d stands twice.*line 5"):
        load_params(tmp_path / "twice.yaml")
    (tmp_path / "merged.yaml").write_text("x: &x {b: 1, c: 2}\ny: &y {<<: *x, b: 3}\nz: {<<: *y, c: 4}\n")
    assert read_document(tmp_path / "merged.yaml", "sweep")["z"] == {"b": 3, "c": 4}
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="YAML"):
        load_params(tmp_path / "bad.yaml")


@given(
    st.integers(1, 9999),
    st.integers(1, 1000),
    st.integers(100, 9999),
    st.sampled_from(["ddim", "ddpm", "dpmpp"]),
    st.none() | st.lists(st.integers(0, 1000).map(lambda n: n / 1000), min_size=2, max_size=2).map(sorted).map(tuple),
    st.integers(1, 99),
)
def test_cell_paths_parse_back(size, steps, hundredths, rule, interval, ensemble):
    options = {"rule": rule, "guidance_interval": interval, "ensemble": ensemble}
    cell = Cell(size=size, steps=steps, guidance=hundredths / 100, **options)
    path = cell_path(cell)
    assert parse_cell(path) == cell
    assert path.count("/") == 2, "a cell's folder never lies in another's"


def test_the_path_of_a_plain_cell_is_what_it_was():
    assert cell_path(Cell(size=128, steps=50, guidance=7.5)) == "size=0128/steps=0050/cfg=07.50"


def test_operating_points_are_cells_of_the_main_size_without_repeats(document):
    document["sample"]["main"]["steps"] = 2
    document["sample"]["points"] = [{"steps": 2, "guidance": 1.0}, {"steps": 4, "guidance": 1.0, "rule": "dpmpp"}]
    sample = validate_params(document).sample
    assert sample.operating_points() == [sample.main, Cell(size=128, steps=4, guidance=1.0, rule="dpmpp")]
    assert set(sample.operating_points()) <= set(sample.grid_cells())
    assert sample.grid_cells()[0] == sample.base


def test_cell_paths_refuse_what_they_cannot_hold():
    with pytest.raises(UserError, match="two decimals"):
        cell_path(Cell(size=1, steps=1, guidance=1.234))
    with pytest.raises(UserError, match="three decimals"):
        cell_path(Cell(size=1, steps=1, guidance=2.0, guidance_interval=(0.1234, 0.5)))
    with pytest.raises(UserError, match="not the path"):
        parse_cell("size=1/steps=2")
