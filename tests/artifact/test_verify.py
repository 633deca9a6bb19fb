from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from spa_compiler.artifact.verify import Mismatch, compare, noise
from spa_compiler.errors import VerificationError
from spa_compiler.graph.session import flatten

F = np.float32


def save(path: Path, body: str, outputs: str = "float[n, 4] y") -> Path:
    text = f'<ir_version: 9, opset_import: ["" : 17]> g (float[n, 4] x) => ({outputs}) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), str(path))
    return path


def feeds(*rows: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((n, 4)).astype(F)} for n in rows]


@pytest.fixture
def portable(tmp_path: Path) -> Path:
    return save(tmp_path / "portable.onnx", "y = Softmax(x)")


def test_one_check_for_each_output_feed_and_thread_count(tmp_path: Path, portable: Path) -> None:
    other = save(tmp_path / "model.onnx", "e = Exp(x)  s = ReduceSum<keepdims=1>(e, a)  y = Div(e, s)")
    model = onnx.load(str(other))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "a"))
    onnx.save(model, str(other))
    checks = compare(portable, other, None, feeds(1, 7))
    assert [(c.output, c.shape, c.threads) for c in checks] == [
        ("y", "1x4", 1),
        ("y", "7x4", 1),
        ("y", "1x4", 2),
        ("y", "7x4", 2),
    ]
    assert all(c.passed and c.tolerance >= 1e-5 for c in checks)


def test_a_wrong_output_is_named_with_its_shape_and_error(tmp_path: Path, portable: Path) -> None:
    wrong = save(tmp_path / "model.onnx", "y = Sigmoid(x)")
    with pytest.raises(Mismatch, match=r"output 'y' is wrong at 7x4 .*error is \d") as caught:
        compare(portable, wrong, None, feeds(7))
    assert caught.value.exit_code == 4
    assert len(caught.value.checks) == 2
    assert not any(c.passed for c in caught.value.checks)


def test_a_missing_output(tmp_path: Path, portable: Path) -> None:
    wrong = save(tmp_path / "model.onnx", "z = Softmax(x)", "float[n, 4] z")
    with pytest.raises(Mismatch, match="shape, type or NaNs differ"):
        compare(portable, wrong, None, feeds(1))


def test_integers_are_exact(tmp_path: Path) -> None:
    a = save(tmp_path / "a.onnx", "y = ArgMax<axis=1>(x)", "int64[n, 1] y")
    b = save(tmp_path / "b.onnx", "y = ArgMin<axis=1>(x)", "int64[n, 1] y")
    assert all(c.error == 0 == c.tolerance for c in compare(a, a, None, feeds(3)))
    with pytest.raises(Mismatch):
        compare(a, b, None, feeds(3))


def test_a_model_that_does_not_run_is_a_failed_verification(tmp_path: Path, portable: Path) -> None:
    broken = save(tmp_path / "model.onnx", "s = Shape(x)  z = Reshape(x, s)  t = Transpose(z)  y = MatMul(x, z)")
    with pytest.raises(VerificationError, match="does not run at 3x4"):
        compare(portable, broken, None, feeds(3))


def test_nans_at_the_same_places_are_equal(tmp_path: Path) -> None:
    log = save(tmp_path / "log.onnx", "y = Log(x)")
    (feed,) = feeds(1)
    feed["x"][0, :2] = (-1, 0)
    assert all(c.error == 0 for c in compare(log, log, None, [feed]))


def test_noise_skips_what_is_not_finite() -> None:
    assert noise(np.array([1, np.nan], F), np.array([1, 2], F)) == 0
    assert noise(np.array([10, np.inf], F), np.array([11, np.inf], F)) == pytest.approx(0.1)
    assert noise(np.array([1]), np.array([2])) == 0


def test_sequences_and_maps_become_outputs() -> None:
    nested = {"y": np.ones(1), "z": [{"a": 0.5, 1: np.ones(2)}]}
    assert [name for name, _ in flatten(nested)] == ["y", "z[0][a]", "z[0][1]"]
