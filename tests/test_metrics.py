"""Metrics against independent definitions: brute force, torch, per-pixel loops, analytic intervals."""

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
from genseg.metrics.bootstrap import paired_difference, paired_miou_difference, recall_intervals, resampled_sums
from genseg.metrics.boundary import band_width, boundary_band, boundary_ious
from genseg.metrics.calibration import calibration_counts, calibration_error, calibration_summary
from genseg.metrics.ceilings import latent_ceiling, protocol_ceiling
from genseg.metrics.operating import operating_points, threshold_ious
from genseg.metrics.protocols import Pairs, phrase_ious, plural_flags, ppmn_size
from genseg.metrics.recall import GRIDS, Grid, average_recall, size_members, split_members, threshold_grid
from genseg.metrics.semantic import class_ious, count_pixels, mean_iou

torch.set_num_threads(1)
quick = settings(max_examples=40, deadline=None)
interpolate = torch.nn.functional.interpolate


def pairs_of(truths, predictions):
    shapes = np.array([mask.shape for mask in truths])
    codes = [[encode(mask) for mask in masks] for masks in (truths, predictions)]
    truth, prediction, common = compare(*codes)
    return Pairs(*codes, shapes[:, 0], shapes[:, 1], truth.foreground, prediction.foreground, common)


def blob(height, width, seed):
    """A random smooth mask, neither empty nor full."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(height, width)), min(height, width) / 10)
    return noise > np.quantile(noise, 0.7)


# ------------------------------------------------------------------------------------------------- average recall
ious = hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1) | st.sampled_from([0.0, 0.25, 0.5, 1.0]))


@quick
@given(ious, st.lists(st.tuples(st.floats(0, 1) | st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 2)), max_size=20))
def test_closed_form_equals_the_definition_on_any_sorted_grid(iou, points):
    points = sorted(points)
    thresholds, weights = (np.array([point[part] for point in points], np.float64) for part in (0, 1))
    brute = sum(weight * np.mean([value >= threshold for value in iou]) for threshold, weight in points)
    assert average_recall(iou, Grid(thresholds, weights)) == pytest.approx(brute, abs=1e-12)


def official_average_accuracy(iou):
    """The PNG benchmark's loop over thresholds, literally but for the vectorised comparison."""
    thresholds = np.arange(0, 1, 0.00001)
    ordered = np.sort(iou)
    accuracy = (len(iou) - np.searchsorted(ordered, thresholds, side="left")) / len(iou)
    return sum(
        abs(after - before) * value for before, after, value in zip(thresholds[:-1], thresholds[1:], accuracy, strict=False)
    )


def test_official_grid_is_the_benchmarks_loop_and_all_grids_agree_within_1e_4():
    iou = np.random.default_rng(0).beta(2, 1, 500)
    iou[:3] = 0, 1, 0.5
    assert average_recall(iou, threshold_grid("official")) == pytest.approx(official_average_accuracy(iou), abs=1e-10)
    assert threshold_grid("gs_eq12").thresholds.shape == (9_999,)
    assert average_recall(np.ones(3), threshold_grid("gs_eq12")) == pytest.approx(0.9999)
    for name in GRIDS:
        assert average_recall(iou, threshold_grid(name)) == pytest.approx(iou.mean(), abs=1e-4 + 1e-12), name


def test_an_empty_union_is_a_miss():
    assert average_recall(np.array([np.nan, 1.0])) == 0.5


