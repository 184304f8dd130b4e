"""The metrics agree with independent definitions: brute force, torch, per-pixel loops, analytic intervals."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from genseg.artifacts.masks import compare, encode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.resample import bilinear
from genseg.errors import UserError
from genseg.metrics.bootstrap import paired_difference, paired_statistic_difference, recall_intervals, resampled_sums
from genseg.metrics.ious import (
    Pairs,
    band_width,
    boundary_band,
    boundary_ious,
    latent_ceiling,
    phrase_ious,
    plural_flags,
    ppmn_size,
    protocol_ceiling,
)
from genseg.metrics.recall import GRIDS, ThresholdGrid, average_recall, group_members, size_members, threshold_grid
from genseg.metrics.semantic import class_ious, count_pixels, mean_iou
from genseg.metrics.soft_maps import (
    calibration_counts,
    calibration_error,
    calibration_summary,
    operating_points,
    threshold_ious,
)

torch.set_num_threads(1)
quick = settings(max_examples=40, deadline=None)
interpolate = torch.nn.functional.interpolate


def pairs_of(truths, predictions):
    shapes = np.array([mask.shape for mask in truths])
    codes = [[encode(mask) for mask in masks] for masks in (truths, predictions)]
    truth, prediction, common = compare(*codes)
    return Pairs(*codes, shapes[:, 0], shapes[:, 1], truth.foreground, prediction.foreground, common)


def blob(height, width, seed):
    """Return a random smooth mask that is neither empty nor full."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(height, width)), min(height, width) / 10)
    return noise > np.quantile(noise, 0.7)


# ------------------------------------------------------------------------------------------------- average recall
ious = hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1) | st.sampled_from([0.0, 0.25, 0.5, 1.0]))


@quick
@given(ious, st.lists(st.tuples(st.floats(0, 1) | st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 2)), max_size=20))
def test_average_recall_equals_its_definition_on_any_sorted_grid(iou, points):
    points = sorted(points)
    thresholds, weights = (np.array([point[index] for point in points], np.float64) for index in (0, 1))
    brute = sum(weight * np.mean([value >= threshold for value in iou]) for threshold, weight in points)
    assert average_recall(iou, ThresholdGrid(thresholds, weights)) == pytest.approx(brute, abs=1e-12)


def official_average_accuracy(iou):
    """Compute AR with the PNG benchmark's loop over thresholds, in which only the comparison is vectorised."""
    thresholds = np.arange(0, 1, 0.00001)
    ordered = np.sort(iou)
    accuracy = (len(iou) - np.searchsorted(ordered, thresholds, side="left")) / len(iou)
    return sum(
        abs(after - before) * value for before, after, value in zip(thresholds[:-1], thresholds[1:], accuracy, strict=False)
    )


def test_official_grid_equals_the_benchmarks_loop_and_all_grids_agree_within_1e_4():
    iou = np.random.default_rng(0).beta(2, 1, 500)
    iou[:3] = 0, 1, 0.5
    assert average_recall(iou, threshold_grid("official")) == pytest.approx(official_average_accuracy(iou), abs=1e-10)
    assert threshold_grid("gs_eq12").thresholds.shape == (9_999,)
    assert average_recall(np.ones(3), threshold_grid("gs_eq12")) == pytest.approx(0.9999)
    for name in GRIDS:
        assert average_recall(iou, threshold_grid(name)) == pytest.approx(iou.mean(), abs=1e-4 + 1e-12), name


def test_empty_union_counts_as_iou_0():
    assert average_recall(np.array([np.nan, 1.0])) == 0.5


def test_phrases_are_grouped_by_thing_or_stuff_plurality_and_size():
    frame = pd.DataFrame({"is_thing": [True, True, False], "is_plural": [False, True, True]})
    groups = {name: members.tolist() for name, members in group_members(frame).items()}
    assert groups == {
        "overall": [True] * 3,
        "things": [True, True, False],
        "stuff": [False, False, True],
        "singulars": [True, False, False],
        "plurals": [False, True, True],
    }
    # In a 640 x 480 image, 1,023 pixels are small and 1,024 are medium. The limits are proportional to the image area.
    areas, images = np.array([1023, 1024, 9215, 9216, 255, 256]), np.array([307200] * 4 + [76800] * 2)
    sizes = size_members(areas, images)
    assert [next(name for name in sizes if sizes[name][row]) for row in range(6)] == [
        *["small", "medium", "medium", "large"],
        *["small", "medium"],
    ]


