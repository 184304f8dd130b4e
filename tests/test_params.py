"""Params: defaults, validation messages, and params as text."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from genseg.cli import main
from genseg.errors import UserError
from genseg.params import OperatingPoint, Params, load_params, read_document, validate_params
from genseg.params.text import differences, to_yaml
from genseg.sampling.runs import parse_point, point_path

PROJECT = Path(__file__).resolve().parents[1]
FILES = [PROJECT / "params.yaml", *sorted((PROJECT / "params").glob("*.yaml"))]
EPSILON = {
    "prediction_type": "epsilon",
    "self_estimate_prob": 0.0,
    "zero_terminal_snr": False,
    "terminal_warmup": 0.0,
    "mask_loss_weight": 0.0,
}


@pytest.fixture
def document():
    """The embedded study's params as a document that a test may change."""
    return Params().model_dump(mode="json")


# ------------------------------------------------------------------------------------------------------ shipped files
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shipped_file_is_valid(path):
    params = load_params(path)
    assert params.sample.grid_points()[0] == params.sample.base


def test_studies_have_different_names():
    names = [load_params(path).study for path in FILES]
    assert len(set(names)) == len(names)


def test_params_yaml_lists_every_key_with_its_default_and_a_comment():
    text = (PROJECT / "params.yaml").read_text()
    assert text.endswith(to_yaml(Params()))
    assert yaml.safe_load(text).keys() == Params.model_fields.keys()
    lines = text.splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        is_list_item = line.lstrip().startswith("- ")
        assert not line.strip() or is_list_item or "# " in line or above.lstrip().startswith("# "), line


@pytest.mark.parametrize("path", FILES[1:], ids=lambda path: path.name)
def test_study_files_do_not_repeat_defaults(path):
    """Except paper.yaml, which lists every value of the paper, and dictionaries, which are replaced as a whole."""
    if path.name == "paper.yaml":
        return
    listed = {key for key, _, _ in differences(Params(), load_params(path))}

    def leaves(node, prefix=""):
        if isinstance(node, dict) and prefix not in ("data.index_masks.", "data.png.", "backbone.shape."):
            for name, value in node.items():
                yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix.removesuffix(".")

    document = yaml.safe_load(path.read_text())
    repeated = [key for key in leaves(document) if not any(item == key or item.startswith(f"{key}.") for item in listed)]
    assert all(key.startswith(("baselines.inexact", "data.scenes.radii")) for key in repeated), repeated


def test_paper_study_has_the_values_of_the_paper():
    paper = load_params(PROJECT / "params" / "paper.yaml")
    train, sample, optimizer = paper.train, paper.sample, paper.train.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.lr_new, optimizer.weight_decay) == ("adam", 1e-7, None, 0)
    assert (train.batch, train.epochs, train.steps) == (128, 10, None)
    assert (train.prediction_type, train.zero_terminal_snr) == ("epsilon", False)
    assert sample.base == sample.main == OperatingPoint(size=1024, num_inference_steps=50, guidance_scale=7.5)
    assert (sample.base.sampler, sample.base.ensemble_size, sample.base.guidance_interval) == ("ddim", 1, None)
    assert (sample.timestep_spacing, sample.readout) == ("trailing", "bilinear")
    assert (train.label, train.terminal_warmup, train.terminal_timestep_prob, train.stages) == ("mask", 0, 0, [])
    grid = sample.grid
    assert (grid.sizes, grid.num_inference_steps, grid.guidance_scale) == ([768, 512], [30, 20], [8.0, 7.0])
    assert sample.grid_fraction == 0.07
    assert paper.backbone.init == "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"


# ----------------------------------------------------------------------------------------------------------- defaults
def test_keys_that_are_not_listed_have_their_defaults():
    params = validate_params({"sample": {"base": {"size": 64}}, "train": {"optimizer": {"lr": 1e-5}}})
    assert params.sample.base == Params().sample.base.model_copy(update={"size": 64})
    assert params.train.optimizer == Params().train.optimizer.model_copy(update={"lr": 1e-5})
    assert params.backbone == Params().backbone


def test_operating_points_have_the_size_of_the_main_point():
    points = [{"num_inference_steps": 4, "guidance_scale": 1.0}]
    for sample in ({"main": {"size": 64}}, {"main": {"size": 64}, "operating_points": points}):
        assert {point.size for point in validate_params({"sample": sample}).sample.operating_points} == {64}
    with pytest.raises(UserError, match=r"must have the size of sample\.main"):
        validate_params({"sample": {"operating_points": [points[0] | {"size": 96}]}})


