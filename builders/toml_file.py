"""Reads TOML files that a pydantic model describes: whatever is wrong with one is one line."""

from __future__ import annotations

import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ensemble.errors import InvalidInput

_Model = TypeVar("_Model", bound=BaseModel)


def read_toml(kind: type[_Model], path: Path, name: str) -> _Model:
    """Reads the file at `path` as a `kind`; InvalidInput begins with `name` and names the first wrong key."""
    try:
        return kind.model_validate(tomllib.loads(path.read_text("utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{name} is not TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name} is not UTF-8 (byte {error.start})") from None
    except ValidationError as error:
        raise InvalidInput(f"{name}: {first_error(error, kind)}") from None


def first_error(error: ValidationError, kind: type[BaseModel]) -> str:
    """Makes one line of what pydantic says of a `kind`: the first wrong key, its value, and what is right."""
    first = error.errors(include_url=False)[0]
    loc, problem, value = first["loc"], first["type"], first["input"]
    where, rest = ".".join(map(str, loc)), error.error_count() - 1
    if problem == "extra_forbidden":
        message = f"{where}: no such key; known here: {', '.join(_known_keys(kind, loc[:-1]))}"
    elif problem == "missing":
        message = f"{where} is missing"
    elif problem == "value_error":
        message = f"{where}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    else:
        rule = (
            "should be a table" if problem == "model_type" else first["msg"].replace("Input should", "should")
        )
        message = f"{where} = {value!r}: {rule}"
    return message + (f" (and {rest} more)" if rest else "")


def _known_keys(kind: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Lists the keys of the table at `loc`, a path of keys and places in arrays from a `kind` on."""
    for part in loc:
        if part in kind.model_fields:  # Not a place in an array, nor one of several types.
            kind = next(_models_in(kind.model_fields[str(part)].annotation))
    return list(kind.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Gives the models that an annotation such as `list[Task]` or `Table | None` names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models_in(part)
