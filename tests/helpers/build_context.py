"""What a builder of images sends along, and what a Dockerfile takes of it: .dockerignore and COPY, as Docker
and buildah read them (moby's patternmatcher: of a path and the folders above it, the last rule that fits)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def _pattern(glob: str) -> re.Pattern[str]:
    """`*` and `?` stay within a folder, `**` does not."""
    parts = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(parts.get(one) or re.escape(one) for one in re.split(r"(\*\*/|\*\*|\*|\?)", glob) if one)
    )


def sent(root: Path) -> list[str]:
    """The files of a folder that are sent to whoever builds an image of it."""
    lines = (root / ".dockerignore").read_text().splitlines()
    rules = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    patterns = [(_pattern(rule.lstrip("!").strip("/")), rule.startswith("!")) for rule in rules]

    def is_sent(path: PurePosixPath) -> bool:
        above, kept = [str(path), *map(str, path.parents[:-1])], True
        for pattern, keeps in patterns:
            if any(map(pattern.fullmatch, above)):
                kept = keeps
        return kept

    files = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return sorted(file for file in files if is_sent(PurePosixPath(file)))


def _sources(dockerfile: str) -> Iterator[str]:
    """What COPY takes of what was sent; an argument in a name may be anything."""
    for line in re.findall(r"^(?:COPY|ADD) (?!--from)(.*)$", dockerfile, re.MULTILINE):
        yield from (re.sub(r"\$\{\w+\}|\$\w+", "*", word).strip("/") for word in line.split()[:-1])


def copied(root: Path, dockerfile: str) -> list[str]:
    """The files that get into a layer."""
    patterns = [_pattern(source) for source in _sources(dockerfile)]
    return [
        file
        for file in sent(root)
        if any(
            pattern.fullmatch(str(above))
            for above in [file, *PurePosixPath(file).parents]
            for pattern in patterns
        )
    ]
