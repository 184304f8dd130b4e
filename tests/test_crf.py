"""The dense CRF compared with mean field over all pairs of pixels, and its lattice compared with plain loops."""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter

from genseg.artifacts.masks import decode, encode
from genseg.artifacts.parquet import KEY
from genseg.errors import UserError
from genseg.params import load_params
from genseg.params.refine import Crf
from genseg.refine.crf import Lattice, binary_crf, dense_crf, permutohedral, refine_masks, refine_predictions
from genseg.refine.crf_search import SETTINGS, mean_ious

CLIP_ES = load_params(Path(__file__).resolve().parents[1] / "params/paper.yaml").refine.crf


def clip_es(**changes) -> Crf:
    return CLIP_ES.model_copy(update=changes)


def scene(seed, labels=3, shape=(20, 24), smooth=1):
    """A random image [H, W, 3] and noisy random probabilities [K, H, W]."""
    rng = np.random.default_rng(seed)
    image = gaussian_filter(rng.normal(size=(*shape, 3)), (smooth, smooth, 0))
    field = 0.5 + 2 * gaussian_filter(rng.normal(size=(labels, *shape)), (0, 3, 3)) + 0.3 * rng.normal(size=(labels, *shape))
    field = np.clip(field, 0.05, None)
    return np.clip(128 + 50 * image / image.std(), 0, 255).astype(np.uint8), (field / field.sum(0)).astype(np.float32)


def all_pairs(probability, image, crf):
    """Mean field with the full matrix K~ [N, N], in which each pixel is also its own neighbour."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    places = np.stack([x, y], -1).reshape(-1, 2)
    colours = np.concatenate([places / crf.bilateral_sxy, image.reshape(-1, 3) / crf.bilateral_srgb], 1)
    kernel = 0
    for weight, features in ((crf.gaussian_weight, places / crf.gaussian_sxy), (crf.bilateral_weight, colours)):
        pairs = np.exp(-((features[:, None] - features) ** 2).sum(-1) / 2)
        norm = 1 / np.sqrt(pairs.sum(1))
        kernel = kernel + weight * norm[:, None] * pairs * norm
    unary = np.log(np.maximum(probability, 1e-5)).reshape(len(probability), -1)
    marginals = np.exp(unary) / np.exp(unary).sum(0)
    for _ in range(crf.iterations):
        energy = np.exp(unary + marginals @ kernel)
        marginals = energy / energy.sum(0)
    return marginals.reshape(probability.shape)


@pytest.mark.parametrize("smooth", [0, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_dense_crf_agrees_with_mean_field_over_all_pairs(seed, smooth):
    """With CLIP-ES' constants, the mean error is below 0.006 after one iteration and 0.02 after ten; 97 % of labels agree."""
    image, probability = scene(seed, smooth=smooth)
    once, often = (clip_es(iterations=count) for count in (1, 10))
    assert np.abs(dense_crf(probability, image, once) - all_pairs(probability, image, once)).mean() < 0.006
    marginals, expected = dense_crf(probability, image, often), all_pairs(probability, image, often)
    assert np.abs(marginals - expected).mean() < 0.02
    assert (marginals.argmax(0) == expected.argmax(0)).mean() > 0.97
    assert (expected.argmax(0) != probability.argmax(0)).mean() > 0.1  # the CRF changes labels


