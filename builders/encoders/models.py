"""Defines the retrieval models: an item encoder and a user encoder whose dot product ranks the catalogue.

Both sides have length 1 / sqrt(temperature), so the dot product is cosine / temperature, the softmax's own
logit, and inner product and cosine rank alike in any index; a cold item is not ranked down for the short
vector it has.

Axes: B batch, H history (left padded, newest item last), D embedding, M interests, C code columns, R value
columns, Q query positions, K key positions. Parameter names of `forward` are the tensor names of the
contract. A contract has no empty tensors: a shop without codes (or values) passes one column of zeros and
sizes of 1.

Sources: SASRec (Kang & McAuley 2018), ComiRec-SA (Cen et al. 2020), ALiBi (Press et al. 2022) for the slopes
of the position bias, DropoutNet (Volkovs et al. 2017) for training with item ids left out (see
train_encoders).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from builders.layers import CodeEmbedding, Dropout

# added to a masked logit: finite, so a row that is wholly masked stays finite (in bf16 and fp16 too)
_FAR = -1e4


class ItemEncoder(nn.Module):
    """Encodes an item: its id row plus its features' sum, corrected by a network that sees them apart."""

    def __init__(
        self,
        *,
        dim: int = 128,
        num_codes: int = 1,
        code_slices: tuple[tuple[int, int], ...] = (),
        num_values: int = 1,
        content_slices: tuple[tuple[int, int], ...] = (),
        dropout: float = 0.0,
        temperature: float = 0.07,
    ):
        super().__init__()
        self.length = temperature**-0.5
        self.codes = CodeEmbedding(num_codes, code_slices, dim)
        self.values = nn.Linear(max(num_values, 1), dim, bias=False)
        nn.init.normal_(self.values.weight, std=0.02)
        self.contents = ContentHeads(num_values, content_slices, dim)
        parts = 2 + len(code_slices) + len(content_slices)
        last = nn.Linear(dim, dim)
        self.mix = nn.Sequential(nn.Linear(parts * dim, dim), nn.GELU(), Dropout(dropout), last)
        nn.init.zeros_(last.weight)  # training starts from the plain sum
        nn.init.zeros_(last.bias)

    def forward(self, item_id_embedding: Tensor, item_codes: Tensor, item_values: Tensor) -> Tensor:
        """Encodes ids [B, D], codes [B, C] int32, values [B, R] -> item_embedding [B, D] float32."""
        numbers, contents = self.contents(item_values)
        parts = [item_id_embedding, self.values(numbers), *self.codes(item_codes), *contents]
        total = torch.stack(parts).sum(0) + self.mix(torch.cat(parts, dim=1))
        return self.length * functional.normalize(total.float(), dim=-1)


