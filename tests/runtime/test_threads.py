"""One session and many threads, many sessions and one library, ten thousand runs."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.region_harness import CASES, assert_parity, case, run, session


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["mlp", "wide"])
def test_eight_python_threads_share_a_session(name: str, threads: int) -> None:
    c = case(name)
    s = session(c.model(("batch", "tokens")), threads)
    work = [(c.feeds((1 + i % 3, 1 + 17 * i), seed=i)) for i in range(8)]
    want = [c.expected(feeds) for feeds in work]

    def often(i: int) -> None:
        for _ in range(20):
            assert_parity(run(s, work[i]), want[i])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(often, range(8)))


def test_sessions_of_one_library_live_side_by_side() -> None:
    sessions = [(case(name), session(case(name).model(), threads)) for name in CASES for threads in (1, 2)]
    feeds = [c.feeds((2, 9)) for c, _ in sessions]
    want = [c.expected(f) for (c, _), f in zip(sessions, feeds, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: run(sessions[i][1], feeds[i]), list(range(len(sessions))) * 5))
    for i, got in enumerate(results):
        assert_parity(got, want[i % len(sessions)])


def test_sessions_are_made_from_several_threads_at_once() -> None:
    c = case("single")
    feeds = c.feeds((1, 5))
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: run(session(c.model()), feeds), range(24)):
            assert_parity(got, c.expected(feeds))


def test_ten_thousand_runs_leak_nothing() -> None:
    c = case("single")
    s = session(c.model(), 2)
    work = [c.feeds((1, tokens)) for tokens in (1, 7, 65)]
    for i in range(600):
        run(s, work[i % 3])
    before = resident()
    for i in range(10_000):
        run(s, work[i % 3])
    assert resident() - before < 2 << 20


def test_failed_runs_leak_nothing() -> None:
    s = session(case("single").model(None))
    bad = {"x0": np.zeros((2, 65), np.float32)}

    def fail(times: int) -> None:
        for _ in range(times):
            with pytest.raises(Exception, match="64 features"):
                run(s, bad)

    fail(200)
    before = resident()
    fail(1000)
    assert resident() - before < 2 << 20


def test_sessions_that_end_or_are_refused_leak_nothing() -> None:
    c = case("mlp")
    good, bad = c.model(), c.model(replace={"bias2": c.arrays["bias2"][:-1]})

    def use(times: int) -> None:
        for _ in range(times):
            run(session(good), c.feeds((1, 2)))
            with pytest.raises(Exception, match="weight 2: bias"):
                session(bad)

    use(30)
    before = resident()
    use(100)
    assert resident() - before < 8 << 20  # a session takes 2 MB
