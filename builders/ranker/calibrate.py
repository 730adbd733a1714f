"""Calibrates the ranker: one affine map per task, fitted on held-out rows, folded into its graph.

Binary tasks: Platt scaling, sigmoid(scale * logit + bias). Regression tasks: the least-squares line. Order
never changes, as a scale is never below MIN_SCALE.
"""

from __future__ import annotations

import numpy as np

from ensemble.arrays import Array
from ensemble.schema import Task

MIN_SCALE = 0.05
_FEW = 10  # fewer rows of a class than this say nothing about a slope: only the bias is fitted


def fit_platt(logits: Array, labels: Array, steps: int = 30) -> tuple[float, float]:
    """Fits scale and bias by log loss of labels [E] 0/1/NaN given logits [E]; (1, 0) without labels."""
    logits, labels = _defined(logits, labels)
    num_positive = float(labels.sum())
    if num_positive < 1 or num_positive > len(labels) - 1:
        return 1.0, 0.0
    slope_fixed = min(num_positive, len(labels) - num_positive) < _FEW
    middle, spread = float(logits.mean()), max(float(logits.std()), 1e-6)
    x = np.stack([(logits - middle) / spread, np.ones_like(logits)], 1)
    weights = np.array([spread, np.log(num_positive / (len(labels) - num_positive))])
    for _ in range(steps):  # damped Newton: 2 x 2, converges in a few steps
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        gradient = x.T @ (p - labels)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-6 * np.eye(2)
        if slope_fixed:
            gradient[0], hessian[0, 1], hessian[1, 0] = 0.0, 0.0, 0.0
        step = np.clip(np.linalg.solve(hessian, gradient), -2.0, 2.0)
        weights = weights - step
        weights[0] = max(weights[0], MIN_SCALE * spread)
        if np.abs(step).max() < 1e-8:
            break
    scale = weights[0] / spread
    return float(scale), float(weights[1] - scale * middle)


def fit_share_slope(scores: Array, labels: Array, steps: int = 50) -> float:
    """Fits the slope by which softmax(slope * score) over each list is likeliest to give its positive, by
    Newton's method: scores [L, N] float, labels [L, N] 1, 0 or NaN (left out). Lists without a positive tell
    nothing; 1 without any."""
    known = ~np.isnan(labels)
    positive = known & (labels == 1)
    told = positive.any(axis=1)
    if not told.any():
        return 1.0
    known, positive, x = known[told], positive[told], scores[told].astype(np.float64)
    spread = max(float(x[known].std()), 1e-6)
    x = np.where(known, x / spread, -np.inf)
    wanted, finite = x[positive].mean(), np.where(known, x, 0.0)
    slope = 1.0
    for _ in range(steps):
        share = np.exp(slope * (x - x.max(axis=1, keepdims=True)))
        share /= share.sum(axis=1, keepdims=True)
        mean = (share * finite).sum(axis=1)
        variance = (share * finite**2).sum(axis=1) - mean**2
        step = float(np.clip((wanted - mean.mean()) / max(float(variance.mean()), 1e-9), -2.0, 2.0))
        slope = max(slope + step, MIN_SCALE)
        if abs(step) < 1e-6:
            break
    return slope / spread


def fit_line(outputs: Array, labels: Array) -> tuple[float, float]:
    """Fits scale and bias of the least-squares line of labels [E] (NaN = not defined) on outputs [E]."""
    outputs, labels = _defined(outputs, labels)
    if len(labels) < _FEW:
        return 1.0, float(labels.mean() - outputs.mean()) if len(labels) else 0.0
    variance = max(float(outputs.var()), 1e-12)
    covariance = float(((outputs - outputs.mean()) * (labels - labels.mean())).mean())
    scale = max(covariance / variance, MIN_SCALE)
    return scale, float(labels.mean() - scale * outputs.mean())


def fit(tasks: tuple[Task, ...], logits: Array, labels: Array) -> tuple[Array, Array]:
    """Fits scales and biases [T] float32 for logits and labels [E, T]."""
    fits = [
        (fit_platt if task.kind == "binary" else fit_line)(logits[:, t], labels[:, t])
        for t, task in enumerate(tasks)
    ]
    scales, biases = np.array(fits, np.float32).reshape(-1, 2).T
    return scales, biases


def _defined(outputs: Array, labels: Array) -> tuple[Array, Array]:
    """Gives both as float64, without the rows whose label is NaN."""
    known = ~np.isnan(labels)
    return outputs[known].astype(np.float64), labels[known].astype(np.float64)
