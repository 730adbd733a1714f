"""Runs `peregrine report`: shows a release's numbers as a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    repository: Annotated[Path, typer.Option("--repository", "-r", help="The model repository.")] = Path(
        "model_repository"
    ),
    release: Annotated[str | None, typer.Option(help="The release; the active one if not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="The page to write; RELEASE.html if not given.")] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            help="Two releases, r1 r2: what the second does better than the first, and for whom; some users' "
            "lists side by side."
        ),
    ] = None,
    shop: Annotated[
        Path | None,
        typer.Option(help="With --compare: the shop's folder, whose pictures stand beside the items."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Also write every figure as PNG into this folder.")] = None,
) -> None:
    """Writes a release's report as one HTML page with its figures inside: worth, ranking, recall,
    compression, gate, latency. Says in a sentence what the release's lists are worth."""
    from builders.report.html import page, release_figures, write_figures
    from builders.verify.markdown import headline
    from builders.verify.newcomers import newcomer_table
    from ensemble.errors import InvalidInput, ReleaseError
    from ensemble.release.release import active_release, open_release

    if compare:
        _compare(repository, *compare, out, shop)
        return
    if shop is not None:
        raise InvalidInput(f"--shop {shop}: only a page of two releases has lists", "add --compare r1 r2")
    name = release or active_release(repository)
    if name is None:
        raise ReleaseError(
            f"no release is active in {repository}; name one with --release, or `peregrine release activate "
            "NAME`"
        )
    manifest = open_release(repository, name).manifest
    if not manifest.get("report"):
        raise ReleaseError(f"release {name} has no report in its manifest; build it again")
    found = release_figures(manifest["report"])
    target = out or Path(f"{name}.html")
    _write(target, page(manifest, found))
    try:
        pictures = write_figures(found, png) if png else []
    except OSError as error:
        raise InvalidInput(f"cannot write {error.filename or png}: {error.strerror}") from None
    if text := headline(manifest["report"]):
        print(text)
    if groups := manifest["report"].get("newcomers"):
        print("\n".join(newcomer_table(groups)))
    print(f"{target}" + (f" and {len(pictures)} PNG in {png}" if png else ""))


def _compare(repository: Path, first: str, second: str, out: Path | None, shop: Path | None) -> None:
    """Writes the page of two releases, and says which is better."""
    from builders.report.compare import comparison_page, sentence
    from ensemble.release.compared import comparison
    from ensemble.steps.served import open_served

    old, new = (open_served(repository, name) for name in (first, second))
    verdict = comparison(new, old)
    target = out or Path(f"{first}-{second}.html")
    _write(target, comparison_page(old, new, verdict, shop))
    print(sentence(verdict, first, second))
    print(target)


def _write(target: Path, page: str) -> None:
    """Writes a page; InvalidInput if it cannot be written."""
    from ensemble.errors import InvalidInput

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot write {error.filename or target}: {error.strerror}") from None
