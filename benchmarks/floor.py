"""The floor under any merge: read the input bytes, write as many bytes as the output has, and do nothing else.

``python benchmarks/floor.py --threads 2 --write-bytes 2200119864 --out FILE INPUT...`` prints
``{"seconds": …, "fsync_s": …}``; flushing to disk is timed by itself, after the figure.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

BLOCK_BYTES = 1 << 20

Task = Callable[[memoryview], None]


def read_tasks(fd: int) -> Iterator[Task]:
    """One task for each block of an open file."""
    for position in range(0, os.fstat(fd).st_size, BLOCK_BYTES):
        yield lambda block, at=position: _read(fd, at, block)  # type: ignore[misc]


def write_tasks(fd: int, size_bytes: int) -> Iterator[Task]:
    """One task for each block of an output of this size."""
    for position in range(0, size_bytes, BLOCK_BYTES):
        n = min(BLOCK_BYTES, size_bytes - position)
        yield lambda block, at=position, n=n: _write(fd, at, block[:n])  # type: ignore[misc]


def _read(fd: int, position: int, block: memoryview) -> None:
    os.preadv(fd, [block], position)


def _write(fd: int, position: int, block: memoryview) -> None:
    done = 0
    while done < len(block):
        done += os.pwrite(fd, block[done:], position + done)


def run(tasks: list[Task], threads: int) -> None:
    """Share the tasks out: every thread takes the next one."""
    queue = iter(tasks)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        block = memoryview(bytearray(os.urandom(4096) * (BLOCK_BYTES // 4096)))
        try:
            while True:
                with lock:
                    task = next(queue, None)
                if task is None:
                    return
                task(block)
        except OSError as e:
            errors.append(e)

    workers = [threading.Thread(target=work) for _ in range(threads - 1)]
    for worker in workers:
        worker.start()
    work()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write-bytes", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("inputs", nargs="+", type=Path)
    args = parser.parse_args()
    inputs = [os.open(path, os.O_RDONLY) for path in args.inputs]
    out = os.open(args.out, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    tasks = [task for fd in inputs for task in read_tasks(fd)]
    writes = list(write_tasks(out, args.write_bytes))
    # In proportion, as a merge would: after every few blocks read, one is written.
    step = max(1, len(tasks) // max(1, len(writes)))
    mixed = [t for i, write in enumerate(writes) for t in (*tasks[i * step : (i + 1) * step], write)]
    mixed += tasks[len(writes) * step :]
    started = time.perf_counter()
    run(mixed, args.threads)
    seconds = time.perf_counter() - started
    os.fsync(out)
    flushed = time.perf_counter() - started - seconds
    os.close(out)
    print(json.dumps({"seconds": seconds, "fsync_s": flushed}))


if __name__ == "__main__":
    main()
