"""Makes what the keys of stages are made of: digests of code, of libraries, of a shop's files, of own models.

A stage's code is its own folder and all that this imports, so that a changed bench or command line retrains
nothing. Importing this module does not load torch.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from builders.folders import SOURCES
from builders.shop.files import shop_files
from ensemble.release.files import file_sha256, write_durably

if TYPE_CHECKING:
    from builders.own_model import OwnModel

PACKAGES = ("builders", "ensemble")
# They look at what stages wrote, or call them; no stage's result depends on them.
BESIDE = (
    "builders.cli",
    "builders.bench",
    "builders.report",
    "builders.compare",
    "builders.tune",
    "builders.keys",  # which kept thing fits, never what is in it
    "ensemble.cli",
)
# Distributions whose version may change what a stage writes; of Faiss, whichever is installed.
LIBRARIES = (
    "torch",
    "numpy",
    "faiss-cpu",
    "faiss-gpu",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pyarrow",
    "scikit-learn",
)
_YOUNG_NS = 2_000_000_000  # a file that was just written may change again within its clock's resolution


def code_digest(package: str, sources: Path = SOURCES) -> str:
    """Gives the digest of all files that run when a module of `package` does (see `closure`)."""
    digest = hashlib.sha256()
    for module, path in sorted(closure(_modules_of(sources, package), sources).items()):
        digest.update(f"{module} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Gives the installed version of each of LIBRARIES; those that are missing are left out."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def shop_digest(shop: Path, digests: FileDigests) -> list[tuple[str, str]]:
    """Gives the name and digest of each file that a build of the shop depends on."""
    return [(os.path.relpath(path, shop), digests.of(path)) for path in shop_files(shop)]


def own_key(source: str | None, *folders: Path) -> OwnModel | None:
    """Gives a user's own model, "module:Class", with the digest of its code; None for None.

    Its code is its whole package, or its single file, and what these import of files beside it. A module that
    cannot be imported has no digest: `own_model` refuses it, with the reason. It is looked for in `folders`
    first.
    """
    from builders.own_model import OwnModel, import_own

    if source is None:
        return None
    try:
        module = import_own(source, *folders)
    except Exception:  # the user's code may raise anything
        return OwnModel(source, "")
    if not module.__file__:
        return OwnModel(source, "")
    name, path = module.__name__, Path(module.__file__).resolve()
    sources = path.parents[len(name.split(".")) - (path.name != "__init__.py")]
    modules = [*_modules_of(sources, name.partition(".")[0]), name]
    # An installed package imports torch from the folder beside it, whose files are not the user's.
    is_installed = "site-packages" in sources.parts
    files = {m: _file(sources, m) for m in modules} if is_installed else closure(modules, sources, ())
    parts = [f"{m} {file_sha256(path)}" for m, path in sorted(files.items()) if path is not None]
    return OwnModel(source, hashlib.sha256("\n".join(parts).encode()).hexdigest())


class FileDigests:
    """Digests files, and remembers the digests in a file by path, size, time of change and inode.

    `rehash` reads every file again. A file that is younger than two seconds is not remembered: it might
    change once more without a sign.
    """

    def __init__(self, cache: Path, *, rehash: bool = False) -> None:
        self.cache, self.used = cache, dict[str, list[int | str]]()
        self.known: dict[str, list[int | str]] = {} if rehash else _read_json(cache)

    def of(self, path: Path) -> str:
        """Gives the SHA-256 of a file in hex."""
        stat, name = path.stat(), os.path.abspath(path)
        facts: list[int | str] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        entry = self.known.get(name)
        digest = str(entry[-1]) if entry and entry[:-1] == facts else file_sha256(path)
        if entry == [*facts, digest] or stat.st_mtime_ns < time.time_ns() - _YOUNG_NS:
            self.used[name] = [*facts, digest]
        return digest

    def save(self) -> None:
        """Writes the digests of the files that were asked for."""
        with contextlib.suppress(OSError):  # read-only or full: the next build reads the files again
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self.cache, json.dumps(self.used))


def _read_json(path: Path) -> dict[str, list[int | str]]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


# --- what a module imports


def closure(
    modules: Iterable[str], sources: Path = SOURCES, packages: tuple[str, ...] = PACKAGES
) -> dict[str, Path]:
    """Gives the files of `modules` and of all they import, at the top or inside functions, by module.

    Only modules below `sources` count, and of those only the ones of `packages` (empty: of any). Imports that
    only a type checker reads do not run, so they do not count; nor do the packages BESIDE the build.
    """
    files: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in files or (packages and module.partition(".")[0] not in packages) or _is_beside(module):
            continue
        path = _file(sources, module)
        if path is not None:
            files[module] = path
            waiting += _imports(path, module, path.stat().st_mtime_ns)
            waiting += [module.rpartition(".")[0]] if "." in module else []
    return files


def _is_beside(module: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in BESIDE)


def _file(sources: Path, module: str) -> Path | None:
    """Gives the file of a module below `sources`; None if it has none there."""
    path = sources.joinpath(*module.split("."))
    for file in (path / "__init__.py", path.with_name(path.name + ".py")):
        if file.is_file():
            return file
    return None


def _modules_of(sources: Path, package: str) -> list[str]:
    """Gives the names of a package and of all modules in it, in sub-packages too; none for no package."""
    if not package:
        return []
    folder = sources.joinpath(*package.split("."))
    inside = [path.relative_to(sources).with_suffix("").parts for path in sorted(folder.rglob("*.py"))]
    return [package, *(".".join(parts).removesuffix(".__init__") for parts in inside)]


@lru_cache(maxsize=4096)
def _imports(path: Path, module: str, mtime_ns: int) -> list[str]:
    """Gives all names that a file's import statements may load; `mtime_ns` tells its versions apart."""
    names: list[str] = []
    for node in _nodes_that_run(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = node.level - (path.name == "__init__.py")
                parts = module.split(".")
                base = ".".join([*parts[: len(parts) - above], *([base] if base else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


def _nodes_that_run(node: ast.AST) -> Iterator[ast.AST]:
    """Walks a tree, but for what stands under `if TYPE_CHECKING:`."""
    yield node
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        children: Iterable[ast.AST] = node.orelse
    else:
        children = ast.iter_child_nodes(node)
    for child in children:
        yield from _nodes_that_run(child)
