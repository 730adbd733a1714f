"""Prunes: sets weights to zero (magnitude, 2:4), or takes out whole channels and heads (structured).

What each does to speed, plainly:
- `magnitude`: nothing. A dense engine (ONNX Runtime, TensorRT) multiplies by zero as slowly as by any other
  number. It makes the file smaller once it is packed, and shows how much of a model is idle.
- `two_four`: nothing on a CPU; on GPUs with sparse tensor cores (SM 8.0 and later) up to twice the matrix
  throughput, and only in an engine that was compiled with the sparsity flag, for layers large enough to be
  bound by arithmetic.
- `structured`: as much as the multiplications it takes out, on every engine: what is left is a smaller dense
  model.

Sources: magnitude, Han et al. 2015 "Learning both weights and connections"; 2:4, Mishra et al. 2021
"Accelerating sparse deep neural networks"; importance of a channel by the L2 norm of its weights, Li et al.
2017 "Pruning filters for efficient ConvNets", or by the first-order Taylor term, Molchanov et al. 2019
"Importance estimation for neural network pruning".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from builders.compress.finetune import Feeds, answers
from builders.compress.prune.channels import Family, families, importance, without
from ensemble.errors import InvalidInput


class Masks:
    """Says which weights stay: bool tensors by parameter name, of its shape. A Repair for `finetune`."""

    def __init__(self, module: nn.Module, kept: dict[str, Tensor]) -> None:
        self.module, self.kept = module, kept

    @torch.no_grad()
    def apply(self) -> None:
        """Sets to zero what was taken out, again: an optimizer's step moves zeros too."""
        for name, kept in self.kept.items():
            self.module.get_parameter(name).mul_(kept)

    @property
    def share(self) -> float:
        """Zeros among all masked weights, 0 to 1."""
        total = sum(kept.numel() for kept in self.kept.values())
        return 1 - sum(int(kept.sum()) for kept in self.kept.values()) / max(1, total)


def magnitude(
    module: nn.Module, *, threshold: float | None = None, share: float | None = None, per_layer: bool = False
) -> Masks:
    """Takes out, in place, the weights |w| < threshold, or the `share` of all weights of linear layers that
    is smallest.

    `per_layer` takes the share out of each layer instead of where the smallest weights lie. No speed is won:
    see above.
    """
    if (threshold is None) == (share is None):
        raise InvalidInput("magnitude: give either threshold or share")
    weights = _weights(module)
    if threshold is not None:
        if not threshold > 0:
            raise InvalidInput(f"threshold = {threshold}: want a number above 0; weights below it become 0")
        masks = Masks(module, {name: weight.abs() >= threshold for name, weight in weights.items()})
    else:
        masks = Masks(module, _largest(weights, check_share("share", share), per_layer))
    masks.apply()
    return masks


def two_four(module: nn.Module) -> Masks:
    """Takes out, in place, the two smallest of every four weights along the input axis, the pattern of sparse
    tensor cores.

    Layers whose input width is no multiple of 4 stay dense, as TensorRT would leave them.
    """
    kept = {}
    for name, weight in _weights(module).items():
        if weight.shape[1] % 4 == 0:
            groups = weight.abs().unflatten(1, (-1, 4))
            order = groups.argsort(dim=-1, descending=True, stable=True)
            kept[name] = (
                torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :2], True).flatten(1)
            )
    if not kept:
        raise InvalidInput("two_four: no linear layer's input width is a multiple of 4")
    masks = Masks(module, kept)
    masks.apply()
    return masks


def structured(
    module: nn.Module,
    share: float,
    example: Feeds,
    *,
    round_to: int = 16,
    loss: Callable[[nn.Module, Feeds], Tensor] | None = None,
) -> nn.Module:
    """Copies `module` smaller: of every hidden width, the `share` of channels that matters least is gone.

    A channel may be an attention head.

    Widths become multiples of `round_to`: the one nearest to what was asked for, at least one. Widths below 2
    * round_to, inputs and outputs (the contract's own widths) stay, and so does what the module's `forward`
    does not let shrink. Which channels belong together is found by running `example`, a few users' feeds (see
    channels.py). A channel matters by the L2 norm of its weights, or, given a `loss` of module and feeds, by
    how much that loss on `example` would change without it (Taylor).
    """
    check_share("share", share)
    if round_to < 1:
        raise InvalidInput(
            f"round_to = {round_to}: want at least 1; 16 suits both int8 kernels and tensor cores"
        )
    found = families(module, example)
    scores = _norms(module) if loss is None else _taylor(module, loss, example)
    chosen: list[tuple[Family, list[int]]] = []
    for family in found:
        kept = _kept(family, share, round_to, [importance(group, scores, module) for group in family.groups])
        if len(kept) < len(family.groups) and _runs(
            module, without(module, [*chosen, (family, kept)]), example
        ):
            chosen.append((family, kept))
    if not chosen and share > 0:
        widths = sorted({family.width for family in found}) or "none that are free"
        raise InvalidInput(
            f"round_to = {round_to} with share = {share} leaves nothing to take out; hidden widths: "
            f"{widths}. Lower round_to"
        )
    return without(module, chosen).eval()