def lattice_by_loops(features, values):
    """Splat, blur and slice with a dictionary, pixel by pixel (Adams et al. 2010, section 3)."""
    d = features.shape[1]
    homes, table = [], defaultdict(float)
    for feature, value in zip(features, values, strict=True):
        scaled = [f * math.sqrt(2 / 3) * (d + 1) / math.sqrt((i + 1) * (i + 2)) for i, f in enumerate(feature)]
        elevated = [sum(scaled[i:]) - (i * scaled[i - 1] if i else 0) for i in range(d + 1)]
        low = [round(e / (d + 1)) * (d + 1) for e in elevated]
        order = sorted(range(d + 1), key=lambda i: (low[i] - elevated[i], i))
        surplus = sum(low) // (d + 1)
        rank = [0] * (d + 1)
        for position, i in enumerate(order):
            rank[i] = position + surplus
            shift = (d + 1) * ((rank[i] < 0) - (rank[i] > d))
            rank[i], low[i] = rank[i] + shift, low[i] + shift
        weights = [0.0] * (d + 2)
        for i in range(d + 1):
            weights[d - rank[i]] += (elevated[i] - low[i]) / (d + 1)
            weights[d + 1 - rank[i]] -= (elevated[i] - low[i]) / (d + 1)
        weights[0] += 1 + weights[d + 1]
        corners = [tuple(low[i] + (k if rank[i] <= d - k else k - d - 1) for i in range(d + 1)) for k in range(d + 1)]
        homes.append(list(zip(corners, weights, strict=False)))
        for corner, weight in homes[-1]:
            table[corner] += weight * value
    for axis in range(d + 1):
        step = [d if i == axis else -1 for i in range(d + 1)]
        near = [{c: tuple(x + sign * s for x, s in zip(c, step, strict=True)) for c in table} for sign in (1, -1)]
        table = {c: table[c] + 0.5 * sum(table.get(side[c], 0.0) for side in near) for c in table}
    return np.array([sum(weight * table[corner] for corner, weight in home) for home in homes])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 10**6), st.sampled_from([0.3, 3.0, 30.0]))
def test_lattice_filter_equals_plain_loops(d, count, seed, spread):
    rng = np.random.default_rng(seed)
    features, values = rng.normal(size=(count, d)) * spread, rng.random(count)
    splat, axes = permutohedral(features)
    assert len(axes) == d + 1
    np.testing.assert_allclose(splat.sum(0), 1, atol=1e-5)  # barycentric
    assert splat.data.min() > -1e-6
    norm = 1 / np.sqrt(lattice_by_loops(features, np.ones(count)))
    expected = norm * lattice_by_loops(features, norm * values)
    filtered = Lattice(features).filter(values[:, None].astype(np.float32))[:, 0]
    np.testing.assert_allclose(filtered, expected, rtol=1e-4, atol=1e-5)


def test_binary_crf_equals_a_separate_crf_with_two_labels_for_each_mask():
    image, probability = scene(1)
    together = binary_crf(probability, image, clip_es())
    for index, foreground in enumerate(probability):
        np.testing.assert_allclose(binary_crf(foreground[None], image, clip_es())[0], together[index], atol=1e-6)
        np.testing.assert_allclose(
            dense_crf(np.stack([1 - foreground, foreground]), image, clip_es())[1], together[index], atol=1e-4
        )


def test_marginals_are_equivariant_to_label_order_and_equal_the_input_with_zero_weights():
    image, probability = scene(2, labels=4)
    marginals = dense_crf(probability, image, clip_es())
    np.testing.assert_allclose(marginals.sum(0), 1, atol=1e-5)
    np.testing.assert_allclose(dense_crf(probability[[2, 0, 3, 1]], image, clip_es()), marginals[[2, 0, 3, 1]], atol=1e-5)
    np.testing.assert_allclose(
        dense_crf(probability, image, clip_es(gaussian_weight=0, bilateral_weight=0)), probability, atol=1e-5
    )


def square(corner, side, shape=(40, 48)):
    mask = np.zeros(shape, bool)
    mask[corner[0] : corner[0] + side, corner[1] : corner[1] + side] = True
    return mask


def painted():
    """A grey image of two coloured squares with a little noise, and the masks of the squares."""
    truth = np.stack([square((8, 6), 14), square((16, 26), 16)])
    image = np.full((40, 48, 3), 90) + 60 * truth[0][..., None] * [1, 0, 0] + 60 * truth[1][..., None] * [0, 0, 1]
    return np.clip(image + np.random.default_rng(0).normal(size=image.shape), 0, 255).astype(np.uint8), truth