# ----------------------------------------------------------------------------------------------------- protocols
two_masks = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda shape: st.tuples(*[hnp.arrays(bool, shape, elements=st.booleans()) for _ in range(2)])
)


@quick
@given(two_masks)
def test_native_iou_counts_pixels(masks):
    truth, prediction = masks
    iou, empty = phrase_ious("native", pairs_of([truth], [prediction]))
    union = (truth | prediction).sum()
    assert empty[0] == (union == 0)
    assert iou[0] == pytest.approx((truth & prediction).sum() / union if union else 0.0)


def torch_official(truth, prediction):
    """Compute IoU with the steps of the PNG benchmark's data loader and test loop."""

    def resize(map_, *size):
        return interpolate(map_[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]

    target = resize(resize(torch.tensor(truth, dtype=torch.float32), 256, 256), *truth.shape)
    instance = torch.round(resize(torch.tensor(prediction, dtype=torch.float32), 256, 256))
    proposal = resize(instance, *truth.shape)
    both = proposal * target
    return (both.sum() / (proposal + target - both).sum()).item()


def torch_ppmn(truth, prediction):
    """Compute IoU with the steps of PPMN's `evaluate`."""
    height, width = truth.shape
    scale = 800 / min(height, width)
    if max(height, width) * scale > 1333:
        scale = 1333 / max(height, width)
    size = int(height * scale + 0.5), int(width * scale + 0.5)

    def quarter(mask):
        resized = interpolate(torch.tensor(mask, dtype=torch.float32)[None, None], size=size, mode="bilinear")
        padded = torch.nn.functional.pad(resized, (0, -size[1] % 32, 0, -size[0] % 32))
        small = interpolate(padded, scale_factor=0.25, mode="bilinear")[0, 0]
        canvas = torch.zeros(400, 400)
        canvas[: small.shape[0], : small.shape[1]] = small
        return canvas

    target, predicted = quarter(truth) > 0, quarter(prediction) > 0.5
    return ((target & predicted).sum() / (target | predicted).sum()).item()


@pytest.mark.parametrize(("height", "width"), [(120, 160), (97, 61), (300, 90), (333, 500)])
def test_other_protocols_equal_their_public_evaluators(height, width):
    truth, prediction = blob(height, width, 0), blob(height, width, 1) | blob(height, width, 0)
    pairs = pairs_of([truth], [prediction])
    assert phrase_ious("png-official", pairs)[0][0] == pytest.approx(torch_official(truth, prediction), abs=1e-5)
    assert phrase_ious("ppmn", pairs)[0][0] == pytest.approx(torch_ppmn(truth, prediction), abs=1e-4)


def test_ppmn_size_follows_detectron2():
    assert ppmn_size(480, 640) == (800, 1067)
    assert ppmn_size(640, 480) == (1067, 800)
    assert ppmn_size(300, 1000) == (400, 1333)  # The longer side limits the scale.


@pytest.mark.parametrize("protocol", ["native", "png-official", "ppmn"])
def test_empty_masks_have_iou_0_under_every_protocol(protocol):
    empty_mask, mask = np.zeros((40, 50), bool), blob(40, 50, 3)
    iou, empty = phrase_ious(protocol, pairs_of([empty_mask, empty_mask, mask], [empty_mask, mask, empty_mask]))
    assert iou.tolist() == [0, 0, 0]
    assert empty.tolist() == [True, False, False]


def test_no_phrases_give_no_ious():
    for protocol in ("native", "png-official", "ppmn"):
        iou, empty = phrase_ious(protocol, Pairs([], [], *[np.zeros(0, np.int64)] * 5))
        assert iou.shape == empty.shape == (0,)


def test_plural_flags_follow_the_rule_of_each_protocol():
    segments = [np.array([4, 5]), np.array([4]), np.array([7, 7]), None]
    frame = pd.DataFrame({"is_plural": [False, True, True, True], "segment_ids": segments})
    assert plural_flags("native", frame)[0].tolist() == [False, True, True, True]
    for protocol in ("png-official", "ppmn"):
        flags, by_flag = plural_flags(protocol, frame)
        assert flags.tolist() == [True, False, False, True]
        assert by_flag == 1  # The row without segments keeps the table's flag and is counted.


# ------------------------------------------------------------------------------------------------------ ceilings
def test_protocol_ceiling_equals_the_iou_of_the_ground_truth():
    masks = [blob(90, 120, seed) for seed in range(4)] + [np.zeros((90, 120), bool)]
    pairs = pairs_of(masks, masks)
    assert protocol_ceiling("native", pairs).tolist() == [1, 1, 1, 1, 0]
    for protocol, reference in (("png-official", torch_official), ("ppmn", torch_ppmn)):
        ceiling = protocol_ceiling(protocol, pairs)
        assert ceiling[:4] == pytest.approx([reference(mask, mask) for mask in masks[:4]], abs=1e-4)
        assert (ceiling[:4] < 0.999).all()
        assert ceiling[4] == 0


def test_latent_ceiling_is_the_iou_of_the_reduced_mask():
    masks = [blob(64, 96, seed) for seed in range(3)]
    pairs = pairs_of(masks, masks)
    for size in ((8, 8), (16, 32)):
        for mask, ceiling in zip(masks, latent_ceiling(pairs, size), strict=True):
            small = interpolate(torch.tensor(mask, dtype=torch.float32)[None, None], size=size, mode="area")
            restored = (interpolate(small, size=mask.shape, mode="bilinear")[0, 0] >= 0.5 - 1e-6).numpy()
            assert ceiling == pytest.approx((mask & restored).sum() / (mask | restored).sum())
    assert latent_ceiling(pairs, (64, 96)).tolist() == [1, 1, 1]
    assert latent_ceiling(pairs, (8, 12)).mean() < latent_ceiling(pairs, (32, 48)).mean() < 1


# -------------------------------------------------------------------------------------------------- boundary IoU
@quick
@given(hnp.arrays(bool, st.tuples(st.integers(1, 14), st.integers(1, 14))), st.integers(1, 4))
def test_boundary_band_equals_the_pixels_that_erosion_removes(mask, distance):
    square = np.ones((2 * distance + 1,) * 2, bool)
    eroded = ndimage.binary_erosion(mask, square, border_value=0)  # The outside of the image is background.
    assert (boundary_band(mask, distance) == (mask & ~eroded)).all()


def test_boundary_iou_of_full_and_half_images_equals_that_of_their_frames():
    full, half = np.ones((100, 100), bool), np.ones((100, 100), bool)
    half[:, 50:] = False
    pairs = pairs_of([full, full, np.zeros((100, 100), bool)], [full, half, np.zeros((100, 100), bool)])
    assert band_width(100, 100, 0.02) == 3
    frame = 100 * 100 - 94 * 94
    inner = 100 * 50 - 94 * 44
    common = 2 * 3 * 50 + 94 * 3  # top, bottom and left side of the half
    assert boundary_ious(pairs, 0.02).tolist() == pytest.approx([1, common / (frame + inner - common), 0])
    assert band_width(10, 10, 0.02) == 1  # at least one pixel


# ---------------------------------------------------------------------------------------------------------- mIoU
def naive_confusion(rows, predicted_values, covered, classes, threshold, shape):
    """Count TP, T and P by class [3, classes] of one image, pixel by pixel.

    `predicted_values` and `covered` map each class to its values [H, W] and to the pixels [H, W] that it may be assigned to.
    """
    background = next((index for index, item in enumerate(classes) if item.get("background")), None)
    tp, t, p = (dict.fromkeys(range(len(classes)), 0) for _ in range(3))
    for y in range(shape[0]):
        for x in range(shape[1]):
            covering = sorted((mask.sum(), -index) for index, mask in rows.items() if mask[y, x])
            truth = -covering[0][1] if covering else (background if background is not None and background not in rows else None)
            if truth is None:
                continue
            candidates = [(values[y, x], -index) for index, values in predicted_values.items() if covered[index][y, x]]
            best = max(candidates) if candidates else None
            winner = None if best is None else -best[1]
            if background is not None and (best is None or best[0] < threshold):
                winner = background
            t[truth] += 1
            if winner is not None:
                p[winner] += 1
                tp[truth] += winner == truth
    return np.array([[count[index] for index in range(len(classes))] for count in (tp, t, p)])


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("background", ["none", "without a row", "with a row"])
def test_miou_equals_a_count_pixel_by_pixel(soft, background):
    random = np.random.default_rng(7)
    classes = [{"name": name} for name in "abcd"]
    if background != "none":
        classes[1]["background"] = True
    rows, maps, expected = [], [], []
    for image, shape in ((3, (13, 9)), (1, (8, 11)), (2, (6, 6))):
        owner = random.integers(0, 4, shape)  # Disjoint, except for class 3, which overlaps the others.
        masks = {index: owner == index for index in range(4)}
        masks[3] = masks[3] | (random.random(shape) < 0.1)
        if background == "without a row":
            del masks[1]
        else:
            masks[0] &= random.random(shape) < 0.7  # Some pixels remain unlabelled.
        values, covered = {}, {}
        for index, mask in masks.items():
            is_predicted = not (image == 1 and index == 2)
            small = random.random((3, 4)).astype(np.float32)
            predicted = random.random(shape) < 0.4
            score = np.float32(random.choice([0.25, 0.5, 0.75]))
            rows.append(
                {
                    **{"image_id": image, "phrase_id": index, "height": shape[0], "width": shape[1], "mask": encode(mask)},
                    **{"area": int(mask.sum()), "predicted_row": len(maps) if is_predicted else -1},
                    **{"predicted_mask": encode(predicted), "score": score},
                }
            )
            maps.append(small)
            if is_predicted and not classes[index].get("background"):
                upsampled = interpolate(torch.tensor(small)[None, None], size=shape, mode="bilinear")[0, 0].numpy()
                values[index] = upsampled if soft else np.full(shape, score)
                covered[index] = np.ones(shape, bool) if soft else predicted
        expected.append((image, naive_confusion(masks, values, covered, classes, 0.6 if soft else -1, shape)))
    frame = pd.DataFrame(rows).sample(frac=1, random_state=0)
    stack = np.stack(maps)
    pixels = count_pixels(frame, (lambda chosen: stack[chosen]) if soft else None, classes, 0.6)
    assert pixels.image_ids.tolist() == [1, 2, 3]
    assert (pixels.counts == np.stack([count for _, count in sorted(expected, key=lambda item: item[0])])).all()
    assert pixels.missing == 1
    tp, t, p = pixels.counts.sum(0)
    class_values = [tp[c] / (t[c] + p[c] - tp[c]) for c in range(4) if t[c]]
    assert mean_iou(pixels.counts.sum(0)) == pytest.approx(np.mean(class_values))


def test_miou_leaves_out_classes_without_ground_truth():
    counts = np.array([[5, 0, 0], [10, 0, 4], [5, 3, 0]])
    assert class_ious(counts) == pytest.approx([0.5, np.nan, 0.0], nan_ok=True)
    assert mean_iou(counts) == 0.25
    assert np.isnan(mean_iou(np.zeros((3, 2))))


def test_unknown_class_index_is_rejected():
    rows = pd.DataFrame({"image_id": [1], "phrase_id": [5], "height": 1, "width": 1})
    with pytest.raises(UserError, match="phrase_id 5 is not the index of one of 2 classes"):
        count_pixels(rows, None, [{"name": "a"}, {"name": "b"}], 0.5)


# ----------------------------------------------------------------------------------------------------- bootstrap
def table(image_ids, iou):
    frame = pd.DataFrame({"image_id": image_ids, "narrative_id": "n", "phrase_id": np.arange(len(iou)), "iou": iou})
    return frame[[*KEY, "iou"]]


def test_interval_has_the_width_of_the_normal_approximation():
    random = np.random.default_rng(1)
    images = np.repeat(np.arange(300), 3)
    effect = np.repeat(random.normal(0, 0.2, 300), 3)  # Phrases of one image are correlated.
    values = np.clip(0.5 + effect + random.normal(0, 0.02, 900), 0, 1)
    members = {"overall": np.ones(900, bool), "none": np.zeros(900, bool)}
    intervals = recall_intervals(images, values, members, 2000, seed=0)
    low, high = intervals["overall"]
    per_image = values.reshape(300, 3).mean(1)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * per_image.std() / np.sqrt(300), rel=0.1)
    assert intervals["none"] is None
    order = random.permutation(900)
    shuffled = recall_intervals(images[order], values[order], members, 2000, seed=0)
    assert shuffled["overall"] == pytest.approx([low, high], abs=1e-12)
    assert recall_intervals(images, values, members, 2000, seed=1)["overall"] != [low, high]
    assert recall_intervals(images, values, members, 0, seed=0)["overall"] is None


