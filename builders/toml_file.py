"""A TOML file, checked by a pydantic model: whatever is wrong with it is one line."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from ensemble.errors import InvalidInput

_Model = TypeVar("_Model", bound=BaseModel)


def read_toml(
    kind: type[_Model], path: Path, name: str, first_error: Callable[[ValidationError], str]
) -> _Model:
    """The file at `path`; InvalidInput begins with `name`, and `first_error` puts the model's own complaint
    into words."""
    try:
        return kind.model_validate(tomllib.loads(path.read_text("utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{name} is not TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name} is not UTF-8 (byte {error.start})") from None
    except ValidationError as error:
        raise InvalidInput(f"{name}: {first_error(error)}") from None
