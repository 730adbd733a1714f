"""Runs one training of the ranker: feeds, epochs, early stop. What is trained on is train_ranker's affair."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from builders.data.dataset import Dataset, cell_windows, history_windows
from builders.data.rates import rates_of
from builders.events import EventRows
from builders.layers import narrow_products
from builders.progress import Progress, Watch, unwatched
from builders.ranker.checkpoint import RankerCheckpoint
from builders.ranker.config import RankerTraining, num_batches_of
from builders.ranker.lists import Lists
from builders.ranker.loss import Loss
from builders.ranker.model import CalibratedRanker, ItemFeatures, Ranker
from builders.ranker.positions import PositionBias, place_facts
from ensemble.activity import context_columns
from ensemble.arrays import Array

_HEAD_CHUNK = 65_536  # items the head computes at once


class RankerTrainer:
    """Holds the model, the item head, both tables of rows, the frozen tensors they read, optimizers."""

    def __init__(
        self,
        dataset: Dataset,
        item_embeddings: Array,
        model: CalibratedRanker,
        config: RankerTraining,
        rng: np.random.Generator,
        progress: Progress,
        watch: Watch = unwatched,
    ):
        self.dataset, self.model, self.config = dataset, model, config
        self.rng, self.progress, self.watch = rng, progress, watch
        self.head = ItemFeatures(dataset.schema, config.model)
        self._count_rates()
        self._begin_rows()
        self.embeddings = torch.from_numpy(np.ascontiguousarray(item_embeddings, dtype=np.float32))
        self.item_codes, self.item_values, self.user_codes, self.user_values = (
            torch.from_numpy(of)
            for of in (dataset.item_codes, dataset.item_values, dataset.user_codes, dataset.user_values)
        )
        self.positions = PositionBias(len(dataset.schema.tasks))
        self.events = EventRows(len(dataset.schema.events), dataset.schema.sizes.item_features)
        learned = (self.model, self.head, self.positions, self.events)
        self.trained = nn.ModuleList([*learned, self.item_rows, self.user_rows])
        # encoders were trained on the clicks that label impressions: pairs of embeddings tell them
        trusted = dataset.train_impressions is None
        self.head.embedding_scale.fill_(
            max(float((self.embeddings[1:] ** 2).mean()), 1e-12) ** -0.5 if trusted else 0.0
        )
        self.head.direct.requires_grad_(not trusted)  # it stays 0 where the embeddings say what codes would
        dense = (weight for part in learned for weight in part.parameters())
        self.dense = [weight for weight in dense if weight.requires_grad]
        self.restart(config)

    def _count_rates(self) -> None:
        """Counts the rates as they are when training has ended; there are none without labels."""
        dataset, impressions = self.dataset, self.dataset.train_impressions
        self.rates = None if impressions is None else rates_of(dataset, impressions, self.config.rate_age)
        self.static_rates = torch.zeros(dataset.num_items + 1, dataset.schema.sizes.item_rates)
        if self.rates is not None:
            self.static_rates = torch.from_numpy(self.rates.items)
            self.head.code_rates.copy_(torch.from_numpy(self.rates.codes))

    def _begin_rows(self) -> None:
        """Draws the rows of single items and users. Those that no training step reads say nothing, and are
        served as row 0."""
        items, users = self.dataset.num_items + 1, self.dataset.num_users + 1
        self.item_rows = nn.Embedding(items, self.head.width, sparse=True)
        self.user_rows = nn.Embedding(users, self.dataset.schema.sizes.user_features, sparse=True)
        for table in (self.item_rows, self.user_rows):
            nn.init.normal_(table.weight, std=self.config.row_scale)
            table.weight.data[0] = 0
        self.read_items = torch.zeros(items, dtype=torch.bool)
        self.read_users = torch.zeros(users, dtype=torch.bool)

    def restart(self, config: RankerTraining) -> None:
        """Begins a training under `config` from the weights that are there."""
        self.config, dense = config, self.dense
        self.mean = RunningMean(dense)
        # biases, and how far a task goes along with its rates, are not pulled to 0
        decays = [weight for weight in dense if weight.dim() > 1]
        stays = [weight for weight in dense if weight.dim() <= 1]
        groups = [
            {"params": decays, "weight_decay": config.weight_decay},
            {"params": stays, "weight_decay": 0.0},
        ]
        self.optimizers = (
            torch.optim.AdamW(groups, lr=config.learning_rate),
            torch.optim.SparseAdam([self.item_rows.weight, self.user_rows.weight], lr=config.row_rate),
        )

    @property
    def apart(self) -> bool:
        """Says whether the module is a user's own. It takes one user_state a list, which so must be of one
        moment, and it gives probabilities, which in 16 bits are soon exactly 1, whose log odds no loss
        bears."""
        return not isinstance(self.model, Ranker)

    def tensors(self, lists: Lists) -> tuple[tuple[Tensor, ...], Tensor]:
        """Gives the ranker's tensors for some lists, and the mean square of the id rows that they read."""
        c, training = self.config, self.trained.training
        schema = self.dataset.schema
        asked = self.dataset, lists.user_rows, lists.history_ends, schema.sizes.history
        windows = torch.from_numpy(history_windows(self.dataset.histories, *asked[1:]))
        users, items = torch.from_numpy(lists.user_rows), torch.from_numpy(lists.item_rows).clamp(min=0)
        if training:
            self.read_users[users] = True
        mask = windows > 0
        if training and c.history_dropout:
            mask[:, :-1] &= torch.rand(mask[:, :-1].shape) >= c.history_dropout
        (history, candidates), square = self._item_features(windows.clamp(min=0), items)
        history = history + self.events(torch.from_numpy(cell_windows(*asked)))
        known = users if not training else users * (torch.rand(users.shape) >= c.id_dropout)
        user_features = self.user_rows(known) * (known > 0).unsqueeze(-1)
        scores = torch.from_numpy(lists.scores)
        if training and c.score_dropout:
            scores = scores * (torch.rand(*scores.shape[:2], 1) >= c.score_dropout)
        user_state, candidate_state = (
            torch.from_numpy(one.astype(np.float32)) for one in (lists.user_state, lists.candidate_state)
        )
        if training and c.context_dropout and schema.context:
            told = context_columns(schema)
            user_state[..., told] *= torch.rand(*user_state.shape[:-1], 1) >= c.context_dropout
        if lists.item_rates is not None:
            rates = torch.from_numpy(lists.item_rates.astype(np.float32))
            candidates = torch.cat([candidates[..., : self.head.width], rates], -1)
        user = (self.user_codes[users], self.user_values[users], user_features, user_state)
        tensors = (
            *(history * mask.unsqueeze(-1), mask, *user),
            candidates * (items > 0).unsqueeze(-1),
            candidate_state.expand(*items.shape, -1),
            scores,
        )
        return tensors, square + user_features.square().mean()

    def _item_features(self, *rows: Tensor) -> tuple[list[Tensor], Tensor]:
        """Runs the head once per distinct item: features [L, …, F], and the mean square of the id rows."""
        distinct, place = torch.unique(torch.cat([part.flatten() for part in rows]), return_inverse=True)
        known = distinct
        if self.trained.training:
            self.read_items[distinct] = True
            known = distinct * (torch.rand(distinct.shape) >= self.config.id_dropout)
        id_rows = self.item_rows(known)
        whole = torch.cat([id_rows, self.static_rates[known]], -1)
        features = self.head(
            whole, self.item_codes[distinct], self.item_values[distinct], self.embeddings[distinct]
        )
        places = place.split([part.numel() for part in rows])
        return [
            functional.embedding(at.view(part.shape), features) for at, part in zip(places, rows, strict=True)
        ], id_rows.square().mean()

    def forget_unread(self) -> None:
        """Gives items and users that no training step has read the row of an unknown one, in place: so a new
        item of the catalogue is served as one that is added live."""
        for table, read in ((self.item_rows, self.read_items), (self.user_rows, self.read_users)):
            table.weight.data[~read] = 0

    def item_id_features(self) -> Array:
        """Gives every item's id row [I + 1, F] float32 as the head reads it: what was learned, and its
        rates."""
        return torch.cat([self.item_rows.weight.detach(), self.static_rates], -1).numpy()

    def user_rates(self) -> Array:
        """Gives the users' rates [U + 1, Q] float32 when training has ended; row 0 (unknown) is 0."""
        if self.rates is None:
            return np.zeros((self.dataset.num_users + 1, 0), np.float32)
        return self.rates.users

    def item_features(self) -> Array:
        """Gives the head's output for every item [I + 1, F] float32; row 0 is 0."""
        self.trained.eval()
        id_rows = torch.from_numpy(self.item_id_features())
        out = np.zeros(id_rows.shape, np.float32)
        with torch.no_grad():
            for start in range(0, len(out), _HEAD_CHUNK):
                part = slice(start, start + _HEAD_CHUNK)
                out[part] = self.head(
                    id_rows[part],
                    self.item_codes[part],
                    self.item_values[part],
                    self.embeddings[part],
                ).numpy()
        out[0] = 0
        return out

    def user_features(self) -> Array:
        """Gives the users' rows [U + 1, U'] float32; row 0 (unknown) is 0."""
        rows = self.user_rows.weight.detach().numpy().copy()
        rows[0] = 0
        return rows

    def logits(self, lists: Lists, chunk: int = 8192, *, with_positions: bool = False) -> Array:
        """Gives logits [L, N, T] float32 of all lists, in eval mode; `chunk` candidates at a time. They are
        those that are served, which know no places, unless `with_positions`."""
        self.trained.eval()
        step = max(1, chunk // max(1, lists.item_rows.shape[1]))
        out = np.zeros(lists.labels.shape, np.float32)
        with torch.no_grad():
            for start in range(0, len(lists), step):
                part = np.arange(start, min(start + step, len(lists)))
                batch = lists.take(part)
                logits = self.model.logits(*self.tensors(batch)[0])
                out[part] = (self.in_place(logits, batch) if with_positions else logits).numpy()
        return out

    def in_place(self, logits: Tensor, lists: Lists) -> Tensor:
        """Adds to logits [L, N, T] what the places of the lists do, some of them hidden in training."""
        if lists.places is None:
            return logits
        places = torch.from_numpy(lists.places)
        if self.trained.training and self.config.position_dropout:
            places = places * (torch.rand(places.shape) >= self.config.position_dropout)
        facts = place_facts(self.dataset.schema, lists.user_state, lists.candidate_state)
        facts = np.broadcast_to(facts, (*lists.places.shape, facts.shape[-1]))
        return logits + self.positions(places, torch.from_numpy(facts.copy()))

    def epoch(self, lists: Lists, loss_function: Loss, epoch: float) -> float:
        """Passes once over the lists in random order, and gives the mean loss; `epoch` is the place in the
        schedule, from 0."""
        self.trained.train()
        total = 0.0
        order = self.rng.permutation(len(lists))
        num_batches = num_batches_of(lists.item_rows.size, self.config.batch)
        for step, part in enumerate(np.array_split(order, num_batches)):
            self._set_rates(1 - (epoch + step / num_batches) / self.config.epochs)
            batch = lists.take(part)
            tensors, square = self.tensors(batch)
            with narrow_products(self.config.bf16 and not self.apart):
                logits = self.model.logits(*tensors)
            loss = (
                loss_function(self.in_place(logits.float(), batch), torch.from_numpy(batch.labels))
                + self.config.row_decay * square
            )
            self.trained.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.mean.update(self.config.average)
            total += float(loss.detach())
        return total / num_batches

    def _set_rates(self, share: float) -> None:
        """Sets learning rates to `share` of their start."""
        for optimizer, rate in zip(
            self.optimizers, (self.config.learning_rate, self.config.row_rate), strict=True
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate * share

    def passes(self, lists: Lists, loss_function: Loss, judge: Callable[[], float]) -> float:
        """Trains over the lists for all epochs; gives the best that judge() said on the way."""
        figures = []
        for epoch in range(int(self.config.epochs)):
            self.epoch(lists, loss_function, epoch)
            self.mean.exchange()
            figures.append(judge())
            self.mean.exchange()
        return min(figures)

    def fit(
        self, draw: Callable[[], Lists], loss_function: Loss, judge: Callable[[], float]
    ) -> tuple[int, list[dict[str, float]]]:
        """Trains over draw() until judge() (less is better) stalls; keeps the best state. Gives the epoch
        that was kept, and what each one had: loss and validation; of epoch 0, before training, the latter."""
        best, best_state, waited, epoch = judge(), copy.deepcopy(self.trained.state_dict()), 0, 0
        kept, curve = 0, [{"epoch": 0, "validation": best}]
        self.progress(0.0, f"ranker: before training, validation {best:.5f}")
        while epoch < self.config.epochs and waited < self.config.patience:
            loss = self.epoch(draw(), loss_function, epoch)
            self.mean.exchange()
            figure, epoch, waited = judge(), epoch + 1, waited + 1
            curve.append({"epoch": epoch, "loss": loss, "validation": figure})
            self.watch(epoch, -figure)
            text = f"ranker: epoch {epoch}, loss {loss:.5f}, validation {figure:.5f}"
            self.progress(epoch / self.config.epochs, text)
            if figure < best:
                best, best_state, waited, kept = figure, copy.deepcopy(self.trained.state_dict()), 0, epoch
            self.mean.exchange()
        self.trained.load_state_dict(best_state)
        return kept, curve

    def fit_shorter(
        self, draw: Callable[[], Lists], loss_function: Loss, judge: Callable[[], float]
    ) -> tuple[int, list[dict[str, float]], list[dict[str, float]]]:
        """Does fit(), and where it stalls in the first half of its epochs begins again from the same weights,
        with rates that fall to 0 over those that were kept, one at least: cut off, a schedule has learned at
        high rates to its end. The better training stays; gives the longer ones beside it, a line each."""
        start, longer = copy.deepcopy(self.trained.state_dict()), list[dict[str, float]]()
        kept, curve = self.fit(draw, loss_function, judge)
        while kept <= self.config.epochs / 2 and self.config.epochs > 1:
            best, state, config = (
                curve[kept]["validation"],
                copy.deepcopy(self.trained.state_dict()),
                self.config,
            )
            self.trained.load_state_dict(start)
            self.restart(replace(config, epochs=max(1, kept)))
            again, shorter = self.fit(draw, loss_function, judge)
            if shorter[again]["validation"] >= best:
                self.trained.load_state_dict(state)
                break
            longer.append({"epochs": config.epochs, "kept": kept, "validation": best})
            kept, curve = again, shorter
        return kept, curve, longer

    def start_from(self, verified: RankerCheckpoint) -> None:
        """Takes over what was trained beside the model that it was given; rates stay those of the dataset at
        hand."""
        code_rates = self.head.code_rates.clone()
        self.head.load_state_dict(verified.item_head.state_dict())
        self.head.code_rates.copy_(code_rates)
        self.events.load_state_dict(verified.events.state_dict())
        for table, rows, read in (
            (self.item_rows, verified.item_id_features[:, : self.head.width], self.read_items),
            (self.user_rows, verified.user_features, self.read_users),
        ):
            table.weight.data.copy_(torch.from_numpy(np.ascontiguousarray(rows)))
            read |= table.weight.data.ne(0).any(1)
        self.mean = RunningMean(self.mean.weights)

    def go_on(self, lists: Lists, loss_function: Loss, epochs: int, share: float) -> None:
        """Trains for so many more epochs, which are the last `share` of a schedule; nobody judges."""
        total = epochs / share
        self.config = replace(self.config, epochs=total)
        for epoch in range(epochs):
            self.progress(epoch / epochs, f"ranker: refit, epoch {epoch + 1}")
            self.epoch(lists, loss_function, total - epochs + epoch)
        if epochs:
            self.mean.exchange()


class RunningMean:
    """Averages the dense weights over the steps (Polyak): the mean has less of the last batches' noise."""

    def __init__(self, weights: list[nn.Parameter]):
        self.weights, self.mean, self.steps = weights, [weight.detach().clone() for weight in weights], 0

    def update(self, keep: float) -> None:
        """Takes in a step; the mean of the first is short, so that it does not hold the untrained weights."""
        self.steps += 1
        torch._foreach_lerp_(
            self.mean,
            [weight.detach() for weight in self.weights],
            1 - min(keep, self.steps / (self.steps + 9)),
        )

    def exchange(self) -> None:
        """Puts the mean in the place of the weights, and back."""
        for place, weight in enumerate(self.weights):
            weight.data, self.mean[place] = self.mean[place], weight.data
