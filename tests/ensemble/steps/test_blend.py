"""The blend of tasks and recall's relevance, and what a request may change of it."""

import numpy as np
import pytest

from ensemble.errors import ReleaseError
from ensemble.steps.blend import BLEND, Blend, read_blend

SCORES = np.array([[[2.0, 0.0, 0.0], [1.0, 1.0, 9.0], [0.0, 0.0, 5.0]]], np.float32)
VALUES = np.array([[0.1, 0.3, 0.9]], np.float32)


def _order(blend, power=None, uses_tasks=None, values=VALUES):
    powers = np.array([blend.power if power is None else power], np.float32)
    uses = np.array([blend.uses_tasks if uses_tasks is None else uses_tasks])
    return np.argsort(-blend.score(values, SCORES, powers, uses)[0]).tolist()


def test_a_power_moves_the_order_from_the_tasks_to_recalls():
    blend = Blend(True, 0.0, (1.0, 0.5, 0.0), 3.0, -3.0)
    assert _order(blend) == [2, 1, 0]
    assert _order(blend, power=16.0) == [0, 1, 2]
    assert _order(blend, uses_tasks=False, power=1.0) == [0, 1, 2]
    assert blend.relevance(SCORES)[0].tolist() == pytest.approx(
        [1 / (1 + np.exp(-3)), 1 / (1 + np.exp(-1.5)), 1 / (1 + np.exp(3))], rel=1e-5
    )


def test_a_negative_value_falls_behind_the_less_relevant_it_is():
    blend = Blend(True, 1.0, (1.0, 0.0, 0.0), 3.0, -3.0)
    assert _order(blend, values=np.full((1, 3), -0.5, np.float32)) == [0, 1, 2]


def test_what_is_hardly_relevant_is_ranked_all_the_same():
    """As all is of which a stranger is asked, in a shop whose users take little: here 3e-11 to 1e-12."""
    blend = Blend(True, 1.0, (1.0, 0.5, 0.0), 1.76, -27.8)
    assert _order(blend, uses_tasks=False) == [0, 1, 2]
    assert _order(blend, power=2.0, values=np.full((1, 3), 0.5, np.float32)) == [0, 1, 2]
    far = blend.score(np.full((1, 3), -1e4, np.float32), SCORES - 40, np.full(1, 16.0), np.ones(1, bool))
    assert np.isfinite(far).all()


def test_without_a_blend_the_tasks_alone_decide(tmp_path):
    blend = read_blend(tmp_path)
    assert _order(blend) == [2, 1, 0]
    assert blend.score(VALUES, SCORES, np.zeros(1), np.ones(1, bool)) is VALUES


def test_a_blend_is_read_as_it_was_written_and_another_is_refused(tmp_path):
    blend = Blend(False, 1.5, (1.0, 0.5, 0.0), 3.0, -3.0)
    (tmp_path / BLEND).write_text(blend.to_json())
    assert read_blend(tmp_path) == blend
    (tmp_path / BLEND).write_text('{"power": 1}')
    with pytest.raises(ReleaseError, match="build the release again"):
        read_blend(tmp_path)
