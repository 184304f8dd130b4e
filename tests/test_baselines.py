"""Attention baselines and inexact masks: functions compared with their definitions, SD and SDXL pipelines, the command."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco
from scipy.spatial import Delaunay
from scipy.stats import entropy
from transformers import CLIPTextConfig, CLIPTextModel

from conftest import PROJECT
from genseg.artifacts import masks
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import maps_path, read_maps, read_predictions
from genseg.artifacts.resample import bilinear
from genseg.baselines import attention as att
from genseg.baselines.attend import METHODS, ImageAttention, attention_grids, recordings
from genseg.baselines.captions import Query, queries, split_caption
from genseg.baselines.inexact import KINDS, _hull, find_amount, inexact_masks
from genseg.baselines.inversion import ddim_step, noise_of, null_text_inversion
from genseg.baselines.make import make_baselines, threshold_ious
from genseg.baselines.registry import RUNS, own_baselines, study_baselines
from genseg.baselines.sam import read_sam_masks, select_masks
from genseg.cli import main
from genseg.diffusion.objectives import training_target
from genseg.errors import UserError
from genseg.models.miniature import build_miniature, learn_tokenizer
from genseg.models.text_to_image import TextToImage
from genseg.params import load_params, validate_params
from genseg.params.backbone import BackboneShape
from genseg.params.baselines import Inversion
from genseg.sampling.runs import study_runs

CAPTIONS = ["two small red circles near the grass", "a large striped blue star", "some water"]
TEXTS = ["some water", "the small red circles", "a star"]
CPU = torch.device("cpu")


def distributions(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.full(shape[-1], 0.3), shape[:-1]))


# ----------------------------------------------------------------------------------------------------------- pure functions
def test_divergence_is_half_the_symmetric_kullback_leibler_divergence():
    p, q = distributions(5, 12) + 1e-9, distributions(7, 12, seed=1) + 1e-9
    expected = [[(entropy(a, b) + entropy(b, a)) / 2 for b in q.numpy()] for a in p.numpy()]
    assert np.allclose(att.divergence(p, q), expected, rtol=1e-5, atol=1e-7)


def reference_merging(maps, points, thresholds):
    """DiffSeg's `mask_merge` (google/diffseg, MIT), transcribed for maps [side, side, side, side] and points (row, column)."""

    def divergences(x, others):
        quotient = np.log(x) - np.log(others)
        return (x * quotient).sum((-2, -1)) / 2 - (others * quotient).sum((-2, -1)) / 2

    side = len(maps)
    flat = maps.reshape(-1, side, side)
    near = np.stack([divergences(maps[row, column], flat) < thresholds[0] for row, column in points]).astype(float)
    merged = (near @ flat.reshape(len(flat), -1) / near.sum(1, keepdims=True)).reshape(-1, side, side)
    for threshold in thresholds[1:]:
        matched, result = set(), []
        for number, anchor in enumerate(merged):
            if number not in matched:
                close = divergences(anchor, merged) < threshold
                matched |= {number, *np.flatnonzero(close).tolist()}
                result.append(merged[close].mean(0))
        merged = np.stack(result)
    return merged


