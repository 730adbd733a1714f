"""Defines the ranker, target attention and a mixture of experts, and the item head beside it.

Axes: B batch, H history (left padded, newest last), D embedding, N candidates, F item features (L learned
ones, then P rates), U user features, A user state (its last Q are rates), G candidate state, S recall
sources, T tasks, C code columns, R value columns, K attention width, E experts. Parameter names of `forward`
are the tensor names of the contract. All that depends on the user alone is computed once
per user and broadcast to the N candidates; no candidate sees another one, so padding changes nothing.

Sources: DIN (Zhou et al. 2018), with scaled dot products for its activation unit; MMoE (Ma et al. KDD 2018);
ESMM (Ma et al. SIGIR 2018): a task that is `given` another one has its conditional probability as output, and
is trained on the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from builders.data.rates import grouping
from builders.layers import CodeEmbedding, Dropout, code_slices
from ensemble.activity import state_width, touches_width
from ensemble.schema import Schema, Table

_FAR = -1e4  # a masked attention logit: finite in every precision


@dataclass(frozen=True)
class RankerConfig:
    """Holds widths of the ranker's layers; the defaults cost 0.40 MFLOP a candidate, `tiny` is for tests."""

    codes: int = 32  # one vector a code feature
    attention: int = 64  # keys and values of the history, over all heads
    heads: int = 2
    products: int = 32  # products with the item of each: user, newest item of the history, attended history
    hidden: int = 192  # the layer in which user and candidate meet
    experts: int = 4
    expert: tuple[int, int] = (128, 64)
    tower: int = 32
    dropout: float = 0.3


TINY = RankerConfig(
    codes=8, attention=16, heads=1, products=8, hidden=32, experts=2, expert=(32, 16), tower=8, dropout=0.1
)


