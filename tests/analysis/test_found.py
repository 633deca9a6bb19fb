"""Cuts hold at other input sizes than those that the analysis bound: what a hostile review found."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.analysis.choose import random_units
from spa_compiler.analysis.cut import cut, removed_slabs
from spa_compiler.analysis.mask import mask
from spa_compiler.calibration.examples import example_feeds
from tests.analysis import architectures
from tests.analysis.exactness import Subject, differences, outputs
from tests.analysis.told import weighted

_LINES = {
    "w": "float[N, S, 5] x, float[5, 8] w",
    "out": "=> (float[A, B] y)",
    "flat": "h = MatMul(x, w)\n f = Flatten <axis = 1> (h)",
    "turned": "h = MatMul(x, w)\n t = Transpose <perm = [0, 2, 1]> (h)\n f = Flatten <axis = 1> (t)",
    "sum": "one = Constant <value = int64[1] {1}> ()\n y = ReduceSum(q, one)",
    "padded": "p = Constant <value = int64[4] {0, 3, 0, 3}> ()\n q = Pad(f, p)",
}

NETS = {
    "a_target_that_is_an_identity_for_two_sequences_alone": """net (float[N, 5] x, float[5, 8] w, float[4, 3] v)
         => (float[A, B] y) {
      h = MatMul(x, w)
      s = Constant <value = int64[3] {0, 2, 4}> ()
      r = Reshape(h, s)
      s2 = Constant <value = int64[3] {2, -1, 4}> ()
      q = Reshape(r, s2)
      one = Constant <value = int64[1] {1}> ()
      t = ReduceSum <keepdims = 0> (q, one)
      y = MatMul(t, v)
    }""",
    "channels_that_are_dealt_out_over_the_batch": """net (float[N, 5] x, float[5, 8] w, float[2, 3] v)
         => (float[A, B] y) {
      h = MatMul(x, w)
      s = Constant <value = int64[3] {-1, 4, 2}> ()
      r = Reshape(h, s)
      t = Transpose <perm = [0, 2, 1]> (r)
      s2 = Constant <value = int64[2] {4, -1}> ()
      q = Reshape(t, s2)
      z = Transpose(q)
      s3 = Constant <value = int64[2] {-1, 2}> ()
      z3 = Reshape(z, s3)
      y = MatMul(z3, v)
    }""",
    "a_slice_of_all_of_the_bound_size": """net ({w}) {out} {{
      {flat}
      a = Constant <value = int64[1] {{0}}> ()
      b = Constant <value = int64[1] {{104}}> ()
      c = Constant <value = int64[1] {{1}}> ()
      q = Slice(f, a, b, c)
      {sum}
    }}""",
    "a_slice_of_channels_merged_with_positions": """net ({w}) {out} {{
      {turned}
      a = Constant <value = int64[1] {{0}}> ()
      b = Constant <value = int64[1] {{52}}> ()
      c = Constant <value = int64[1] {{1}}> ()
      q = Slice(f, a, b, c)
      {sum}
    }}""",
    "a_gather_of_channels_merged_with_positions": """net ({w}) {out} {{
      {turned}
      i = Constant <value = int64[4] {{0, 5, 20, 60}}> ()
      q = Gather <axis = 1> (f, i)
      {sum}
    }}""",
    "one_of_channels_merged_with_positions": """net ({w}) => (float[A] y) {{
      {turned}
      i = Constant <value = int64 {{20}}> ()
      y = Gather <axis = 1> (f, i)
    }}""",
    "halves_of_positions": """net ({w}) {out} {{
      {flat}
      p, r = Split <axis = 1, num_outputs = 2> (f)
      q = Sub(p, r)
      {sum}
    }}""",
    "the_shape_of_a_sum": """net ({w}) => (float[A, B] y, int64[2] z) {{
      {flat}
      {padded}
      z = Shape(q)
      {sum}
    }}""",
    "the_size_of_a_sum": """net ({w}) => (float[A, B] y, int64 z) {{
      {flat}
      {padded}
      z = Size(q)
      {sum}
    }}""",
    "a_target_computed_from_a_sum": """net ({w}) {out} {{
      {flat}
      {padded}
      sizes = Shape(q)
      one_ = Constant <value = int64[1] {{1}}> ()
      target = Concat <axis = 0> (one_, sizes)
      r = Reshape(q, target)
      two = Constant <value = int64[1] {{2}}> ()
      y = ReduceSum <keepdims = 0> (r, two)
    }}""",
    "a_sum_in_front_of_the_batch": """net ({w}) {out} {{
      {flat}
      {padded}
      target = Constant <value = int64[3] {{1, 0, -1}}> ()
      r = Reshape(q, target)
      one = Constant <value = int64[1] {{1}}> ()
      y = ReduceSum <keepdims = 0> (r, one)
    }}""",
    "heads_merged_with_the_batch_stay_free": """net (float[N, S, 5] x, float[5, 8] w, float[8, 3] v)
         => (float[A, B, C] y) {
      h = MatMul(x, w)
      s = Constant <value = int64[4] {0, 0, 4, 2}> ()
      r = Reshape(h, s)
      t = Transpose <perm = [0, 2, 1, 3]> (r)
      sizes = Shape <start = 1, end = 2> (x)
      rest = Constant <value = int64[1] {-1}> ()
      four = Constant <value = int64[1] {4}> ()
      two = Constant <value = int64[1] {2}> ()
      merged = Concat <axis = 0> (rest, sizes, two)
      g = Reshape(t, merged)
      e = Exp(g)
      whole = Concat <axis = 0> (rest, four, sizes, two)
      u = Reshape(e, whole)
      k = Transpose <perm = [0, 2, 1, 3]> (u)
      c = Constant <value = int64[3] {0, 0, 8}> ()
      m = Reshape(k, c)
      y = MatMul(m, v)
    }""",
}
PRUNABLE = {"heads_merged_with_the_batch_stay_free"}
BOUND = {"halves_of_positions": {"N": 2, "S": 8}}
OTHERS = [{"N": n, "S": s} for n in (1, 2, 3, 4) for s in (4, 13, 17)]


def check_other_sizes(subject: Subject, others: list[dict[str, int]]) -> int:
    """Cut and masked at sizes that the analysis never saw; returns how many of them the whole model can take."""
    inputs = subject.model.signature.inputs
    ran = 0
    for ratio in (0.2, 0.5, 0.8):
        removed = random_units(subject.analysis, ratio, np.random.default_rng(round(10 * ratio)))
        activations = removed_slabs(subject.analysis, removed)[1]
        small = cut(subject.model, subject.analysis, removed)
        masked = mask(subject.model, activations, subject._sizes_of(name for name, _ in activations))
        for sizes in others:
            shapes = {one.name: tuple(d if isinstance(d, int) else sizes[str(d)] for d in one.shape) for one in inputs}
            feeds = example_feeds(subject.model, shapes, np.random.default_rng(0))
            try:
                outputs(subject.model, feeds)
            except Exception:  # ONNX Runtime's errors have no common root
                continue
            ran += 1
            far = differences(outputs(small, feeds), outputs(masked, feeds))
            assert max(far.values()) < 1e-4, (ratio, sizes, far)
    return ran


@pytest.mark.parametrize("name", NETS)
def test_cut_equals_masked_at_other_sizes(name: str) -> None:
    text = NETS[name].format(**_LINES) if "{{" in NETS[name] else NETS[name]
    subject = Subject(weighted(text), name, BOUND.get(name))
    assert check_other_sizes(subject, OTHERS) >= 3
    if name in PRUNABLE:
        assert sorted((group.size, group.granularity) for group in subject.analysis.groups) == [
            (2, "channel"),
            (4, "channel"),
        ]


@pytest.mark.parametrize("name", architectures.ALL)
@pytest.mark.slow
def test_architectures_at_other_sizes(name: str) -> None:
    sizes = architectures.SIZES
    others = [dict(sizes, N=3, S=7, T=3, H=16, W=8), dict(sizes, N=1, S=1, T=1), dict(sizes, N=4, S=4, T=4, H=16, W=16)]
    model = architectures.ALL[name].build()
    for bound in (sizes, others[1]):
        check_other_sizes(Subject(model, name, bound), others)
