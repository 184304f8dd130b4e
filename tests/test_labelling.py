"""The competition of class phrases: evidence, alignment, reliability and read-out of a labelling."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from genseg.params import load_params
from genseg.refine.labelling import class_evidence, coarse_cells, read_out_labels, reliability, shuffle_changes, update_labels

REFINE = load_params("params/smoke.yaml").refine


def columns(rng, rows, cells):
    return rng.dirichlet(np.ones(rows), cells).T.astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_reliability_maximises_the_likelihood_of_the_mixture(seed):
    rng = np.random.default_rng(seed)
    coarse, likelihood = columns(rng, 4, 200), columns(rng, 4, 200)
    likelihood[:, :120] = 0.2 * likelihood[:, :120] + 0.8 * coarse[:, :120]

    def loss(rho):
        return -np.log(((rho * coarse + (1 - rho) / 4) * likelihood).sum(0)).sum()

    best = minimize_scalar(loss, bounds=(0, 1), method="bounded")
    assert loss(reliability(coarse, likelihood)) == pytest.approx(best.fun, rel=1e-2)


def test_evidence_corrects_a_wrong_labelling_and_keeps_a_right_one():
    rng = np.random.default_rng(0)
    truth = np.eye(3, dtype=np.float32)[:, np.repeat([0, 1, 2], 30)]
    evidence = truth + 0.3 * rng.normal(size=truth.shape).astype(np.float32)
    aligned = np.eye(90, dtype=np.float32)
    wrong = np.eye(3, dtype=np.float32)[:, rng.integers(3, size=90)]
    for coarse in (truth, wrong):
        updated = update_labels(coarse, evidence, aligned)
        np.testing.assert_allclose(updated.sum(0), 1, rtol=1e-5)
        assert (updated.argmax(0) == truth.argmax(0)).mean() > 0.8


def test_without_evidence_labels_are_averaged_over_aligned_cells():
    rng = np.random.default_rng(1)
    coarse, aligned = columns(rng, 3, 8), columns(rng, 8, 8).T
    np.testing.assert_allclose(update_labels(coarse, None, aligned), coarse @ aligned.T)


def test_coarse_cells_are_area_fractions_and_unlabelled_pixels_have_all_labels():
    labels = np.array([[0, 0, 1, -1], [0, 1, -1, -1]])
    np.testing.assert_allclose(coarse_cells(labels, 2, 1), [[3 / 8 + 3 / 16], [2 / 8 + 3 / 16]])


def test_read_out_recovers_edges_of_the_image():
    picture = np.full((32, 32, 3), 40, np.uint8)
    picture[:, 13:] = 210
    probability = np.zeros((3, 4, 4), np.float32)
    probability[0, :, :2] = probability[2, :, 2:] = 0.8
    probability[2, :, :2] = probability[0, :, 2:] = 0.2
    labels = read_out_labels(probability, picture, REFINE)
    assert set(np.unique(labels)) == {0, 2}
    assert ((labels == 2) == (picture[..., 0] > 100)).mean() > 0.95


def test_shuffled_changes_keep_their_number_and_labels():
    rng = np.random.default_rng(2)
    coarse, refined = np.zeros((20, 20), np.int64), np.where(rng.random((20, 20)) < 0.2, 3, 0)
    shuffled = shuffle_changes(coarse, refined, 0)
    assert np.array_equal(np.bincount(shuffled.ravel()), np.bincount(refined.ravel()))
    assert not np.array_equal(shuffled, refined)
    assert np.array_equal(shuffled, shuffle_changes(coarse, refined, 0))


class OneClassModel:
    """A generator whose prediction is the noise, up to an error that the right class halves in the left half of the image."""

    prediction_type = "epsilon"
    alphas = torch.linspace(0.99, 0.01, 1000)

    def embed(self, phrases, template="{phrase}"):
        return FakePrompts(list(phrases))

    def predict(self, x_t, t, latent, prompts, pooled):
        alpha = self.alphas[t]
        noise = (x_t - alpha.sqrt() * latent) / (1 - alpha).sqrt()
        scale = torch.ones(len(prompts), 1, *latent.shape[2:])
        scale[[text == "right" for text in prompts], :, :, : latent.shape[3] // 2] = 0.5
        return noise + scale


class FakePrompts:
    def __init__(self, texts):
        self.tokens = self.pooled = texts

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, rows):
        return FakePrompts(self.tokens[rows])


def test_class_evidence_is_the_error_that_a_prompt_saves():
    class Block:
        model, grid, latents = OneClassModel(), (4, 4), torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        refine = REFINE.model_copy(update={"evidence_timesteps": [300, 700], "evidence_noises": 2, "batch": 2})
        traces = (type("Trace", (), {"key": (7, "n", 0)}),)

    evidence = class_evidence(Block, ["wrong", "right", "other"], 0).reshape(3, 4, 4)
    saved = np.zeros((3, 4, 4), np.float32)
    saved[1, :, :2] = 1 - 0.25
    np.testing.assert_allclose(evidence, 2 * saved / saved.std(ddof=1), atol=1e-3)
