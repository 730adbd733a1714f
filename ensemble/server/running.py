"""Reads and writes <repository>/.server.json, by which the release commands find the repository's server."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ensemble.engines import ONNXRUNTIME
from ensemble.errors import ServerError
from ensemble.release.files import try_flock

FILE = ".server.json"


@dataclass(frozen=True)
class RunningServer:
    """Describes a server at work on a repository; `header` and `secret` open its control calls."""

    pid: int  # of the process that supervises it
    url: str
    metrics_url: str | None
    header: str
    secret: str = dataclasses.field(repr=False)
    engine: str = ONNXRUNTIME  # what the Python engine steps run on
    overlay: str = ""  # the folder of links that Triton mounts, if it does
    has_plans: bool = False  # Triton's own backend runs plans
    instances: int | None = None  # of each step, where that is not the release's affair
    node: dict[str, str] | None = None  # engines.plans.Node, where plans run
    takes_portable: bool = False  # plans of other GPUs and versions, which need a flag of Triton
    require: str | None = None  # what `serve --require` asked for
    has_redis: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """Gives the gRPC metadata that control and statistics calls need."""
        return {self.header: self.secret}


class Claim:
    """Claims a repository for one server: holds the file's lock while the process lives, so that a killed one
    leaves no claim behind."""

    def __init__(self, repository: Path) -> None:
        self.path = repository / FILE
        self._descriptor = self._open()

    def _open(self) -> int:
        """Opens and locks the file; ServerError if it cannot be written or another server holds it."""
        while True:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise ServerError(
                    f"cannot write {self.path}: {error.strerror}; the repository's owner must start the "
                    "server"
                ) from error
            if not try_flock(descriptor):
                text = os.pread(descriptor, 65536, 0)
                os.close(descriptor)
                at = f" by process {json.loads(text)['pid']} at {json.loads(text)['url']}" if text else ""
                raise ServerError(f"{self.path.parent} is served already{at}; stop that server first")
            if self.path.exists() and os.path.samestat(os.fstat(descriptor), self.path.stat()):
                return descriptor
            os.close(descriptor)  # its former owner removed it between our open and our lock

    def write(self, server: RunningServer) -> None:
        """Writes how the server is reached."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(dataclasses.asdict(server)).encode(), 0)

    def drop(self) -> None:
        """Gives the repository free."""
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


def running_server(repository: Path) -> RunningServer | None:
    """Gives the server that serves this repository now; None if none does, or the file's owner is dead."""
    try:
        descriptor = os.open(repository / FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise ServerError(
            f"{repository / FILE} belongs to another user: only who started the server may control it"
        ) from error
    try:
        text = os.pread(descriptor, 65536, 0)
        return None if try_flock(descriptor) or not text else RunningServer(**json.loads(text))
    finally:
        os.close(descriptor)
