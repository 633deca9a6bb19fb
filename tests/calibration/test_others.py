"""Shapes that nobody asked for: few tokens and many, as far as dimensions are open."""

from __future__ import annotations

import pytest

from spa_compiler.calibration.others import other_shapes, telling
from tests.networks import model_of


@pytest.mark.parametrize(
    ("inputs", "asked", "expected"),
    [
        ('float["b","s",8] x', {"x": (1, 128, 8)}, [(1, 1, 8), (1, 16, 8), (8, 64, 8), (32, 128, 8)]),
        ('float["b","s"] x', {"x": (1, 16)}, [(1, 1), (8, 64), (32, 128)]),
        ('float["b",3,8,8] x', {"x": (8, 3, 8, 8)}, [(1, 3, 8, 8), (32, 3, 8, 8)]),
        ('float["b",3,"h","w"] x', {"x": (1, 3, 9, 7)}, [(8, 3, 9, 7), (32, 3, 9, 7)]),
        ('float["n",8] x', {"x": (16, 8)}, [(1, 8), (512, 8)]),
        ('float[1,"s",8] x', {"x": (1, 2, 8)}, [(1, 1, 8), (1, 16, 8), (1, 512, 8)]),
        ('float[2,"s","t",8] x', {"x": (2, 3, 4, 8)}, []),
        ("float[4,8] x", {"x": (4, 8)}, []),
    ],
)
def test_what_is_open_varies(inputs: str, asked: dict[str, tuple[int, ...]], expected: list[tuple[int, ...]]) -> None:
    model = model_of(f"g ({inputs}) => (float[a] y) {{ s = Shape(x) y = Cast<to=1>(s) }}")
    assert [shapes["x"] for shapes in other_shapes(model, [asked])] == expected


def test_inputs_follow_by_their_symbols_and_places() -> None:
    model = model_of(
        'g (float[4] a, float["b","s",8] x, float["b",1,"s"] m, float["p"] q) => (float[n] y) { y = Relu(q) }'
    )
    value = telling(model)
    assert value is not None
    assert value.name == "x"
    asked = {"a": (4,), "x": (1, 128, 8), "m": (1, 1, 128), "q": (5,)}
    found = other_shapes(model, [asked])
    assert found[-1] == {"a": (4,), "x": (32, 128, 8), "m": (32, 1, 128), "q": (5,)}


def test_dimensions_without_symbols_are_one_where_inputs_are_alike() -> None:
    model = model_of("g (float[?,?] x, float[?,?] z) => (float[?,?] y) { y = Add(x, z) }")
    found = other_shapes(model, [{"x": (1, 128), "z": (1, 128)}])
    assert found[0] == {"x": (1, 1), "z": (1, 1)}
    assert len(found) == 4
