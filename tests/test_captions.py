"""Noun phrases of captions, against the narratives of the embedded scenes and against sentences of the PNG kind."""

import json

import pytest

from genseg.data.captions import noun_phrases


def test_phrases_of_narratives_are_found(finished_study):
    narratives = []
    for split in ("train", "val"):
        file = finished_study / f"data/smoke/scenes/annotations/png_coco_{split}2017.json"
        narratives += json.loads(file.read_text())
    for narrative in narratives:
        grounded = [part["utterance"] for part in narrative["segments"] if part["segment_ids"]]
        assert noun_phrases(narrative["caption"]) == grounded


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        (
            "In this picture I can see a man standing on the ground and riding a brown horse, and in the background are trees.",
            ["a man", "the ground", "a brown horse", "trees"],
        ),
        ("A woman's hand holding a cell phone next to a laptop", ["A woman's hand", "a cell phone", "a laptop"]),
        (
            "A black-and-white dog is running; people sit on two wooden benches.",
            ["A black-and-white dog", "people", "two wooden benches"],
        ),
        ("the left side", []),
        ("", []),
    ],
)
def test_phrases_of_sentences_are_found(caption, phrases):
    assert noun_phrases(caption) == phrases
