"""Small nets in ONNX text: every input but x is a weight. Each is about one rule, or one combination of rules."""

from __future__ import annotations

import numpy as np

MLP = """net (float[N, 6] x, float[10, 6] w1, float[10] b1, float[10, 7] w2, float[7] b2, float[1, 7] s, float[7, 3] w3,
     float[3] b3) => (float[N, 3] y) {
  h1 = Gemm <transB = 1> (x, w1, b1)
  r1 = Sigmoid(h1)
  h2 = Gemm(r1, w2, b2)
  s2 = Mul(h2, s)
  r2 = HardSwish(s2)
  h3 = MatMul(r2, w3)
  y = Add(h3, b3)
}"""

GATED = """net (float[N, 5, 6] x, float[6, 8] wg, float[6, 8] wu, float[8, 6] wd) => (float[N, 5, 6] y) {
  g = MatMul(x, wg)
  a = Sigmoid(g)
  u = MatMul(x, wu)
  m = Mul(a, u)
  y = MatMul(m, wd)
}"""

CONV_FLATTEN = """net (float[N, 3, 6, 6] x, float[8, 3, 3, 3] w1, float[8] b1, float[8, 1, 1] scale,
     float[8, 1, 1] slope, float[5, 8, 3, 3] w2, float[80, 4] w3, float[4] b3) => (float[N, 4] y) {
  c1 = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
  m1 = Mul(c1, scale)
  p1 = PRelu(m1, slope)
  c2 = Conv <strides = [1, 1], pads = [0, 0, 0, 0]> (p1, w2)
  r2 = Cos(c2)
  one = Constant <value = float[1, 5, 1, 1] {0.5, 1.5, 2.0, -1.0, 0.25}> ()
  a2 = Add(r2, one)
  f = Flatten(a2)
  y = Gemm(f, w3, b3)
}"""

RESIDUAL = """net (float[2, 3, 5, 5] x, float[8, 3, 1, 1] w0, float[6, 8, 3, 3] w1, float[6] b1, float[8, 6, 3, 3] w2,
     float[8] b2, float[4, 8, 1, 1] w3) => (float[2, 4, 5, 5] y) {
  s0 = Conv(x, w0)
  r0 = Relu(s0)
  c1 = Conv <pads = [1, 1, 1, 1]> (r0, w1, b1)
  r1 = Exp(c1)
  c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2, b2)
  s1 = Add(c2, r0)
  r2 = Clip(s1)
  y = Conv(r2, w3)
}"""

DEPTHWISE = """net (float[2, 3, 5, 5] x, float[6, 3, 1, 1] w0, float[6, 1, 3, 3] wd, float[6] bd, float[12, 1, 3, 3] wm,
     float[4, 12, 1, 1] w1) => (float[2, 4, 1, 1] y) {
  c0 = Conv(x, w0)
  d = Conv <group = 6> (c0, wd, bd)
  t = Tanh(d)
  m = Conv <group = 6> (t, wm)
  y = Conv(m, w1)
}"""

GROUPED = """net (float[2, 3, 4, 4] x, float[16, 3, 1, 1] w0, float[24, 4, 1, 1] w1, float[24] b1,
     float[24, 3, 3, 3] w2, float[5, 24, 1, 1] w3) => (float[2, 5, 4, 4] y) {
  c0 = Conv(x, w0)
  c1 = Conv <group = 4> (c0, w1, b1)
  t = Softplus(c1)
  c2 = Conv <group = 8, pads = [1, 1, 1, 1]> (t, w2)
  y = Conv(c2, w3)
}"""

GROUPED_FLATTEN = """net (float[2, 3, 4, 4] x, float[8, 3, 1, 1] w0, float[12, 4, 1, 1] w1, float[192, 5] w2)
     => (float[2, 5] y) {
  c0 = Conv(x, w0)
  c1 = Conv <group = 2> (c0, w1)
  f = Flatten(c1)
  y = Gemm(f, w2)
}"""

