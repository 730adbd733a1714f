"""Changes items while they are served: those that were added, changed or deleted since the release was built.

catalogue.py  the log of a repository: every change as it was said, for all releases
catalogue_log.py  writes it, as the only one
overlay.py    what the log is for one release: encoded by its encoder, made again whenever it is missing
writer.py     the one who changes items: checks, appends to the log, tells the overlays
items.py      every instance's view: the release's rows with the overlay's over them, and a small exact delta
              for recall
rows.py       rows of items as steps read them: the overlay's content over what the feature tiers have
merge.py      overlay -> a new main index, in its own process
service.py    the writer behind a unix socket; clients.items talks to it

<repository>/.live/catalogue/log         every change
                             lock        held by the writer
<repository>/.live/<release>-<id>/current       number of the generation that is served
                             log-<g>       changes since generation g, encoded
                             g<g>/         generation g, where it was merged: rows.npy, index.faiss, meta.json
                             instances/    one file an instance: the last sequence number that it has
"""