def test_splits_and_sizes():
    frame = pd.DataFrame({"is_thing": [True, True, False], "is_plural": [False, True, True]})
    found = {name: members.tolist() for name, members in split_members(frame).items()}
    assert found == {
        "overall": [True] * 3,
        "things": [True, True, False],
        "stuff": [False, False, True],
        "singulars": [True, False, False],
        "plurals": [False, True, True],
    }
    # 1,023 pixels are small and 1,024 medium in a 640 x 480 image, a quarter of them in an image of a quarter of its area
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
    """Steps of the PNG benchmark's data loader and test loop."""

    def resize(map_, *size):
        return interpolate(map_[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]

    target = resize(resize(torch.tensor(truth, dtype=torch.float32), 256, 256), *truth.shape)
    instance = torch.round(resize(torch.tensor(prediction, dtype=torch.float32), 256, 256))
    proposal = resize(instance, *truth.shape)
    both = proposal * target
    return (both.sum() / (proposal + target - both).sum()).item()


def torch_ppmn(truth, prediction):
    """Steps of PPMN's `evaluate`."""
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

    target, found = quarter(truth) > 0, quarter(prediction) > 0.5
    return ((target & found).sum() / (target | found).sum()).item()


@pytest.mark.parametrize(("height", "width"), [(120, 160), (97, 61), (300, 90), (333, 500)])
def test_other_protocols_repeat_their_evaluators(height, width):
    truth, prediction = blob(height, width, 0), blob(height, width, 1) | blob(height, width, 0)
    pairs = pairs_of([truth], [prediction])
    assert phrase_ious("png-official", pairs)[0][0] == pytest.approx(torch_official(truth, prediction), abs=1e-5)
    assert phrase_ious("ppmn", pairs)[0][0] == pytest.approx(torch_ppmn(truth, prediction), abs=1e-4)


def test_ppmn_resizes_as_detectron2():
    assert ppmn_size(480, 640) == (800, 1067)
    assert ppmn_size(640, 480) == (1067, 800)
    assert ppmn_size(300, 1000) == (400, 1333)  # the longest side decides


@pytest.mark.parametrize("protocol", ["native", "png-official", "ppmn"])
def test_empty_masks_under_every_protocol(protocol):
    nothing, something = np.zeros((40, 50), bool), blob(40, 50, 3)
    iou, empty = phrase_ious(protocol, pairs_of([nothing, nothing, something], [nothing, something, nothing]))
    assert iou.tolist() == [0, 0, 0]
    assert empty.tolist() == [True, False, False]


def test_no_phrases_give_no_ious():
    for protocol in ("native", "png-official", "ppmn"):
        iou, empty = phrase_ious(protocol, Pairs([], [], *[np.zeros(0, np.int64)] * 5))
        assert iou.shape == empty.shape == (0,)


def test_plural_rule_of_each_protocol():
    segments = [np.array([4, 5]), np.array([4]), np.array([7, 7]), None]
    frame = pd.DataFrame({"is_plural": [False, True, True, True], "segment_ids": segments})
    assert plural_flags("native", frame)[0].tolist() == [False, True, True, True]
    for protocol in ("png-official", "ppmn"):
        flags, by_flag = plural_flags(protocol, frame)
        assert flags.tolist() == [True, False, False, True]
        assert by_flag == 1  # the row without segments keeps the table's flag, and that is told


# ------------------------------------------------------------------------------------------------------ ceilings
def test_ceilings_of_protocols():
    masks = [blob(90, 120, seed) for seed in range(4)] + [np.zeros((90, 120), bool)]
    pairs = pairs_of(masks, masks)
    assert protocol_ceiling("native", pairs).tolist() == [1, 1, 1, 1, 0]
    for protocol, reference in (("png-official", torch_official), ("ppmn", torch_ppmn)):
        found = protocol_ceiling(protocol, pairs)
        assert found[:4] == pytest.approx([reference(mask, mask) for mask in masks[:4]], abs=1e-4)
        assert (found[:4] < 0.999).all()
        assert found[4] == 0


def test_latent_ceiling_is_the_read_out_of_the_reduced_mask():
    masks = [blob(64, 96, seed) for seed in range(3)]
    pairs = pairs_of(masks, masks)
    for size in ((8, 8), (16, 32)):
        for mask, found in zip(masks, latent_ceiling(pairs, size), strict=True):
            small = interpolate(torch.tensor(mask, dtype=torch.float32)[None, None], size=size, mode="area")
            read = (interpolate(small, size=mask.shape, mode="bilinear")[0, 0] >= 0.5 - 1e-6).numpy()
            assert found == pytest.approx((mask & read).sum() / (mask | read).sum())
    assert latent_ceiling(pairs, (64, 96)).tolist() == [1, 1, 1]
    assert latent_ceiling(pairs, (8, 12)).mean() < latent_ceiling(pairs, (32, 48)).mean() < 1


# -------------------------------------------------------------------------------------------------- boundary IoU
@quick
@given(hnp.arrays(bool, st.tuples(st.integers(1, 14), st.integers(1, 14))), st.integers(1, 4))
def test_boundary_band_is_what_erosion_removes(mask, distance):
    square = np.ones((2 * distance + 1,) * 2, bool)
    eroded = ndimage.binary_erosion(mask, square, border_value=0)  # the outside of the image is background
    assert (boundary_band(mask, distance) == (mask & ~eroded)).all()


def test_boundary_iou_of_a_full_image_is_its_frame():
    full, half = np.ones((100, 100), bool), np.ones((100, 100), bool)
    half[:, 50:] = False
    pairs = pairs_of([full, full, np.zeros((100, 100), bool)], [full, half, np.zeros((100, 100), bool)])
    assert band_width(100, 100, 0.02) == 3
    frame = 100 * 100 - 94 * 94
    inner = 100 * 50 - 94 * 44
    both = 2 * 3 * 50 + 94 * 3  # top and bottom of the half, and its left side
    assert boundary_ious(pairs, 0.02).tolist() == pytest.approx([1, both / (frame + inner - both), 0])
    assert band_width(10, 10, 0.02) == 1  # never none


# ---------------------------------------------------------------------------------------------------------- mIoU
def naive_confusion(rows, predicted_values, covered, classes, threshold, shape):
    """TP, T, P by class of one image, pixel by pixel. `predicted_values`: class -> [H, W]; `covered`: where it may win."""
    background = next((index for index, item in enumerate(classes) if item.get("background")), None)
    tp, t, p = (dict.fromkeys(range(len(classes)), 0) for _ in range(3))
    for y in range(shape[0]):
        for x in range(shape[1]):
            there = sorted((mask.sum(), -index) for index, mask in rows.items() if mask[y, x])
            truth = -there[0][1] if there else (background if background is not None and background not in rows else None)
            if truth is None:
                continue
            offers = [(values[y, x], -index) for index, values in predicted_values.items() if covered[index][y, x]]
            best = max(offers) if offers else None
            winner = None if best is None else -best[1]
            if background is not None and (best is None or best[0] < threshold):
                winner = background
            t[truth] += 1
            if winner is not None:
                p[winner] += 1
                tp[truth] += winner == truth
    return np.array([[part[index] for index in range(len(classes))] for part in (tp, t, p)])


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("background", ["none", "without a row", "with a row"])
def test_miou_equals_a_naive_count(soft, background):
    random = np.random.default_rng(7)
    classes = [{"name": name} for name in "abcd"]
    if background != "none":
        classes[1]["background"] = True
    rows, maps, expected = [], [], []
    for image, shape in ((3, (13, 9)), (1, (8, 11)), (2, (6, 6))):
        owner = random.integers(0, 4, shape)  # disjoint but for class 3, which lies over the others' pixels
        masks = {index: owner == index for index in range(4)}
        masks[3] = masks[3] | (random.random(shape) < 0.1)
        if background == "without a row":
            del masks[1]
        else:
            masks[0] &= random.random(shape) < 0.7  # leaves unlabelled pixels
        values, covered = {}, {}
        for index, mask in masks.items():
            answered = not (image == 1 and index == 2)
            small = random.random((3, 4)).astype(np.float32)
            guess = random.random(shape) < 0.4
            score = np.float32(random.choice([0.25, 0.5, 0.75]))
            rows.append(
                {
                    **{"image_id": image, "phrase_id": index, "height": shape[0], "width": shape[1], "mask": encode(mask)},
                    **{"area": int(mask.sum()), "predicted_row": len(maps) if answered else -1},
                    **{"predicted_mask": encode(guess), "score": score},
                }
            )
            maps.append(small)
            if answered and not classes[index].get("background"):
                up = interpolate(torch.tensor(small)[None, None], size=shape, mode="bilinear")[0, 0].numpy()
                values[index] = up if soft else np.full(shape, score)
                covered[index] = np.ones(shape, bool) if soft else guess
        expected.append((image, naive_confusion(masks, values, covered, classes, 0.6 if soft else -1, shape)))
    frame = pd.DataFrame(rows).sample(frac=1, random_state=0)
    stack = np.stack(maps)
    semantic = count_pixels(frame, (lambda chosen: stack[chosen]) if soft else None, classes, 0.6)
    assert semantic.image_ids.tolist() == [1, 2, 3]
    assert (semantic.counts == np.stack([count for _, count in sorted(expected, key=lambda item: item[0])])).all()
    assert semantic.missing == 1
    tp, t, p = semantic.counts.sum(0)
    wanted = [tp[c] / (t[c] + p[c] - tp[c]) for c in range(4) if t[c]]
    assert mean_iou(semantic.counts.sum(0)) == pytest.approx(np.mean(wanted))


def test_classes_without_ground_truth_do_not_count():
    counts = np.array([[5, 0, 0], [10, 0, 4], [5, 3, 0]])
    assert class_ious(counts) == pytest.approx([0.5, np.nan, 0.0], nan_ok=True)
    assert mean_iou(counts) == 0.25
    assert np.isnan(mean_iou(np.zeros((3, 2))))


def test_unknown_class_index_is_an_error():
    rows = pd.DataFrame({"image_id": [1], "phrase_id": [5], "height": 1, "width": 1})
    with pytest.raises(UserError, match="phrase_id 5 is no index of the 2 classes"):
        count_pixels(rows, None, [{"name": "a"}, {"name": "b"}], 0.5)


# ----------------------------------------------------------------------------------------------------- bootstrap
def table(image_ids, iou):
    frame = pd.DataFrame({"image_id": image_ids, "narrative_id": "n", "phrase_id": np.arange(len(iou)), "iou": iou})
    return frame[[*KEY, "iou"]]


def test_interval_has_the_width_that_statistics_predicts():
    random = np.random.default_rng(1)
    images = np.repeat(np.arange(300), 3)
    effect = np.repeat(random.normal(0, 0.2, 300), 3)  # phrases of one image are alike: only images are independent
    values = np.clip(0.5 + effect + random.normal(0, 0.02, 900), 0, 1)
    members = {"overall": np.ones(900, bool), "none": np.zeros(900, bool)}
    found = recall_intervals(images, values, members, 2000, seed=0)
    low, high = found["overall"]
    per_image = values.reshape(300, 3).mean(1)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * per_image.std() / np.sqrt(300), rel=0.1)
    assert found["none"] is None
    order = random.permutation(900)
    again = recall_intervals(images[order], values[order], members, 2000, seed=0)
    assert again["overall"] == pytest.approx([low, high], abs=1e-12)
    assert recall_intervals(images, values, members, 2000, seed=1)["overall"] != [low, high]
    assert recall_intervals(images, values, members, 0, seed=0)["overall"] is None


