"""Runs `peregrine compare losses | plans | chain`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ensemble.errors import InvalidInput
from ensemble.json_text import json_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from builders.compare.losses import LossTable
    from builders.compare.precisions import PrecisionsTable
    from builders.compress.source import Source
    from builders.progress import Progress

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Which way of compressing a shop's models loses least, measured on its own held-out users.

\b
losses   a smaller student of one model, taught by logits (kd), attention (at), relations (rd), and together
plans    a precision for each node, by sensitivity, beside plain 8 bits at the same size
chain    two releases, step by step: what compression did for the whole

\b
The first two take the finished stages of `peregrine build` (same SHOP, --preset and --repository);
stages that are missing are run first, which may take as long as the build itself. Nothing is published.

\b
What you find goes into a recipe: peregrine build SHOP --compress recipe.toml; its keys are described
in builders/compress/README.md.
""",
)
Shop = Annotated[Path, typer.Argument(metavar="SHOP", help="Folder of the shop: shop.toml and its tables.")]
Preset = Annotated[str, typer.Option(help="Of the build: `tiny`, `base` or `quick`.")]
Repository = Annotated[
    Path, typer.Option("--repository", "-r", help="Of the build: its stages lie in .build there.")
]
BuildSeed = Annotated[int, typer.Option(help="--seed of the build.")]
Model = Annotated[str, typer.Option(help="`ranker` or `user_encoder`.")]
Student = Annotated[
    str | None,
    typer.Option(
        metavar="SIZES",
        help="Such as 'hidden=96, expert=[64, 32]' or 'layers=1, feed=128'; default: half the teacher's.",
    ),
]
Weights = Annotated[str, typer.Option(help="Of the losses, in every row that has them.")]
Only = Annotated[
    str | None, typer.Option(metavar="ROWS", help="Rows of the table, such as 'kd, kd + at'; default: all.")
]
Users = Annotated[
    int,
    typer.Option(
        min=1,
        help="Held-out users that judge, at most. They neither teach nor calibrate, and are not the test "
        "users.",
    ),
]
AsJson = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write all numbers as JSON.")
]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Also draw them.")]
_REPOSITORY = Path("model_repository")


@app.command()
def losses(
    shop: Shop,
    preset: Preset = "base",
    repository: Repository = _REPOSITORY,
    build_seed: BuildSeed = 0,
    model: Model = "ranker",
    student: Student = None,
    weights: Weights = "kd=1, at=1, rd=1",
    only: Only = None,
    steps: Annotated[int, typer.Option(min=1, help="Of training, each student.")] = 400,
    learning_rate: Annotated[float, typer.Option(help="Of Adam; falls linearly to 0.")] = 1e-3,
    seeds: Annotated[str, typer.Option(help="One student each and row; the error is over them.")] = "0,1,2",
    users: Users = 4000,
    as_json: AsJson = None,
    plot: Plot = None,
) -> None:
    """KD, AT and RD at equal student size: one table.

    \b
    Every row has the same student, start, batches and steps; only the losses differ:
        kd   the teacher's answers, softened
        at   where its attention looks
        rd   how samples lie to each other
    Attention and relations alone do not tell the answers (a ranker's last layers stay as they start, an
    encoder may turn its space): the rows `at` and `rd` show that, those with a tenth of kd what they do
    beside just enough of it.

    \b NDCG@10 is a share of the teacher's, ± the standard error over seeds; overlap@10 the share of shown
    items that are the teacher's too. Both are of the whole chain with the student in the model's place.

    \b
        peregrine compare losses shops/demo --preset tiny --steps 200 --plot losses.png
    """
    _writable(as_json, plot)
    starts, parts, rows = _seeds(seeds), _weights(weights), _names(only)
    sizes = None if student is None else _student_sizes(student, model)
    source = _source(shop, preset, repository, build_seed)
    from builders.compare import figures, tables
    from builders.compare.losses import compare_losses

    with _bar("compare losses") as progress:
        found = compare_losses(
            source,
            model,
            student=sizes,
            weights=parts,
            only=rows,
            steps=steps,
            learning_rate=learning_rate,
            seeds=starts,
            users=users,
            progress=progress,
        )
    tables.show(tables.loss_table(found), tables.loss_words(found))
    _write(found, as_json, lambda: figures.losses_figure(found), plot)


@app.command()
def plans(
    shop: Shop,
    preset: Preset = "base",
    repository: Repository = _REPOSITORY,
    build_seed: BuildSeed = 0,
    model: Model = "ranker",
    runtime: Annotated[
        str, typer.Option(help="`onnxruntime`, or `tensorrt` (accuracy only: no latency without its GPU).")
    ] = "onnxruntime",
    sizes: Annotated[
        str, typer.Option(help="Of the engine, as shares of the fp32 one's bytes.")
    ] = "0.25,0.3,0.4,0.5,0.7",
    calibration_users: Annotated[
        int, typer.Option(min=8, help="Whose feeds set the ranges of 8 bits.")
    ] = 128,
    users: Users = 4000,
    as_json: AsJson = None,
    plot: Plot = None,
) -> None:
    """The planner beside global 8 bits at equal size: table and Pareto plot.

    \b Each node alone is lowered once and judged. For every size the planner then lowers the nodes that cost
    least for their bytes; global 8 bits lowers the largest first, whatever that costs, until it is as small
    as the planner's engine.

    \b Read `changed`, the share of shown items that are others than at fp32, before the loss of NDCG@10: with
    a few thousand users the loss of one engine is mostly noise (its standard error stands beside it), the
    changed items hardly.

    \b
        peregrine compare plans shops/demo --preset tiny --plot plans.png
    """
    _writable(as_json, plot)
    targets = _sizes(sizes)
    source = _source(shop, preset, repository, build_seed)
    from builders.compare import figures, tables
    from builders.compare.precisions import compare_precisions

    with _bar("compare plans") as progress:
        found = compare_precisions(
            source,
            model,
            runtime=runtime,
            sizes=targets,
            users=users,
            calibration_users=calibration_users,
            progress=progress,
        )
    tables.show(tables.precisions_table(found), tables.precisions_words(found))
    _write(found, as_json, lambda: figures.precisions_figure(found), plot)


