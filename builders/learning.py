"""Says what each epoch of a training had: what a release's report draws as learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def learning_report(kept: int, curve: Sequence[Mapping[str, float]], metric: str) -> dict[str, Any]:
    """Gathers a training's epochs for its report: the `kept` one, and of each one (0: before training) the
    training loss and the validation, as far as it has them; `metric` names the validation."""
    epochs = max((int(entry["epoch"]) for entry in curve), default=0)
    return {"epochs": epochs, "kept_epoch": kept, "metric": metric, "curve": [dict(one) for one in curve]}


def size_line(ranker: Mapping[str, Any]) -> str:
    """Says which of two rankers is served, by the `losses` of a ranker's report."""
    served, other = ("small", "large") if ranker["is_small"] else ("large", "small")
    losses = ranker["losses"]
    why = f"held-out exposures have the loss {losses[served]:.4f}, with the {other} one {losses[other]:.4f}"
    return f"ranker: the {served} one is served: {why}"


def learning_lines(report: Mapping[str, Any]) -> list[str]:
    """Says in a sentence for each model which epoch was kept, and whether it was still learning then."""
    lines = []
    for model in ("encoders", "ranker"):
        of = report.get(model) or {}
        if not of.get("curve"):
            continue
        kept, epochs = of["kept_epoch"], of["epochs"]
        judged = any("validation" in one for one in of["curve"])
        why = f"by the {of['metric']}" if judged else "the last, as nothing was held out to judge by"
        still = " It was still gaining at its last epoch." if judged and 0 < epochs == kept else ""
        for one in of.get("longer", []):
            still = f" A training over {one['epochs']:g} epochs was best at {one['kept']}, and worse."
        lines.append(f"{model}: epoch {kept} of {epochs} is kept, {why}.{still}")
        if "losses" in of:
            lines.append(f"{size_line(of)}.")
    return lines
