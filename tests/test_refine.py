"""G4Seg: invariants over random inputs, comparison with a brute-force definition, and the command line."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.distance import directed_hausdorff
from transformers import CLIPTextConfig, CLIPTextModel

from genseg.artifacts import masks
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import write_phrases
from genseg.artifacts.predictions import maps_path, read_maps, read_predictions, write_maps, write_predictions
from genseg.artifacts.resample import area_reduce
from genseg.cli.main import main
from genseg.errors import UserError
from genseg.models.miniature import build_miniature, learn_tokenizer
from genseg.models.text_to_image import TextToImage
from genseg.params import Params, load_params
from genseg.params.backbone import BackboneShape
from genseg.refine.crf import refine_masks
from genseg.refine.g4seg import refine_predictions
from genseg.refine.g4seg_steps import (
    MIN_PROBABILITY,
    PhraseBlock,
    choose_cuts,
    confident,
    confusion_area,
    correspondence,
    cuts,
    evidence,
    first_probability,
    generate,
    hypothesis,
    read_out,
    set_distance,
    unit_features,
    update,
)
from genseg.refine.layout import forward_passes, variants

CAPTIONS = ["two small red circles near the grass", "a large striped blue star", "some water"]
SMOKE = load_params("params/smoke.yaml")
SIDE = 40
GRID = (6, 6)
CUT = torch.tensor(0.05)


@pytest.fixture(scope="module")
def study() -> Params:
    return SMOKE


@pytest.fixture(scope="module")
def refine(study):
    return study.refine.model_copy(update={"size": 32, "feature_size": 16, "maps": SIDE, "readout": "bilinear"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two pipeline directories with random weights, shaped like SDXL and like Stable Diffusion 2.1."""
    root = tmp_path_factory.mktemp("pipelines")
    shape = BackboneShape(
        unet_channels=[16, 32, 32],
        transformer_layers=[1, 1, 1],
        attention_head_channels=16,
        vae_channels=[8, 16],
        text_width=32,
        text_layers=2,
        vocabulary=120,
    )
    build_miniature(shape, 32, CAPTIONS, seed=0).save_pretrained(root / "sdxl")
    torch.manual_seed(0)
    tokenizer = learn_tokenizer(CAPTIONS, 120, "<|endoftext|>")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(root / "sd21")
    return root


@pytest.fixture(scope="module", params=["sdxl", "sd21"])
def model(request, folders):
    return TextToImage(str(folders / request.param), None, torch.device("cpu"))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Phrases and coarse predictions of two images with three phrases each; one mask is empty and one is full."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    rows, predictions = [], []
    for image_id in (1, 2):
        name = folder / f"{image_id}.png"
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE + 8, 3), np.uint8)).save(name)
        for phrase_id, phrase in enumerate(("two small red circles", "the grass", "some water")):
            mask = np.zeros((SIDE, SIDE + 8), bool)
            if phrase_id == 0:
                mask[8:24, 10 : 20 + 4 * image_id] = True
            elif phrase_id == 1:
                mask[:, 20:] = True
            elif image_id == 2:
                mask[:] = True
            rows.append(
                {
                    **dict(zip(KEY, (image_id, "n", phrase_id), strict=True)),
                    "split": "test",
                    "file_name": str(name),
                    "height": SIDE,
                    "width": SIDE + 8,
                    "caption": None,
                    "phrase": phrase,
                    "is_thing": True,
                    "is_plural": False,
                    "class_id": None,
                    "segment_ids": None,
                    "mask": masks.encode(mask),
                    "tags": None,
                }
            )
            predictions.append((image_id, "n", phrase_id, masks.encode(mask), 0.25 * phrase_id))
    return pd.DataFrame(rows), pd.DataFrame(predictions, columns=[*KEY, "mask", "score"])