def test_resolved_document_is_valid_and_equal(document):
    assert validate_params(document) == Params()
    assert validate_params(yaml.safe_load(to_yaml(load_params(PROJECT / "params/smoke.yaml")))).study == "smoke"


def test_val_points_are_the_main_point_and_the_operating_points_without_duplicates(document):
    document["sample"]["main"] |= {"num_inference_steps": 2, "ensemble_size": 1, "mirror": False}
    document["sample"]["operating_points"] = [
        {"num_inference_steps": 2, "guidance_scale": 1.0},
        {"num_inference_steps": 4, "guidance_scale": 1.0, "sampler": "dpmpp"},
    ]
    sample = validate_params(document).sample
    other = OperatingPoint(size=128, num_inference_steps=4, guidance_scale=1.0, sampler="dpmpp")
    assert sample.val_points() == [sample.main, other]
    assert set(sample.val_points()) <= set(sample.test_subset_points())
    assert sample.test_subset_points()[0] == sample.base


# ------------------------------------------------------------------------------------------------------------- errors
def stage(objective, guidance_scale):
    return {"objective": objective, "steps": 5, "lr_factor": 0.5, "guidance_scale": guidance_scale}


def set_leading_spacing_with_1000_steps(document):
    document["train"].update(EPSILON, terminal_timestep_prob=0.0)
    document["sample"].update(timestep_spacing="leading")
    document["sample"]["operating_points"].append({"num_inference_steps": 1000, "guidance_scale": 1.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["train"].update(guidence=3), "train.guidence"),
        (lambda d: d["train"]["optimizer"].update(lrnew=3), "did you mean train.optimizer.lr_new"),
        (lambda d: d["sample"]["base"].update(num_steps=3), "did you mean sample.base.num_inference_steps"),
        (lambda d: d.update(smaple=d.pop("sample")), "did you mean sample"),
        (lambda d: d["resources"]["score"].update(gpus=1), "did you mean resources.score.gpu?"),
        (lambda d: d["train"].update(cond_drop_prob=1.5), "train.cond_drop_prob"),
        (lambda d: d["train"].update(prediction_type="epsilon"), "zero terminal SNR"),
        (lambda d: d["train"].update(batch=30), "train.batch (30) must be divisible by train.micro_batch (16)"),
        (lambda d: d["train"].update(epochs=2), "exactly one"),
        (lambda d: d["data"].update(source="png"), "data.png must not be null"),
        (lambda d: d["data"].update(class_template="a thing"), "{name}"),
        (lambda d: d["data"].update(class_template="the {name} of {foo}"), "no other braces"),
        (lambda d: d["data"].update(phrase_templates=["{name} {name}"]), "must contain {name} once"),
        (lambda d: d["data"]["scenes"].update(shapes=["ring", "star", "ring"]), "data.scenes.shapes: duplicate value"),
        (lambda d: d["data"]["scenes"]["radii"].update(small=[0.3, 0.1]), "data.scenes.radii: expected small"),
        (lambda d: d["data"]["scenes"]["radii"].update(large=[0.2, 0.6]), "at most 0.5"),
        (lambda d: d["data"]["scenes"]["radii"].pop("large"), "data.scenes.radii: expected small"),
        (lambda d: d["train"].update(cond_drop_prob=True), "train.cond_drop_prob: expected a number, got a boolean"),
        (
            lambda d: d["sample"]["grid"].update(num_inference_steps=[30, True]),
            "sample.grid.num_inference_steps.1: expected a number, got a boolean",
        ),
        (lambda d: d["backbone"].update(init=None), "exactly one"),
        (lambda d: d["sample"]["grid"].update(guidance_scale=[0.5]), "sample.grid.guidance_scale"),
        (
            lambda d: d["sample"]["operating_points"].append(
                {"num_inference_steps": 4, "guidance_scale": 2.0, "samplr": "ddpm"}
            ),
            "did you mean sample.operating_points.12.sampler?",
        ),
        (lambda d: d["sample"]["operating_points"].append({"guidance_scale": 2.0}), "12.num_inference_steps is required"),
        (lambda d: d["sample"]["main"].update(size=0), "sample.main.size"),
        (lambda d: d["sample"]["main"].update(guidance_interval=[0.8, 0.2]), "must be ascending"),
        (lambda d: d["train"].update(stages=[stage("distill", None)]), "guidance_scale is required with objective distill"),
        (lambda d: d["train"].update(stages=[stage("mask_loss", 2.0)]), "must be null with mask_loss"),
        (lambda d: d["train"].update(EPSILON, stages=[stage("mask_loss", None)]), "objective mask_loss needs an estimate"),
        (
            lambda d: d["train"].update(EPSILON, terminal_timestep_prob=0.3),
            "train.terminal_timestep_prob needs train.zero_terminal_snr",
        ),
        (lambda d: d["train"].update(EPSILON, terminal_warmup=0.5), "train.terminal_warmup needs train.zero_terminal_snr"),
        (lambda d: d["sample"].update(timestep_spacing="leading"), "leading omits the last timestep"),
        (set_leading_spacing_with_1000_steps, "no grid of 1000 steps"),
        (lambda d: d["train"].update(label="vae"), "BCE + Dice"),
        (lambda d: d["train"].update(label="vae", mask_loss_weight=0.0), "sample.clip_sample false"),
        (lambda d: d.update(study="a b"), "study"),
        (lambda d: d.update(device="gpu"), "device"),
    ],
)
def test_mistake_is_reported_in_one_line_that_names_the_key(document, change, message):
    change(document)
    with pytest.raises(UserError) as caught:
        validate_params(document, "params.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_without_params_is_rejected(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        load_params(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="mapping"):
        load_params(tmp_path / "list.yaml")
    (tmp_path / "latin.yaml").write_bytes("study: mini  # é".encode("latin1"))
    with pytest.raises(UserError, match="UTF-8"):
        load_params(tmp_path / "latin.yaml")
    (tmp_path / "twice.yaml").write_text("a: {b: 1}\nc:\n  d: 1\n  e: 2\n  d: 3\n")
    with pytest.raises(UserError, match=r"duplicate key d.*line 5"):
        load_params(tmp_path / "twice.yaml")
    (tmp_path / "merged.yaml").write_text("x: &x {b: 1, c: 2}\ny: &y {<<: *x, b: 3}\nz: {<<: *y, c: 4}\n")
    assert read_document(tmp_path / "merged.yaml", "sweep")["z"] == {"b": 3, "c": 4}
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="YAML"):
        load_params(tmp_path / "bad.yaml")