def test_paired_difference_uses_the_pairing():
    random = np.random.default_rng(2)
    images = np.repeat(np.arange(100), 4)
    base = random.uniform(0, 0.9, 400)
    a, b = table(images, base + 0.05), table(images, base)
    paired = paired_difference(a, b, 500, seed=0)
    assert paired["n"] == 400
    assert [paired["difference"], paired["ci_low"], paired["ci_high"]] == pytest.approx([0.05] * 3)
    unpaired = paired_difference(a, table(images, random.permutation(base)), 500, seed=0)
    assert unpaired["ci_high"] - unpaired["ci_low"] > 0.03
    reversed_ = paired_difference(b, a, 500, seed=0)
    assert reversed_["difference"] == pytest.approx(-paired["difference"])


def test_paired_difference_uses_only_shared_phrases():
    a, b = table([1, 1, 2], [0.2, 0.4, 1.0]), table([1, 1, 2], [0.1, 0.1, 0.5]).iloc[1:]
    difference = paired_difference(a, b, 0, seed=0)
    assert difference == {"n": 2, "difference": pytest.approx(0.4), "ci_low": None, "ci_high": None}
    assert paired_difference(a, b.iloc[:0], 10, seed=0) is None


def test_resampled_sums_are_sums_of_drawn_images():
    per_image = np.arange(12.0).reshape(4, 3)
    sums = resampled_sums(per_image, 200, seed=0)
    drawn = (sums[:, 0] / 3).round(9)  # column 0 is 0, 3, 6, 9
    assert sums.shape == (200, 3)
    assert (sums[:, 1] - sums[:, 0] == 4).all()
    assert set(drawn) <= set(range(13))
    assert len(set(drawn)) > 6


