import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spa_compiler.bench.engines import ENGINES
from spa_compiler.bench.race import Absent, Contender, Times, race
from spa_compiler.errors import EnvironmentFault, ModelError
from spa_compiler.graph.session import open_session, run

FEEDS = {"x": np.ones((4, 64), np.float32)}
ORT = ENGINES["onnxruntime"]


def test_every_contender_is_timed_as_often_as_asked(linear: Callable[..., Path]) -> None:
    path, said = linear(), []
    contenders = [Contender("a", ORT, path, FEEDS), Contender("b", ENGINES["onnxruntime-best"], path, FEEDS)]
    for runs, rounds in ((23, 10), (3, 3)):
        times = race(contenders, threads=1, runs=runs, progress=lambda *args: said.append(args))
        for taken in times:
            assert isinstance(taken, Times)
            assert len(taken.bursts) == rounds
            assert sum(map(len, taken.bursts)) == runs
            assert 0 < taken.percentile(10) <= taken.percentile(50) <= taken.percentile(90)
    assert {what for what, _, _ in said} == {"loading", "timing"}


def test_more_work_is_the_slower(linear: Callable[..., Path]) -> None:
    contenders = [Contender(str(n), ORT, linear(f"{n}.onnx", n), FEEDS) for n in (2, 200)]
    short, long = race(contenders, threads=1, runs=20)
    assert isinstance(short, Times)
    assert isinstance(long, Times)
    # How far 100 times the work shows is up to what else the machine does.
    assert short.ratio(long) > 1 > long.ratio(short)


def test_a_ratio_pairs_the_bursts_of_a_round() -> None:
    # The machine was three times as slow in the last round, for both.
    slow = Times(((2.0, 2.0), (2.0, 2.0), (6.0, 6.0)), "")
    fast = Times(((1.0, 1.0), (1.0, 9.0, 1.0), (3.0, 3.0)), "")
    assert fast.ratio(slow) == 2.0


def test_an_error_is_the_worst_of_all_outputs() -> None:
    def outputs(**values: list[float]) -> Times:
        return Times((), "", {place: np.array(value) for place, value in values.items()})

    reference = outputs(a=[1.0, 2.0], b=[4.0])
    assert outputs(a=[1.0, 2.2], b=[6.0], c=[0.0]).error(reference) == 0.5
    assert outputs(a=[1.0, 2.0]).error(reference) is None, "an output is missing"
    assert outputs(a=[1.0, 2.0], b=[np.nan]).error(reference) is None, "NaN is no number to compare"
    assert reference.error(outputs()) is None, "nothing to compare with"


def test_outputs_are_what_the_model_computes(linear: Callable[..., Path]) -> None:
    path = linear()
    (times,) = race([Contender("a", ORT, path, FEEDS)], threads=1, runs=1)
    assert isinstance(times, Times)
    (wanted,) = run(open_session(path), FEEDS).values()
    np.testing.assert_allclose(times.outputs["0"], wanted, rtol=1e-5)


def test_what_need_not_run_is_left_out(linear: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    wrong = {"z": np.ones(1, np.float32)}
    contenders = [Contender("a", ORT, linear(), wrong, required=False), Contender("b", ORT, linear(), FEEDS)]
    first, second = race(contenders, threads=1, runs=2)
    assert isinstance(first, Absent)
    assert first.reason.startswith("does not run: ")
    assert isinstance(second, Times)
    assert "left out: a in onnxruntime" in caplog.text


def test_why_it_was_left_out_is_one_line(linear: Callable[..., Path], tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh\necho '{"error": "RuntimeError: two\\\\nlines"}'\n""")
    python.chmod(0o755)
    (absent,) = race([Contender("a", ORT, linear(), FEEDS, python=str(python), required=False)], threads=1, runs=2)
    assert absent == Absent("does not run: RuntimeError: two lines")


def test_what_must_run_is_an_error_in_words(linear: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"a in onnxruntime: does not run: .*z"):
        race([Contender("a", ORT, linear(), {"z": np.ones(1, np.float32)})], threads=1, runs=2)


def test_an_interpreter_that_is_none(linear: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="--python"):
        race([Contender("a", ORT, linear(), FEEDS, python=str(tmp_path / "none"))], threads=1, runs=2)


def test_a_worker_that_dies_is_quoted(linear: Callable[..., Path], tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho the last words >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(ModelError, match="status 3 the last words"):
        race([Contender("a", ORT, linear(), FEEDS, python=str(python))], threads=1, runs=2)


def test_an_engine_has_its_own_environment(linear: Callable[..., Path], tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "isa is $ONEDNN_MAX_CPU_ISA, home is $HOME" >&2\nexit 3\n')
    python.chmod(0o755)
    contender = Contender("a", ENGINES["openvino-int8-vnni"], linear(), FEEDS, python=str(python))
    with pytest.raises(ModelError, match=f"isa is AVX512_CORE_FP16, home is {os.environ['HOME']}"):
        race([contender], threads=1, runs=2)


def test_a_worker_that_dies_while_it_is_timed(linear: Callable[..., Path], tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh\necho '{"version": "1"}'\nread line\nexit 4\n""")
    python.chmod(0o755)
    with pytest.raises(ModelError, match=r"stopped while it was timed: .*status 4"):
        race([Contender("a", ORT, linear(), FEEDS, python=str(python))], threads=1, runs=2)


def test_no_process_outlives_the_race(linear: Callable[..., Path]) -> None:
    def interrupt(what: str, *_: int) -> None:
        if what == "timing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        race([Contender("a", ORT, linear(), FEEDS)], threads=1, runs=2, progress=interrupt)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    assert not [c for c in children if "worker.py" in Path(f"/proc/{c}/cmdline").read_text()]


def test_the_worker_needs_nothing_of_this_package(linear: Callable[..., Path], tmp_path: Path) -> None:
    """As in the interpreter of another environment: the package cannot be imported."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh\ncd / && exec {sys.executable} -c 'import runpy, sys
sys.modules["spa_compiler"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")' "$@"\n"""
    )
    python.chmod(0o755)
    (times,) = race([Contender("a", ORT, linear(), FEEDS, python=str(python))], threads=1, runs=2)
    assert isinstance(times, Times)