@app.command()
def chain(
    before: Annotated[str, typer.Argument(help="A release.")],
    after: Annotated[str, typer.Argument(help="The same, compressed.")],
    repository: Repository = _REPOSITORY,
    as_json: AsJson = None,
) -> None:
    """What compression did for the whole chain: CPU of every step of two releases, by turns, beside Amdahl's
    bound.

    \b
        peregrine compare chain r1 small
    """
    _writable(as_json)
    from builders.compare.chain import chain_table, compare_chain
    from builders.compare.tables import show

    with _bar("compare chain") as progress:
        rows = compare_chain(repository, before, after, progress=progress)
    show(chain_table(rows, before, after), [])
    _write_json([{**dataclasses.asdict(row), "gain": row.gain, "bound": row.bound} for row in rows], as_json)


def _source(shop: Path, preset: str, repository: Path, seed: int) -> Source:
    # read when torch is imported; spinning threads make a busy machine ten times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rich.console import Console

    from builders.build import BuildOptions, uncompressed
    from builders.presets import preset as preset_named

    return uncompressed(BuildOptions(shop, repository, preset_named(preset), seed=seed), Console(stderr=True))


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    from ensemble.progress import bar

    with bar(title) as update:
        yield lambda share, text: update(text, share)


# --- what is asked


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InvalidInput(f"{option} {text}: want numbers separated by commas") from None


def _seeds(text: str) -> list[int]:
    found = _numbers("--seeds", text, int)
    if min(found) < 0 or len(set(found)) < len(found):
        raise InvalidInput(f"--seeds {text}: want different whole numbers from 0 up")
    return found


def _sizes(text: str) -> list[float]:
    found = _numbers("--sizes", text, float)
    if not all(0 < size <= 1 for size in found):
        raise InvalidInput(f"--sizes {text}: want shares of the fp32 engine's bytes, above 0 and at most 1")
    return sorted(set(found))


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",")] if text else []


def _toml(option: str, text: str, example: str) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(f"found = {{{text}}}")["found"]
    except tomllib.TOMLDecodeError:
        raise InvalidInput(
            f"{option} '{text}': want NAME=VALUE, separated by commas, such as '{example}'"
        ) from None


def _weights(text: str) -> dict[str, float]:
    found = _toml("--weights", text, "kd=1, at=1, rd=1")
    for name, weight in found.items():
        if (
            name not in ("kd", "at", "rd")
            or type(weight) not in (int, float)
            or not 0 < weight < float("inf")
        ):
            raise InvalidInput(f"--weights {name}={weight}: want kd, at or rd, and a number above 0")
    return found


def _student_sizes(text: str, model: str) -> dict[str, Any]:
    """Reads sizes as a recipe's file has them."""
    from pydantic import ValidationError

    from builders.compress.recipe import Recipe
    from builders.toml_file import first_error

    sizes = _toml(
        "--student", text, "layers=1, feed=128" if model == "user_encoder" else "hidden=96, expert=[64, 32]"
    )
    try:
        recipe = Recipe.model_validate({model: {"distil": {"student": sizes}}})
    except ValidationError as error:
        raise InvalidInput(f"--student '{text}': {first_error(error, Recipe)}") from None
    distil = recipe.of(model).distil
    return dict(distil.student) if distil else {}


# --- what is written


def _writable(*targets: Path | None) -> None:
    """Refuses targets that cannot be written now, not after minutes of work."""
    for target in targets:
        if target is not None and (target.is_dir() or not os.access(target.parent, os.W_OK)):
            raise InvalidInput(
                f"cannot write {target}: "
                f"{'it is a folder' if target.is_dir() else 'its folder is missing or read-only'}"
            )


def _write(
    found: LossTable | PrecisionsTable, as_json: Path | None, figure: Callable[[], Figure], plot: Path | None
) -> None:
    """Writes both files, where they are wanted."""
    _write_json(dataclasses.asdict(found), as_json)
    if plot is not None:
        from builders.report.figures import png

        _write_bytes(png(figure), plot)


def _write_json(facts: Any, target: Path | None) -> None:
    if target is not None:
        _write_bytes(json_text(facts, indent=1).encode(), target)


def _write_bytes(content: bytes, target: Path) -> None:
    try:
        target.write_bytes(content)
    except OSError as error:
        raise InvalidInput(f"cannot write {target}: {error.strerror}") from None
