"""Templates filled with phrases: no phrase gets a second article, and the phrase itself is never changed."""

import csv
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import PROJECT
from genseg.artifacts.templates import fill_template

DETERMINERS = ["a", "an", "the", "two", "3", "his", "their", "some", "these", "The", "A", "several", "my"]
NOUNS = ["person", "umbrella", "old man", "people", "dogs", "grass", "sand", "wooden floor", "men in black", "bus", "hour"]
TEMPLATES = ["a photograph of a {phrase}", "{phrase}", "the {name}", "An image of the {phrase} here", "this is an {name}, yes"]
TWO_DETERMINERS = re.compile(r"(?i)\b(a|an|the)\s+(a|an|the|two|\d+|his|their|some|these|several|my)\b")


@given(
    st.sampled_from(TEMPLATES), st.sampled_from(["", *DETERMINERS]), st.lists(st.sampled_from(NOUNS), min_size=1, max_size=3)
)
def test_no_text_has_two_determiners_and_the_phrase_is_unchanged(template, determiner, nouns):
    phrase = f"{determiner} {' with '.join(nouns)}".strip()
    text, start = fill_template(template, phrase)
    before, after = re.split(r"\{\w+\}", template)
    assert text[start : start + len(phrase)] == phrase
    assert text.endswith(phrase + after)
    assert not TWO_DETERMINERS.search(text)
    words = re.sub(r"(?i)\b(a|an|the)\s+$", "", before).split()
    assert text[:start].split()[: len(words)] == words  # only the article before the placeholder may go
    if not determiner and "the {" in template:
        assert text == before + phrase + after


@given(st.text(min_size=1), st.sampled_from(["{phrase}", "photo: {phrase}.", "of {name}"]))
def test_templates_without_an_article_are_only_joined(phrase, template):
    assert fill_template(template, phrase)[0] == re.sub(r"\{\w+\}", lambda _: phrase, template)


@pytest.mark.parametrize(
    ("phrase", "text"),
    [
        ("the person", "a photograph of the person"),
        ("person", "a photograph of a person"),
        ("elephant", "a photograph of an elephant"),
        ("uniform", "a photograph of a uniform"),
        ("two dogs", "a photograph of two dogs"),
        ("dogs", "a photograph of dogs"),
        ("people on a bus", "a photograph of people on a bus"),
        ("man with glasses", "a photograph of a man with glasses"),
        ("glass", "a photograph of a glass"),
        ("man's hat", "a photograph of a man's hat"),
        ("his hat", "a photograph of his hat"),
    ],
)
def test_prompts_read_as_a_person_writes_them(phrase, text):
    assert fill_template("a photograph of a {phrase}", phrase)[0] == text


def test_class_names_of_coco_panoptic_are_readable():
    with open(PROJECT / "data/classes/coco_panoptic.csv", newline="") as handle:
        names = {row["category"]: row["name"] for row in csv.DictReader(handle)}
    assert len(names) == len(set(names.values())) == 133
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)*", name) for name in names.values())
    assert not [name for name in names.values() if {"merged", "other", "stuff"} & set(name.split())]
    assert (names["wall-other-merged"], names["door-stuff"], names["floor-wood"]) == ("wall", "door", "wooden floor")