def test_paired_miou_difference_has_a_narrow_interval():
    truth = np.full((40, 5), 1000)
    good = np.random.default_rng(3).integers(300, 900, (40, 1)) + np.arange(5)  # Images differ much more than a and b.
    a, b = (np.stack([hits, truth, truth], 1) for hits in (good, good - 50))
    difference = paired_statistic_difference(mean_iou, a, b, 300, seed=0)
    assert difference["n"] == 40
    assert difference["difference"] == pytest.approx(float(mean_iou(a.sum(0)) - mean_iou(b.sum(0))))
    assert 0.03 < difference["ci_low"] < difference["difference"] < difference["ci_high"] < 0.06
    assert paired_statistic_difference(mean_iou, a, a, 50, seed=0) == {"n": 40, "difference": 0, "ci_low": 0, "ci_high": 0}


# --------------------------------------------------------------------------------------------- soft maps, operating points
def soft_rows(seed, count=5):
    """Return phrases of three images, their soft maps (the first is 0 everywhere, the last 1) and their masks."""
    rng = np.random.default_rng(seed)
    truths = [blob(*shape, index) for index, shape in enumerate([(9, 13), (9, 13), (16, 8), (16, 8), (7, 7)][:count])]
    rows = pd.DataFrame(
        {
            "image_id": [4, 4, 2, 2, 9][:count],
            "height": [truth.shape[0] for truth in truths],
            "width": [truth.shape[1] for truth in truths],
            "mask": [encode(truth) for truth in truths],
        }
    )
    maps = rng.random((count, 4, 4), dtype=np.float32)
    maps[0], maps[-1] = 0, 1
    return rows, maps, truths


