"""Texts made from a template and a phrase, such as prompts and the phrases of classes."""

import re

_ARTICLE = re.compile(r"(?i)\b(a|an|the)\s+$")
_DETERMINERS = re.compile(
    r"a|an|the|this|that|these|those|my|your|his|her|its|our|their|some|any|no|each|every|either|neither|another|both|all|many|"
    r"several|few|most|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\d+"
).fullmatch
_PREPOSITIONS = re.compile(
    r"of|in|on|at|by|with|without|from|near|behind|under|over|above|below|between|beside|for|to"
).fullmatch
_IRREGULAR_PLURALS = {"people", "men", "women", "children", "feet", "teeth", "mice", "geese", "cattle", "police"}
_SINGULARS = {"gas", "lens", "canvas", "christmas", "atlas"}
_VOWEL_SOUND = re.compile(r"(?i)(?!uni(?![ndm])|us[eu]|eu|one\b|once\b)[aeiou]|hour|honest|heir")


def fill_template(template: str, phrase: str) -> tuple[str, int]:
    """Put a phrase in the place of a template's placeholder (in braces), with one article at most.

    An article before the placeholder is left out if the phrase has a determiner of its own ("the person", "two dogs", "his
    hat"); "a" is also left out before a plural, and becomes "an" before a vowel.

    Returns:
        The text, and the position in it of the phrase, which is never changed.
    """
    before, after = re.split(r"\{\w+\}", template)
    article = _ARTICLE.search(before)
    if article is not None:
        words = re.findall(r"[\w'’]+", phrase.lower())
        is_definite = article[1].lower() == "the"
        if words and (_DETERMINERS(words[0]) or (not is_definite and _is_plural(words))):
            before = before[: article.start()]
        elif not is_definite:
            vowel = _VOWEL_SOUND.match(phrase) is not None
            before = f"{before[: article.start()]}{article[1][0]}{'n' if vowel else ''} "
    return before + phrase + after, len(before)


def _is_plural(words: list[str]) -> bool:
    """Return whether the noun before the first preposition looks like a plural: ends in s, but not in ss, us or is."""
    end = next((k for k, word in enumerate(words) if k and _PREPOSITIONS(word)), len(words))
    noun = words[end - 1]
    if noun in _IRREGULAR_PLURALS:
        return True
    return noun.endswith("s") and not noun.endswith(("ss", "us", "is", "'s", "’s")) and noun not in _SINGULARS
