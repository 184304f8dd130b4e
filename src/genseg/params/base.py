"""Base types of the params: fields, sections, and reading and validating a document of any schema."""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from genseg.errors import UserError

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
ImageSize = Annotated[int, Field(gt=0, lt=10_000)]
Timestep = Annotated[int, Field(ge=0, lt=1000)]
Precision = Literal["fp32", "bf16", "fp16"]


class Section(BaseModel):
    """Part of a params document. Sections are immutable and reject unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _partial_sections_take_defaults(cls, document: Any) -> Any:
        """Complete each subsection that lists only some of its keys with its default in this section."""
        if not isinstance(document, dict):
            return document
        defaults = {name: field.default for name, field in cls.model_fields.items() if isinstance(field.default, Section)}
        partial = {name: document[name] for name in defaults if isinstance(document.get(name), dict)}
        return document | {name: defaults[name].model_dump(exclude_unset=True) | keys for name, keys in partial.items()}


Document = TypeVar("Document", bound=Section)


def has_placeholder(template: str, placeholder: str) -> bool:
    """Return whether a template contains `placeholder` (such as `{name}`) exactly once and no other braces."""
    return template.count(placeholder) == 1 and not set(template.replace(placeholder, "")) & {"{", "}"}


def canonical_json(value: Any) -> str:
    """Return the JSON text of a value with sorted keys and no white space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any, length: int = 16) -> str:
    """Return the first `length` hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


class StableDiffusion(Section):
    """Stable Diffusion pipeline of a phase, and the size, precision and prompt with which it is evaluated."""

    backbone: str | None = None
    """Diffusers directory or hub id of a Stable Diffusion pipeline; null: the study's backbone."""
    revision: str | None = None
    """Revision of the hub id."""
    size: ImageSize = 128
    """Side in pixels to which images are resized."""
    precision: Precision = "bf16"
    """Precision of the networks."""
    prompt: str = "{phrase}"
    """Prompt for a phrase, such as `a photo of {phrase}`."""

    @field_validator("prompt")
    @classmethod
    def _prompt_has_phrase(cls, value: str) -> str:
        if not has_placeholder(value, "{phrase}"):
            raise ValueError("must contain {phrase} once and no other braces")
        return value


class _UniqueKeys(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys, as DVC does."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value}", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


def read_document(path: str | Path, kind: str) -> Any:
    """Parse a YAML file. Raises UserError if it is unreadable, not UTF-8 or not valid YAML; `kind` names its option."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the {kind} file ({error.strerror}); pass another with --{kind} FILE") from None
    try:
        return yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def validate(schema: type[Document], document: Any, origin: str) -> Document:
    """Validate a parsed document; `origin` is its name in error messages.

    Raises UserError if it is not a mapping, a key is unknown or missing, or a value is out of range.
    """
    if not isinstance(document, dict):
        raise UserError(f"{origin}: expected a mapping at the top level, got {type(document).__name__}")
    try:
        valid = schema.model_validate(document)
    except ValidationError as error:
        items = [item for item in error.errors() if item["type"] != "default_factory_not_called"]  # follows from another error
        raise UserError(f"{origin}: " + "; ".join(_explain(item, schema) for item in items)) from None
    if key := _boolean_as_number(document, valid.model_dump(mode="json")):
        raise UserError(f"{origin}: {key}: expected a number, got a boolean")
    return valid


def _boolean_as_number(document: Any, valid: Any, key: str = "") -> str | None:
    """Return the first key whose value is a boolean that pydantic converted to 1 or 0, or None."""
    if isinstance(document, bool):
        return key if not isinstance(valid, bool) else None
    if isinstance(document, dict) and isinstance(valid, dict):
        children = [(str(name), value, valid.get(str(name))) for name, value in document.items()]
    elif isinstance(document, list) and isinstance(valid, list):
        children = [(str(index), *pair) for index, pair in enumerate(zip(document, valid, strict=True))]
    else:
        return None
    return next(filter(None, (_boolean_as_number(a, b, f"{key}.{name}".lstrip(".")) for name, a, b in children)), None)


def _explain(item: Any, schema: type[Section]) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        names = _sibling_names(location, schema)
        nearest = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], nearest[0]])}?" if nearest else f"valid keys: {', '.join(names)}"
        return f"unknown key {key}; {hint}"
    if item["type"] == "missing":
        return f"key {key} is required"
    value = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
    return f"{key or 'document'}: {item['msg'].removeprefix('Value error, ')}{value}"


def _sibling_names(location: list[str], model: type[Section]) -> list[str]:
    """Return the valid names at the place of an unknown key."""
    schema: dict[str, Any] = model.model_json_schema()
    definitions = schema.get("$defs", {})

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        while True:
            if "$ref" in node:
                node = definitions[node["$ref"].rsplit("/", 1)[1]]
            elif "anyOf" in node:
                node = next((option for option in node["anyOf"] if "$ref" in option), node["anyOf"][0])
            else:
                return node

    node = schema
    for part in location[:-1]:
        parent = resolve(node)
        node = parent.get("properties", {}).get(part) or parent.get("additionalProperties") or parent.get("items") or {}
        node = node or next(iter(parent.get("patternProperties", {}).values()), {})
    return list(resolve(node).get("properties", {}))
