"""Noun phrases of a caption, found with a part-of-speech tagger."""

import re
from functools import cache
from typing import Any

NOT_THINGS = {
    *("background", "bottom", "foreground", "front", "left", "middle", "right", "side", "top"),
    *("image", "photo", "photograph", "picture"),
}
"""Nouns for places in an image and for the image itself; a phrase that ends with one of them names nothing to segment."""
_KINDS = {"AT": "D", "DT": "D", "DP": "D", "CR": "D", "OR": "D", "AJ": "A", "NN": "N", "NP": "N"}
"""Determiners and numbers, adjectives, nouns, by the first letters of the tags of the British National Corpus (C5)."""


def noun_phrases(caption: str) -> list[str]:
    """Return the noun phrases of an English caption in their order, without `NOT_THINGS`.

    A phrase is a maximal sequence of determiners, adjectives and at least one noun. It is tagged by HanTa (Wartena 2019).
    """
    words = list(re.finditer(r"\w+(?:[-'’]\w+)*|[^\w\s]", caption))
    tags = [tag for _, _, tag in _tagger().tag_sent([word[0] for word in words])]
    kinds = "".join(_KINDS.get(tag[:2], "-") for tag in tags)
    phrases = [words[match.start() : match.end()] for match in re.finditer("D*A*N+", kinds)]
    return [caption[phrase[0].start() : phrase[-1].end()] for phrase in phrases if phrase[-1][0].lower() not in NOT_THINGS]


@cache
def _tagger() -> Any:
    from HanTa.HanoverTagger import HanoverTagger

    return HanoverTagger("morphmodel_en.pgz")
