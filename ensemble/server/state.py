"""Finds the folders of one user on one machine: a server's state folder, and the lists of servers.

    $XDG_STATE_HOME/peregrine/<repository>/             a server's state, if `serve --state` names no other
    $XDG_RUNTIME_DIR/peregrine/servers/<repository>/    links to the claims of the servers at work on it

Who has no such folder that can be written to (a service's user) has both in /tmp/peregrine-<uid>.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from ensemble.errors import ServerError


def default_state(repository: Path) -> Path:
    """Names the state folder of the one server that a user runs on a repository."""
    home = os.path.expanduser("~")  # not Path.home(), which raises for a user without one
    for folder in (os.environ.get("XDG_STATE_HOME", ""), os.path.join(home, ".local", "state")):
        if os.path.isabs(folder) and _can_be_written(folder):
            return Path(folder) / "peregrine" / _key(repository)
    return _temporary() / _key(repository)


def user_lists(repository: Path) -> list[Path]:
    """Names the folders where this user's servers of a repository are listed: whoever starts one may have a
    session's folder, and whoever looks for it none."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    bases = [Path(runtime) / "peregrine"] if os.path.isabs(runtime) and _can_be_written(runtime) else []
    return [base / "servers" / _key(repository) for base in (*bases, _temporary())]


def make_private(folder: Path) -> None:
    """Makes a folder that only we may enter; ServerError if it is another user's, or cannot be made."""
    shared = _temporary()  # under a folder where everybody may write: nobody may have made it before us
    ours = [path for path in (*reversed(folder.parents), folder) if path.is_relative_to(shared)]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True) if not ours else None
        for path in ours or [folder]:
            path.mkdir(mode=0o700, exist_ok=True)
            found = path.lstat() if ours else path.stat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise ServerError(f"folder {path} is another user's", "name another with --state")
    except OSError as error:
        raise ServerError(
            f"folder {folder} cannot be made: {error.strerror}", "name another with --state"
        ) from error


def _temporary() -> Path:
    """Names our own folder among everybody's temporary ones."""
    return Path(tempfile.gettempdir()) / f"peregrine-{os.geteuid()}"


def _can_be_written(folder: str) -> bool:
    """Says whether we can write into a folder, or make it."""
    while not os.path.exists(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def _key(repository: Path) -> str:
    """Names a repository by where it really is: its folder's name, and a digest of the path."""
    real = repository.resolve()
    return f"{real.name[:40]}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:12]}"
