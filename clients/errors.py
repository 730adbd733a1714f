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
# What gRPC says where the two ends do not agree on TLS, and what that means
_HANDSHAKES = {
    "http1.x server": "it wants TLS: name its authority (`tls`, in the command line --ca)",
    "WRONG_VERSION_NUMBER": "it speaks in clear: leave `tls` (--ca, --certificate, --key) out",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not of the authority that was named (`tls.ca`, --ca)",
    "Hostname Verification": "its certificate is of another name (`tls.server_name`, --server-name)",
    "Failed to create security handshaker": "key and certificate do not belong together (--key, "
    "--certificate)",
}
# Triton (2.51) says it to all requests of a batch; ours are well formed
_MATES_FAULT = "incomplete string data"
# gRPC says it of a call whose answer had begun: nginx cannot ask another replica then, the caller can
_BROKEN_OFF = ("RST_STREAM", "Stream removed")


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
    if status == "INVALID_ARGUMENT":
        if _MATES_FAULT in text:
            return Unavailable(
                f"server {target} met this request together with another caller's, whose ids were cut short; "
                "send it again",
                status,
                retryable=True,
            )
        return _invalid_argument(text)
    if status == "RESOURCE_EXHAUSTED" or "Exceeds maximum queue size" in text or "memory pool size" in text:
        return Overloaded(f"server {target} is overloaded: {scrubbed(text)}", status)
    if status == "DEADLINE_EXCEEDED" or "Request timeout expired" in text:
        return BudgetExceeded(f"budget_ms: server {target} gave up within the request's own timeout", status)
    if "This protocol is restricted" in text:
        return Unavailable(
            f"server {target} keeps this call to its operator; pass the header that `peregrine serve` wrote "
            "into server.json in its state folder",
            status,
        )
    if "'search'" in text and ("has no available versions" in text or status == "NOT_FOUND"):
        return Unavailable(
            f"server {target} has no search: its release encodes no texts or pictures, or it is draining; "
            "give a feature of its items an `encoder` in shop.toml and build again",
            status,
            retryable="has no available versions" in text,  # another server may not be draining
        )
    if status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return Unavailable(
            f"server {target} does not let this client in: {scrubbed(text)}; give it another certificate "
            "(`tls`, in the command line --certificate and --key)",
            status,
        )
    if status == "UNIMPLEMENTED":
        return Unavailable(f"server {target} does not offer this call: {scrubbed(text)}", status)
    reason = next((ours for theirs, ours in _HANDSHAKES.items() if theirs in text), "")
    if status == "UNAVAILABLE" and reason:
        return Unavailable(f"server {target}: {reason}", status)
    if status == "UNAVAILABLE":
        return Unavailable(
            f"server {target} is not available: {scrubbed(text)}; is `peregrine serve` running?",
            status,
            retryable=True,
        )
    if any(words in text for words in _BROKEN_OFF):
        return Unavailable(
            f"server {target} broke the answer off ({status}), as when it is killed; ask again",
            status,
            retryable=True,
        )
    if "Stub process" in text and "is not healthy" in text:
        return Unavailable(
            f"server {target}: a step's process died; restart the server if this goes on",
            status,
            retryable=True,
        )
    if "has no available versions" in text:  # at SIGTERM `peregrine serve` takes the alias away first
        return Unavailable(
            f"server {target} is draining or has no active release; ask another one", status, retryable=True
        )
    if status == "NOT_FOUND":
        return Unavailable(
            f"server {target}: {scrubbed(text)}; activate a release with `peregrine release activate`", status
        )
    return ServerFault(
        f"server {target} failed ({status}): {scrubbed(text)}; its log has the details", status
    )


def _invalid_argument(text: str) -> InvalidArgument:
    limit = _BATCH.search(text)
    if limit:
        return InvalidArgument(f"user_id: at most {limit[1]} users in one request; send several requests")
    return InvalidArgument(scrubbed(text))
