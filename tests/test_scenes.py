"""The embedded data set: annotations and narratives agree with the images."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genseg.data.scenes import (
    ATTRIBUTES,
    COMPOSITIONAL,
    NUMBERS,
    PLURALS,
    SHAPES,
    _choose_things,
    _describe,
    attributes_of,
    write_scenes,
)
from genseg.params.data import Scenes

SCENES = Scenes(
    seed=3,
    size=64,
    train_images=12,
    test_images=10,
    shapes=["circle", "star", "ring"],
    colours=["red", "green"],
    surfaces=["plain", "dotted"],
    radii={"small": (0.09, 0.12), "large": (0.155, 0.21)},
    most_things=7,
    hold_back=True,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    write_scenes(SCENES, root)
    return root


def read(folder: Path, name: str):
    return json.loads((folder / "annotations" / name).read_text())


def test_bytes_do_not_depend_on_number_of_workers(folder, tmp_path):
    write_scenes(SCENES, tmp_path / "again", workers=2)
    first = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    second = {
        path.relative_to(tmp_path / "again"): path.read_bytes() for path in (tmp_path / "again").rglob("*") if path.is_file()
    }
    assert first == second
    assert len(first) == 2 * (12 + 10) + 4


def test_another_seed_gives_another_data_set(folder, tmp_path):
    write_scenes(SCENES.model_copy(update={"seed": 4}), tmp_path / "other")
    name = "train2017/000000000001.jpg"
    assert (folder / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_panoptic_pngs_contain_exactly_the_listed_segments(folder):
    for split in ("train", "val"):
        document = read(folder, f"panoptic_{split}2017.json")
        for annotation in document["annotations"]:
            pixels = np.asarray(Image.open(folder / f"annotations/panoptic_{split}2017" / annotation["file_name"])).astype(int)
            ids, areas = np.unique(pixels @ [1, 256, 65536], return_counts=True)
            assert {info["id"]: info["area"] for info in annotation["segments_info"]} == dict(
                zip(ids.tolist(), areas.tolist(), strict=True)
            )


def test_parts_join_to_caption_and_plurals_have_several_segments(folder):
    for narrative in read(folder, "png_coco_val2017.json"):
        joined = " ".join(part["utterance"] for part in narrative["segments"]).replace(" ,", ",").replace(" .", ".")
        assert joined == narrative["caption"]
        assert any(part["noun"] and not part["segment_ids"] for part in narrative["segments"]), "an ungrounded noun"
        for part in narrative["segments"]:
            if part["segment_ids"]:
                assert part["plural"] == (len(part["segment_ids"]) > 1)


def test_held_back_pairs_are_not_in_training_scenes():
    for seed in range(300):
        things = _choose_things(np.random.default_rng(seed), ATTRIBUTES, unseen_pairs=False)
        assert things
        assert not {(thing.colour, thing.shape) for thing in things} & COMPOSITIONAL
    test_scenes = [_choose_things(np.random.default_rng(seed), ATTRIBUTES, unseen_pairs=True) for seed in range(300)]
    share = np.mean([any((t.colour, t.shape) in COMPOSITIONAL for t in things) for things in test_scenes])
    assert share > 0.4


def test_training_scenes_contain_pairs_that_are_not_held_back(tmp_path):
    for hold_back in (True, False):
        folder = tmp_path / str(hold_back)
        write_scenes(SCENES.model_copy(update={"train_images": 30, "hold_back": hold_back}), folder)
        narratives = json.loads((folder / "annotations" / "png_coco_train2017.json").read_text())
        tagged_parts = [part for narrative in narratives for part in narrative["segments"] if part.get("tags")]
        assert bool(tagged_parts) != hold_back


def test_phrases_describe_exactly_their_things():
    words = {word: key for key, values in ATTRIBUTES.items() for word in values}
    singular = {PLURALS.get(shape, shape + "s"): shape for shape in SHAPES}
    phrase_count = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        things = _choose_things(rng, ATTRIBUTES, unseen_pairs=True)
        for plural in (False, True):
            description = _describe(rng, things, int(rng.integers(len(things))), plural)
            if description is None:
                continue
            phrase, members = description
            phrase_count += 1
            attributes = {}
            for word in phrase.split()[1:]:
                word = singular.get(word, word)
                attributes[words[word]] = word
            matches = [i for i, t in enumerate(things) if all(getattr(t, key) == value for key, value in attributes.items())]
            assert members == matches
            assert (len(members) > 1) == plural
            head = phrase.split()[0]
            assert head in {"a", "the", NUMBERS.get(len(members))}
    assert phrase_count > 400


def test_scenes_use_only_attributes_of_the_params():
    attributes = attributes_of(SCENES)
    for seed in range(200):
        for thing in _choose_things(np.random.default_rng(seed), attributes, unseen_pairs=seed % 2 == 0):
            assert all(getattr(thing, key) in values for key, values in attributes.items())


def test_distractors_differ_in_one_attribute():
    pairs = 0
    for seed in range(200):
        things = _choose_things(np.random.default_rng(seed), ATTRIBUTES, unseen_pairs=True)
        for i, first in enumerate(things):
            for second in things[i + 1 :]:
                pairs += sum(getattr(first, key) != getattr(second, key) for key in ATTRIBUTES) == 1
    assert pairs > 150
