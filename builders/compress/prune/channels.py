"""Finds which channels of a module belong together by running it: so whole channels can be taken out.

One output channel of one layer is made NaN, and the module is run on real feeds. Sums, products, activations,
concatenations and reshapes hand NaN on to their own places alone, attention spreads it over its head; the
columns of the next layers in which it arrives are those that read the channel. Channels with a reader in
common form a group, which goes or stays as a whole (both sides of a residual sum; a head's queries, keys and
values). A group that reaches an output, or whose readers read an input of the module too, stays. No operator
is known by name, so this works on a user's own module. torch-pruning (Fang et al. 2023 "DepGraph: towards any
structural pruning") finds such groups in the autograd graph, but must be told of every reshape into heads.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from builders.compress.finetune import Feeds, answers

Place = tuple[str, str, int]  # "out" or "in", module name, channel or column
_PRODUCERS = (nn.Linear, nn.Embedding)
_PROBED_USERS = 2


@dataclass(frozen=True)
class Group:
    """Channels ("out") and the columns that read them ("in"), which go or stay together."""

    places: tuple[Place, ...]

    @property
    def first(self) -> Place:
        return min(place for place in self.places if place[0] == "out")

    @property
    def signature(self) -> tuple[tuple[tuple[str, str], int], ...]:
        """Counts the channels and columns of each module."""
        return tuple(sorted(Counter((side, name) for side, name, _ in self.places).items()))


@dataclass(frozen=True)
class Family:
    """Groups that differ by place only, such as all channels of one hidden layer or all heads of one
    attention."""

    groups: tuple[Group, ...]

    @property
    def each(self) -> int:
        """Channels of one layer in one group: 1, or the width of a head."""
        return min(count for (side, _), count in self.groups[0].signature if side == "out")

    @property
    def width(self) -> int:
        """Channels of one layer in all groups."""
        return self.each * len(self.groups)

    @property
    def layers(self) -> list[str]:
        """Names the layers whose channels these are."""
        return [name for (side, name), _ in self.groups[0].signature if side == "out"]


def families(module: nn.Module, example: Feeds) -> list[Family]:
    """Finds all families of channels of `module` that may shrink, in the order of its layers."""
    probe = _Probe(module, _few(example))
    with torch.no_grad():
        found = _groups(probe)
    by_kind: dict[Any, list[Group]] = defaultdict(list)
    for group in found:
        by_kind[group.signature].append(group)
    order = {name: place for place, (name, _) in enumerate(module.named_modules())}
    kinds = [Family(tuple(sorted(groups, key=lambda group: group.first))) for groups in by_kind.values()]
    return sorted(kinds, key=lambda family: min(order[name] for name in family.layers))


def without(module: nn.Module, dropped: Iterable[tuple[Family, list[int]]]) -> nn.Module:
    """Copies `module`, keeping of each family only the groups at the given places."""
    smaller, gone = copy.deepcopy(module), set[Place]()
    for family, kept in dropped:
        gone |= {
            place for at, group in enumerate(family.groups) if at not in set(kept) for place in group.places
        }
        _keep_heads(smaller, family, kept)
    for name, part in smaller.named_modules():
        outside = [place for side, of, place in gone if side == "out" and of == name]
        inside = [place for side, of, place in gone if side == "in" and of == name]
        if outside or inside:
            _shrink(part, outside, inside)
    return smaller


def importance(group: Group, scores: dict[str, Tensor], module: nn.Module) -> float:
    """Sums the scores (by parameter name, of the parameter's shape) of all weights of the group."""
    total = 0.0
    for side, name, place in group.places:
        axis = _axis(module.get_submodule(name), side)
        total += (
            float(scores[f"{name}.weight"].select(axis, place).sum()) if f"{name}.weight" in scores else 0.0
        )
        total += float(scores[f"{name}.bias"][place]) if side == "out" and f"{name}.bias" in scores else 0.0
    return total


class _Probe:
    """Runs the module with one channel NaN and notes where NaN arrives."""

    def __init__(self, module: nn.Module, feeds: Feeds) -> None:
        self.module, self.feeds = module, feeds
        self.parts = {name: part for name, part in module.named_modules() if _is_watched(part)}
        self.target: tuple[str, list[int]] = ("", [])
        self.hits: set[Place] = set()
        self.lost = False

    def channels(self) -> list[tuple[str, int]]:
        """Counts the output channels of every layer that has some."""
        return [(name, _width(part)) for name, part in self.parts.items() if isinstance(part, _PRODUCERS)]

    def run(
        self, name: str, channels: Iterable[int], feeds: Feeds | None = None
    ) -> tuple[frozenset[Place], bool]:
        """Makes these channels NaN: gives the columns in which NaN arrives.

        And whether it reaches an output or a layer of unknown kind.
        """
        self.target, self.hits, self.lost = (name, list(channels)), set(), False
        handles = [part.register_forward_hook(self._hook(name)) for name, part in self.parts.items()]
        try:
            outputs = answers(self.module, feeds or self.feeds)
        finally:
            for handle in handles:
                handle.remove()
        tensors = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        return frozenset(self.hits), self.lost or any(bool(tensor.isnan().any()) for tensor in tensors)

    def readers(self, name: str, width: int) -> list[frozenset[Place]]:
        """Finds for each channel of a layer the columns that read it.

        Where every column reads one channel, 2 log2(width) runs tell which.
        """
        reached: dict[Place, list[int]] = defaultdict(list)
        for bit in range((width - 1).bit_length()):
            for value in (0, 1):
                for column in self.run(
                    name, [channel for channel in range(width) if channel >> bit & 1 == value]
                )[0]:
                    reached[column].append(value << bit)
        if any(len(values) != (width - 1).bit_length() for values in reached.values()):
            return [self.run(name, [channel])[0] for channel in range(width)]
        found: list[set[Place]] = [set() for _ in range(width)]
        for column, values in reached.items():
            found[sum(values)].add(column)
        return [frozenset(columns) for columns in found]

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(part: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
            first = (
                arguments[0]
                if arguments and isinstance(arguments[0], Tensor) and arguments[0].is_floating_point()
                else torch.zeros(1)
            )
            arrived = (
                first.isnan().flatten(0, -2).any(0).nonzero().flatten().tolist() if first.ndim > 1 else []
            )
            if not isinstance(part, (*_PRODUCERS, nn.LayerNorm)):
                self.lost |= bool(first.isnan().any())
                return output.nan_to_num() if isinstance(output, Tensor) else output
            self.hits |= {("in", name, column) for column in arrived}
            output = output.nan_to_num()
            marked = (
                arrived
                if isinstance(part, nn.LayerNorm)
                else self.target[1]
                if self.target[0] == name
                else []
            )
            output[..., marked] = float("nan")
            return output

        return hook


def _groups(probe: _Probe) -> list[Group]:
    """Gives free groups: channels joined by common readers."""
    blank = {
        name: tensor * float("nan") if tensor.is_floating_point() else tensor
        for name, tensor in probe.feeds.items()
    }
    # bound: columns that read an input of the module stay
    joined, bound = (
        _Joined(),
        set(probe.run("", [], blank)[0]),
    )
    for name, width in probe.channels():
        hits, lost = probe.run(name, range(width))
        if lost or not hits:
            bound |= hits
            continue
        readers = probe.readers(name, width)
        if len(set(readers)) == 1:
            # a softmax or a norm spreads every channel over all readers (gates, the queries of a single
            # head): none to tell apart
            continue
        for channel, columns in enumerate(readers):
            own: Place = ("out", name, channel)
            joined.add(own)
            bound |= set() if columns else {own}
            for column in columns:
                joined.join(own, column)
    return [Group(tuple(sorted(places))) for places in joined.sets() if not places & bound]


class _Joined:
    """Holds disjoint sets of places."""

    def __init__(self) -> None:
        self.of: dict[Place, set[Place]] = {}

    def add(self, place: Place) -> set[Place]:
        return self.of.setdefault(place, {place})

    def join(self, first: Place, second: Place) -> None:
        large, small = sorted((self.add(first), self.add(second)), key=len, reverse=True)
        if large is not small:
            large |= small
            self.of.update(dict.fromkeys(small, large))

    def sets(self) -> list[set[Place]]:
        return list({id(places): places for places in self.of.values()}.values())


def _few(example: Feeds) -> Feeds:
    """Picks the users of `example` with the most true masks: what is masked is hidden from the probe."""
    users = len(next(iter(example.values())))
    seen = sum(
        (tensor.flatten(1).sum(1) for tensor in example.values() if tensor.dtype == torch.bool),
        torch.zeros(users),
    )
    chosen = seen.argsort(dim=0, descending=True, stable=True)[:_PROBED_USERS]
    return {name: tensor[chosen] for name, tensor in example.items() if len(tensor) == users}


def _is_watched(part: nn.Module) -> bool:
    """Layers that produce or read channels, and torch's other layers with weights, of which nothing is
    known."""
    return isinstance(part, _PRODUCERS) or (
        type(part).__module__.startswith("torch.nn") and any(True for _ in part.parameters(recurse=False))
    )


def _width(part: nn.Module) -> int:
    """Counts the output channels of a layer that has some."""
    return part.embedding_dim if isinstance(part, nn.Embedding) else len(part.get_parameter("weight"))


def _axis(part: nn.Module, side: str) -> int:
    """Axis of the weight on which channels (out) or columns (in) lie."""
    return 1 if isinstance(part, nn.Embedding) or (isinstance(part, nn.Linear) and side == "in") else 0


def _shrink(part: nn.Module, outside: list[int], inside: list[int]) -> None:
    """Takes channels and columns out of one layer, in place."""
    for side, gone in (("out", outside), ("in", inside)):
        axis = _axis(part, side)
        for name, parameter in list(part.named_parameters(recurse=False)):
            at = 0 if parameter.ndim == 1 else axis
            if gone and not (side == "in" and name == "bias" and isinstance(part, nn.Linear)):
                left = [place for place in range(parameter.shape[at]) if place not in set(gone)]
                setattr(
                    part, name, nn.Parameter(parameter.detach().index_select(at, torch.tensor(left)).clone())
                )
    shape = tuple(part.get_parameter("weight").shape)
    if isinstance(part, nn.Linear):
        part.out_features, part.in_features = shape
    elif isinstance(part, nn.Embedding):
        part.embedding_dim = shape[1]
    elif isinstance(part, nn.LayerNorm):
        part.normalized_shape = shape


def _keep_heads(module: nn.Module, family: Family, kept: list[int]) -> None:
    """Tells a module with a number of `heads` which are left.

    Its own parameters and `bias_rows` have one row a head.
    """
    owners = {name.rpartition(".")[0] for name in family.layers}
    owner: Any = module.get_submodule(owners.pop()) if len(owners) == 1 else nn.Module()
    heads = getattr(owner, "heads", None)
    if heads != len(family.groups) or family.each < 2:
        return
    for name, parameter in list(owner.named_parameters(recurse=False)):
        if parameter.shape[0] == heads:
            setattr(owner, name, nn.Parameter(parameter.detach()[kept].clone()))
    owner.heads = len(kept)
    if hasattr(owner, "bias_rows"):
        owner.bias_rows = [owner.bias_rows[place] for place in kept]