@dataclass(frozen=True)
class Size:
    """Holds what a module costs."""

    parameters: int
    zeros: int  # among the parameters
    # dense multiply-adds x 2 of one user, in millions; zeros count in full, as engines compute them
    mflops: float


def size(module: nn.Module, example: Feeds) -> Size:
    """Counts parameters and zeros, and the operations of one user of `example`."""
    parameters = list(module.parameters())
    users = len(next(iter(example.values())))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        answers(module, example)
    zeros = sum(int((parameter == 0).sum()) for parameter in parameters)
    return Size(
        sum(parameter.numel() for parameter in parameters), zeros, counter.get_total_flops() / users / 1e6
    )


def check_share(name: str, value: float | None) -> float:
    """Gives the value, if it is a share that leaves something: 0 <= value < 1."""
    if value is None or not 0 <= value < 1:
        raise InvalidInput(f"{name} = {value}: want a share from 0 up to, not including, 1, such as 0.5")
    return value


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Weights [outputs, inputs] of the linear layers by parameter name."""
    found = {
        f"{name}.weight".lstrip("."): part.weight.detach()
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
    }
    if not found:
        raise InvalidInput(f"{type(module).__name__} has no linear layer: nothing to prune")
    return found


def _largest(weights: dict[str, Tensor], share: float, per_layer: bool) -> dict[str, Tensor]:
    """Masks with exactly round(share * weights) zeros, ties broken by place."""
    if per_layer:
        return {name: _largest({name: weight}, share, False)[name] for name, weight in weights.items()}
    flat = torch.cat([weight.abs().flatten() for weight in weights.values()])
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[flat.argsort(stable=True)[: round(share * len(flat))]] = False
    pieces = kept.split([weight.numel() for weight in weights.values()])
    return {
        name: piece.view(weight.shape) for (name, weight), piece in zip(weights.items(), pieces, strict=True)
    }


def _kept(family: Family, share: float, round_to: int, scores: list[float]) -> list[int]:
    """Places of the groups that stay, ascending: as many as make the nearest multiple of round_to
    channels."""
    every = len(family.groups)
    unit = round_to // math.gcd(family.each, round_to)  # groups that make a multiple
    count = max(unit, math.floor((1 - share) * every / unit + 0.5) * unit)
    if every < 2 * unit:
        return list(range(every))
    best = sorted(range(every), key=lambda place: (-scores[place], place))
    return sorted(best[: min(count, every)])


def _norms(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().square() for name, parameter in module.named_parameters()}


def _taylor(
    module: nn.Module, loss: Callable[[nn.Module, Feeds], Tensor], example: Feeds
) -> dict[str, Tensor]:
    """Gives (weight * gradient)^2 by parameter name."""
    module.zero_grad()
    loss(module, example).backward()
    scores = {
        name: (p.detach() * (p.grad if p.grad is not None else torch.zeros_like(p))).square()
        for name, p in module.named_parameters()
    }
    module.zero_grad()
    return scores


@torch.no_grad()
def _runs(module: nn.Module, smaller: nn.Module, example: Feeds) -> bool:
    """Says whether the smaller module still runs and answers in the same shapes.

    Where `forward` fixes a width, it does not.
    """
    few = {name: tensor[:2] for name, tensor in example.items()}
    try:
        return _shapes(answers(smaller, few)) == _shapes(answers(module, few))
    except (RuntimeError, ValueError):
        return False


def _shapes(outputs: Tensor | Iterable[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in ([outputs] if isinstance(outputs, Tensor) else outputs)]