class CalibratedRanker(nn.Module):
    """Wraps `logits` as the contract's ranker: an affine map a task, then a sigmoid (binary) or nothing.

    For binary tasks the map is the calibration; for regression tasks it also undoes the standardization of
    training.
    """

    calibration_scale: Tensor
    calibration_bias: Tensor
    is_binary: Tensor
    score_gate: Tensor

    def __init__(self, schema: Schema):
        super().__init__()
        # 0 for sources whose scores training must not trust
        self.register_buffer("score_gate", torch.ones(len(schema.sources)))
        self.register_buffer("calibration_scale", torch.ones(len(schema.tasks)))
        self.register_buffer("calibration_bias", torch.zeros(len(schema.tasks)))
        self.register_buffer("is_binary", torch.tensor([task.kind == "binary" for task in schema.tasks]))

    def forward(
        self,
        history_features: Tensor,
        history_mask: Tensor,
        user_codes: Tensor,
        user_values: Tensor,
        user_features: Tensor,
        user_state: Tensor,
        candidate_features: Tensor,
        candidate_state: Tensor,
        candidate_scores: Tensor,
    ) -> Tensor:
        """Gives candidate_probabilities [B, N, T] float32: calibrated ones of binary tasks, others' numbers.

        history_features [B, H, F], history_mask [B, H] bool, user_codes [B, C] int32, user_values [B, R],
        user_features [B, U], user_state [B, A], candidate_features [B, N, F], candidate_state [B, N, G],
        candidate_scores [B, N, S]; float32 unless said.
        """
        user = (user_codes, user_values, user_features, user_state)
        candidates = (candidate_features, candidate_state, candidate_scores)
        return self.probabilities(self.logits(history_features, history_mask, *user, *candidates))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turns logits [..., T] into probabilities (binary) or numbers (regression) [..., T]."""
        calibrated = logits * self.calibration_scale + self.calibration_bias
        return torch.where(self.is_binary, calibrated.sigmoid(), calibrated)

    def logits(self, *tensors: Tensor) -> Tensor:
        """Gives logits [B, N, T] float32 before calibration, from the tensors of forward in its order.

        In training user_state may be [B, N, A]: impressions of one list may be of different moments.
        """
        return self.gated_logits(*tensors[:-1], tensors[-1] * self.score_gate)

    def gated_logits(self, *tensors: Tensor) -> Tensor:
        """Gives `logits` with the scores of distrusted sources 0."""
        raise NotImplementedError


class Ranker(CalibratedRanker):
    """Adds a wide path, linear in recall's scores, to a deep one of experts and products of both sides, and
    both to what the rates of item and user say by themselves: in log odds, each task's own starting point."""

    score_mean: Tensor
    score_scale: Tensor
    user_state_mean: Tensor
    user_state_scale: Tensor
    candidate_state_mean: Tensor
    candidate_state_scale: Tensor
    deep_gate: Tensor

    def __init__(self, schema: Schema, config: RankerConfig | None = None):
        super().__init__(schema)
        c, s, tasks = config or RankerConfig(), schema.sizes, len(schema.tasks)
        self.register_buffer("score_mean", torch.zeros(len(schema.sources)))
        self.register_buffer("score_scale", torch.ones(len(schema.sources)))
        # what a candidate's own numbers are beside all that is learned: its state, then its rates
        self.learned, own = s.item_features - s.item_rates, touches_width(schema) + s.item_rates
        for name, width in (("user_state", state_width(schema)), ("candidate_state", own)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_scale", torch.ones(width))
        self.register_buffer("deep_gate", torch.ones(()))  # 0 where the deep path did not help held-out users
        self.user = UserSide(schema, c)
        self.attention = TargetAttention(self.learned, s.history, c)
        self.user_product = nn.Linear(self.user.width, c.products)
        self.newest_product = nn.Linear(self.learned, c.products)
        self.attended_product = nn.Linear(c.attention, c.products)
        self.item_product = nn.Linear(self.learned, 3 * c.products)
        inside = self.learned + own + c.attention + 3 * c.products + len(schema.sources)
        self.candidate_in = nn.Linear(inside, c.hidden)
        self.user_in = nn.Linear(self.user.width, c.hidden, bias=False)
        self.state_in = nn.Linear(state_width(schema), c.hidden, bias=False)
        self.rated = tasks if s.item_rates else 0  # tasks whose rates are known: all, or none without labels
        self.user_rates = state_width(schema) - s.user_rates  # where they begin in user_state
        # how far each task goes along with the rate of the item, and of the user
        self.item_pull, self.user_pull = (nn.Parameter(torch.ones(self.rated)) for _ in range(2))
        self.experts = nn.ModuleList(_mlp((c.hidden, *c.expert), c.dropout) for _ in range(c.experts))
        self.gates = nn.ModuleList(nn.Linear(c.hidden, c.experts) for _ in range(tasks))
        self.towers = nn.ModuleList(
            nn.Sequential(_mlp((c.expert[-1], c.tower)), nn.Linear(c.tower, 1)) for _ in range(tasks)
        )
        self.products_out = nn.Linear(3 * c.products, tasks, bias=False)
        self.wide = nn.Linear(len(schema.sources), tasks)
        self.dropout = Dropout(c.dropout)
        lasts = [tower.get_submodule("1") for tower in self.towers]
        for layer in (*lasts, self.products_out, self.wide):
            # training starts at the wide path, which starts at recall's own order
            nn.init.zeros_(layer.get_parameter("weight"))

    def gated_logits(self, *tensors: Tensor) -> Tensor:
        """Gives logits [B, N, T] float32 of CalibratedRanker.forward's tensors."""
        history, mask, user_codes, user_values, user_features, user_state, features, touches, scores = tensors
        scores = (scores - self.score_mean) * self.score_scale
        user_state = user_state if user_state.dim() == 3 else user_state.unsqueeze(1)  # [B, 1 or N, A]
        items, history = features[..., : self.learned], history[..., : self.learned]
        keys, values = self.attention.sides(history)
        user = self.user(values, mask, user_codes, user_values, user_features).unsqueeze(1)  # [B, 1, width]
        attended = self.attention(items, keys, values, mask)
        newest = self.newest_product(history[:, -1:] * mask[:, -1:, None])  # [B, 1, products]
        sides = torch.broadcast_tensors(self.user_product(user), newest, self.attended_product(attended))
        products = torch.cat(sides, -1) * self.item_product(items)
        own = torch.cat([touches, features[..., self.learned :]], -1)
        own = (own - self.candidate_state_mean) * self.candidate_state_scale
        parts = torch.cat([items, own, attended, products, scores.clamp(-8.0, 8.0)], -1)
        moment = self.state_in((user_state - self.user_state_mean) * self.user_state_scale)
        hidden = self.dropout(torch.relu(self.candidate_in(parts) + self.user_in(user) + moment))
        deep = self._mixture(hidden) + self.products_out(products)
        return self.wide(scores) + self._rates(features, user_state) + self.deep_gate * deep

    def _rates(self, features: Tensor, user_state: Tensor) -> Tensor | float:
        """Gives what the rates of item and user add to each task's logit [B, N, T]; 0 where there are
        none."""
        if not self.rated:
            return 0.0
        item = features[..., self.learned : self.learned + self.rated]
        user = user_state[..., self.user_rates : self.user_rates + self.rated]
        return item * self.item_pull + user * self.user_pull

    def _mixture(self, hidden: Tensor) -> Tensor:
        """Weighs the shared experts by each task's own gate: [B, N, hidden] -> [B, N, T]."""
        experts = [expert(hidden) for expert in self.experts]  # [B, N, width] each
        outputs = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            # [B, N, E]; a sum of products is faster than a stack, most of all at 8 bits
            share = gate(hidden).softmax(-1)
            outputs.append(
                tower(sum(share[..., place : place + 1] * expert for place, expert in enumerate(experts)))
            )
        return torch.cat(outputs, -1)


class UserSide(nn.Module):
    """Makes one vector of the user alone: row, features, the history's mean, newest item and length."""

    def __init__(self, schema: Schema, config: RankerConfig):
        super().__init__()
        self.codes = _codes(schema.users, config.codes)
        num_codes = len(self.codes.slices)
        inside = (
            schema.sizes.user_features
            + num_codes * config.codes
            + schema.users.value_width
            + 2 * config.attention
            + 1
        )
        self.width = config.hidden
        self.layer = nn.Linear(inside, self.width)

    def forward(
        self, values: Tensor, mask: Tensor, user_codes: Tensor, user_values: Tensor, user_features: Tensor
    ) -> Tensor:
        """Describes users [B, width] by values [B, H, K], mask [B, H], codes, values and rows."""
        present = mask.unsqueeze(-1).to(values.dtype)
        length = present.sum(1)  # [B, 1]
        mean = (values * present).sum(1) / length.clamp(min=1.0)
        newest = values[:, -1] * present[:, -1]
        parts = [user_features, *self.codes(user_codes), user_values, mean, newest, torch.log1p(length)]
        return torch.relu(self.layer(torch.cat(parts, -1)))


class TargetAttention(nn.Module):
    """Attends from candidates (queries) to what of the history (keys, values) matters to them.

    A learned "nothing" stands beside the history: an empty one stays finite, and a candidate may find nothing
    alike in it.
    """

    def __init__(self, dim: int, history: int, config: RankerConfig):
        super().__init__()
        width, self.heads = config.attention, config.heads
        self.query, self.key, self.value = nn.Linear(dim, width), nn.Linear(dim, width), nn.Linear(dim, width)
        self.position = nn.Parameter(torch.zeros(self.heads, 1, history))
        self.nothing = nn.Parameter(torch.zeros(self.heads, 1, 1))

    def sides(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """Gives keys and values [B, H, K] of history [B, H, F]: once per user."""
        return self.key(history), self.value(history)

    def forward(self, items: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attends from items [B, N, F] to keys, values [B, H, K] under mask [B, H]: [B, N, K]; 0 for none."""
        query, key, value = (self._split(side) for side in (self.query(items), keys, values))
        place = self.position + torch.where(mask, 0.0, _FAR)[:, None, None, :]  # [B, heads, 1, H]
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + place  # [B, heads, N, H]
        nothing = self.nothing + torch.zeros_like(logits[..., :1])
        share = torch.cat([logits, nothing], -1).softmax(-1)[..., :-1]
        mixed = share @ value  # [B, heads, N, K / heads]
        return mixed.transpose(1, 2).flatten(2)

    def _split(self, side: Tensor) -> Tensor:
        """Splits heads: [B, L, K] -> [B, heads, L, K / heads]."""
        return side.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ItemFeatures(nn.Module):
    """Makes all that the ranker sees of an item: its id row, codes, values and, gated, its embedding."""

    embedding_scale: Tensor
    code_rates: Tensor

    def __init__(self, schema: Schema, config: RankerConfig | None = None):
        super().__init__()
        c, s = config or RankerConfig(), schema.sizes
        self.width = width = s.item_features - s.item_rates
        self.groups = [feature.start for feature in grouping(schema)] if s.item_rates else []
        # [codes, T] the rates of each value of the features that group items (builders/data/rates.py)
        self.register_buffer("code_rates", torch.zeros(schema.items.num_codes, len(schema.tasks)))
        # 1 / root mean square of the embeddings; 0 where they tell the labels
        self.register_buffer("embedding_scale", torch.ones(()))
        self.codes = _codes(schema.items, c.codes)
        inside = width + len(self.codes.slices) * c.codes + schema.items.value_width + schema.sizes.embedding
        self.layers = nn.Sequential(_mlp((inside, 2 * width)), nn.Linear(2 * width, width))
        # a straight way beside the layers, which alone may not tell some codes apart (two textures); 0 where
        # it is not trained
        self.direct = nn.utils.skip_init(nn.Linear, inside, width, bias=False)
        nn.init.zeros_(self.direct.weight)

    def forward(
        self, item_id_features: Tensor, item_codes: Tensor, item_values: Tensor, item_embedding: Tensor
    ) -> Tensor:
        """Gives item_features [B, F] of id rows [B, F] (row 0 of the table for a new item), codes [B, C]:
        what is learned, then rates. An id row holds the item's own rates; those of its groups come by its
        codes.

        item_values [B, R] and item_embedding [B, D], the first head's output, are float32.
        """
        own, rates = item_id_features[:, : self.width], item_id_features[:, self.width :]
        parts = [
            own,
            *self.codes(item_codes),
            item_values,
            item_embedding * self.embedding_scale,
        ]
        known = torch.cat(parts, -1)
        learned = own + self.direct(known) + self.layers(known)
        if not self.groups:
            return torch.cat([learned, rates], -1)
        tasks = self.code_rates.shape[1]
        grouped = [functional.embedding(item_codes[:, at], self.code_rates) for at in self.groups]
        return torch.cat([learned, rates[:, :tasks], *grouped, rates[:, -1:]], -1)


class OwnRanker(CalibratedRanker):
    """Makes a user's own module trainable on logits and calibrates it like ours."""

    def __init__(self, schema: Schema, inner: nn.Module):
        super().__init__(schema)
        self.inner = inner

    def gated_logits(self, *tensors: Tensor) -> Tensor:
        """Gives the inner module's probabilities (binary) as logits, its numbers (regression) as they are."""
        own = [*tensors]
        if own[5].dim() == 3:  # user_state: in training one a candidate, all of one moment
            own[5] = own[5][:, 0]
        outputs = self.inner(*own)
        return torch.where(self.is_binary, torch.logit(outputs, eps=1e-6), outputs)


def num_parameters(module: nn.Module) -> int:
    """Counts trained numbers in the module (id tables live outside)."""
    return sum(parameter.numel() for parameter in module.parameters())


def flops_per_user(ranker: Ranker, num_candidates: int) -> int:
    """Counts floating point operations (2 a multiply-add) of one user with N candidates."""
    attention, user = ranker.attention, ranker.user
    per_user = (user.layer, ranker.user_product, ranker.newest_product, ranker.user_in, ranker.state_in)
    once = sum(layer.weight.numel() for layer in per_user) + attention.position.shape[-1] * (
        attention.key.weight.numel() + attention.value.weight.numel()
    )
    skipped = {*per_user, attention.key, attention.value}
    linear = sum(m.weight.numel() for m in ranker.modules() if isinstance(m, nn.Linear) and m not in skipped)
    pairs = 2 * attention.position.shape[-1] * attention.key.out_features  # logits and mix
    return 2 * (once + num_candidates * (linear + pairs))


def _mlp(widths: tuple[int, ...], dropout: float = 0.0) -> nn.Sequential:
    """Stacks Linear + ReLU (+ dropout between layers) through `widths`."""
    layers: list[nn.Module] = []
    for place, (inside, outside) in enumerate(pairwise(widths)):
        if place and dropout:
            layers.append(Dropout(dropout))
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*layers)


def _codes(table: Table, dim: int) -> CodeEmbedding:
    """Embeds codes as one pooled vector for each category and text feature of a table."""
    codes = CodeEmbedding(table.num_codes, code_slices(table), dim)
    # the ranker trains for few steps: codes must be told apart from the first one on
    nn.init.normal_(codes.table.weight, std=0.3)
    return codes
