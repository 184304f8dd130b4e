"""Phrases within their prompts: DiffPNG and DiffSeg read a phrase's attention in a pass for its whole caption.

Captions that exceed the text encoder's limit are divided into pieces, after a full stop where there is one, as DiffPNG does.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from genseg.artifacts.templates import fill_template


class Query(NamedTuple):
    """A phrase, and its position in the prompt whose attention is read for it."""

    phrase: str
    prompt: str
    start: int
    end: int


def queries(narrative: pd.DataFrame, template: str, count_tokens: Callable[[str], int], limit: int) -> list[Query]:
    """Return one query per row of a narrative, in the order of `phrase_id`.

    The phrases are searched in the caption one after the other, each behind the previous one. A phrase without a caption, such
    as a class phrase, or one that the caption does not contain is prompted with `template`.

    Args:
        count_tokens: returns the tokens of a text without start and end tokens.
        limit: largest number of such tokens in a prompt.
    """
    found, position, pieces = [], 0, list[tuple[int, int]]()
    for phrase, caption in zip(narrative["phrase"], narrative["caption"], strict=True):
        span = _find(caption, phrase, position) if isinstance(caption, str) else None
        if span is None:
            prompt, start = fill_template(template, phrase)
            found.append(Query(phrase, prompt, start, start + len(phrase)))
            continue
        pieces = pieces or split_caption(caption, count_tokens, limit)
        start, position = span
        first, last = next(piece for piece in pieces if start < piece[1])
        found.append(Query(phrase, caption[first:last], start - first, min(position, last) - first))
    return found


def _find(caption: str, phrase: str, position: int) -> tuple[int, int] | None:
    """Return the span of a phrase's first occurrence, as whole words, from a position, else from the start of the caption."""
    words = r"\s+".join(map(re.escape, phrase.split()))
    pattern = re.compile(rf"(?<!\w){words}(?!\w)")
    match = pattern.search(caption, position) or pattern.search(caption)
    return None if match is None else match.span()


def split_caption(caption: str, count_tokens: Callable[[str], int], limit: int) -> list[tuple[int, int]]:
    """Return the spans of a caption's pieces of whole words, each of at most `limit` tokens (a longer word is a piece).

    A piece ends after the last word with a full stop that fits, or without one after the last word that fits.
    """
    words = [(match.span(), count_tokens(match[0])) for match in re.finditer(r"\S+", caption)]
    pieces, first = [], 0
    while first < len(words):
        end, total = first + 1, words[first][1]
        while end < len(words) and total + words[end][1] <= limit:
            total += words[end][1]
            end += 1
        if end < len(words):
            stops = [k + 1 for k in range(first, end) if caption[words[k][0][1] - 1] == "."]
            end = stops[-1] if stops else end
        pieces.append((words[first][0][0], words[end - 1][0][1]))
        first = end
    return pieces
