"""Runs `peregrine search "TEXT"`: prints what fits a text or a picture, in the order of a user's taste."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clients.cli.recommend import (
    CONNECT_S,
    Allow,
    BudgetMs,
    Ca,
    Cap,
    Certificate,
    Context,
    Deny,
    Diversity,
    Exclude,
    ExcludeSeen,
    Key,
    ServerName,
    TopK,
    Url,
    find_server,
    options_of,
    show,
    tls_of,
)
from ensemble.cli.options import REPOSITORY, JsonOption

Text = Annotated[
    str, typer.Argument(metavar="[TEXT]", help="What to look for; may be left out beside --image.")
]
User = Annotated[str, typer.Option(help="Whose taste orders the list; nobody's if left out.")]
Image = Annotated[Path | None, typer.Option(help="A picture to look for: a JPEG, PNG or WebP file.")]
Repository = Annotated[
    Path, typer.Option("--repository", "-r", help="Where titles are read, if it is there.")
]


def search(
    text: Text = "",
    user: User = "",
    image: Image = None,
    top_k: TopK = None,
    exclude: Exclude = None,
    exclude_seen: ExcludeSeen = None,
    allow: Allow = None,
    deny: Deny = None,
    cap: Cap = None,
    diversity: Diversity = None,
    context: Context = None,
    budget_ms: BudgetMs = None,
    as_json: JsonOption = False,
    url: Url = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    server_name: ServerName = None,
    repository: Repository = REPOSITORY,
) -> None:
    """Prints what fits a text or a picture: titles, scores, and what brought each item."""
    from clients.client import Client

    options = options_of(
        top_k=top_k,
        exclude=exclude,
        exclude_seen=exclude_seen,
        allow=allow,
        deny=deny,
        cap=cap,
        diversity=diversity,
        context=context,
    )
    server_url, headers = find_server(repository, url)
    tls = tls_of(ca, certificate, key, server_name)
    with Client(server_url, headers=headers, tls=tls) as client:
        client.connect(CONNECT_S)
        result = client.search(user, text, image=image, budget_ms=budget_ms, **options)
    show([result], options, repository, as_json=as_json)
