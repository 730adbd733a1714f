"""Changes items while they are served: those that were added, changed or deleted since the release was built.

writer.py     the one process that changes them: checks, encodes, appends to the log
log.py        the append-only log: fixed-width records, checksummed, fsync by group
items.py      every instance's view: the release's rows with the log's changes over them, and a small
              exact delta for recall
rows.py       rows of items as steps read them: the log's content over what the feature tiers have
merge.py      log -> a new main index, in its own process
service.py    the writer behind a unix socket; clients.items talks to it

<repository>/.live/<release>-<id>/current       number of the generation that is served
                             log-<g>       changes since generation g
                             g<g>/         generation g > 0: rows.npy, index.faiss, meta.json
                             instances/    one file an instance: the last sequence number that it has
                             lock          held by the writer
"""