# ---------------------------------------------------------------------------------------------------- arithmetic
def random_inputs(seed: int, cells: int = 36):
    """P [N] and D [N, N] in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(cells, generator=generator), torch.rand(cells, cells, generator=generator)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_update_changes_only_the_confusion_area_and_stays_in_the_unit_interval(seed, gate):
    refine = SMOKE.refine.model_copy(update={"gate": gate})
    probability, distances = random_inputs(seed)
    step = update(evidence(probability, distances, GRID, refine), CUT, refine)
    assert torch.equal(step.after[~step.confusion], probability[~step.confusion])
    assert ((step.after >= 0) & (step.after <= 1) & (step.discrepancy >= 0) & (step.discrepancy <= 1)).all()
    between = torch.stack([probability, step.target]).sort(0).values
    assert ((step.after >= between[0] - 1e-6) & (step.after <= between[1] + 1e-6)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_update_leaves_p_unchanged_with_constant_distances(seed, gate):
    refine = SMOKE.refine.model_copy(update={"gate": gate})
    probability, _ = random_inputs(seed)
    step = update(evidence(probability, torch.zeros(36, 36), GRID, refine), CUT, refine)
    assert torch.equal(step.after, probability)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_maximal_set_distance_with_one_neighbour_is_the_hausdorff_distance(seed):
    """Compares with scipy, for Euclidean distances and a region of all cells."""
    generator = np.random.default_rng(seed)
    original, generated = generator.normal(size=(2, 20, 3))
    distances = torch.from_numpy(np.linalg.norm(original[:, None] - generated[None], axis=-1))
    everything = torch.arange(20)
    ours = max(set_distance(distances, everything, 1).max(), set_distance(distances.T, everything, 1).max())
    expected = max(directed_hausdorff(original, generated)[0], directed_hausdorff(generated, original)[0])
    assert ours.item() == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_update_equals_the_literal_definition(seed, neighbours):
    refine = SMOKE.refine.model_copy(update={"num_neighbours": neighbours, "gate": True})
    probability, distances = random_inputs(seed)
    step = update(evidence(probability, distances, GRID, refine), CUT, refine)
    P, D = probability.numpy(), distances.numpy()
    omega = {1: np.flatnonzero(refine.confidence_thresholds[1] <= P), 0: np.flatnonzero(refine.confidence_thresholds[0] >= P)}

    def d(p, label, matrix):
        return np.sort(matrix[p, omega[label]])[:neighbours].mean()

    H = np.array([max(d(p, int(P[p] >= 0.5), D), d(p, int(P[p] >= 0.5), D.T)) for p in range(36)])
    U = step.confusion.numpy()
    g = np.where(U, (H - H[U].min()) / np.ptp(H[U]), 0)
    Q = np.array([(d(p, 0, D) + d(p, 0, D.T) - d(p, 1, D) - d(p, 1, D.T)) / 2 for p in range(36)])
    Q = 1 / (1 + np.exp(-(Q - CUT.item()) / refine.temperature))
    np.testing.assert_allclose(step.discrepancy.numpy(), g, atol=1e-5)
    expected = np.where(U, P + (1 - refine.beta) * g * (Q - P), P)
    np.testing.assert_allclose(step.after.numpy(), expected, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.2, 0.4]))
def test_confusion_area_equals_brute_force(seed, band):
    probability = random_inputs(seed)[0]
    area = confusion_area(probability, GRID, 0.2, 0.8, band).view(GRID)
    P, radius = probability.view(GRID).numpy(), round(band * 6)
    for y in range(6):
        for x in range(6):
            window = P[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1] > 0.5
            assert area[y, x].item() == (0.2 < P[y, x] < 0.8 or window.any() != window.all())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(0.05, 0.95), max_size=4))
def test_hypotheses_threshold_the_margin_at_zero_and_its_quantiles(seed, quantiles):
    probability, distances = random_inputs(seed)
    observed = evidence(probability, distances, GRID, SMOKE.refine)
    inside, margin = observed.confusion.numpy(), observed.margin.numpy()
    expected_cuts = [0.0, *(np.quantile(margin[inside], quantile) for quantile in quantiles)]
    values = cuts(observed, quantiles)
    np.testing.assert_allclose(values.numpy(), expected_cuts, atol=1e-6)
    for value in values:
        expected = np.where(inside, margin > value.item(), probability.numpy() > 0.5)
        assert (hypothesis(observed, value).numpy() == expected).all()


def test_confident_regions_are_never_empty():
    foreground, background = confident(torch.full((40,), 0.5), 0.2, 0.8)
    assert len(foreground) == len(background) == 2


def test_correspondence_is_one_minus_the_mean_cosine():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 5, 4, 4, generator=generator), torch.randn(2, 3, 2, 2, generator=generator)]
    features = [unit_features(value, (4, 4)) for value in maps]
    distances = correspondence(features, features)
    assert distances.shape == (2, 16, 16)
    torch.testing.assert_close(distances.diagonal(dim1=1, dim2=2), torch.zeros(2, 16), atol=1e-5, rtol=0)
    centred = maps[0][0].flatten(1).T - maps[0][0].flatten(1).T.mean(0)
    cosine = torch.nn.functional.cosine_similarity(centred[3], centred[7], dim=0)
    assert (features[0][0, 3] @ features[0][0, 7]).item() == pytest.approx(cosine.item(), abs=1e-5)


# ------------------------------------------------------------------------------------------------ whole refiner
def test_pixels_outside_the_confusion_area_are_unchanged(model, tables, refine):
    phrases, coarse = tables
    traces = []
    frame, _ = refine_predictions(phrases, coarse, model, refine, 0, observe=traces.append)
    changed = 0
    for trace in traces:
        touched = np.zeros((16, 16), bool)
        for step in trace.updates:
            touched |= step.confusion.numpy().reshape(16, 16)
        reach = np.asarray(Image.fromarray(touched).resize((SIDE + 8, SIDE), Image.Resampling.NEAREST))
        far = np.array(
            [[not reach[max(0, y - 4) : y + 5, max(0, x - 4) : x + 5].any() for x in range(SIDE + 8)] for y in range(SIDE)]
        )
        assert np.array_equal(trace.result.mask[far], trace.coarse[far])
        changed += (trace.result.mask != trace.coarse).sum()
    assert changed > 0
    assert frame[KEY].equals(coarse[KEY])
    assert frame["score"].equals(coarse["score"])
    for row in (2, 5):  # an empty and a full mask
        assert frame["mask"][row] == coarse["mask"][row]


def test_results_depend_on_the_seed_but_not_on_batch_size_or_order(model, tables, refine):
    phrases, coarse = tables
    results = [
        refine_predictions(phrases, table, model, refine.model_copy(update={"batch": batch}), seed)[0]["mask"]
        for batch, table, seed in ((8, coarse, 0), (1, coarse[::-1], 0), (8, coarse, 0), (8, coarse, 1))
    ]
    pixels = np.stack([[masks.decode(code, SIDE, SIDE + 8) for code in result] for result in results])
    assert (pixels[0] != pixels[1]).mean() < 1e-3
    assert results[0].equals(results[2])
    assert not results[0].equals(results[3])


def test_alpha_zero_generates_the_same_as_the_stock_network(model, tables, refine):
    phrases, coarse = tables
    calls, traces = [], []
    predict = model.predict

    def spy(x_t, t, *rest):
        output = predict(x_t, t, *rest)
        calls.append((x_t, t, output))
        return output

    model.predict = spy
    try:
        refine_predictions(phrases.iloc[:2], coarse.iloc[:2], model, refine, 0, "alpha_zero", observe=traces.append)
    finally:
        del model.predict
    (stock_input, t, output), (x_t, _, injected) = calls[0], calls[1]
    assert torch.equal(x_t, stock_input)
    assert torch.equal(injected, output)
    assert len(calls) == forward_passes(variants(refine)["alpha_zero"])
    alpha = model.alphas[t]
    if model.prediction_type == "epsilon":
        z_0 = (x_t - (1 - alpha).sqrt() * output) / alpha.sqrt()
    else:
        z_0 = alpha.sqrt() * x_t - (1 - alpha).sqrt() * output
    torch.testing.assert_close(traces[0].generated[0], z_0[0], rtol=1e-5, atol=1e-5)


def test_chosen_cut_minimises_the_error_of_the_predicted_noise(model, tables, refine):
    """Compares with brute force, which evaluates every phrase, hypothesis and timestep separately."""
    phrases, coarse = tables
    changed = refine.model_copy(update={"cut_quantiles": [0.3, 0.7], "choice_timesteps": [300, 700]})
    traces = []
    refine_predictions(phrases, coarse, model, changed.model_copy(update={"iterations": 0}), 0, observe=traces.append)
    traces = [trace for trace in traces if trace.coarse.any() and not trace.coarse.all()]
    start = [first_probability(trace.coarse, changed) for trace in traces]
    grid = (changed.feature_size, changed.feature_size)
    evidences = [evidence(p, random_inputs(seed, len(p))[1], grid, changed) for seed, p in enumerate(start)]
    chosen = choose_cuts(PhraseBlock(traces, model, changed, 0), evidences)
    for trace, observed, cut in zip(traces, evidences, chosen, strict=True):
        alone = PhraseBlock([trace], model, changed, 0)
        errors = []
        values = [*cuts(observed, changed.cut_quantiles), None]
        for value in values:
            mask = observed.probability
            if value is not None:
                mask = hypothesis(observed, value).clamp(MIN_PROBABILITY, 1 - MIN_PROBABILITY)
            total = 0.0
            for t in (300, 700):
                alpha = model.alphas[t]
                z_t = alpha.sqrt() * alone.latents + (1 - alpha).sqrt() * alone.noise
                z_0 = generate(alone, t, mask[None])
                predicted = (z_t - alpha.sqrt() * z_0) / (1 - alpha).sqrt()
                total += (predicted - alone.noise).square().mean().item()
            errors.append(total)
        best = values[int(np.argmin(errors))]
        assert cut is best is None or cut == best
    without_injection = choose_cuts(PhraseBlock(traces, model, changed.model_copy(update={"alpha": 0.0}), 0), evidences)
    assert not any(without_injection)


def test_each_variant_differs_from_g4seg_as_its_name_says(model, tables, refine):
    phrases, coarse = tables
    results = {}
    for name in ("g4seg", "alpha_zero", "gate", "no_generation", "unconditioned", "random", "beta=0.75"):
        traces = []
        frame, _ = refine_predictions(phrases, coarse, model, refine, 0, name, observe=traces.append)
        results[name] = (traces, frame)
        assert len(traces[0].updates) == variants(refine)[name].iterations
        assert bool(traces[0].generated) == (variants(refine)[name].generation > 0)
    ours = results["g4seg"][0][0].updates[0]
    for name in ("alpha_zero", "no_generation", "unconditioned"):
        assert not torch.equal(results[name][0][0].updates[0].discrepancy, ours.discrepancy), name
    gated = results["gate"][0][0].updates[0]
    weight = (1 - refine.beta) * ours.discrepancy
    torch.testing.assert_close(gated.after, ours.probability + weight * (ours.target - ours.probability))
    counts = [[(trace.result.mask != trace.coarse).sum() for trace in results[name][0]] for name in ("g4seg", "random")]
    assert counts[0] == counts[1]
    assert not results["g4seg"][1]["mask"].equals(results["random"][1]["mask"])
    summarised = variants(refine)["as_summarised"]
    assert (summarised.gate, summarised.cut_quantiles, summarised.readout) == (True, [], "bilinear")
    assert summarised.evidence_timesteps == []
    assert (summarised.alpha, summarised.inject) == (refine.alpha, ["cross", "self"])


def test_bilinear_read_out_cuts_p_inside_the_confusion_area(refine):
    rng = np.random.default_rng(0)
    coarse, picture = rng.random((20, 24)) > 0.5, rng.integers(0, 256, (20, 24, 3), np.uint8)
    after = rng.random((4, 4)).astype(np.float32)
    result = read_out(coarse, picture, after, after, np.ones((4, 4), bool), refine)
    expected = torch.nn.functional.interpolate(torch.from_numpy(after)[None, None], (20, 24), mode="bilinear")[0, 0] >= 0.5
    assert np.array_equal(result.mask, expected.numpy())
    assert result.area.all()
    assert not result.change.any()
    outside = read_out(coarse, picture, after, after, np.zeros((4, 4), bool), refine)
    assert np.array_equal(outside.mask, coarse)


def test_crf_read_out_of_an_unchanged_p_is_the_crf_control_and_keeps_thin_things(refine):
    rng = np.random.default_rng(0)
    coarse = np.zeros((20, 24), bool)
    coarse[:, 11] = True  # thinner than a cell
    picture = np.where(coarse[..., None], 220, 30).astype(np.uint8).repeat(3, -1)
    p = area_reduce(coarse, 4, 4)
    refine = refine.model_copy(update={"readout": "crf"})
    result = read_out(coarse, picture, p, p, np.ones((4, 4), bool), refine)
    assert np.array_equal(result.mask, refine_masks(coarse[None], picture, refine.crf, False)[0])
    assert np.array_equal(result.mask, coarse)
    larger = p + 0.9 * (rng.random((4, 4)) > 0.5)
    moved = read_out(coarse, picture, p, larger.clip(0, 1).astype(np.float32), np.ones((4, 4), bool), refine)
    assert (moved.mask & ~coarse).any()


# ------------------------------------------------------------------------------------------------------ command
@pytest.fixture
def files(tables, folders, study, refine, tmp_path):
    phrases, coarse = tables
    document = study.model_dump(mode="json") | {"refine": refine.model_dump(mode="json") | {"readout": "crf", "crf": {}}}
    (tmp_path / "params.yaml").write_text(json.dumps(document))
    write_phrases(phrases, tmp_path / "phrases.parquet")
    write_predictions(coarse, tmp_path / "coarse.parquet")
    return tmp_path


def run_refine(folder, model, *more):
    options = {
        "--params": "params.yaml",
        "--phrases": "phrases.parquet",
        "--predictions": "coarse.parquet",
        "--out": "out.parquet",
    }
    paths = [item for flag, name in options.items() for item in (flag, str(folder / name))]
    return main(["refine", *paths, "--model", str(model), *more])


def test_command_refines_a_file_once_and_writes_pictures(files, folders, capsys):
    assert run_refine(files, folders / "sdxl", "--pictures", str(files / "pictures")) == 0
    coarse, refined = read_predictions(files / "coarse.parquet"), read_predictions(files / "out.parquet")
    assert refined[KEY].equals(coarse[KEY])
    assert not refined["mask"].equals(coarse["mask"])
    assert not maps_path(files / "out.parquet").exists()
    sheets = sorted((files / "pictures").glob("*.png"))
    assert len(sheets) == 6
    assert Image.open(sheets[0]).size == (6 * 192, (1 + SMOKE.refine.iterations) * 192)
    capsys.readouterr()
    assert run_refine(files, folders / "sdxl") == 0
    assert "already exists" in capsys.readouterr().out


def test_soft_maps_are_refined_with_the_masks(files, folders):
    soft = np.random.default_rng(0).random((6, 8, 8)).astype(np.float32)
    write_maps(soft, files / "coarse.parquet")
    assert run_refine(files, folders / "sdxl") == 0
    before, after = read_maps(files / "coarse.parquet"), read_maps(files / "out.parquet")
    assert after.shape == (6, SIDE, SIDE)
    unchanged = torch.nn.functional.interpolate(torch.from_numpy(before)[:, None], (SIDE, SIDE + 8), mode="bilinear")
    unchanged = area_reduce(unchanged[:, 0].numpy(), SIDE, SIDE)
    np.testing.assert_allclose(after[2], unchanged[2], atol=0.02)  # an empty mask is unchanged
    assert np.abs(after[0] - unchanged[0]).max() > 0.1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "magic"), "--method magic: expected one of g4seg, alpha_zero"),
        (("--images", "/nowhere"), "no such image"),
        (("--predictions", "missing.parquet"), "missing.parquet"),
        ((), "phrases.parquet: row 0 has no file_name"),
    ],
)
def test_user_errors_are_one_line(files, folders, capsys, monkeypatch, more, message):
    monkeypatch.chdir(files)
    if more[:1] != ("--method",):
        table = pd.read_parquet(files / "phrases.parquet")
        write_phrases(table.assign(file_name="1.png" if more else None), files / "phrases.parquet")
    assert run_refine(files, folders / "sdxl", *more) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_missing_layer_or_phrase_is_named(model, tables, refine):
    phrases, coarse = tables
    with pytest.raises(UserError, match=r"refine\.layers: expected indices below \d, the U-Net\'s up-blocks, got 7"):
        refine_predictions(phrases, coarse, model, refine.model_copy(update={"layers": [7]}), 0)
    with pytest.raises(UserError, match="is not in the phrase table"):
        refine_predictions(phrases.iloc[1:], coarse, model, refine, 0)
