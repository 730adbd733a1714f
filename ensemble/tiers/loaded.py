"""Says whether Redis has a release's rows, for whoever is about to let servers answer with it."""

from __future__ import annotations

import json

from ensemble.errors import ServerError
from ensemble.release.release import Release
from ensemble.tiers.connection import connect_now, reason
from ensemble.tiers.records import meta_key, row_format, shop_key
from ensemble.tiers.settings import hidden

_PATIENCE_S = 2.0


def rows_missing(release: Release, url: str) -> str:
    """Says that Redis has no rows of a release, or those of another that had its name, with the command that
    loads them; that Redis cannot tell; or "" where it has them."""
    import redis

    try:
        client = connect_now(url, _PATIENCE_S)
        version = client.hget(shop_key(release.schema.shop), release.name)
        meta = client.get(meta_key(version)) if version else None
    except ServerError as error:
        return f"{error.fact}: whether it has the rows of release {release.name} is not known"
    except (redis.exceptions.RedisError, OSError) as error:
        what = f"Redis at {hidden(url)}: {reason(error)}"
        return f"{what}: whether it has the rows of release {release.name} is not known"
    if meta and json.loads(meta).get("digest") == row_format(release, "users").digest:
        return ""
    what = "rows of another release of that name" if meta else "no rows"
    option = url if hidden(url) == url else "@FILE"  # a password is nothing for a terminal
    return (
        f"Redis at {hidden(url)} has {what} for release {release.name}: its lists will say that features are "
        f"stale, and a canary is taken out for it; first: peregrine features load --redis {option} "
        f"-r {release.repository} --release {release.name}"
    )
