"""Reading what people write: YAML and JSON into pydantic models, with errors in one line. Knows no field."""

from __future__ import annotations

import json
import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from isthmus.workloads.errors import InputError, RunFailure, unknown

Document = TypeVar("Document", bound=BaseModel)
_MOST_EXPANDED = 20
"""How much an alias may save, as parts of a file that are named again are checked anew each time."""


class _Loader(yaml.SafeLoader):
    """The safe loader with the booleans of YAML 1.2: `on` and `off` are words, and so may be names of fields."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:bool"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^([tT]rue|TRUE|[fF]alse|FALSE)$"), list("tTfF"))


def read_text(path: str | Path) -> str:
    """A text file. InputError naming it when it is missing, unreadable or not text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("no such file", where=path) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"cannot be read: {reason}", where=path) from None


def read_yaml(path: str | Path) -> Any:
    """A YAML file (safe loader). InputError with line and column when it is not YAML."""
    try:
        text = read_text(path)
        data = yaml.load(text, _Loader)
        if "*" in text and _size(data, {}) > _MOST_EXPANDED * (len(text) + 100):
            raise yaml.YAMLError("its aliases stand for too much")
        return data
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2024-13-45
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"not YAML: {problem}", where=place) from None


def _size(data: Any, known: dict[int, float]) -> float:
    """How much is there, with everything counted as often as it is named; infinite if something is in itself."""
    if not isinstance(data, dict | list):
        return 1.0
    if id(data) not in known:
        known[id(data)] = math.inf
        inside = (*data, *data.values()) if isinstance(data, dict) else data
        known[id(data)] = 1.0 + sum(_size(value, known) for value in inside)
    return known[id(data)]


def read_json(path: str | Path) -> Any:
    """A JSON file. InputError with the line when it is not JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise InputError(f"is not JSON: {error}", where=path) from None


def parse(kind: type[Document], data: Any, *, where: object) -> Document:
    """Validate; the first thing wrong becomes an InputError that names file, field, value and what is allowed."""
    if data is None:
        raise InputError("is empty", where=where, allowed=", ".join(kind.model_fields))
    if not isinstance(data, dict):
        raise InputError(
            f"is not a {kind.__name__}: expected fields with values, found {type(data).__name__}", where=where
        )
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise InputError(_first(error, kind, data), where=where) from None
    except OverflowError as error:  # pydantic takes whole numbers of any size for a float
        raise InputError(f"a number is out of range: {error}", where=where) from None


def _first(error: ValidationError, kind: type[BaseModel], data: Any) -> str:
    # Of the alternatives of a field, the one whose error lies deepest is the one that was meant; a field that is
    # missing there may be the one that is misspelt.
    first = max(error.errors(include_url=False), key=lambda e: (len(e["loc"]), e["type"] == "extra_forbidden"))
    loc = _typed(first["loc"], data, missing=first["type"] == "missing")
    field = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")
    return f"{field or kind.__name__}: {_problem(first, kind)}"


def _problem(error: Any, kind: type[BaseModel]) -> str:
    """What is wrong, for people: pydantic's words where they serve, and ours where they are about pydantic."""
    context, what = error.get("ctx", {}), error["type"]
    if what == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    if what == "missing":
        return "is missing"
    if what == "extra_forbidden":
        return str(unknown("field", str(error["loc"][-1]), _fields(kind, error["loc"][:-1])))
    if what == "union_tag_invalid":
        known = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        return str(unknown(context["discriminator"].strip("'"), str(context["tag"]), known))
    if what == "union_tag_not_found":
        return f"has no {context['discriminator']}"
    said = {
        "model_type": "is not a set of fields with values",
        "model_attributes_type": "is not a set of fields with values",
        "dict_type": "is not a set of names with values",
        "tuple_type": "is not a list",
        "list_type": "is not a list",
        "too_short": f"needs at least {context.get('min_length')}",
    }.get(what, error["msg"])
    try:
        shown = repr(error["input"])
    except ValueError:  # a whole number of thousands of digits
        shown = "a number that is too long"
    return f"{said}, got {shown if len(shown) < 80 else shown[:77] + '...'}"


def _typed(loc: tuple[int | str, ...], data: Any, *, missing: bool) -> list[int | str]:
    """A place as people wrote it: without the names that pydantic gives to alternatives."""
    found: list[int | str] = []
    for part in loc:
        inside = data if isinstance(data, dict) else dict(enumerate(data)) if isinstance(data, list) else {}
        if part in inside:
            data = inside[part]
            found.append(part)
    return [*found, loc[-1]] if missing else found


def _fields(kind: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The fields that may stand at a place."""
    kinds = [kind]
    for part in loc:
        inner = [k.model_fields[str(part)].annotation for k in kinds if part in k.model_fields]
        named = [k for k in kinds if part in (k.__name__, getattr(k.model_fields.get("kind"), "default", None))]
        kinds = [m for annotation in inner for m in _models(annotation)] if inner else named or kinds
    return list(dict.fromkeys(field.alias or name for k in kinds for name, field in k.model_fields.items()))


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all. RunFailure naming it when that fails."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise RunFailure(f"{path}: cannot be written: {error.strerror}") from None