def test_paired_difference_uses_the_pairing():
    random = np.random.default_rng(2)
    images = np.repeat(np.arange(100), 4)
    base = random.uniform(0, 0.9, 400)
    a, b = table(images, base + 0.05), table(images, base)
    found = paired_difference(a, b, 500, seed=0)
    assert found["n"] == 400
    assert [found["difference"], found["ci_low"], found["ci_high"]] == pytest.approx([0.05] * 3)
    unpaired = paired_difference(a, table(images, random.permutation(base)), 500, seed=0)
    assert unpaired["ci_high"] - unpaired["ci_low"] > 0.03
    back = paired_difference(b, a, 500, seed=0)
    assert back["difference"] == pytest.approx(-found["difference"])


def test_paired_difference_takes_the_phrases_that_both_hold():
    a, b = table([1, 1, 2], [0.2, 0.4, 1.0]), table([1, 1, 2], [0.1, 0.1, 0.5]).iloc[1:]
    found = paired_difference(a, b, 0, seed=0)
    assert found == {"n": 2, "difference": pytest.approx(0.4), "ci_low": None, "ci_high": None}
    assert paired_difference(a, b.iloc[:0], 10, seed=0) is None


def test_resampled_sums_are_sums_of_drawn_images():
    per_image = np.arange(12.0).reshape(4, 3)
    sums = resampled_sums(per_image, 200, seed=0)
    drawn = (sums[:, 0] / 3).round(9)  # column 0 is 0, 3, 6, 9
    assert sums.shape == (200, 3)
    assert (sums[:, 1] - sums[:, 0] == 4).all()
    assert set(drawn) <= set(range(13))
    assert len(set(drawn)) > 6


