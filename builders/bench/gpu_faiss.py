"""Searches on the GPU through our own index, beside the CPU: gpu-check's part `faiss`.

The same neighbours, with filters and with items deleted since, and the time of a batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import faiss
import numpy as np

from builders.bench.gpu_rows import Row, guarded, wall_ms
from ensemble.arrays import Array
from ensemble.errors import PeregrineError
from ensemble.index.gpu_index import Device, GpuIndex
from ensemble.index.main_index import MainIndex, QuerySettings
from ensemble.steps.served import ServedRelease

_SIZES, _CPU_SIZES = (12_000, 1_000_000, 10_000_000), (12_000, 100_000)
_QUERIES, _NEIGHBOURS, _DIMS = 64, 256, 128
_SHARES = (0.5, 0.1, 0.03)  # of the items that pass a filter
_ON_ONE_THREAD = 1_000_000  # up to here the CPU is timed as it serves: one thread
_PIECE = 1 << 18


def faiss_rows(release: ServedRelease, cpu: bool) -> Iterator[Row]:
    """Gives rows for catalogues of several sizes; without a GPU, the CPU's alone."""
    for size in _CPU_SIZES if cpu else _SIZES:
        yield from guarded("faiss", f"{size:,} x {_DIMS}", partial(_size_rows, size))


def _size_rows(size: int) -> Iterator[Row]:
    vectors = _unit_vectors(size)
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((_QUERIES, _DIMS), dtype=np.float32) * 0.05
    query = vectors[rng.integers(0, size, _QUERIES)] + noise
    flat = faiss.IndexFlatIP(_DIMS)
    flat.add(vectors)
    what = f"{size:,} x {_DIMS}, {_NEIGHBOURS} neighbours"
    main = MainIndex(flat, lambda rows: vectors[rows - 1], QuerySettings())
    threads = 1 if size <= _ON_ONE_THREAD else os.cpu_count() or 1
    faiss.omp_set_num_threads(threads)
    ms = _once_ms(main, query, None)  # seconds, at a million: once is enough
    yield Row("faiss", what, f"CPU, {threads} threads", "fp32", _QUERIES, ms)
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    try:
        gpu = GpuIndex(flat, main.vectors, QuerySettings())
    except PeregrineError as error:
        yield Row("faiss", what, "GPU", note=error.fact)
        return
    yield from _against(main, gpu, query, what, "GPU", None)
    for share in _SHARES if size <= _ON_ONE_THREAD else _SHARES[1:2]:  # the CPU's own answer takes seconds
        mask = np.concatenate([[False], rng.random(size) < share])
        yield from _against(main, gpu, query, f"{what}, {share:.0%} pass a filter", "GPU", mask)
    alive = np.ones(size + 1, bool)
    alive[0] = False
    alive[main.search(query, _NEIGHBOURS // 4)[0].ravel()] = False  # the best of every query are gone
    yield from _against(main, gpu, query, f"{what}, the best quarter deleted", "GPU", alive)
    del gpu
    yield from _half_rows(flat, main, query, what)


def _against(
    main: MainIndex, gpu: GpuIndex, query: Array, what: str, runtime: str, mask: Array | None
) -> Iterator[Row]:
    """Compares lists, and times the second search of a filter: the first made its index."""
    faiss.omp_set_num_threads(os.cpu_count() or 1)  # an index that is opened sets one
    wanted = main.search(query, _NEIGHBOURS, mask)[0]
    first_ms = _once_ms(gpu, query, mask)
    found = gpu.search(query, _NEIGHBOURS, mask)[0]
    differing = 1 - float(np.mean([np.isin(w, f).mean() for w, f in zip(wanted, found, strict=True)]))
    ms = wall_ms(lambda: gpu.search(query, _NEIGHBOURS, mask))
    lone_ms = wall_ms(lambda: gpu.search(query[:1], _NEIGHBOURS, mask))
    note = f"first time {first_ms:.1f} ms; a lone query {lone_ms:.3f} ms"
    yield Row("faiss", what, runtime, "fp32", _QUERIES, ms, differing, 5e-3, note=note)


def _once_ms(index: MainIndex, query: Array, mask: Array | None) -> float:
    started = time.perf_counter()
    index.search(query, _NEIGHBOURS, mask)
    return (time.perf_counter() - started) * 1e3


def _half_rows(flat: faiss.Index, main: MainIndex, query: Array, what: str) -> Iterator[Row]:
    """Times a search of vectors kept as fp16: half the memory, and tensor cores."""
    gpu = GpuIndex(flat, main.vectors, QuerySettings(), Device(half=True))
    wanted, found = main.search(query, _NEIGHBOURS)[0], gpu.search(query, _NEIGHBOURS)[0]
    differing = 1 - float(np.mean([np.isin(w, f).mean() for w, f in zip(wanted, found, strict=True)]))
    ms = wall_ms(lambda: gpu.search(query, _NEIGHBOURS))
    yield Row("faiss", what, "GPU", "fp16", _QUERIES, ms, differing, 5e-2)


def _unit_vectors(size: int) -> Array:
    """Draws [size, D] float32 of length 1, in pieces on all cores."""
    out = np.empty((size, _DIMS), np.float32)

    def fill(start: int) -> None:
        piece = out[start : start + _PIECE]
        np.random.default_rng(start).standard_normal(out=piece, dtype=np.float32)
        piece /= np.linalg.norm(piece, axis=1, keepdims=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(0, size, _PIECE)))
    return out
