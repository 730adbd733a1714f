"""Says which GPUs a server uses, and which of them a process of it sees: CUDA's own variable hides the rest.

The instances of a step take the cards by turns. A process sees its own card alone, as number 0: so engines,
the index and the plans' keys, which name a card's kind, need not know of the others. Where the index is cut
into shards, a process sees the other cards too, behind its own.
"""

from __future__ import annotations

import os
import re

from ensemble.engines import SHARDS_VARIABLE
from ensemble.engines.cuda import num_gpus
from ensemble.errors import InvalidInput, ReleaseError

VISIBLE = "CUDA_VISIBLE_DEVICES"
SHOWN_VARIABLE = "PEREGRINE_GPUS"  # the cards that the server was told to use; absent: what CUDA shows


def cards_from_text(text: str) -> tuple[int, ...]:
    """Reads `0,2`; InvalidInput if that is not a list of different card numbers."""
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() for number in numbers) or len(set(numbers)) != len(numbers):
        raise InvalidInput(
            f"--gpus {text}: is no list of different GPUs", "number them as nvidia-smi does: --gpus 0,1"
        )
    return tuple(map(int, numbers))


def show_cards(cards: tuple[int, ...]) -> None:
    """Lets this process, and those that it starts, see these GPUs alone, in this order; InvalidInput if one
    is not there, or the driver is not. Cards are counted among those that CUDA's variable shows already."""
    if SHOWN_VARIABLE in os.environ:  # a server of this process has said it, and CUDA reads it once
        if os.environ[SHOWN_VARIABLE] != _text(cards):
            raise InvalidInput(
                f"--gpus {_text(cards)}: this process uses {os.environ[SHOWN_VARIABLE]}",
                "start the server in a process of its own",
            )
        return
    shown = visible(cards, os.environ.get(VISIBLE))
    try:
        count = num_gpus()
    except ReleaseError as error:
        raise InvalidInput(f"--gpus: {error.fact}", "leave it out to serve on the CPU") from None
    if missing := [card for card in cards if card >= count]:
        raise InvalidInput(f"--gpus: there is no GPU {missing[0]}", f"this machine has {count}, from 0 on")
    os.environ[VISIBLE], os.environ[SHOWN_VARIABLE] = shown, _text(cards)


def _text(cards: tuple[int, ...]) -> str:
    return ",".join(map(str, cards))


def visible(cards: tuple[int, ...], already: str | None) -> str:
    """Gives CUDA's variable for these cards, counted among those that `already` shows: of `4,7` card 1 is
    7."""
    there = None if already is None else [name.strip() for name in already.split(",")]
    return ",".join(str(card) if there is None or card >= len(there) else there[card] for card in cards)


def take_card(instance: str) -> None:
    """Lets this process, which is the instance named `…_0_3`, see its own card first: alone, or with the
    others behind it where the index is in shards. Before CUDA is started."""
    count = len(os.environ.get(SHOWN_VARIABLE, "0").split(","))
    if count == 1:
        return
    cards = os.environ[VISIBLE].split(",")
    match = re.search(r"_(\d+)$", instance)
    own = int(match.group(1)) % count if match else 0
    rotated = [*cards[own:], *cards[:own]]
    is_cut = int(os.environ.get(SHARDS_VARIABLE, "1")) > 1
    os.environ[VISIBLE] = ",".join(rotated if is_cut else rotated[:1])
