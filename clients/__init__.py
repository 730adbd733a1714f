"""Calls a served release over gRPC, and changes what it knows: `from clients import Client`.

    Client, AsyncClient       ask for ranked lists; FakeTransport stands in for the server in your tests
    Tls                       certificates, for a client that asks by way of a gateway
    Recommendations, Item     what comes back; Degraded names what was missing while a list was made
    EventWriter, Event        write what users do into the feature rows in Redis
    ItemClient                adds, changes and removes items while they are served
    PeregrineError            is every error: InvalidArgument, Overloaded, BudgetExceeded, Unavailable and
                              ServerFault

Importing this package loads nothing; a name's module is loaded when the name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clients.aio import AsyncClient
    from clients.client import Client
    from clients.errors import BudgetExceeded, CallError, Overloaded, ServerFault, Unavailable
    from clients.event_checks import Event, ItemUpdate
    from clients.events import EventWriter, Outcome
    from clients.items import Changed, ItemClient
    from clients.results import Item, Recommendations
    from clients.tls import Tls
    from clients.transport import FakeTransport, GrpcTransport
    from ensemble.contract import Degraded
    from ensemble.errors import InvalidArgument, PeregrineError

__all__ = [
    "AsyncClient",
    "BudgetExceeded",
    "CallError",
    "Changed",
    "Client",
    "Degraded",
    "Event",
    "EventWriter",
    "FakeTransport",
    "GrpcTransport",
    "InvalidArgument",
    "Item",
    "ItemClient",
    "ItemUpdate",
    "Outcome",
    "Overloaded",
    "PeregrineError",
    "Recommendations",
    "ServerFault",
    "Tls",
    "Unavailable",
]

_MODULES = {  # where each name lives, for those who run this; the block above says it to type checkers
    "clients.aio": ("AsyncClient",),
    "clients.client": ("Client",),
    "clients.errors": ("BudgetExceeded", "CallError", "Overloaded", "ServerFault", "Unavailable"),
    "clients.event_checks": ("Event", "ItemUpdate"),
    "clients.events": ("EventWriter", "Outcome"),
    "clients.items": ("Changed", "ItemClient"),
    "clients.results": ("Item", "Recommendations"),
    "clients.tls": ("Tls",),
    "clients.transport": ("FakeTransport", "GrpcTransport"),
    "ensemble.contract": ("Degraded",),
    "ensemble.errors": ("InvalidArgument", "PeregrineError"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # else a type checker would take any name for one that is here

    def __getattr__(name: str) -> Any:
        """Loads the module that `name` lives in, and keeps the name here for the next time."""
        import importlib

        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no name {name!r}; it has: {', '.join(__all__)}")
        value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return value


def __dir__() -> list[str]:
    """Lists the public names, those that are not loaded yet included."""
    return sorted({*globals(), *__all__})