def test_miou_difference():
    truth = np.full((40, 5), 1000)
    good = np.random.default_rng(3).integers(300, 900, (40, 1)) + np.arange(5)  # images differ much more than a and b
    a, b = (np.stack([hit, truth, truth], 1) for hit in (good, good - 50))
    found = paired_miou_difference(a, b, 300, seed=0)
    assert found["n"] == 40
    assert found["difference"] == pytest.approx(float(mean_iou(a.sum(0)) - mean_iou(b.sum(0))))
    assert 0.03 < found["ci_low"] < found["difference"] < found["ci_high"] < 0.06
    assert paired_miou_difference(a, a, 50, seed=0) == {"n": 40, "difference": 0, "ci_low": 0, "ci_high": 0}


# --------------------------------------------------------------------------------------------- soft maps, operating points
def soft_rows(seed, count=5):
    """Phrases of three images with soft maps, the first and the last map plain 0 and 1."""
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
def test_calibration_error_is_the_definition(seed):
    rows, maps, truths = soft_rows(seed)
    bins = [[] for _ in range(15)]
    for soft, truth in zip(maps, truths, strict=True):
        for probability, foreground in zip(bilinear(soft[None], *truth.shape).ravel(), truth.ravel(), strict=True):
            bins[min(int(float(probability) * 15), 14)].append((float(probability), bool(foreground)))
    total = sum(map(len, bins))
    brute = sum(
        len(found) / total * abs(np.mean([p for p, _ in found]) - np.mean([y for _, y in found])) for found in bins if found
    )
    counts = calibration_counts(rows, maps)
    assert counts.shape == (3, 3, 15)
    assert counts[:, 0].sum(1).tolist() == [2 * 16 * 8, 2 * 9 * 13, 7 * 7], "images in the order of their ids"
    assert calibration_error(counts.sum(0)) == pytest.approx(brute, abs=1e-9)
    summary = calibration_summary(counts, 20, 0)
    assert summary["ece"] == pytest.approx(brute, abs=1e-9)
    assert summary["pixels"] == [len(found) for found in bins]
    assert [value is None for value in summary["frequency"]] == [not found for found in bins]