# ------------------------------------------------------------------------------------------------------------ command
def test_params_command_prints_the_resolved_document_and_differences(capsys, tmp_path):
    assert main(["params", str(PROJECT / "params/camvid.yaml")]) == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
    assert load_params(tmp_path / "resolved.yaml") == load_params(PROJECT / "params/camvid.yaml")
    assert main(["params", str(tmp_path / "resolved.yaml"), str(PROJECT / "params/camvid.yaml")]) == 0
    assert capsys.readouterr().out == ""
    assert main(["params", str(PROJECT / "params.yaml"), str(PROJECT / "params/paper.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "train.optimizer.lr: 0.0003 -> 1.0e-07" in lines
    assert "data.source: scenes -> png" in lines
    assert not any(line.startswith("sample.base.guidance_scale") for line in lines)


# ---------------------------------------------------------------------------------------------- operating-point paths
@given(
    st.integers(1, 9999),
    st.integers(1, 1000),
    st.integers(100, 9999),
    st.sampled_from(["ddim", "ddpm", "dpmpp", "mean"]),
    st.none() | st.lists(st.integers(0, 1000).map(lambda n: n / 1000), min_size=2, max_size=2).map(sorted).map(tuple),
    st.integers(1, 99),
    st.booleans(),
)
def test_path_of_an_operating_point_is_parsed_to_the_same_point(
    size, steps, hundredths, sampler, interval, ensemble_size, mirror
):
    point = OperatingPoint(
        size=size,
        num_inference_steps=steps,
        guidance_scale=hundredths / 100,
        sampler=sampler,
        guidance_interval=interval,
        ensemble_size=ensemble_size,
        mirror=mirror and ensemble_size > 1,
    )
    path = point_path(point)
    assert parse_point(path) == point
    assert path.count("/") == 2, "no point's folder is inside another's"


def test_path_of_a_point_without_options_has_three_parts():
    point = OperatingPoint(size=128, num_inference_steps=50, guidance_scale=7.5)
    assert point_path(point) == "size=0128/steps=0050/cfg=07.50"


def test_points_that_a_path_cannot_represent_are_rejected():
    with pytest.raises(UserError, match="two decimals"):
        point_path(OperatingPoint(size=1, num_inference_steps=1, guidance_scale=1.234))
    with pytest.raises(UserError, match="three decimals"):
        point_path(OperatingPoint(size=1, num_inference_steps=1, guidance_scale=2.0, guidance_interval=(0.1234, 0.5)))
    with pytest.raises(UserError, match="not the path"):
        parse_point("size=1/steps=2")