@pytest.mark.parametrize(("tau", "iterations"), [(0.5, 1), (0.8, 3), (0.9, 3), (1.0, 3), (2.0, 2), (5.0, 3)])
def test_merging_equals_the_authors_program(tau, iterations):
    maps = distributions(36, 36) + 1e-4
    maps = maps / maps.sum(1, keepdim=True)
    maps = 0.7 * maps + 0.3 * maps[torch.arange(36) // 6 * 6]  # maps of a row resemble each other
    anchors = att.anchor_indices((6, 6), 3)
    expected = reference_merging(
        maps.numpy().reshape(6, 6, 6, 6), [(a // 6, a % 6) for a in anchors.tolist()], [tau] * iterations
    )
    proposals = att.merge(maps, anchors, tau, iterations).numpy()
    assert proposals.shape == (len(expected), 36)
    assert np.allclose(proposals.reshape(-1, 6, 6), expected, atol=1e-9)


def test_anchors_of_a_64_grid_are_those_of_the_authors_program():
    step = 63 // 15
    line = np.linspace((63 - 15 * step) // 2, 15 * step + (63 - 15 * step) // 2, 16).astype(int)
    assert att.anchor_indices((64, 64), 16).tolist() == [64 * row + column for row in line for column in line]


def test_token_weights_of_diffpng_compare_with_the_last_token():
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    products = np.array([[1, 0, 1], [0, 4, 2], [1, 2, 2]]) / 4
    expected = np.exp(products[-1]) / np.exp(products[-1]).sum()
    assert np.allclose(att.similarity_weights(embeddings), expected)
    assert att.similarity_weights(embeddings[:1]).tolist() == [1.0]


CAPTION = "In this image there is a bear. A small bear and  another\nbear near two small red circles."


def narrative(*phrases, caption=CAPTION):
    return pd.DataFrame({"phrase": phrases, "caption": [caption] * len(phrases)})


def test_phrases_are_found_in_their_caption_one_after_the_other():
    found = queries(narrative("a bear", "A small bear", "another bear", "circles", "a cat"), "a {phrase}", lambda t: 1, 75)
    assert [query.prompt[query.start : query.end] for query in found[:4]] == [
        "a bear",
        "A small bear",
        "another\nbear",
        "circles",
    ]
    assert {query.prompt for query in found[:4]} == {CAPTION}
    assert found[4] == Query("a cat", "a cat", 0, 5)  # not in the caption
    assert queries(narrative("the wall", caption=None), "a {phrase}", len, 75) == [Query("the wall", "the wall", 0, 8)]


@given(st.lists(st.sampled_from(["red", "bear.", "near", "a", "longer-word"]), min_size=1, max_size=30), st.integers(1, 12))
def test_pieces_of_a_caption_cover_its_words_and_fit_the_limit(words, limit):
    caption, count = "  ".join(words), lambda text: sum(1 + len(word) // 5 for word in text.split())
    pieces = [caption[start:end] for start, end in split_caption(caption, count, limit)]
    assert " ".join(pieces).split() == words
    for piece, after in itertools.pairwise([*pieces, None]):
        assert count(piece) <= limit or len(piece.split()) == 1
        if after is not None and "." in piece:
            assert piece.endswith(".")
        elif after is not None:
            assert count(f"{piece} {after.split()[0]}") > limit


def test_sam_masks_are_read_and_selected_by_overlap(tmp_path):
    proposals = np.zeros((3, 4, 6), bool)
    proposals[0, :, :2], proposals[1, :, 2:], proposals[2, 0, :4] = True, True, True
    records = [{"segmentation": coco.encode(np.asfortranarray(mask, np.uint8)), "area": 1} for mask in proposals]
    for record in records:
        record["segmentation"]["counts"] = record["segmentation"]["counts"].decode()
    (tmp_path / "000000000012.json").write_text(json.dumps(records))
    read = read_sam_masks(str(tmp_path), "data/inputs/coco/val2017/000000000012.jpg", 4, 6)
    assert np.array_equal(read, proposals)
    mask = np.zeros((4, 6), bool)
    mask[:, :3] = True  # contains all of the first proposal, 3 of 4 pixels of the third
    assert np.array_equal(select_masks(proposals, mask, 0.6), proposals[0] | proposals[2])
    assert np.array_equal(select_masks(proposals[1:2], mask, 0.6), mask)
    with pytest.raises(UserError, match=r"12.json: mask 0: size \[4, 6\], but the image has \[6, 4\]"):
        read_sam_masks(str(tmp_path), "000000000012.jpg", 6, 4)
    with pytest.raises(UserError, match=r"13.json: no such file; write SAM's masks"):
        read_sam_masks(str(tmp_path), "000000000013.jpg", 4, 6)


def test_aggregation_is_the_weighted_sum_of_enlarged_and_repeated_maps():
    fine, coarse = distributions(24, 24).float(), distributions(6, 6, seed=1).float()
    aggregated = att.aggregate({(2, 3): coarse, (4, 6): fine}).numpy()
    for row in range(4):
        for column in range(6):
            part = bilinear(coarse[(row // 2) * 3 + column // 2].reshape(1, 2, 3).numpy(), 4, 6).ravel()
            expected = fine[row * 6 + column].numpy() * 4 / 6 + part / part.sum() * 2 / 6
            assert np.allclose(aggregated[row * 6 + column], expected, atol=1e-6)
    assert np.allclose(aggregated.sum(1), 1)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))
def test_anchors_are_spread_evenly_over_any_grid(height, width, side):
    anchors = att.anchor_indices((height, width), side).tolist()
    assert len(set(anchors)) == len(anchors) == min(side, height) * min(side, width)
    for coordinates, length in (({a // width for a in anchors}, height), ({a % width for a in anchors}, width)):
        steps = np.diff([-1, *sorted(coordinates), length])
        assert min(coordinates) >= 0
        assert max(coordinates) < length
        assert len(steps) == 2 or np.ptp(steps[1:-1]) <= 1


def three_regions(side=8):
    """Self-attention of an image with three regions, and the regions [side, side]."""
    regions = np.zeros((side, side), int)
    regions[:, side // 2 :] = 1
    regions[side // 2 :, : side // 2] = 2
    same = (regions.ravel()[:, None] == regions.ravel()[None]).astype(np.float32) + 0.01
    return torch.from_numpy(same / same.sum(1, keepdims=True)), regions


def test_diffseg_segments_regions_that_attend_to_themselves_and_assigns_them_to_phrases():
    self_attention, regions = three_regions()
    proposals = att.merge(att.aggregate({(8, 8): self_attention}), att.anchor_indices((8, 8), 4), tau=1.0, iterations=3)
    segments = att.segment(proposals, (8, 8), 8, 8)
    assert len(proposals) == 3
    assert all(len(np.unique(segments[regions == region])) == 1 for region in range(3))
    maps = np.stack([(regions == region) + 0.2 for region in range(3)]).astype(np.float32)
    assigned = att.assign(segments, maps, every_phrase=False)
    assert np.array_equal(assigned > 0, maps > 1)
    doubled = np.concatenate([maps, maps[:1] * 0.9])
    assert np.array_equal(att.assign(segments, doubled, every_phrase=False)[3], np.zeros((8, 8)))
    assert np.array_equal(att.assign(segments, doubled, every_phrase=True)[3] > 0, regions == 0)


def test_diffpng_grows_a_region_from_a_few_anchors():
    self_attention, regions = three_regions()
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 3], maps[1, 3, 0] = 1.0, 1.0
    anchors = att.locate(maps, (8, 8), 0.4)
    assert 1 <= anchors[0].sum() < (regions == 1).sum()
    grown = att.minmax(att.spread(self_attention.expand(2, -1, -1), anchors, (8, 8)))
    assert np.array_equal(grown[0].numpy() > 0.3, regions == 1)
    assert np.array_equal(grown[1].numpy() > 0.3, regions == 2)
    assert att.spread(self_attention[None], torch.zeros(1, 64, dtype=torch.bool), (8, 8)).abs().max() == 0


def test_phrase_maps_are_weighted_means_of_token_maps():
    cross = {grid: distributions(2, grid[0] * grid[1], 5).float() for grid in ((4, 4), (2, 2))}
    weights = torch.tensor([[0, 1.0, 3.0, 0, 0], [0, 2.0, 0, 0, 0]])
    combined = att.combined_maps(cross, weights)
    token = {grid: torch.stack([(m[0, :, 1] + 3 * m[0, :, 2]) / 4, m[1, :, 1]]).view(2, *grid) for grid, m in cross.items()}
    expected = token[4, 4].numpy() * 4 / 6 + bilinear(token[2, 2].numpy(), 4, 4) * 2 / 6
    assert np.allclose(combined, expected, atol=1e-6)
    assert att.find_grid([(64, 64), (32, 32), (16, 16)], 16, "key") == (16, 16)
    with pytest.raises(
        UserError, match=r"key: the U-Net has no attention on 16 x 16 tokens at this image size; its sides are 64, 32"
    ):
        att.find_grid([(64, 64), (32, 32)], 16, "key")


@given(arrays(np.float32, (3, 4, 5), elements=st.floats(0, 1, width=16)))
def test_minmax_scales_maps_separately_or_jointly_and_keeps_their_order(values):
    maps = torch.from_numpy(values)
    alone, together = att.minmax(maps), att.minmax(maps, together=True)
    for scaled, low, high in [(a, m.min(), m.max()) for a, m in zip(alone, maps, strict=True)] + [
        (together, maps.min(), maps.max())
    ]:
        assert scaled.min() == 0
        assert scaled.max() == pytest.approx(1.0 if high - low > att.TINY else 0.0)
    assert torch.equal(together.argmax(0), maps.argmax(0)) or maps.max() - maps.min() < 1e-6


@given(
    arrays(np.float32, (6, 7), elements=st.sampled_from(np.linspace(0, 1, 11).astype(np.float32).tolist())),
    arrays(np.bool_, (6, 7)),
)
def test_threshold_ious_equal_the_iou_of_every_threshold(soft, truth):
    thresholds = np.array([0.1, 0.3, 0.5, 1.0], np.float32)
    expected = [((soft >= t) & truth).sum() / max(1, ((soft >= t) | truth).sum()) for t in thresholds]
    assert np.allclose(threshold_ious(soft, truth, thresholds), expected)


# ------------------------------------------------------------------------------------------------------------- pipelines
def tiny_sd() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 in miniature: 4 channels, one text encoder."""
    torch.manual_seed(3)
    tokenizer = learn_tokenizer(CAPTIONS, 120, "<|endoftext|>")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2, attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(prediction_type="v_prediction"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def tiny_sdxl() -> StableDiffusionXLInpaintPipeline:
    shape = BackboneShape(
        unet_channels=[16, 32], transformer_layers=[1, 1], attention_head_channels=16, vae_channels=[8, 8],
        text_width=32, text_layers=2, vocabulary=120,
    )  # fmt: skip
    return build_miniature(shape, 16, CAPTIONS, seed=3)


@pytest.fixture(scope="module", params=[tiny_sd, tiny_sdxl])
def pipeline(request, tmp_path_factory):
    pipeline, folder = request.param(), tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.eval()
    return pipeline, str(folder)


@pytest.fixture(scope="module")
def model(pipeline):
    return TextToImage(pipeline[1], None, CPU)


def in_caption(texts):
    """Queries of texts in one caption."""
    return queries(narrative(*texts, caption="I see " + " and ".join(TEXTS)), "{phrase}", lambda text: len(text.split()), 75)


def attended(model, params, texts=TEXTS):
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    sides = [grid[0] for grid in attention_grids(model.unet.config, 8, 8)]
    params = params.model_copy(
        update={
            "diffpng": params.diffpng.model_copy(update={"cross_side": sides[0], "self_side": sides[0]}),
            "diffseg": params.diffseg.model_copy(update={"sides": sides}),
        }
    )
    return ImageAttention(model, params, latent, (16, 20), in_caption(texts), (0, 7))


@pytest.fixture(scope="module")
def params():
    return load_params(PROJECT / "params/smoke.yaml").baselines


def test_prompt_embeddings_equal_those_of_the_pipeline(pipeline, model):
    template = "a photo of {phrase} here"
    prompts = model.embed(TEXTS, template)
    stock = pipeline[0].encode_prompt([template.format(phrase=t) for t in TEXTS], device=CPU, num_images_per_prompt=1,
                                      do_classifier_free_guidance=False)  # fmt: skip
    assert torch.allclose(prompts.tokens, stock[0], atol=1e-6)
    if model.double:
        assert torch.allclose(prompts.pooled, stock[2], atol=1e-6)
    tokenizer = pipeline[0].tokenizer
    for text, chosen in zip(TEXTS, prompts.phrase_tokens, strict=True):
        ids = torch.tensor(tokenizer(template.format(phrase=text), padding="max_length").input_ids)
        assert tokenizer.decode(ids[chosen]).strip() == text
    truncated = model.embed(["star " * 200]).phrase_tokens[0]
    assert truncated.sum() == 75


def test_unet_gets_the_inputs_of_the_pipeline(pipeline, model):
    unet, vae = pipeline[0].unet, pipeline[0].vae
    prompts, x_t, latent = model.embed(TEXTS[:2]), torch.randn(2, 4, 8, 8), torch.randn(1, 4, 8, 8)
    sample, added = x_t, None
    if model.double:
        hidden = vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mode() * vae.config.scaling_factor
        sample = torch.cat([x_t, torch.ones(2, 1, 8, 8), hidden.expand(2, -1, -1, -1)], 1)
        ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(2, -1)
        added = {"text_embeds": prompts.pooled, "time_ids": ids}
    with torch.no_grad():
        expected = unet(sample, 50, prompts.tokens, added_cond_kwargs=added).sample
    assert torch.allclose(model.predict(x_t, 50, latent, prompts.tokens, prompts.pooled), expected, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_maps_do_not_depend_on_batch_size_or_other_phrases(model, params, name):
    """Maps do not depend on batch size or phrase order and, except for diffseg, not on other phrases of the image."""
    whole = attended(model, params)
    maps = METHODS[name].maps(whole, in_caption(TEXTS), False)
    assert maps.min() >= 0
    assert maps.max() <= 1
    split = attended(model, params.model_copy(update={"batch": 1}), TEXTS[::-1])
    assert np.allclose(METHODS[name].maps(split, in_caption(TEXTS), False), maps, atol=1e-4)
    if name != "diffseg":
        assert np.ptp(maps) == 1
        assert np.allclose(METHODS[name].maps(whole, in_caption(TEXTS)[1:2], False)[0], maps[1], atol=1e-6)
        together = METHODS[name].maps(whole, in_caption(TEXTS), True)
        assert sorted([together.min(), together.max()]) == pytest.approx([0, 1])
    else:
        assert maps.shape == (3, 16, 20)
        assert (maps > 0).any((1, 2)).all()
        exclusive = METHODS[name].maps(whole, in_caption(TEXTS), True)
        assert np.array_equal((exclusive > 0).sum(0), np.ones((16, 20)))


def test_noise_and_ddim_steps_invert_the_objectives():
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(2, 4, 3, 3, generator=generator) for _ in range(2))
    alpha, alphas, t = torch.tensor(0.3), torch.full((10,), 0.3), torch.tensor([4, 4])
    x_t = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        output = training_target(prediction_type, x_0, noise, alphas, t, label_scale=1.0)
        assert torch.allclose(noise_of(output, x_t, alpha, prediction_type), noise, atol=1e-5)
    lower = ddim_step(x_t, noise, alpha, torch.tensor(0.9))
    assert torch.allclose(lower, 0.9**0.5 * x_0 + 0.1**0.5 * noise, atol=1e-5)
    assert torch.allclose(ddim_step(lower, noise, torch.tensor(0.9), alpha), x_t, atol=1e-5)


def test_null_text_inversion_reconstructs_the_image(model):
    """Inner steps bring the result closer to the image latent; a prompt's result does not depend on the other prompts."""
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    prompts, empty = model.embed(TEXTS[:2]), model.embed([""])
    passes = []

    class Record:
        def __enter__(self):
            passes.append(1)

        def __exit__(self, *_):
            return None

    def reconstruct(inner_steps, prompts=prompts):
        inversion = Inversion(steps=3, guidance_scale=7.5, inner_steps=inner_steps, lr=0.05, tolerance=1e-9)
        x = null_text_inversion(model, latent, prompts, empty, inversion, Record)
        return x, (x - latent).square().mean((1, 2, 3))

    x, error = reconstruct(10)
    assert len(passes) == 3
    assert (error < reconstruct(0)[1]).all()
    assert torch.allclose(reconstruct(10, prompts[1:2])[0], x[1:2], atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ inexact masks
def shapes(count=24, side=48):
    """A phrase table of discs, bars and rings."""
    rows, columns = np.mgrid[:side, :side]
    phrases = []
    for number in range(count):
        rng = np.random.default_rng(number)
        centre, radius = rng.uniform(14, side - 14, 2), rng.uniform(5, 13)
        distance = np.hypot(rows - centre[0], columns - centre[1])
        mask = [
            distance <= radius,
            (abs(rows - centre[0]) <= radius) & (abs(columns - centre[1]) <= 3),
            abs(distance - radius) < 3,
        ][number % 3]
        phrases.append((number, "n", number % 5, masks.encode(mask), side, side))
    return pd.DataFrame(phrases, columns=[*KEY, "mask", "height", "width"])


def decoded(frame, side=48):
    return np.stack([masks.decode(code, side, side) for code in frame["mask"]])


def iou(a, b):
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2))


@pytest.mark.parametrize(
    ("kind", "target"), [("box", 0.4), ("dilated", 0.5), ("eroded", 0.4), ("shifted", 0.3), ("scribble", 0.4)]
)
def test_inexact_masks_have_the_target_mean_iou(kind, target):
    table = shapes()
    amount, reached = find_amount(table, kind, target, seed=0)
    inexact = inexact_masks(table, kind, amount, seed=0)
    truth, degraded = decoded(table), decoded(inexact)
    assert iou(truth, degraded).mean() == pytest.approx(reached)
    assert reached == pytest.approx(target, abs=0.02)
    backwards = inexact_masks(table.iloc[::-1], kind, amount, seed=0).iloc[::-1]
    assert backwards["mask"].tolist() == inexact["mask"].tolist()
    random = inexact_masks(table, kind, amount, seed=1)["mask"].tolist() != inexact["mask"].tolist()
    assert random == (kind in ("shifted", "scribble"))
    if kind in ("box", "dilated"):
        assert not (truth & ~degraded).any()
    if kind == "eroded":
        assert not (degraded & ~truth).any()
        assert degraded.any((1, 2)).all()
    if kind == "shifted":
        assert (degraded.sum((1, 2)) <= truth.sum((1, 2))).all()


def test_unreachable_target_raises_an_error_with_the_reachable_range():
    with pytest.raises(UserError, match=r"baselines.inexact.box.*between 0\.\d\d and 0\.\d\d"):
        find_amount(shapes(), "box", 0.99, seed=0)


@given(arrays(np.bool_, (12, 10)))
@settings(deadline=None)
def test_every_kind_of_degradation_accepts_every_mask(mask):
    for kind in KINDS.values():
        degrade = kind.prepare(mask, 5)
        for amount in (kind.best, 1.3, kind.worst):
            assert degrade(amount).shape == mask.shape
            assert degrade(amount).any() <= mask.any()
    for name in ("dilated", "eroded", "shifted"):
        assert np.array_equal(KINDS[name].prepare(mask, 5)(0.0), mask)
    box = KINDS["box"].prepare(mask, 5)(0.0)
    if mask.any():
        rows, columns = np.nonzero(mask)
        assert box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        assert box.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 9)), min_size=3, max_size=9, unique=True))
@settings(deadline=None)
def test_hull_equals_the_delaunay_triangulation(points):
    points = np.array(points)
    grid = np.argwhere(np.ones((12, 10), bool))
    hull = _hull(points, (12, 10))
    assert hull[tuple(points.T)].all()
    if np.linalg.matrix_rank(points - points[0]) == 2:
        inside = Delaunay(points).find_simplex(grid, tol=1e-9) >= 0
        assert np.array_equal(hull.ravel(), inside)
    else:
        span = points.max(0) - points.min(0)
        assert hull.sum() == np.gcd(*span) + 1  # the lattice points of the segment
    assert _hull(points[:1], (12, 10)).sum() == 1


# -------------------------------------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A smoke study with data, backbone and baselines."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_params(folder)
        assert main(["data", "--params", "params.yaml"]) == 0
        assert main(["backbone", "--params", "params.yaml"]) == 0
        assert main(["baseline", "--params", "params.yaml"]) == 0
    return folder


def write_params(folder, **changes):
    document = yaml.safe_load((PROJECT / "params/smoke.yaml").read_text())
    document["baselines"].update(changes)
    (folder / "params.yaml").write_text(yaml.safe_dump(document))
    return load_params(folder / "params.yaml")


def test_every_baseline_predicts_every_phrase(project, monkeypatch):
    monkeypatch.chdir(project)
    study = load_params("params.yaml")
    entries = json.loads((project / "results/smoke/baselines/manifest.json").read_text())["baselines"]
    assert [entry["name"] for entry in entries] == [baseline.name for baseline in study_baselines(study)]
    assert {entry["name"] for entry in entries if not entry["real"]} == {f"inexact_{kind}" for kind in study.baselines.inexact}
    for which, table in (("predictions", "phrases"), ("class_predictions", "class_phrases")):
        rows = read_phrases(study.data_dir / f"{table}.parquet")
        rows = rows[rows["split"] == "test"].sort_values(KEY, ignore_index=True)
        for entry in entries:
            if "/predictions/" in entry[which]:
                continue
            frame = read_predictions(entry[which])
            assert frame[KEY].equals(rows[KEY])
            assert frame["score"].between(0, 1).all()
            assert set(masks.measure(frame["mask"].tolist()).pixels) == {64 * 64}
            if maps_path(entry[which]).exists() and which == "predictions":  # the masks are the thresholded maps
                soft = bilinear(read_maps(entry[which]), 64, 64)
                thresholded = soft >= entry["threshold"]
                assert np.mean(thresholded == np.stack([masks.decode(code, 64, 64) for code in frame["mask"]])) > 0.95


def test_study_without_runs_has_only_the_listed_baselines():
    document = yaml.safe_load((PROJECT / "params/smoke.yaml").read_text())
    document["baselines"] |= {"attention": ["diffseg", "diffpng_cross"], "inexact": {"box": 0.5}}
    document["sample"]["runs"] = []
    params = validate_params(document)
    assert [baseline.name for baseline in own_baselines(params)] == ["diffpng_cross", "diffseg", "inexact_box"]
    assert set(recordings(params.baselines)) == set(METHODS)
    document["baselines"] |= {"attention": [], "inexact": {}}
    with pytest.raises(UserError, match=r"no baseline to refine; import one with `genseg import`"):
        make_baselines(validate_params(document))


def test_study_samples_the_runs_that_serve_as_baselines(project):
    study = load_params(PROJECT / "params/smoke.yaml")
    runs = {run.name: run for run in study_runs(study)}
    for baseline in RUNS:
        assert baseline.run in runs
        assert runs[baseline.class_run].role == "class_phrases"
        assert runs[baseline.class_run].method == runs[baseline.run].method


def test_up_to_date_baselines_are_kept_and_changed_ones_are_remade(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    folder = project / "results/smoke/baselines"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    assert main(["baseline", "--params", "params.yaml"]) == 0
    assert "0 of 8 to make" in capsys.readouterr().out
    diffseg = yaml.safe_load((PROJECT / "params/smoke.yaml").read_text())["baselines"]["diffseg"]
    write_params(project, diffseg=diffseg | {"tau": 0.001}, inexact={"box": 0.3})
    assert main(["baseline", "--params", "params.yaml"]) == 0
    out = capsys.readouterr().out
    assert "2 of 5 to make" in out
    assert "removed results/smoke/baselines/inexact_scribble.parquet" in out
    write_params(project)
    assert main(["baseline", "inexact_box", "diffseg", "--params", "params.yaml"]) == 0
    assert main(["baseline", "--params", "params.yaml"]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"} == before


def test_stable_diffusion_directory_replaces_the_backbone(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    tiny_sd().save_pretrained(project / "sd")
    write_params(project, backbone="sd", size=32)
    before = (project / "results/smoke/baselines/cross_attention.parquet").read_bytes()
    assert main(["baseline", "cross_attention", "--params", "params.yaml"]) == 0
    assert (project / "results/smoke/baselines/cross_attention.parquet").read_bytes() != before
    assert read_maps(project / "results/smoke/baselines/cross_attention.parquet").shape[1:] == (16, 16)
    write_params(project)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nonsense"], "nonsense: not a baseline of study smoke; choose from cross_attention"), (["gs"], "run `genseg sample`")],
)
def test_invalid_name_raises_a_one_line_error(project, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(project)
    assert main(["baseline", *arguments, "--params", "params.yaml"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
