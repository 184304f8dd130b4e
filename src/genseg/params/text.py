"""Params as text: the complete document with a comment for each key, and the keys in which two studies differ."""

import math
import re
from typing import Any, Literal, get_args, get_origin

import yaml

from genseg.params import JobResources, OperatingPoint, Params
from genseg.params.base import Section

_COMMENT_COLUMN = 36
_MAX_WIDTH = 128
_SENTENCE_END = re.compile(r"(?<!Eq)(?<!e\.g)\. (?=[A-Z0])")
_ON_ONE_LINE = (OperatingPoint, JobResources)
"""Sections that are written on one line."""


def to_yaml(params: Params) -> str:
    """Return all params as YAML. The comment of a key is the first sentence of its docstring, or of its section's class."""
    return "\n".join(_lines(params, 0)) + "\n"


def differences(first: Params, second: Params) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, first value, second value) for the keys whose values differ. A missing section is None."""
    a, b = (_leaves(params.model_dump(mode="json")) for params in (first, second))
    keys = dict.fromkeys([*a, *b])
    rows = [(key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)]
    return [row for row in rows if not any(key.startswith(f"{row[0]}.") for key in keys)]


def flow(value: Any) -> str:
    """Return a JSON value as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    return text.strip().removesuffix("\n...").strip()


def _leaves(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in document.items():
        key = f"{prefix}{name}"
        leaves |= _leaves(value, f"{key}.") if isinstance(value, dict) and value else {key: value}
    return leaves


def _lines(section: Section, indent: int) -> list[str]:
    lines = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        docstring = " ".join((field.description or type(value).__doc__ or "").split())
        comment = _SENTENCE_END.split(docstring)[0].removesuffix(".")
        if get_origin(field.annotation) is Literal:
            comment += f" ({' | '.join(get_args(field.annotation))})"
        margin = " " * indent
        if isinstance(value, Section) and not isinstance(value, _ON_ONE_LINE):
            blank = [""] if indent == 0 else []
            lines += [*blank, _with_comment(f"{margin}{name}:", comment), *_lines(value, indent + 2)]
        elif isinstance(value, list) and any(isinstance(item, OperatingPoint) for item in value):
            points = [item.model_dump(mode="json", exclude_defaults=True, exclude={"size"}) for item in value]
            lines += [_with_comment(f"{margin}{name}:", comment), *(f"{margin}  - {flow(point)}" for point in points)]
        else:
            document = section.model_dump(mode="json", include={name})[name]
            lines.append(_with_comment(f"{margin}{name}: {flow(document)}", comment))
    return lines


def _with_comment(text: str, comment: str) -> str:
    """Return a line with its comment, which precedes the line if both do not fit on one."""
    line = f"{text:<{_COMMENT_COLUMN - 2}}  # {comment}"
    return line if len(line) <= _MAX_WIDTH else f"{' ' * (len(text) - len(text.lstrip()))}# {comment}\n{text}"
