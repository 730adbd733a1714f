"""Measures a running server: latency, throughput, cost, faults, and the twin beside it.

measurement.py        all of `peregrine bench`, in its order
loadgen.py            asks the server, in an open or a closed loop
local_twin.py         asks the same pipeline without a server; queued_twins.py: several behind one queue
measuring_process.py  runs one measurement in a process of its own
server_probe.py       reads what the server did meanwhile
perf_analyzer.py      runs Triton's own tool
machine.py report.py plot.py   say where it was measured, and show what
faults.py faulty_redis.py      what faults of Redis cost (python -m clients.bench.faults)
live.py               what changing items costs (python -m clients.bench.live)
many_changes.py       what a million changes cost (python -m clients.bench.many_changes)
"""
