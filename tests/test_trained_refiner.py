"""The trained refiner: corruptions, training and its reproducibility, and refinement of predictions."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from genseg.artifacts.masks import decode, encode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.resample import area_reduce
from genseg.errors import UserError
from genseg.refine.trained import CORRUPTIONS, Refiner, RefinerNet, _batch, corrupt, train_refiner


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(CORRUPTIONS))
def test_each_corruption_changes_the_mask_as_its_name_says(seed, kind):
    rng = np.random.default_rng(seed)
    mask = np.zeros((32, 40), bool)
    y, x, height, width = rng.integers(0, [24, 30, 8, 10])
    mask[y : y + height + 1, x : x + width + 1] = rng.random((height + 1, width + 1)) < 0.8
    result = corrupt(mask, kind, np.random.default_rng(seed))
    np.testing.assert_array_equal(result, corrupt(mask, kind, np.random.default_rng(seed)))
    assert result.dtype == bool
    assert result.any() == mask.any()
    if kind == "none" or not mask.any():
        np.testing.assert_array_equal(result, mask)
    if kind == "dilate":
        assert (result & mask).sum() == mask.sum()
        assert (result & ndimage.binary_dilation(mask)).sum() > mask.sum() or not mask.any() or mask.all()
    if kind == "erode":
        assert (result & ~mask).sum() == 0
    if kind == "box" and mask.any():
        rows, columns = np.nonzero(mask)
        assert result.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert (result & mask).sum() == mask.sum()
    if kind == "shift":
        assert result.sum() <= mask.sum()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Phrases of bright squares on a dark background, so that the image shows the mask's boundary."""
    folder = tmp_path_factory.mktemp("refiner")
    rng, rows = np.random.default_rng(0), []
    for image_id in range(24):
        mask = np.zeros((40, 40), bool)
        y, x, side = rng.integers([0, 0, 12], [20, 20, 20])
        mask[y : y + side, x : x + side] = True
        Image.fromarray(np.where(mask[..., None], 200, 40).astype(np.uint8).repeat(3, -1)).save(folder / f"{image_id}.png")
        rows.append(
            (image_id, "n", 0, "train" if image_id < 20 else "test", str(folder / f"{image_id}.png"), 40, 40, encode(mask))
        )
    return pd.DataFrame(rows, columns=[*KEY, "split", "file_name", "height", "width", "mask"])


def train(study, out, **changes):
    return list(train_refiner(study, out, **({"size": 32, "steps": 40, "batch": 8, "lr": 1e-2, "seed": 3} | changes)))


@pytest.fixture(scope="module")
def trained(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "refiner"
    return out, train(study, out)


def test_training_reduces_the_loss_and_improves_coarse_masks(study, trained):
    out, losses = trained
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    test = study[study["split"] == "test"]
    coarse = [corrupt(decode(row.mask, 40, 40), "dilate", np.random.default_rng(row.image_id)) for row in test.itertuples()]
    predictions = test[KEY].assign(mask=[encode(mask) for mask in coarse], score=0.5)
    refined = Refiner(out).refine_predictions(study, predictions)[0]
    truth = [decode(mask, 40, 40) for mask in test["mask"]]

    def mean_iou(masks):
        return np.mean([(a & b).sum() / (a | b).sum() for a, b in zip(masks, truth, strict=True)])

    assert mean_iou([decode(mask, 40, 40) for mask in refined["mask"]]) > mean_iou(coarse) + 0.1
    assert refined["score"].tolist() == [0.5] * len(test)


def test_training_sees_masks_that_are_reduced_from_native_size_as_in_refinement(study, monkeypatch):
    monkeypatch.setattr("genseg.refine.trained.CORRUPTIONS", ("none",))
    _, coarse, truth = _batch(study, 16, 8, np.random.default_rng(0))
    assert coarse.equal(truth)
    reduced = area_reduce(np.stack([decode(mask, 40, 40) for mask in study["mask"]]), 16, 16)
    known = {each.tobytes() for each in (*reduced, *np.ascontiguousarray(reduced[..., ::-1]))}
    assert all(mask.contiguous().numpy().tobytes() in known for mask in coarse[:, 0])
    assert ((coarse > 0) & (coarse < 1)).any()


def test_weights_are_reproducible_and_depend_on_the_seed(study, trained, tmp_path):
    train(study, tmp_path / "a", steps=3)
    train(study, tmp_path / "b", steps=3)
    train(study, tmp_path / "c", steps=3, seed=4)
    a, b, c = ((tmp_path / name / "refiner.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_masks_are_refined_independently_and_empty_masks_stay_empty(study, trained):
    refiner = Refiner(trained[0])
    image = np.asarray(Image.open(study["file_name"].iloc[0]))
    masks = np.stack([decode(study["mask"].iloc[k], 40, 40) for k in (0, 1)])
    together = refiner.probability(image, masks)
    np.testing.assert_array_equal(together[1], refiner.probability(image, masks[1:])[0])
    empty = pd.DataFrame([(0, "n", 0, encode(np.zeros((40, 40))), 0.0)], columns=[*KEY, "mask", "score"])
    assert not decode(refiner.refine_predictions(study, empty)[0]["mask"].iloc[0], 40, 40).any()


def test_network_has_at_most_300_000_parameters():
    assert sum(parameter.numel() for parameter in RefinerNet().parameters()) <= 300_000


def test_errors_name_the_file_and_the_remedy(study, trained, tmp_path):
    with pytest.raises(UserError, match="expected a multiple of 16, got 40"):
        train(study, tmp_path / "x", size=40)
    with pytest.raises(UserError, match="expected phrases of split train, got none"):
        train(study[study["split"] == "test"], tmp_path / "x")
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        Refiner(tmp_path)
    for name in ("config.json", "refiner.safetensors"):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    (tmp_path / "refiner.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"refiner\.safetensors: cannot read the weights"):
        Refiner(tmp_path)
    (tmp_path / "config.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match=r"config\.json: expected a refiner of version"):
        Refiner(tmp_path)