@pytest.mark.parametrize("disjoint", [False, True])
def test_refined_masks_follow_the_edges_and_empty_masks_stay_empty(disjoint):
    image, truth = painted()
    coarse = np.stack([square((6, 5), 17), np.zeros((40, 48), bool), square((13, 25), 19)])
    refined = refine_masks(coarse, image, clip_es(), disjoint)
    assert not refined[1].any()
    np.testing.assert_array_equal(refined[[0, 2]], truth)
    assert not refine_masks(coarse[1:2], image, clip_es(), disjoint).any()


@pytest.fixture
def study(tmp_path):
    image, truth = painted()
    Image.fromarray(image).save(tmp_path / "a.png")
    common = {"image_id": 1, "narrative_id": "n", "file_name": str(tmp_path / "a.png"), "height": 40, "width": 48}
    phrases = pd.DataFrame([common | {"phrase_id": k, "mask": encode(mask)} for k, mask in enumerate(truth)])
    coarse = [square((6, 5), 17), square((13, 25), 19)]
    rows = [(1, "n", k, encode(mask), 0.25 * k) for k, mask in enumerate(coarse)]
    return phrases, pd.DataFrame(rows[::-1], columns=[*KEY, "mask", "score"])


def ious_of(predictions, phrases):
    joined = predictions.merge(phrases, on=KEY, suffixes=("", "_truth"))
    pairs = [(decode(a, 40, 48), decode(b, 40, 48)) for a, b in zip(joined["mask"], joined["mask_truth"], strict=True)]
    return np.array([(a & b).sum() / (a | b).sum() for a, b in pairs])


def test_mean_ious_equals_refining_with_each_setting_separately(study):
    """A phrase with empty ground truth is left out."""
    phrases, predictions = study
    kinds = {"tight": predictions, "exact": phrases[KEY].assign(mask=phrases["mask"], score=0.0)}
    refined = refine_predictions(phrases, predictions, clip_es())
    assert refined["score"].tolist() == [0, 0.25]
    assert refined[KEY].equals(phrases[KEY])
    compared = [clip_es(bilateral_weight=0, confidence=0.99), clip_es(), clip_es(bilateral_srgb=13.0)]
    empty = phrases.iloc[[0]].assign(phrase_id=7, mask=[encode(np.zeros((40, 48), bool))])
    more = pd.concat([phrases, empty])
    coarse = pd.concat([frame.assign(coarse=kind) for kind, frame in kinds.items()])
    for kind in kinds:
        coarse = pd.concat([coarse, predictions.iloc[[0]].assign(phrase_id=7, coarse=kind)])
    ious = mean_ious(more, coarse.sample(frac=1, random_state=0), compared)
    assert len(ious) == 1 + len(compared)
    for kind, frame in kinds.items():
        expected = [ious_of(frame, phrases).mean()]
        expected += [ious_of(refine_predictions(phrases, frame, crf), phrases).mean() for crf in compared]
        np.testing.assert_allclose(ious[kind], expected)
    np.testing.assert_allclose(ious["mean"], ious[list(kinds)].mean(axis=1))
    assert ious["tight"].iloc[1] < ious["tight"].iloc[2:].min()


def test_ten_distinct_settings_start_with_clip_es():
    assert len({crf.model_dump_json() for crf in SETTINGS}) == 10
    assert SETTINGS[0] == CLIP_ES


def test_user_errors_name_the_phrase_file_or_constant(study):
    phrases, predictions = study
    with pytest.raises(UserError, match=r"\(1, 'n', 7\) is not in the phrase table"):
        refine_predictions(phrases, predictions.assign(phrase_id=7), clip_es())
    with pytest.raises(UserError, match=r"a\.png: expected 48 x 40 pixels as in the phrase table, got 40 x 48"):
        refine_predictions(phrases.assign(height=48, width=40), predictions, clip_es())
    with pytest.raises(UserError, match="standard deviations are too small"):
        dense_crf(np.ones((1, 2, 2), np.float32), np.array([[[0] * 3, [255] * 3]] * 2, np.uint8), clip_es(bilateral_srgb=1e-3))