class ContentHeads(nn.Module):
    """Holds a trained head for each frozen content vector: of its components, and of its absence."""

    number_mask: Tensor

    def __init__(self, num_values: int, slices: tuple[tuple[int, int], ...], dim: int) -> None:
        super().__init__()
        self.slices = slices
        self.heads = nn.ModuleList(nn.Linear(stop - start, dim, bias=False) for start, stop in slices)
        for weight in self.heads.parameters():
            nn.init.normal_(weight, std=0.02)
        mask = torch.ones(max(num_values, 1))
        for start, stop in slices:
            mask[start:stop] = 0
        self.register_buffer("number_mask", mask, persistent=False)

    def forward(self, item_values: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Splits values [B, R]: the same with contents 0 [B, R], and each content's vector [B, D]."""
        if not self.slices:
            return item_values, []
        heads = zip(self.heads, self.slices, strict=True)
        contents = [head(item_values[:, start:stop]) for head, (start, stop) in heads]
        return item_values * self.number_mask, contents


class ItemRows(nn.Module):
    """Runs both heads over one id row: the item_encoder engine. The ids' table itself stays outside."""

    def __init__(self, encoder: nn.Module, head: nn.Module, embedding: int) -> None:
        super().__init__()
        self.encoder, self.head, self.embedding = encoder, head, embedding

    def forward(
        self, item_id_embedding: Tensor, item_codes: Tensor, item_values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encodes ids [B, E], codes [B, C], values [B, R]: item_embedding [B, D], item_features [B, F]."""
        embedding = self.encoder(item_id_embedding[:, : self.embedding], item_codes, item_values)
        return embedding, self.head(
            item_id_embedding[:, self.embedding :], item_codes, item_values, embedding
        )


class Block(nn.Module):
    """Runs a pre-norm Transformer block: attention with an added bias, then a feed-forward network."""

    def __init__(self, dim: int, heads: int, dropout: float, width: int):
        super().__init__()
        # a pruned block has fewer heads, and reads the bias of those it kept
        self.heads, self.bias_rows = (
            heads,
            list(range(heads)),
        )
        self.norm_attention, self.norm_feed = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed = nn.Sequential(nn.Linear(dim, width), nn.GELU(), Dropout(dropout), nn.Linear(width, dim))
        self.dropout = Dropout(dropout)

    def forward(self, states: Tensor, bias: Tensor) -> Tensor:
        """Gives the newest Q positions of states [B, H, D]: [B, Q, D]; bias [B, heads, Q, H] masks."""
        split = self.qkv(self.norm_attention(states)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        query, states = query[:, :, -bias.shape[2] :], states[:, -bias.shape[2] :]
        own = bias if len(self.bias_rows) == bias.shape[1] else bias[:, self.bias_rows]
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + own
        mixed = self.dropout(logits.softmax(-1)) @ value
        states = states + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return states + self.dropout(self.feed(self.norm_feed(states)))


class UserEncoder(nn.Module):
    """Encodes a user: SASRec on item embeddings plus a recency-weighted sum; interests > 1 adds ComiRec-SA.

    Order enters only as a learned bias on the distance between two items, so a packed training row, a full
    window and a left-padded one give a user the same embedding. Who has no history gets a learned default;
    features are added.
    """

    def __init__(
        self,
        *,
        dim: int = 128,
        num_user_codes: int = 1,
        user_code_slices: tuple[tuple[int, int], ...] = (),
        num_user_values: int = 1,
        interests: int = 1,
        layers: int = 2,
        heads: int = 4,
        feed: int | None = None,  # width of the feed-forward networks; None: 4 * dim
        dropout: float = 0.3,
        temperature: float = 0.07,
        max_history: int = 50,
        ordered: bool = True,  # False: starts without a preference for recent items
    ):
        super().__init__()
        self.length = temperature**-0.5
        self.interests, self.max_history = interests, max_history
        self.codes = CodeEmbedding(num_user_codes, user_code_slices, dim)
        self.values = nn.Linear(max(num_user_values, 1), dim, bias=False)
        nn.init.normal_(self.values.weight, std=0.02)
        self.default = nn.Parameter(torch.zeros(dim))
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout, feed or 4 * dim) for _ in range(layers))
        ages = torch.arange(max_history).float() * ordered
        slopes = -(2.0 ** -torch.arange(heads).float())
        self.distance_bias = nn.Parameter(slopes[:, None] * ages.clamp(max=20.0))  # [heads, H]
        self.recency_bias = nn.Parameter(-0.5 * ages.clamp(max=10.0))  # [H]
        self.recency = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.recency.weight)
        if interests > 1:
            self.interest_query = nn.Sequential(
                nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, interests, bias=False)
            )
            self.interest_bias = nn.Parameter(torch.zeros(interests, max_history))
            self.interest_out = nn.Linear(dim, dim, bias=False)

    def forward(
        self, history_embeddings: Tensor, history_mask: Tensor, user_codes: Tensor, user_values: Tensor
    ) -> Tensor:
        """Encodes histories [B, H, D], masks [B, H], codes [B, Cu], values [B, Ru] -> [B, M, D] float32."""
        length = history_mask.shape[1]
        order = torch.arange(length, device=history_mask.device)
        seen = history_mask[:, None, :] & (order[:, None] >= order[None, :])
        newest = self.positions(history_embeddings, seen, newest_only=self.interests == 1)[:, -1]
        known = history_mask.any(1)[:, None, None]
        return self.embeddings(
            torch.where(known, newest, self.default), self.features(user_codes, user_values)
        )

    def embeddings(self, states: Tensor, features: Tensor) -> Tensor:
        """Adds features [B, D] to states [B, M, D] of a position -> user_embeddings [B, M, D] float32."""
        return self.length * functional.normalize((states + features[:, None]).float(), dim=-1)

    def features(self, user_codes: Tensor, user_values: Tensor) -> Tensor:
        """Gives what the user's features [B, Cu] int32, [B, Ru] float32 add: [B, D] float32."""
        return torch.stack([self.values(user_values), *self.codes(user_codes)]).sum(0)

    def positions(self, history_embeddings: Tensor, seen: Tensor, *, newest_only: bool = False) -> Tensor:
        """Gives states [B, Q, M, D], without features, of histories [B, H, D] float32.

        seen [B, Q, K] bool says which items a position may use.

        Training learns from all positions at once; serving reads the newest, and with `newest_only` no other
        one is computed where the last block could leave it out.
        """
        order = torch.arange(seen.shape[1], device=seen.device)
        age = (order[:, None] - order[None, :]).clamp(0, self.max_history - 1)
        hidden = torch.where(seen, 0.0, _FAR)  # [B, Q, K]
        items = self.dropout(self.norm_in(history_embeddings))
        states = items
        for block in self.blocks[:-1]:
            states = block(states, self.distance_bias[:, age] + hidden[:, None])
        if newest_only:
            age, hidden = age[-1:], hidden[:, -1:]
        states = self.blocks[-1](states, self.distance_bias[:, age] + hidden[:, None])
        recent = (self.recency_bias[age] + hidden).softmax(-1) @ items
        states = self.norm_out(states)
        newest = (states + self.recency(recent))[:, :, None]
        return newest if self.interests == 1 else newest + self._interests(states, hidden, age)

    def _interests(self, states: Tensor, hidden: Tensor, age: Tensor) -> Tensor:
        """Gives ComiRec-SA's interests [B, Q, M, D] of states [B, H, D], hidden [B, Q, K], age [Q, K]."""
        logits = self.interest_query(states).transpose(1, 2)[:, :, None]  # [B, M, 1, K]
        weights = (logits + self.interest_bias[:, age] + hidden[:, None]).softmax(-1)
        return self.interest_out((weights @ states[:, None]).transpose(1, 2))
