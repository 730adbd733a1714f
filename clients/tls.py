"""Opens the way to a server: in clear on a machine or in a cluster, by TLS to a gateway.

The files are read when a client is made; certificates that were renewed need another client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.errors import InvalidArgument

# For three round trips and two signatures; in clear, on the same site, a tenth of a second does
_CONNECT_MS = 2000


@dataclass(frozen=True)
class Tls:
    """Names the files of a client: who signs servers, and its own certificate with its key.

    ca           certificates of the authorities that sign servers; None: those that gRPC brings
    certificate  of this client, for a gateway that lets in only those whom it knows; with `key`
    server_name  what the server's certificate says, where that is not the host of the url
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            missing, there = ("key", "certificate") if self.key is None else ("certificate", "key")
            raise InvalidArgument(f"{missing}: is needed together with the {there}")


def open_channel(url: str, tls: Tls | None, options: Sequence[tuple[str, Any]]) -> Any:
    """Opens a gRPC channel; InvalidArgument names a file that cannot be read, or holds something else."""
    import grpc

    if tls is None:
        return grpc.insecure_channel(url, options=options)
    credentials = grpc.ssl_channel_credentials(
        _read("ca", tls.ca, "CERTIFICATE"),
        _read("key", tls.key, "PRIVATE KEY"),
        _read("certificate", tls.certificate, "CERTIFICATE"),
    )
    # gRPC's least pause is also how long a connection may take to be made; of two the first would hold
    settings = dict(options) | {"grpc.min_reconnect_backoff_ms": _CONNECT_MS}
    settings["grpc.enable_retries"] = 1  # of calls that a gateway never took, since it ended their connection
    if tls.server_name:
        settings["grpc.ssl_target_name_override"] = tls.server_name
    return grpc.secure_channel(url, credentials, options=list(settings.items()))


def _read(field: str, path: str | Path | None, kind: str) -> bytes | None:
    """Reads a PEM file; gRPC itself says of a wrong one only that nobody can be reached."""
    if path is None:
        return None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{field}: {path} cannot be read: {error.strerror}") from None
    if f"{kind}-----".encode() not in content:
        raise InvalidArgument(f"{field}: {path} holds no {kind.lower()} in PEM form")
    return content
