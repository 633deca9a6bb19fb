"""Whole regions inside ONNX Runtime: numbers, shapes, and everything that must be refused without a crash."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper

from spa_compiler.runtime import link
from tests.region_harness import CASES, MCPU, assert_parity, case, run, session
from tests.runtime_malformed import BAD, case_of, edited

TOKENS = (0, 1, 3, 7, 16, 33, 64, 65, 128, 200)
ROWS = ("mlp", "single", "wide", "sum", "thin", "gated", "blocks", "grouped")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_any_number_of_tokens(name: str, threads: int) -> None:
    c = case(name)
    s = session(c.model(), threads)
    for dims in [*((1, t) for t in TOKENS), (0, 5), (3, 33), (8, 64), (5, 1), (2, 0)]:
        feeds = c.feeds(dims, seed=sum(dims))
        assert_parity(run(s, feeds), c.expected(feeds))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name, dims", [("mlp", (3, 500)), ("thin", (2, 3000))])
def test_panels_that_leave_the_cache_are_computed_in_bands(name: str, dims: tuple[int, ...], threads: int) -> None:
    c = case(name)
    tokens = int(np.prod(dims))
    assert c.spec.scratch_rows * tokens * 4 > 2 << 20, "more than a band holds"
    weights = sum(a.nbytes for name, a in c.arrays.items() if name.startswith(("values", "columns")))
    assert weights < 1 << 18, "small enough to be read again for every band"
    feeds = c.feeds(dims)
    s = session(c.model(("n", *(f"p{i}" for i in range(len(dims) - 1)))), threads)
    assert_parity(run(s, feeds), c.expected(feeds))


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_rows_of_any_rank(rank: int) -> None:
    c = case("mlp")
    dims = (2, 1, 3, 1, 2, 1, 1)[: rank - 1]
    feeds = c.feeds(dims)
    assert_parity(run(session(c.model(dims)), feeds), c.expected(feeds))


def test_a_run_is_the_same_bits_every_time_and_at_any_number_of_threads() -> None:
    c = case("wide")
    feeds = c.feeds((3, 50))
    first = run(session(c.model(), 1), feeds)
    for threads in (1, 2, 3):
        for one, other in zip(first, run(session(c.model(), threads), feeds), strict=True):
            assert (one == other).all()


def test_nan_reaches_its_own_token_alone() -> None:
    c = case("mlp")
    feeds = c.feeds((1, 40))
    clean = run(session(c.model()), feeds)
    feeds["x0"][0, 17] = np.nan
    for before, after in zip(clean, run(session(c.model()), feeds), strict=True):
        assert np.isnan(after[0, 17]).all()
        assert (np.delete(before, 17, 1) == np.delete(after, 17, 1)).all()


# ---- shape inference ----


@pytest.mark.parametrize("name, dims", [("mlp", ("batch", "tokens")), ("single", (4, 9))])
def test_symbolic_dimensions_survive(name: str, dims: tuple[Any, ...]) -> None:
    c = case(name)
    shapes = [y.shape for y in session(c.model(dims)).get_outputs()]
    assert shapes == [[*dims, n] for n in c.spec.output_features]


def test_unknown_dimensions_stay_apart_for_a_reshape_further_down() -> None:
    c = case("mlp")
    nodes = [
        helper.make_node("Shape", ["y0"], ["shape"]),
        helper.make_node("Reshape", ["y1", "to"], ["flat"]),
        helper.make_node("Constant", [], ["to"], value_ints=[-1]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Add", ["zeros", "y0"], ["same"]),
    ]
    model = c.model((None, None), extra_nodes=[nodes[0], nodes[2], nodes[1], *nodes[3:]], outputs=["y0", "y1"])
    s = session(_only_outputs(model, ["flat", "same"]))
    feeds = c.feeds((2, 5))
    flat, same = run(s, feeds)
    want = c.expected(feeds)
    assert_parity([flat.reshape(want[1].shape), same], [want[1], want[0]])


def _only_outputs(model: bytes, names: list[str]) -> bytes:
    import onnx

    proto = onnx.load_from_string(model)
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_tensor_value_info(n, 1, None) for n in names)
    return proto.SerializeToString()


def test_an_input_without_a_shape_runs() -> None:
    c = case("mlp")
    s = session(c.model(None))
    for dims in ((), (6,), (2, 3)):
        feeds = c.feeds(dims)
        assert_parity(run(s, feeds), c.expected(feeds))


# ---- malformed initializers: refused when the session is made ----


@pytest.mark.parametrize("label", BAD)
def test_malformed_initializers_are_refused(label: str) -> None:
    array, change, words = BAD[label]
    c = case_of(label)
    with pytest.raises(Exception) as raised:
        session(c.model(replace={array: change(c.arrays[array])}))
    message = str(raised.value)
    assert words in message
    assert f"ai.spa::{c.spec.op_type} at site 'encoder/dense'" in message


@pytest.mark.parametrize("array, dtype", [("indptr0", "i8"), ("columns0", "i4"), ("values0", "f8"), ("bias0", "f2")])
def test_another_element_type_is_refused(array: str, dtype: str) -> None:
    c = case("single")
    with pytest.raises(Exception, match=c.spec.op_type):
        session(c.model(replace={array: c.arrays[array].astype(dtype)}))


@pytest.mark.parametrize("array", ["gamma0", "beta0"])
def test_norms_are_checked_too(array: str) -> None:
    c = case("mlp")
    with pytest.raises(Exception, match=f"norm 0: {array[:-1]} must have 100 elements, not 99"):
        session(c.model(replace={array: c.arrays[array][:99]}))


def test_an_rms_norm_has_no_beta_and_is_checked_too() -> None:
    c = case("gated")
    assert [name for name in c.arrays if name.startswith(("gamma", "beta"))] == ["gamma0", "gamma1", "gamma2", "beta2"]
    for array, norm, count in (("gamma0", 0, 101), ("gamma1", 1, 101), ("beta2", 2, 101)):
        with pytest.raises(Exception, match=f"norm {norm}: {array[:-1]} must have {count} elements, not {count - 1}"):
            session(c.model(replace={array: c.arrays[array][:-1]}))
    with pytest.raises(Exception, match=r"gamma\) must be an initializer"):
        session(c.model(replace={"gamma1": None}))


def test_the_second_weight_is_named() -> None:
    c = case("mlp")
    with pytest.raises(Exception, match="weight 1: column 60000 is out of range"):
        session(c.model(replace={"columns1": edited(c.arrays["columns1"], 0, 60000)}))


def test_a_missing_site_is_named() -> None:
    c = case("single")
    with pytest.raises(Exception, match=f"ai.spa::{c.spec.op_type}: .*site"):
        session(c.model(attributes={}))


@pytest.mark.parametrize("length", [0, 1, 254, 255, 256, 257, 5000])
@pytest.mark.parametrize("letter", ["%n", "ü", "網"])
def test_a_site_of_any_length_is_named(letter: str, length: int) -> None:
    c = case("single")
    site = (letter * length)[:length]
    with pytest.raises(Exception) as raised:
        session(c.model(attributes={"site": site}, replace={"bias0": c.arrays["bias0"][:-1]}))
    shown = str(raised.value).split("at site '")[1].split("': weight 0: bias must")[0]
    assert shown == site if len(site.encode()) < 256 else shown.endswith("...") and site.startswith(shown[:-3])
    assert len(shown.encode()) > 250 or shown == site
    if length in (0, 5000):
        feeds = c.feeds((1, 3))
        assert_parity(run(session(c.model(attributes={"site": site})), feeds), c.expected(feeds))


@pytest.mark.parametrize("outputs", [["", "y1"], ["y0", ""], ["y0"]])
def test_missing_outputs_do_not_crash(outputs: list[str]) -> None:
    c = case("mlp")
    with pytest.raises(Exception, match="Region_"):
        session(c.model(outputs=outputs))


# ---- run-time errors ----


def refused(name: str, feeds: dict[str, np.ndarray], words: str) -> None:
    c = case(name)
    s = session(c.model(None))
    with pytest.raises(Exception) as raised:
        run(s, feeds)
    assert words in str(raised.value)
    assert "at site 'encoder/dense'" in str(raised.value)
    good = c.feeds((2, 3))
    assert_parity(run(s, good), c.expected(good))  # the session still works


def test_wrong_features() -> None:
    x = np.zeros((2, 5, 101), np.float32)
    refused("mlp", {"x0": x}, "input 0 must have 100 features on axis 2, its shape is [2,5,101]")


def test_wrong_ranks() -> None:
    refused("mlp", {"x0": np.array(1, np.float32)}, "input 0 must have 1 to 8 dimensions, it has 0")
    refused("mlp", {"x0": np.zeros((1,) * 8 + (100,), np.float32)}, "input 0 must have 1 to 8 dimensions, it has 9")


@pytest.mark.parametrize("other", [(2, 6), (1, 5), (10,), (2, 5, 1), ()])
def test_inputs_that_disagree(other: tuple[int, ...]) -> None:
    feeds = {"x0": np.zeros((2, 5, 301), np.float32), "x1": np.zeros((*other, 600), np.float32)}
    refused("wide", feeds, "inputs 0 and 1 must agree in all but their features, their shapes are [2,5,301] and [")


def test_wrong_features_in_large_shapes_with_a_zero() -> None:
    x = np.zeros((0, 2**20, 2**20, 1, 1, 1, 1, 3), np.float32)
    refused("mlp", {"x0": x}, "its shape is [0,1048576,1048576,1,1,1,1,3]")


def test_scratch_that_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    c = case("single")
    huge = dataclasses.replace(c, spec=dataclasses.replace(c.spec, scratch_rows=10**13))
    link.link([huge.spec], (MCPU,), tmp_path / "kernels.so")
    s = session(huge.model(), path=tmp_path / "kernels.so")
    with pytest.raises(Exception, match=r"(?i)alloc|memory"):
        run(s, huge.feeds((1, 64)))


def test_the_library_is_needed() -> None:
    with pytest.raises(Exception, match="is not a registered function/op"):
        ort.InferenceSession(case("single").model(), providers=["CPUExecutionProvider"])


def test_every_case_has_an_op_of_its_own() -> None:
    assert len({case(name).spec.op_type for name in CASES}) == len(CASES)