def test_a_calibrated_map_has_no_calibration_error():
    """Halves of foreground where the map says one half; certainty where it is right."""
    truth = np.zeros((4, 8), bool)
    truth[:, 2:6] = True
    truth[0::2, 6:] = True
    soft = np.array([[0, 0, 1, 1, 1, 1, 0.5, 0.5]] * 4, np.float32)
    rows = pd.DataFrame({"image_id": [1], "height": [4], "width": [8], "mask": [encode(truth)]})
    assert calibration_error(calibration_counts(rows, soft[None]).sum(0)) == 0


@quick
@given(st.integers(0, 10**6), st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True).map(sorted))
def test_threshold_ious_are_those_of_the_read_out(seed, twentieths):
    rows, maps, truths = soft_rows(seed)
    thresholds = np.array(twentieths) / 20
    found = threshold_ious(rows, maps, thresholds)
    for soft, truth, ious_of_phrase in zip(maps, truths, found, strict=True):
        for threshold, iou in zip(thresholds, ious_of_phrase, strict=True):
            mask = bilinear(soft[None], *truth.shape)[0] >= threshold
            union = (mask | truth).sum()
            assert iou == pytest.approx((mask & truth).sum() / union if union else 0)


def test_the_best_point_of_a_budget_costs_no_more():
    points = [
        {"name": f"{cost}-{ar}", "evaluations": cost, "best_ar": ar} for cost, ar in ((4, 0.6), (1, 0.5), (4, 0.7), (9, 0.65))
    ]
    found = operating_points(points, "4-0.6")
    assert [(entry["evaluations_at_most"], entry["name"]) for entry in found["best"]] == [
        (1, "1-0.5"),
        (4, "4-0.7"),
        (9, "4-0.7"),
    ]
    assert not found["main_is_best_for_its_cost"]
    assert operating_points(points, "4-0.7")["main_is_best_for_its_cost"]
    assert not operating_points(points, "9-0.65")["main_is_best_for_its_cost"], "dearer and worse"
