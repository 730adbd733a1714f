"""Lists the releases of a repository with what somebody has to know to choose one, half copies as such."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ensemble.errors import InvalidInput, ReleaseError
from ensemble.release.manifest import MANIFEST, read_manifest
from ensemble.release.names import name_order, release_names
from ensemble.release.release import Release, active_release
from ensemble.release.repository import half_releases
from ensemble.release.route import read_route


@dataclass(frozen=True)
class ReleaseInfo:
    """Holds one line of `release list`."""

    name: str
    id: str = ""  # 16 hex digits of its content
    created: str = ""
    age_s: float | None = None
    shop: str = ""
    size_bytes: int = 0
    is_active: bool = False
    share: float = 0.0  # of users that `recommend` answers with it
    trained_up_to: str = ""  # the newest event that its encoders learned from
    preset: str = ""
    compression: str = ""  # the recipe
    figures: dict[str, float] = field(default_factory=dict)  # of the build's report, on held-out users
    problem: str = ""  # why it cannot be served; empty: all its files are there, and no others


def list_releases(repository: Path, home: Path | None = None) -> list[ReleaseInfo]:
    """Lists every release of the repository, oldest name first, and those of which only parts are there.

    Files are looked for, not read: a changed one of the same size is found when the release is activated.
    """
    check_repository(repository)
    route, halves = _shares(repository, home), half_releases(repository)
    infos = [_info(repository, name, route) for name in release_names(repository)]
    for name, paths in halves.items():
        parts = ", ".join(path.name for path in paths)
        problem = f"half a copy: {name}/{MANIFEST} is missing (there are {parts})"
        infos.append(
            ReleaseInfo(
                name, is_active=name == next(iter(route), None), share=route.get(name, 0.0), problem=problem
            )
        )
    return sorted(infos, key=lambda info: name_order(info.name))


def check_repository(repository: Path) -> None:
    """Raises InvalidInput if the folder is not there."""
    if not repository.is_dir():
        raise InvalidInput(f"repository {repository} does not exist; `peregrine build SHOP` makes one")


def _info(repository: Path, name: str, route: Mapping[str, float]) -> ReleaseInfo:
    """Reads from its manifest what the list says of a release, and looks for its files."""
    share, is_active = route.get(name, 0.0), name == next(iter(route), None)
    try:
        manifest = read_manifest(repository / name / MANIFEST)
    except ReleaseError as error:
        return ReleaseInfo(name, is_active=is_active, share=share, problem=str(error))
    report, created = manifest.get("report") or {}, str(manifest.get("created", ""))
    return ReleaseInfo(
        name,
        manifest["id"],
        created,
        _age_s(created),
        str(manifest.get("shop", "")),
        sum(int(entry["bytes"]) for entry in manifest["files"].values()),
        is_active,
        share,
        str((manifest.get("trained") or {}).get("encoders", {}).get("trained_up_to", "")),
        str(manifest.get("preset", "")),
        str((report.get("compress") or {}).get("plan_name", "none")),
        _figures(report),
        _problem(Release(repository, name, manifest)),
    )


def _shares(repository: Path, home: Path | None) -> dict[str, float]:
    """Gives the share of users that each release of the route has, the main one first."""
    route = read_route(home or repository)
    if route is not None:
        return {one.release: one.share for one in route.shares}
    active = active_release(repository, home)
    return {} if active is None else {active: 1.0}


def _age_s(created: str) -> float | None:
    """Gives the seconds since a release was built; None if its manifest does not say when."""
    try:
        built = datetime.datetime.fromisoformat(created)
    except ValueError:
        return None
    return (datetime.datetime.now(datetime.UTC) - built).total_seconds()


def _figures(report: Mapping[str, Any]) -> dict[str, float]:
    """Picks a report's headline figures: what lists are worth, the chain's, and each binary task's AUC."""
    worth = report.get("worth", {}).get("ways", {}).get("chain", {})
    first = {"worth": float(worth["worth"])} if "worth" in worth else {}
    chain = report.get("ranking", {}).get("ways", {}).get("chain", {})
    figures = {name: float(chain[name]) for name in ("ndcg@10", "hr@10") if name in chain}
    tasks = report.get("tasks", {}).items()
    return first | figures | {f"auc {task}": float(found["auc"]) for task, found in tasks if "auc" in found}


def _problem(release: Release) -> str:
    """Says what is missing of a release, changed its size, or lies there unlisted; empty: nothing."""
    missing = []
    for path, entry in release.manifest["files"].items():
        try:
            size = (release.repository / path).stat().st_size
        except OSError:
            missing.append(path)
            continue
        if size != entry["bytes"]:
            return f"changed: {path} has {size} bytes, its manifest says {entry['bytes']}"
    if missing:
        others = f" and {len(missing) - 1} more files are" if len(missing) > 1 else " is"
        return f"half a copy: {missing[0]}{others} missing"
    unlisted = next(release.unlisted(), None)
    return f"not a file of it, yet in its folders: {unlisted}" if unlisted else ""
