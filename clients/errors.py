"""Names what can go wrong with a call to `recommend`: one class for each thing that the caller can do.

PeregrineError
├── InvalidInput
│   └── InvalidArgument   fix the request: "<field>: <rule>"
└── CallError             the request was fine; `status` has the gRPC code
    ├── Overloaded        ask again later, or show something else
    ├── BudgetExceeded    the time budget is over; the server may still be at it
    ├── Unavailable       nobody there who can answer: wait for the server, or start it
    └── ServerFault       a bug or a broken server: its log has the details

Triton's texts carry prefixes of its own, shared-memory keys, paths and tracebacks; none leaves this module.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ensemble.errors import InvalidArgument, PeregrineError

__all__ = [
    "BudgetExceeded",
    "CallError",
    "InvalidArgument",
    "Overloaded",
    "ServerFault",
    "Unavailable",
    "error_from_status",
]


class CallError(PeregrineError):
    """Says why a call was not answered. `retryable`: the same request, sent again, may well succeed, after
    `retry_after_s` seconds; `request_id`: what the server's log calls it."""

    def __init__(
        self, message: str, status: str = "", retryable: bool = False, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retryable = retryable
        self.retry_after_s = retry_after_s
        self.request_id = ""


class Overloaded(CallError):
    """Says that the server, or this client, has more to do than it can."""


class BudgetExceeded(CallError):
    """Says that no answer came within budget_ms."""


class Unavailable(CallError):
    """Says that there is no server, no such model, or a dead step."""


class ServerFault(CallError):
    """Says that the server failed in a way that no request should be able to cause."""

    def __str__(self) -> str:
        return f"{super().__str__()} (request {self.request_id})" if self.request_id else super().__str__()


_PREFIX = re.compile(
    r"^(?:\[request id: [^\]]*\] *|in ensemble '[^']*', *|[Ee]xecution of model '[^']*' failed: *)+"
)
_SECRETS = re.compile(r"'[^']*(?:shm|/)[^']*'|/[\w./+-]{2,}|\b(?:\w*shm_\w+|0x[0-9a-fA-F]+)\b")
_BATCH = re.compile(r"batch-size must be <= (\d+)")
_MAX_TEXT = 300
# Triton (2.51) says it to all requests of a batch; ours are well formed
_MATES_FAULT = "incomplete string data"
# What gRPC says where the two ends do not agree on TLS, and what that means
_HANDSHAKES = {
    "http1.x server": "it wants TLS: name its authority (`tls`, in the command line --ca)",
    "WRONG_VERSION_NUMBER": "it speaks in clear: leave `tls` (--ca, --certificate, --key) out",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not of the authority that was named (`tls.ca`, --ca)",
    "Hostname Verification": "its certificate is of another name (`tls.server_name`, --server-name)",
    "Failed to create security handshaker": "key and certificate do not belong together (--key, "
    "--certificate)",
}


class _Kind(NamedTuple):
    """Holds one thing that can go wrong: what it is known by, and how we say it."""

    status: str  # gRPC's name of the code; empty: any
    text: str  # what Triton's text, or gRPC's, has: a regular expression
    error: type[CallError]
    says: str  # of {server}, {theirs}, their text without secrets, and {status}
    retryable: bool = False


_OVERLOADED = "{server} is overloaded: {theirs}"
_LATE = "budget_ms: {server} gave up within the request's own timeout"
_NO_SEARCH = (
    "{server} has no search: its release encodes no texts or pictures, or it is draining; "
    "give a feature of its items an `encoder` in shop.toml and build again"
)
_NOT_LET_IN = (
    "{server} does not let this client in: {theirs}; give it another certificate (`tls`, in the command line "
    "--certificate and --key)"
)
_KINDS = (  # the first that fits is taken
    _Kind(
        "INVALID_ARGUMENT",
        _MATES_FAULT,
        Unavailable,
        "{server} met this request together with another caller's, whose ids were cut short; send it again",
        True,
    ),
    _Kind("RESOURCE_EXHAUSTED", "", Overloaded, _OVERLOADED),
    _Kind("", "Exceeds maximum queue size|memory pool size", Overloaded, _OVERLOADED),
    _Kind("DEADLINE_EXCEEDED", "", BudgetExceeded, _LATE),
    _Kind("", "Request timeout expired", BudgetExceeded, _LATE),
    _Kind(
        "",
        "This protocol is restricted",
        Unavailable,
        "{server} keeps this call to its operator; pass the header that `peregrine serve` wrote into "
        "server.json in its state folder",
    ),
    # another server may not be draining
    _Kind("", "(?s)'search'.*has no available versions", Unavailable, _NO_SEARCH, True),
    _Kind("NOT_FOUND", "'search'", Unavailable, _NO_SEARCH),
    _Kind("UNAUTHENTICATED", "", Unavailable, _NOT_LET_IN),
    _Kind("PERMISSION_DENIED", "", Unavailable, _NOT_LET_IN),
    _Kind("UNIMPLEMENTED", "", Unavailable, "{server} does not offer this call: {theirs}"),
    *(
        _Kind("UNAVAILABLE", re.escape(theirs), Unavailable, f"{{server}}: {ours}")
        for theirs, ours in _HANDSHAKES.items()
    ),
    _Kind(
        "UNAVAILABLE",
        "",
        Unavailable,
        "{server} is not available: {theirs}; is `peregrine serve` running?",
        True,
    ),
    # a call whose answer had begun: nginx cannot ask another replica then, the caller can
    _Kind(
        "",
        "RST_STREAM|Stream removed",
        Unavailable,
        "{server} broke the answer off ({status}), as when it is killed; ask again",
        True,
    ),
    _Kind(
        "",
        "(?s)Stub process.*is not healthy",
        Unavailable,
        "{server}: a step's process died; restart the server if this goes on",
        True,
    ),
    # at SIGTERM `peregrine serve` takes the alias away first
    _Kind(
        "",
        "has no available versions",
        Unavailable,
        "{server} is draining or has no active release; ask another one",
        True,
    ),
    _Kind(
        "NOT_FOUND",
        "",
        Unavailable,
        "{server}: {theirs}; activate a release with `peregrine release activate`",
    ),
    _Kind("", "", ServerFault, "{server} failed ({status}): {theirs}; its log has the details"),
)


def stripped(text: str) -> str:
    """Gives the part of Triton's text that says what is wrong, without prefixes and further lines
    (tracebacks)."""
    lines = text.strip().splitlines()
    return _PREFIX.sub("", lines[0] if lines else "")[:_MAX_TEXT]


def scrubbed(text: str) -> str:
    """Gives `stripped` text with shared-memory keys, paths and addresses replaced by …"""
    return _SECRETS.sub("…", stripped(text))


def error_from_status(status: str, text: str, target: str, retry_after_s: float = 0.0) -> PeregrineError:
    """Makes the exception for a failed call; `status` is gRPC's name of the code, `target` the server's
    address, `retry_after_s` what it says of when to ask again."""
    error = _error(status, text, target)
    if isinstance(error, CallError):
        error.retry_after_s = retry_after_s
    return error


def _error(status: str, text: str, target: str) -> PeregrineError:
    """Chooses the exception and says it in our words."""
    if status == "INVALID_ARGUMENT" and _MATES_FAULT not in text:
        return _invalid_argument(text)
    kind = next(kind for kind in _KINDS if kind.status in ("", status) and re.search(kind.text, text))
    said = kind.says.format(server=f"server {target}", theirs=scrubbed(text), status=status)
    return kind.error(said, status, kind.retryable)


def _invalid_argument(text: str) -> InvalidArgument:
    limit = _BATCH.search(text)
    if limit:
        return InvalidArgument(f"user_id: at most {limit[1]} users in one request; send several requests")
    return InvalidArgument(scrubbed(text))
