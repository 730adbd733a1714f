"""`peregrine compare`: one student under several losses, and the planner beside global 8 bits, on a real
build's stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

import peregrine
from builders.build import BuildOptions, uncompressed
from builders.compare.losses import compare_losses, mean_and_error
from builders.compare.precisions import compare_precisions
from builders.presets import preset
from ensemble.errors import InvalidInput

STUDENT = {"hidden": 16, "expert": (16, 8)}
STEPS = 200  # a student begins at the rates, as its teacher did: sixty steps teach it little more
ROWS = ["untrained", "kd", "at", "kd + at + rd"]


@pytest.fixture(scope="module")
def source(workshop):
    before = {path.name for path in (workshop / "repository" / ".build" / "shop").iterdir()}
    found = uncompressed(
        BuildOptions(workshop / "shop", workshop / "repository", preset("tiny")), Console(quiet=True)
    )
    assert {path.name for path in (workshop / "repository" / ".build" / "shop").iterdir()} == before, (
        "finished stages are used"
    )
    return found


@pytest.fixture(scope="module")
def losses(source):
    return compare_losses(
        source,
        "ranker",
        student=STUDENT,
        steps=STEPS,
        users=200,
        seeds=(0,),
        only=ROWS,
        progress=lambda share, text: None,
    )


@pytest.fixture(scope="module")
def plans(source):
    told: list[float] = []
    sizes = (0.05, 0.265, 0.9)  # without the exporter's notes a tiny engine has 0.268 of its bytes
    found = compare_precisions(
        source,
        "ranker",
        runtime="onnxruntime",
        sizes=sizes,
        users=300,
        calibration_users=32,
        progress=lambda share, text: told.append(share),
    )
    assert told == sorted(told)
    assert 0 <= told[0] <= told[-1] <= 1
    return found


@pytest.fixture
def run(workshop, source, capsys, monkeypatch):
    """Runs `peregrine compare` -> (exit code, stdout, stderr)."""

    def run(command: str, *arguments: str):
        options = ("--preset", "tiny", "--repository", str(workshop / "repository"))
        monkeypatch.setattr(
            "sys.argv", ["peregrine", "compare", command, str(workshop / "shop"), *options, *arguments]
        )
        with pytest.raises(SystemExit) as done:
            peregrine.main()
        return done.value.code, *capsys.readouterr()

    return run


@pytest.mark.long
def test_all_losses_have_students_of_one_size(losses):
    assert [row.name for row in losses.rows] == ROWS
    assert losses.rows[-1].weights == {"kd": 1, "at": 1, "rd": 1}
    assert 0 < losses.parameters < losses.teacher_parameters
    assert all(len(row.ndcg) == len(row.overlap) == 1 for row in losses.rows)


@pytest.mark.long
def test_a_taught_student_shows_more_of_its_teachers_items(losses):
    overlap = {row.name: mean_and_error(row.overlap)[0] for row in losses.rows}
    # recall's relevance, which all share, makes up most of a list: there is little left to teach
    assert overlap["kd"] > overlap["untrained"] + 0.01
    assert overlap["kd + at + rd"] > overlap["untrained"] + 0.01
    assert overlap["kd"] > overlap["at"], "attention alone does not reach the last layers"


def test_the_user_encoders_default_student_is_half_of_it(source):
    found = compare_losses(
        source,
        "user_encoder",
        only=["rd + 0.1 kd"],
        steps=2,
        seeds=(0,),
        users=100,
        progress=lambda share, text: None,
    )
    assert found.parameters < found.teacher_parameters
    assert {"layers", "heads", "feed"} == set(found.student)


def test_planner_and_global_8_bits_are_compared_at_equal_size(plans):
    (small, plain), (large, untouched) = plans.pairs()
    assert small.size <= small.target == 0.265
    assert 0 < small.low < plans.blocks
    assert plain.low > 0
    assert small.latency is not None
    assert (
        (large.low, large.changed, large.loss)
        == (untouched.low, untouched.changed, untouched.loss)
        == (0, 0, 0)
    )
    everything = plans.points[-1]
    assert (everything.target, everything.low) == (None, plans.blocks)
    assert everything.changed >= small.changed
    assert any("target_size 5.0%" in note for note in plans.notes), (
        "a size that cannot be reached is told, not hidden"
    )


def test_a_model_without_a_network_to_compress_is_refused(source):
    gate = source.modules["ranker"].deep_gate
    gate.zero_()
    try:
        with pytest.raises(InvalidInput, match=r"recall's own order: .* cure: --model user_encoder"):
            compare_losses(source, "ranker", steps=1, seeds=(0,), users=10, progress=lambda share, text: None)
    finally:
        gate.fill_(1)


@pytest.mark.long
def test_losses_are_printed_drawn_and_written_and_a_seeds_student_depends_on_nothing_but_its_seed(
    run, losses, tmp_path
):
    same = ("--student", "hidden=16, expert=[16, 8]", "--steps", str(STEPS), "--users", "200")
    code, stdout, stderr = run("losses", "--only", "kd", "--seeds", "1,0", *same, *_files(tmp_path))
    assert code == 0, stderr
    assert "overlap@10" in stdout
    assert "standard error over seeds" in stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["student"] == {"hidden": 16, "expert": [16, 8]}
    [row] = found["rows"]
    assert len(row["ndcg"]) == len(row["overlap"]) == 2
    assert tuple(row["overlap"][1:]) == losses.rows[1].overlap
    assert row["overlap"][0] != row["overlap"][1]
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_plans_are_printed_drawn_and_written(run, tmp_path):
    code, stdout, stderr = run(
        "plans", "--users", "50", "--sizes", "0.6", "--calibration-users", "16", *_files(tmp_path)
    )
    assert code == 0, stderr
    assert "global 8 bits" in stdout
    assert "noisier" in stdout
    points = json.loads((tmp_path / "found.json").read_text())["points"]
    assert [point["family"] for point in points] == ["uncompressed", "planner", "global", "global"]
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def _files(folder: Path) -> tuple[str, ...]:
    return "--json", str(folder / "found.json"), "--plot", str(folder / "found.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("losses", "--seeds", "0,one"), "--seeds 0,one: want numbers"),
        (("losses", "--seeds", "0,-1"), "--seeds 0,-1: want different whole numbers from 0 up"),
        (
            ("losses", "--student", "width=3"),
            "--student 'width=3': ranker.distil.student.width: no such width",
        ),
        (
            ("losses", "--student", "hidden"),
            "want NAME=VALUE, separated by commas, such as 'hidden=96, expert=[64, 32]'",
        ),
        (("losses", "--student", "expert=16"), "expert = 16; the teacher's is (32, 16)"),
        (("losses", "--weights", "xd=1"), "--weights xd=1: want kd, at or rd"),
        (
            ("losses", "--only", "kd+rd"),
            "rows: untrained, kd, at, rd, at + 0.1 kd, rd + 0.1 kd, kd + at, kd + rd, kd + at + rd",
        ),
        (("losses", "--only", "kd, kd+rd"), "--only kd+rd: there is no such row"),
        (("losses", "--model", "item_encoder"), "--model item_encoder: unknown; known: ranker, user_encoder"),
        (
            ("losses", "--plot", "/nowhere/found.png"),
            "cannot write /nowhere/found.png: its folder is missing",
        ),
        (("plans", "--sizes", "25"), "--sizes 25: want shares"),
        (("plans", "--sizes", "0.01"), "target_size 1.0% of fp32 cannot be met on onnxruntime"),
        (("plans", "--runtime", "tpu"), "runtime tpu is unknown; known: onnxruntime, tensorrt"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(run, arguments, message):
    code, stdout, stderr = run(arguments[0], "--users", "50", *arguments[1:])
    assert (code, stdout) == (2, "")
    *progress, last = stderr.splitlines()
    assert last.startswith("error: ")
    assert message in last
    # What the shop is said to lack comes of reading it, before any of this begins.
    assert all(line.startswith((f"compare {arguments[0]}: ", "labels: ")) for line in progress)
