"""Shows which GPUs the processes of a server see: the instances take them by turns."""

import os

import pytest

from ensemble.engines import SHARDS_VARIABLE
from ensemble.engines.cards import SHOWN_VARIABLE, VISIBLE, cards_from_text, take_card, visible
from ensemble.errors import InvalidInput
from tests.helpers import pretend

SHOW = """
import os, sys
from ensemble.engines import SHARDS_VARIABLE
from ensemble.engines.cards import show_cards
from ensemble.errors import InvalidInput
try:
    show_cards(tuple(map(int, sys.argv[1].split(","))))
    print(os.environ["CUDA_VISIBLE_DEVICES"], os.environ["PEREGRINE_GPUS"])
except InvalidInput as error:
    print(error)
"""


def test_a_list_of_gpus_is_read():
    assert cards_from_text("0, 2") == (0, 2)


@pytest.mark.parametrize("text", ["", "a", "0,0", "-1", "0;1", "0,"])
def test_what_is_no_list_of_gpus_is_refused(text):
    with pytest.raises(InvalidInput, match="--gpus"):
        cards_from_text(text)


def test_cards_are_counted_among_those_that_are_shown():
    assert visible((1, 0), None) == "1,0"
    assert visible((1,), "4,7") == "7"


@pytest.mark.parametrize(
    ("instance", "shards", "seen"),
    [
        ("r1_ranker_0_0", "1", "5"),
        ("r1_ranker_0_1", "1", "6"),
        ("r1_ranker_0_4", "1", "6"),
        ("r1_recall_0_1", "2", "6,7,5"),  # its own first, the others for its shards
    ],
)
def test_instances_take_the_cards_by_turns(monkeypatch, instance, shards, seen):
    monkeypatch.setenv(SHOWN_VARIABLE, "0,1,2")
    monkeypatch.setenv(SHARDS_VARIABLE, shards)
    monkeypatch.setenv(VISIBLE, "5,6,7")
    take_card(instance)
    assert os.environ[VISIBLE] == seen


def test_without_a_list_nothing_changes(monkeypatch):
    monkeypatch.delenv(SHOWN_VARIABLE, raising=False)
    monkeypatch.setenv(VISIBLE, "5,6,7")
    take_card("r1_ranker_0_1")
    assert os.environ[VISIBLE] == "5,6,7"


def test_a_server_sees_the_cards_that_it_was_told_of(tmp_path):
    two = pretend.environment(tmp_path, PRETEND_GPUS="2")
    assert pretend.run(two, "-c", SHOW, "1").stdout.split() == ["1", "1"]
    assert pretend.run(two, "-c", SHOW, "1,0").stdout.split() == ["1,0", "1,0"]
    assert "there is no GPU 2; this machine has 2" in pretend.run(two, "-c", SHOW, "0,2").stdout
    hidden = {**two, VISIBLE: "1"}
    assert pretend.run(hidden, "-c", SHOW, "0").stdout.split() == ["1", "0"]
    assert "there is no GPU 1" in pretend.run(hidden, "-c", SHOW, "1").stdout


def test_a_process_that_uses_other_cards_already_says_so(tmp_path):
    env = {**pretend.environment(tmp_path, PRETEND_GPUS="2"), SHOWN_VARIABLE: "0", VISIBLE: "0"}
    assert pretend.run(env, "-c", SHOW, "0").stdout.split() == ["0", "0"]
    assert "--gpus 1: this process uses 0" in pretend.run(env, "-c", SHOW, "1").stdout


def test_without_a_gpu_a_list_of_them_is_refused(tmp_path):
    env = {**pretend.environment(tmp_path), "LD_LIBRARY_PATH": ""}
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("there is a GPU here")
    assert "--gpus: no GPU" in pretend.run(env, "-c", SHOW, "0").stdout
