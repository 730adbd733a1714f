"""Changes items while they are served: those that were added, changed or deleted since the release was built.

catalogue.py  the log of a repository: every change as it was said, for all releases
catalogue_log.py  writes it, as the only one
overlay.py    what the log is for one release: encoded by its encoder, made again whenever it is missing
writer.py     the one who changes items: checks, appends to the log, tells the overlays
items.py      follows an overlay in every instance
state.py      the release's rows with the overlay's over them: segments, mapped, and the tail behind them
rows.py       rows of items as steps read them: the overlay's content over what the feature tiers have
merge.py      the tail -> a segment with its index, in its own process
service.py    the writer behind a unix socket; clients.items talks to it
contents.py   encodes the titles and pictures of such items
pictures.py   keeps the pictures that came with changes

<repository>/.live/catalogue/log         every change
                             pictures/   those that came with changes, by content
                             lock        held by the writer
<repository>/.live/<release>-<id>/current       generation, and the names of its segments
                             log-<g>       changes behind them, encoded: the tail
                             g<n>/         a segment: arrays, index.faiss, meta.json
                             values-<n>    values that the release's vocabularies lack
                             empty.faiss   the release's index with nothing in it
                             instances/    one file an instance: the last sequence number that it has
"""

MAX_REQUEST_BYTES = 64 << 20  # a longer line the writer does not read to its end
