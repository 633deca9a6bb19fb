"""What a stream takes and leaves: threads, disk, memory, progress; and what it refuses."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spa_compiler.calibration.moments import Moments
from spa_compiler.calibration.samples import Samples
from spa_compiler.calibration.stream import Stream
from spa_compiler.errors import ModelError, UsageError
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.graph.session import Feeds
from tests.calibration.streamed import (
    CASES,
    all_moments,
    arrays,
    rewritten,
    samples,
    token_feeds,
    tokens,
)
from tests.networks import model_of


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_what_waits_on_disk_is_dropped_in_time_and_removed_in_the_end(temporary: Path) -> None:
    model, feeds = tokens(), token_feeds(5)
    stream = Stream(model, weighted_ops(model.graph), samples(feeds))
    waiting = [len(list(temporary.rglob("*.npy"))) for _ in stream]
    # Four feeds are not held out, both runs keep theirs. In front of each wave: x; x and m; x, m and r; r and h twice.
    assert waiting == [4, 4 + 8, 4 + 8 + 8, 8 + 8, 8 + 8]
    assert not list(temporary.iterdir())


def test_nothing_is_left_after_an_error_of_the_caller(temporary: Path) -> None:
    model = tokens()

    def work() -> None:
        for wave in Stream(model, weighted_ops(model.graph), samples(token_feeds(3))):
            assert list(temporary.iterdir())
            if wave[0].site == 2:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    gc.collect()
    assert not list(temporary.iterdir())


def test_nothing_is_left_when_the_caller_stops_early(temporary: Path) -> None:
    model = tokens()
    stream = iter(Stream(model, weighted_ops(model.graph), samples(token_feeds(3))))
    next(stream)
    assert list(temporary.iterdir())
    stream.close()  # type: ignore[attr-defined]
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("threads", [1, 3])
def test_nothing_is_left_when_the_samples_end_early(temporary: Path, threads: int) -> None:
    model, feeds = tokens(), token_feeds(3)
    fewer = Samples(lambda: iter(feeds[:2]), 3)
    with pytest.raises(UsageError, match="there were 3 feeds of samples at first, and 2"):
        all_moments(Stream(model, weighted_ops(model.graph), fewer, threads=threads))
    assert not list(temporary.iterdir())


def test_what_cannot_wait_is_refused(temporary: Path) -> None:
    model = model_of(
        """g (float[N, 4] x) => (float[N, 4] y) {
          two = SplitToSequence <axis = 1> (x, half) a = MatMul (x, u) first = SequenceAt (two, zero)
          all = Concat <axis = 1> (first, first) s = Add (a, all) y = MatMul (s, v)
        }""",
        half=np.array([2, 2]),
        zero=np.array(0),
        **arrays({"u": (4, 4), "v": (4, 4)}),
    )
    ops = weighted_ops(model.graph)
    feeds = [{"x": np.ones((2, 4), np.float32)}]
    # `first` itself is computed before the first site: only where it is read behind it must a sequence wait
    got = all_moments(Stream(model, ops, samples(feeds)))
    assert got[1].count == 2
    late = model_of(
        """g (float[N, 4] x) => (float[N, 4] y) {
          two = SplitToSequence <axis = 1> (x, half) a = MatMul (x, u) n = ReduceMax <keepdims = 0> (a)
          i = Cast <to = 7> (n) z = Sub (i, i) first = SequenceAt (two, z) all = Concat <axis = 1> (first, first)
          y = MatMul (all, v)
        }""",
        half=np.array([2, 2]),
        **arrays({"u": (4, 4), "v": (4, 4)}),
    )
    with pytest.raises(ModelError, match="'two' is a list that has to wait between two layers"):
        all_moments(Stream(late, weighted_ops(late.graph), samples(feeds)))
    assert not list(temporary.iterdir())


def test_progress_counts_waves() -> None:
    model, calls = tokens(), []
    all_moments(
        Stream(model, weighted_ops(model.graph), samples(token_feeds(2)), progress=lambda *call: calls.append(call))
    )
    waves = max(Stream(model, weighted_ops(model.graph), samples([])).waves.waves) + 1
    assert calls == [("calibrating", done, waves) for done in range(waves + 1)]


@pytest.mark.parametrize("case", list(CASES))
def test_the_bits_do_not_depend_on_threads(case: str) -> None:
    make, feeds_of = CASES[case]
    model, feeds = make(), feeds_of(9)
    for number, feed in enumerate(feeds):  # of such different sizes that the order of additions shows in the bits
        feed["x"] *= np.float32(10.0 ** (number % 4 * 3 - 6))
    ops = weighted_ops(model.graph)
    _, weights, _ = rewritten(model)

    def moments(threads: int) -> dict[int, Moments]:
        stream, got = Stream(model, ops, samples(feeds), threads=threads), {}
        for wave in stream:
            for collected in wave:
                got[collected.site] = collected.fit
                stream.replace(collected.site, weights[collected.site])
        return got

    first = moments(1)
    for threads in (2, 3):
        for site, got in moments(threads).items():
            for name in ("mean", "gram", "cross", "dense_mean"):
                assert got.get(name).tobytes() == first[site].get(name).tobytes()


def test_no_more_feeds_are_in_memory_than_threads() -> None:
    """The source is asked for the next feed only when an earlier one is done."""
    model, large = tokens(), token_feeds(1)[0]
    made: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    def read() -> Iterator[Feeds]:
        for _ in range(30):
            alive.append(sum(reference() is not None for reference in made))
            array = large["x"].copy()
            made.append(weakref.ref(array))
            yield large | {"x": array}
            del array

    next(iter(Stream(model, weighted_ops(model.graph), Samples(read, 30), threads=2)))
    assert len(alive) == 30
    assert max(alive) <= 4


SCRIPT = """
import resource, sys
import numpy as np
from spa_compiler.calibration.samples import Samples
from spa_compiler.calibration.stream import Stream
from spa_compiler.graph.operators import weighted_ops
from tests.networks import model_of

rng = np.random.default_rng(0)
shape = {"u": (4, 256), "v": (256, 256), "w": (256, 4)}
model = model_of(
    "g (float[N, 4] x) => (float[N, 4] y) { a = MatMul (x, u) b = Relu (a) c = MatMul (b, v) d = Relu (c)"
    " s = Add (b, d) y = MatMul (s, w) }",
    **{name: rng.standard_normal(size).astype(np.float32) for name, size in shape.items()},
)
count = int(sys.argv[1])

def read():
    for number in range(count):
        yield {"x": np.random.default_rng(number).standard_normal((20, 4)).astype(np.float32)}

ops = weighted_ops(model.graph)
stream = Stream(model, ops, Samples(read, count), threads=2)
positions = 0
for wave in stream:
    for collected in wave:
        positions = collected.fit.count
        stream.replace(collected.site, ops[collected.site].rows() * 0.5)
print(positions, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_ten_thousand_samples_take_no_more_memory_than_a_hundred() -> None:
    """What the sites of 10,000 samples read is 10 MB for each tensor and run, 50 MB in all."""

    def peak(feeds: int) -> int:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(feeds)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
        positions, kilobytes = map(int, done.stdout.split())
        assert positions == 20 * (feeds - max(1, feeds // 8))
        return kilobytes

    assert peak(500) - peak(5) < 8_000