@quick
@given(st.integers(0, 10**6))
def test_calibration_error_equals_its_definition(seed):
    rows, maps, truths = soft_rows(seed)
    bins = [[] for _ in range(15)]
    for soft, truth in zip(maps, truths, strict=True):
        for probability, foreground in zip(bilinear(soft[None], *truth.shape).ravel(), truth.ravel(), strict=True):
            bins[min(int(float(probability) * 15), 14)].append((float(probability), bool(foreground)))
    total = sum(map(len, bins))
    brute = sum(
        len(pixels) / total * abs(np.mean([p for p, _ in pixels]) - np.mean([y for _, y in pixels]))
        for pixels in bins
        if pixels
    )
    counts = calibration_counts(rows, maps)
    assert counts.shape == (3, 3, 15)
    assert counts[:, 0].sum(1).tolist() == [2 * 16 * 8, 2 * 9 * 13, 7 * 7], "images must be in the order of their ids"
    assert calibration_error(counts.sum(0)) == pytest.approx(brute, abs=1e-9)
    summary = calibration_summary(counts, 20, 0)
    assert summary["ece"] == pytest.approx(brute, abs=1e-9)
    assert summary["pixels"] == [len(pixels) for pixels in bins]
    assert [value is None for value in summary["frequency"]] == [not pixels for pixels in bins]


