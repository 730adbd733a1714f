"""Says what the shown lists are worth: a release's first figure, of held-out users.

The worth of an item to a user is what the user does with it when it is shown, each task by its weight: clicks
and purchases by their probability, dwell after a click, as the shop's tasks say. In a generated shop the
planted truth tells it of any item (`by_truth`). In a real one only what was shown has labels
(`by_propensities`, `by_log`):

  - propensities: where the chance with which each item was shown was logged, what became of the items that a
    way would have shown too counts by one over that chance;
  - places: the logged lists are put into each way's order, and what became of an item counts as much more as
    its new place is looked at more than its old one (the position-based model; off_policy.py);
  - replay: where no places were logged, each way chooses of the items shown to a user at one moment the one
    that it would have put first, and gets what became of it (Li et al., WSDM 2011). What the shop itself put
    first was looked at more, so this is kind to the shop's own order.
"""

from __future__ import annotations

from pathlib import Path

from builders.export.verifier import Verifier
from builders.shop.truth import FILE
from builders.verify.by_log import by_log
from builders.verify.by_propensities import by_propensities
from builders.verify.by_truth import by_truth
from builders.verify.values import Worth


def worth_of(verifier: Verifier, data: Path) -> Worth | str:
    """Measures what lists are worth in the surest way that the shop allows; says why, where none does.

    `data` is the folder of the stage, which has a generated shop's truth.
    """
    impressions, reasons = verifier.dataset.test_impressions, []
    if (data / FILE).is_file():
        found = by_truth(verifier, data / FILE)
        if isinstance(found, Worth):
            return found
        reasons.append(found)
    if impressions is None:
        return "; ".join([*reasons, "the shop has no labels"])
    for way in (by_propensities, by_log):
        found = way(verifier, impressions)
        if isinstance(found, Worth):
            return found
        reasons.append(found)
    return "; ".join(filter(None, reasons))
