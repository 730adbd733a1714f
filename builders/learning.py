"""Says what each epoch of a training had: what a release's report draws as learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def learning_report(kept: int, curve: Sequence[Mapping[str, float]], metric: str) -> dict[str, Any]:
    """Gathers a training's epochs for its report: the `kept` one, and of each one (0: before training) the
    training loss and the validation, as far as it has them; `metric` names the validation."""
    epochs = max((int(entry["epoch"]) for entry in curve), default=0)
    return {"epochs": epochs, "kept_epoch": kept, "metric": metric, "curve": [dict(one) for one in curve]}


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
        if losses := of.get("losses"):
            large, small = (f"{losses[size]:.4f}" for size in ("large", "small"))
            still += f" The preset's ranker had {large}, a small one {small}: the "
            still += "small one is served." if of["is_small"] else "preset's is."
        lines.append(f"{model}: epoch {kept} of {epochs} is kept, {why}.{still}")
    return lines
