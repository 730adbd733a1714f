"""Changes a preset's settings one by one, typed and checked: `--set encoders.epochs=4`, or a preset file.

base = "base"                    # the preset that the file changes; default "base"
[encoders]
epochs = 4
[ranker]
learning_rate = 3e-3
model.dropout = 0.2
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from builders.presets import PRESETS, Preset
from ensemble.errors import InvalidInput

# The build finds these by the shop, or by other settings
_DERIVED = {
    "name",
    "base",
    "changes",
    *(f"sizes.{name}" for name in ("item_rates", "user_rates")),
    *(
        f"encoders.{name}"
        for name in ("num_kinds", "num_item_codes", "item_code_slices", "item_content_slices", "dim")
    ),
    *(f"encoders.{name}" for name in ("num_user_codes", "user_code_slices", "max_history", "interests")),
    "encoders.ordered",
}
_SHARES = (
    "dropout",
    "held_out",
    "average",
    "hard_from",
    "rate_age",
)  # names, or ends of names, of what lies in 0 to 1
_MAY_BE_NOTHING = ("num_hard", "tried_epochs", "warmup_steps", "item_features", "user_features")
Changes = Mapping[str, Any]


def settings_of(preset: Preset) -> dict[str, Any]:
    """Lists all settings that may be changed, by their dotted names, with their values."""
    return dict(_walk(preset, ""))


def named_preset(name: str, changes: list[str] | None = None) -> Preset:
    """Gives the preset called `name`, or that of a file NAME.toml, with changes such as "encoders.epochs=4";
    InvalidInput names the first that is wrong."""
    if name.endswith(".toml"):
        preset = _from_file(Path(name))
    elif name in PRESETS:
        preset = PRESETS[name]
    else:
        raise InvalidInput(f"--preset {name}: unknown; known: {', '.join(PRESETS)}, or a file NAME.toml")
    return with_settings(preset, dict(_split(change) for change in changes or []), "--set ")


def with_settings(preset: Preset, changes: Changes, where: str = "") -> Preset:
    """Gives a preset with some settings changed, which it remembers; `where` begins the errors."""
    if not changes:
        return preset
    known = settings_of(preset)
    for name, value in changes.items():
        if name not in known:
            near = [one for one in known if one.rpartition(".")[2] == name.rpartition(".")[2]]
            there = ", ".join(near or known)
            raise InvalidInput(
                f"{where}{name}: no such setting; {'do you mean' if near else 'there are'} {there}"
            )
        known[name] = _checked(preset, name, value, where)
        preset = _replaced(preset, name.split("."), known[name])
    done = {**preset.changes, **{name: known[name] for name in changes}}
    _refuse_misfits(preset, where)
    return dataclasses.replace(preset, changes=done)


def preset_text(root: str, changes: Changes) -> str:
    """Writes the preset file that makes these changes to the preset called `root`."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in sorted(changes.items())]
    return "\n".join([f'base = "{root}"', *lines, ""])


def _walk(part: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(part):
        name, value = prefix + field.name, getattr(part, field.name)
        if name in _DERIVED:
            continue
        if dataclasses.is_dataclass(value):
            yield from _walk(value, name + ".")
        else:
            yield name, value


def _split(change: str) -> tuple[str, str]:
    name, sign, value = change.partition("=")
    if not sign or not name.strip():
        raise InvalidInput(f"--set {change}: write NAME=VALUE, such as encoders.epochs=4")
    return name.strip(), value.strip()


def _from_file(path: Path) -> Preset:
    """Reads a preset file."""
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InvalidInput(f"--preset {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"--preset {path} is no UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"--preset {path} is not TOML: {error}") from None
    base = raw.pop("base", "base")
    if not isinstance(base, str) or base not in PRESETS:
        raise InvalidInput(f"{path}: base = {base!r}: unknown; known: {', '.join(PRESETS)}")
    preset = with_settings(PRESETS[base], dict(_flat(raw, "")), f"{path}: ")
    return dataclasses.replace(preset, name=path.stem, base=base)


def _flat(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _checked(preset: Preset, name: str, value: Any, where: str) -> Any:
    """Reads a value as its setting's type, from text too, and refuses numbers that make no sense."""
    owner: Any = preset
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    kind = typing.get_type_hints(type(owner))[last]
    if isinstance(value, bool) and kind is not bool:
        raise InvalidInput(f"{where}{name}={value}: should be a number, not a truth value")
    try:
        adapter = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
        found = adapter.validate_json(value) if _is_json(value) else adapter.validate_python(value)
    except ValidationError as error:
        rule = error.errors(include_url=False)[0]["msg"].replace("Input should", "should")
        raise InvalidInput(f"{where}{name}={value}: {rule}") from None
    numbers = [found] if isinstance(found, int | float) and not isinstance(found, bool) else []
    least = 0 if last in _MAY_BE_NOTHING or isinstance(found, float) else 1
    for number in numbers:
        if last.endswith(_SHARES) and not 0 <= number < 1:
            raise InvalidInput(f"{where}{name}={value}: should be a share, 0 to below 1")
        if number < least:
            raise InvalidInput(f"{where}{name}={value}: should be at least {least}")
    return found


def _is_json(value: Any) -> bool:
    return isinstance(value, str) and value[:1] == "["


def _replaced(part: Any, path: list[str], value: Any) -> Any:
    """Gives a dataclass with the field at `path` replaced."""
    name, *rest = path
    return dataclasses.replace(part, **{name: _replaced(getattr(part, name), rest, value) if rest else value})


def _refuse_misfits(preset: Preset, where: str) -> None:
    """Raises InvalidInput where settings do not fit each other."""
    sizes = preset.sizes
    misfits = (
        (sizes.history > sizes.seen, "sizes.history is more than sizes.seen, of which it is the end"),
        (sizes.max_top_k > sizes.candidates, "sizes.max_top_k is more than sizes.candidates"),
        (sizes.embedding % preset.encoders.heads != 0, "encoders.heads does not divide sizes.embedding"),
        (preset.ranker.model.attention % preset.ranker.model.heads != 0,
         "ranker.model.heads does not divide ranker.model.attention"),
    )  # fmt: skip
    for is_wrong, why in misfits:
        if is_wrong:
            raise InvalidInput(f"{where.strip() or 'settings'}: {why}")