def test_calibrated_map_has_no_calibration_error():
    """Half of the pixels with probability 0.5 are foreground; probabilities 0 and 1 are correct."""
    truth = np.zeros((4, 8), bool)
    truth[:, 2:6] = True
    truth[0::2, 6:] = True
    soft = np.array([[0, 0, 1, 1, 1, 1, 0.5, 0.5]] * 4, np.float32)
    rows = pd.DataFrame({"image_id": [1], "height": [4], "width": [8], "mask": [encode(truth)]})
    assert calibration_error(calibration_counts(rows, soft[None]).sum(0)) == 0


@quick
@given(st.integers(0, 10**6), st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True).map(sorted))
def test_threshold_ious_equal_those_of_the_upsampled_masks(seed, twentieths):
    rows, maps, truths = soft_rows(seed)
    thresholds = np.array(twentieths) / 20
    computed = threshold_ious(rows, maps, thresholds)
    for soft, truth, row in zip(maps, truths, computed, strict=True):
        for threshold, iou in zip(thresholds, row, strict=True):
            mask = bilinear(soft[None], *truth.shape)[0] >= threshold
            union = (mask | truth).sum()
            assert iou == pytest.approx((mask & truth).sum() / union if union else 0)


def test_best_point_of_a_budget_is_within_the_budget():
    points = [
        {"name": f"{cost}-{ar}", "evaluations": cost, "best_ar": ar} for cost, ar in ((4, 0.6), (1, 0.5), (4, 0.7), (9, 0.65))
    ]
    summary = operating_points(points, "4-0.6")
    assert [(entry["evaluations_at_most"], entry["name"]) for entry in summary["best"]] == [
        (1, "1-0.5"),
        (4, "4-0.7"),
        (9, "4-0.7"),
    ]
    assert not summary["main_is_best_for_its_cost"]
    assert operating_points(points, "4-0.7")["main_is_best_for_its_cost"]
    assert not operating_points(points, "9-0.65")["main_is_best_for_its_cost"], "more evaluations and a lower AR"
