"""Claims a server's state folder, and lists the servers at work on a repository for the release commands.

<state>/server.json     how the server is reached; locked while the process lives
<list>/<digest>         a link to it, in each list that can be written: the user's, and the home's
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ensemble.engines import ONNXRUNTIME
from ensemble.errors import ServerError
from ensemble.release.files import is_locked, try_flock
from ensemble.server.state import make_private, user_lists

CLAIM = "server.json"
LIST = ".servers"  # in a home: the folder of route and catalogue log
_TRIES = 10


@dataclass(frozen=True)
class RunningServer:
    """Describes a server at work on a repository; `header` and `secret` open its control calls."""

    pid: int  # of the process that supervises it
    url: str
    metrics_url: str | None
    header: str
    secret: str = dataclasses.field(repr=False)
    state: str = ""  # its folder, with the mount
    home: str = ""  # the folder of route and catalogue log
    engine: str = ONNXRUNTIME  # what the Python engine steps run on
    has_plans: bool = False  # Triton's own backend runs plans
    instances: int | None = None  # of each step, where that is not the release's affair
    num_gpus: int = 1  # that its engines are on
    node: dict[str, str] | None = None  # engines.plans.Node, where plans run
    takes_portable: bool = False  # plans of other GPUs and versions, which need a flag of Triton
    require: str | None = None  # what `serve --require` asked for
    has_redis: bool = False
    is_fused: bool = False  # all steps of a release in one process
    is_stopping: bool = False  # it answers what is in flight, and ends

    @property
    def headers(self) -> dict[str, str]:
        """Gives the gRPC metadata that control and statistics calls need."""
        return {self.header: self.secret}


class Claim:
    """Claims a state folder for one server: holds the file's lock while the process lives, so that a killed
    one leaves no claim behind."""

    def __init__(self, state: Path, repository: Path, home: Path | None = None) -> None:
        make_private(state)
        self.path, self._repository, self._home = state / CLAIM, repository, home or repository
        self._links: list[Path] = []
        self._server: RunningServer | None = None
        self._descriptor = self._open()

    def _open(self) -> int:
        """Opens and locks the file; ServerError if it cannot be written or another server holds it."""
        while True:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise ServerError(
                    f"cannot write {self.path}: {error.strerror}", "give `peregrine serve` another --state"
                ) from error
            if not _try_often(descriptor):
                text = os.pread(descriptor, 65536, 0)
                os.close(descriptor)
                at = f" by process {json.loads(text)['pid']} at {json.loads(text)['url']}" if text else ""
                raise ServerError(
                    f"{self._repository} is served already{at}",
                    f"stop that server, or give this one another --state than {self.path.parent}",
                )
            if self.path.exists() and os.path.samestat(os.fstat(descriptor), self.path.stat()):
                return descriptor
            os.close(descriptor)  # its former owner removed it between our open and our lock

    def write(self, server: RunningServer) -> None:
        """Writes how the server is reached, and lists it."""
        self._server = server
        self._put(server)
        name = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]
        for folder in user_lists(self._repository):
            self._list(folder / name, make_private)
        with contextlib.suppress(OSError):  # a read-only home: our user finds us all the same
            self._list(self._home / LIST / name, lambda folder: folder.mkdir(exist_ok=True))

    def _put(self, server: RunningServer) -> None:
        """Writes the claim's text."""
        text = json.dumps(dataclasses.asdict(server)).encode()
        os.pwrite(self._descriptor, text, 0)
        os.ftruncate(self._descriptor, len(text))

    def note_stopping(self) -> None:
        """Says in the claim that the server is about to end, so that the next one waits for it."""
        if self._server is not None:
            with contextlib.suppress(OSError):
                self._put(dataclasses.replace(self._server, is_stopping=True))

    def _list(self, link: Path, make: Callable[[Path], None]) -> None:
        """Links to the claim, in the place of a server that was killed."""
        staged = link.with_name(f".{link.name}.{os.getpid()}")
        while True:
            make(link.parent)
            with contextlib.suppress(FileNotFoundError):  # a server that ends removed the empty folder
                staged.symlink_to(self.path)
                staged.rename(link)
                self._links.append(link)
                return

    def drop(self) -> None:
        """Gives the state folder free."""
        for path in (*self._links, self.path):
            with contextlib.suppress(OSError):
                path.unlink()
        for folder in (*(link.parent for link in self._links), self.path.parent):
            with contextlib.suppress(OSError):
                folder.rmdir()  # if it is empty
        os.close(self._descriptor)


def _try_often(descriptor: int) -> bool:
    """Takes the lock, which a command that looks for servers may hold for a moment."""
    for _ in range(_TRIES):
        if try_flock(descriptor):
            return True
        time.sleep(0.01)
    return False


def running_servers(repository: Path, home: Path | None = None) -> list[RunningServer]:
    """Gives the servers that serve this repository now and are ours to control, the first that was started
    first; where a home is given, only those that follow it."""
    home = home.resolve() if home else None
    servers = {}
    for link in _links(repository, home):
        server = _read(link)
        if server is not None and home in (None, Path(server.home)):
            servers[server.pid, server.url] = server
    return list(servers.values())


def running_server(repository: Path) -> RunningServer | None:
    """Gives one of the servers at work on a repository, the first that was started; None if there is none."""
    return next(iter(running_servers(repository)), None)


def num_of_others(home: Path) -> int:
    """Counts the servers that are listed in a home and are other users': we cannot control those."""
    count = 0
    for link in _listed(home / LIST):
        try:
            link.stat()
            count += not os.access(link, os.R_OK)
        except PermissionError:
            count += 1
        except OSError:
            continue
    return count


def _links(repository: Path, home: Path | None) -> Iterator[Path]:
    """Finds the claims that are listed, those of a list in their order of age."""
    for folder in (*user_lists(repository), (home or repository) / LIST):
        yield from _listed(folder)


def _listed(folder: Path) -> list[Path]:
    """Lists the links in a folder, the oldest first; none where it cannot be read."""
    try:
        return sorted(folder.glob("[!.]*"), key=lambda link: link.lstat().st_ctime_ns)
    except OSError:
        return []


def _read(link: Path) -> RunningServer | None:
    """Reads a claim; None where it is another user's, or its owner is dead: then the link is removed."""
    try:
        descriptor = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        return None
    except OSError:
        with contextlib.suppress(OSError):
            link.unlink()
        return None
    try:
        if not is_locked(descriptor):
            with contextlib.suppress(OSError):
                link.unlink()
            return None
        text = os.pread(descriptor, 65536, 0)
        return RunningServer(**json.loads(text)) if text else None
    finally:
        os.close(descriptor)