SCORES = """net (float[N, 5, 6] x, float[6, 8] wq, float[8] bq, float[6, 8] wk, float[5, 3] wo) => (float[N, 5, 3] y) {
  q0 = MatMul(x, wq)
  q = Add(bq, q0)
  k = MatMul(x, wk)
  kt = Transpose <perm = [0, 2, 1]> (k)
  s = MatMul(q, kt)
  y = MatMul(s, wo)
}"""

TIED = """net (float[N, 6] x, float[6, 9] w, float[9] b) => (float[N, 6] y) {
  h = Gemm(x, w, b)
  e = Elu(h)
  y = Gemm <transB = 1> (e, w)
}"""

SHARED = """net (float[N, 7] x, float[7, 9] w0, float[9, 9] w, float[9, 2] w1) => (float[N, 2] y) {
  h0 = MatMul(x, w0)
  h1 = MatMul(h0, w)
  i1 = Identity(h1)
  h2 = MatMul(i1, w)
  y = MatMul(h2, w1)
}"""

VECTORS = """net (float[4, 6] x, float[6, 8] w, float[8] v, float[8] u) => (float[4] y, float z) {
  h = MatMul(x, w)
  y = MatMul(h, v)
  d = Mul(v, u)
  z = MatMul(d, v)
}"""

WHERE = """net (float[N, 4] x, float[4, 6] wa, float[4, 6] wb, float[6, 2] w1, float[6] t) => (float[N, 2] y) {
  a = MatMul(x, wa)
  b = MatMul(x, wb)
  c = Greater(a, t)
  s = Where(c, a, b)
  m = Max(s, a, t)
  y = MatMul(m, w1)
}"""

ALL = {
    "mlp": MLP,
    "gated": GATED,
    "conv_flatten": CONV_FLATTEN,
    "residual": RESIDUAL,
    "depthwise": DEPTHWISE,
    "grouped": GROUPED,
    "grouped_flatten": GROUPED_FLATTEN,
    "scores": SCORES,
    "tied": TIED,
    "shared": SHARED,
    "vectors": VECTORS,
    "where": WHERE,
}


def random_convolutional(seed: int) -> str:
    """A chain of 3 to 8 random layers on 12 or 24 channels: grouped, depthwise, with constants and residuals.

    Group counts that do not fit together (4 and 6) are among them.
    """
    rng = np.random.default_rng(seed)
    weights, lines = ["float[12, 2, 1, 1] w0"], ["t0 = Conv(x, w0)"]
    channels = [12]
    for layer in range(1, int(rng.integers(4, 10))):
        now, kind = channels[-1], rng.choice(["conv", "grouped", "depthwise", "scale", "unary", "add"])
        earlier = [place for place, size in enumerate(channels) if size == now]
        if kind in ("conv", "grouped", "depthwise"):
            group = {"conv": 1, "grouped": int(rng.choice([2, 3, 4, 6])), "depthwise": now}[kind]
            size = (
                int(rng.choice([12, 24]))
                if kind != "depthwise"
                else int(rng.choice([now, 2 * now if now < 24 else now]))
            )
            weights.append(f"float[{size}, {now // group}, 3, 3] w{layer}")
            lines.append(f"t{layer} = Conv <group = {group}, pads = [1, 1, 1, 1]> (t{layer - 1}, w{layer})")
            now = size
        elif kind == "scale":
            weights.append(f"float[{now}, 1, 1] w{layer}")
            lines.append(f"t{layer} = Mul(t{layer - 1}, w{layer})")
        elif kind == "unary":
            lines.append(f"t{layer} = Sigmoid(t{layer - 1})")
        else:
            lines.append(f"t{layer} = Add(t{layer - 1}, t{rng.choice(earlier)})")
        channels.append(now)
    last = len(channels) - 1
    weights.append(f"float[{channels[-1] * 9}, 3] wz")
    lines += [f"f = Flatten(t{last})", "y = MatMul(f, wz)"]
    body = "\n  ".join(lines)
    return f"net (float[2, 2, 3, 3] x, {', '.join(weights)}) => (float[2, 3] y) {{\n  {body}\n}}"
