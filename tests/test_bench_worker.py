"""Workers are real processes here: they keep their state, and they are ended when they exceed a limit, fail or are no longer needed."""

import itertools
import os
import time
from collections.abc import Callable

import pytest
from small_checks import assert_gone

from bench.worker import Worker, WorkerError

NO_LIMIT = 1 << 40
SECONDS = 60.0


def counter(start: int) -> Callable[[], tuple[int, int]]:
    numbers = itertools.count(start)
    return lambda: (next(numbers), os.getpid())


def sleeper() -> Callable[[], None]:
    return lambda: time.sleep(3600)


def hoarder(size: int, count: int) -> Callable[[], None]:
    blocks = []

    def take() -> None:
        for _ in range(count):
            blocks.append(b"x" * size)
        time.sleep(3600)

    return take


def failure(kind: type[BaseException]) -> Callable[[], None]:
    def fail() -> None:
        raise kind("no such thing\nand more lines")

    return fail


def crash() -> Callable[[], None]:
    return os.abort


def test_the_work_is_prepared_once_and_its_process_ends_with_the_block() -> None:
    with Worker(counter, 5) as worker:
        (first, pid), (second, same) = worker.run(NO_LIMIT, SECONDS), worker.run(NO_LIMIT, SECONDS)
    assert (first, second) == (5, 6)
    assert pid == same != os.getpid()
    assert_gone(pid)


def test_work_that_never_ends_is_ended_at_its_time_limit() -> None:
    with Worker(sleeper) as worker:
        with pytest.raises(WorkerError, match="took more than 2 s"):
            worker.run(NO_LIMIT, 2.0)
        assert_gone(worker._process.pid)
        with pytest.raises(WorkerError, match="the process ended by itself"):
            worker.run(NO_LIMIT, SECONDS)


def test_work_that_takes_too_much_memory_is_ended_before_its_time_limit() -> None:
    started = time.monotonic()
    with Worker(hoarder, 32 << 20, 64) as worker, pytest.raises(WorkerError, match=r"took more than 1\.00 GiB of memory"):
        worker.run(1 << 30, SECONDS)
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, ValueError])
def test_an_error_of_the_work_is_passed_on_with_its_first_line(kind: type[BaseException]) -> None:
    with Worker(failure, kind) as worker, pytest.raises(WorkerError, match=f"^{kind.__name__}: no such thing$"):
        worker.run(NO_LIMIT, SECONDS)


def test_a_process_that_crashes_is_an_error_and_not_a_wait() -> None:
    with Worker(crash) as worker, pytest.raises(WorkerError, match="the process ended by itself"):
        worker.run(NO_LIMIT, SECONDS)
