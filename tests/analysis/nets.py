"""Small nets in ONNX text: every input but x is a weight. Each is about one rule, or one combination of rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from tests.analysis.builder import Net

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


def random_movement(seed: int) -> onnx.ModelProto:
    """Channels on the last axis or on axis 1, split, joined, sliced, gathered, padded, factored, repeated, normalized.

    Much of what comes out cannot be pruned, as factors that do not fit together meet; what can be must be exact.
    """
    return _Movement(seed).model()


class _Movement:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.net = Net(f"movement{seed}", int(self.rng.choice([13, 17, 18])))
        self.last = bool(self.rng.random() < 0.5)
        self.axis = 2 if self.last else 1
        self.steps = [step for name, step in vars(_Movement).items() if name.startswith("step_")]

    def model(self) -> onnx.ModelProto:
        x = self.net.input("x", "N", 5, 6) if self.last else self.net.input("x", "N", 6, 3, 2)
        self.earlier = [(self.layer(x, 6, 12), 12)]
        for _ in range(int(self.rng.integers(3, 9))):
            x, size = self.earlier[-1]
            step = self.steps[self.rng.integers(len(self.steps))]
            self.earlier.append(step(self, x, size))
            if not 4 <= self.earlier[-1][1] <= 40:
                self.earlier.append((self.layer(*self.earlier[-1], 12), 12))
        x, size = self.earlier[-1]
        return self.net.model(self.layer(x, size, 3))

    def pick(self, *options: Any) -> Any:
        return options[self.rng.integers(len(options))]

    def layer(self, x: str, before: int, after: int) -> str:
        if self.last:
            return self.net.linear(x, before, after)
        fits = [group for group in (1, 2, 3, 4) if before % group == 0 and after % group == 0]
        return self.net.conv(x, before, after, self.pick(1, 3), group=self.pick(*fits))

    def shape(self, *sizes: int) -> list[int]:
        """The whole shape, with these sizes in the place of the channels."""
        return [0, 5, *sizes] if self.last else [-1, *sizes, 3, 2]

    def constant(self, *sizes: int) -> str:
        return self.net.weight(*sizes, *([] if self.last else [1, 1]), std=1.0)

    def divisor(self, size: int) -> int:
        fits = [number for number in (2, 3, 4, 6) if size % number == 0 and size > number]
        return int(self.pick(*fits)) if fits else 1

    def step_layer(self, x: str, size: int) -> tuple[str, int]:
        after = int(self.pick(8, 12, 12, 18, 24))
        return self.net.sigmoid(self.layer(x, size, after)), after

    def step_unary(self, x: str, size: int) -> tuple[str, int]:
        return self.net.op(self.pick("Sigmoid", "Cos", "Relu", "Softplus"), x), size

    def step_constant(self, x: str, size: int) -> tuple[str, int]:
        return self.net.op(self.pick("Add", "Mul", "Max", "Sub"), x, self.constant(size)), size

    def step_join(self, x: str, size: int) -> tuple[str, int]:
        """With something earlier of the same size."""
        other = self.pick(*[name for name, own in self.earlier if own == size])
        return self.net.op(self.pick("Add", "Mul"), x, other), size

    def step_concat(self, x: str, size: int) -> tuple[str, int]:
        name, own = self.pick(*self.earlier)
        return self.net.concat(name, x, axis=self.axis), size + own

    def step_split(self, x: str, size: int) -> tuple[str, int]:
        """In two or three parts, one of which changes, joined in another order or added up."""
        count = 3 if size % 3 == 0 and self.rng.random() < 0.5 else 2
        even = size % count == 0 and self.rng.random() < 0.6
        first = size // count if even else int(self.rng.integers(1, size // 2))
        sizes = [first] * count if even else [first, size - first]
        parts = self.net.split(x, *sizes, axis=self.axis)
        parts[0] = self.net.sigmoid(parts[0])
        if even and self.rng.random() < 0.5:
            return self.net.add(*parts), first
        return self.net.concat(*(parts[place] for place in self.rng.permutation(len(parts))), axis=self.axis), size

    def step_slice(self, x: str, size: int) -> tuple[str, int]:
        start, step = int(self.rng.integers(0, size // 2)), int(self.pick(1, 1, 2, 3))
        end = int(self.rng.integers(start + 2, size + 1))
        if self.rng.random() < 0.2:
            return self.net.slice(x, size - 1, -(2**62), self.axis, -1), size
        return self.net.slice(x, start, end, self.axis, step), -(-(end - start) // step)

    def step_gather(self, x: str, size: int) -> tuple[str, int]:
        repeated = self.rng.integers(-size, size, int(self.rng.integers(3, size + 3)))
        indices = self.pick(self.rng.permutation(size), repeated)
        return self.net.gather(x, self.net.ints(*indices.tolist()), axis=self.axis), len(indices)

    def step_pad(self, x: str, size: int) -> tuple[str, int]:
        low, high = int(self.rng.integers(0, 3)), int(self.rng.integers(0, 4))
        rank = 3 if self.last else 4
        pads = [0] * 2 * rank
        pads[self.axis], pads[rank + self.axis] = low, high
        value = self.net.const(float(self.pick(0.0, 0.5)))
        return self.net.op("Pad", x, self.net.ints(*pads), value), size + low + high

    def step_shuffle(self, x: str, size: int) -> tuple[str, int]:
        inner = self.divisor(size)
        x = self.net.reshape(x, *self.shape(size // inner, inner))
        perm = [0, 1, 3, 2] if self.last else [0, 2, 1, 3, 4]
        return self.net.reshape(self.net.transpose(x, *perm), *self.shape(size)), size

    def step_factor(self, x: str, size: int) -> tuple[str, int]:
        """Something happens on one of two factors of the axis."""
        inner = self.divisor(size)
        outer = size // inner
        x = self.net.reshape(x, *self.shape(outer, inner))
        place = self.axis + int(self.rng.integers(2))
        left = inner if place == self.axis else outer
        kind = self.pick("sum", "mean", "softmax", "constant", "pick", "square")
        if kind == "sum":
            return self.net.op("ReduceSum", x, self.net.ints(place), keepdims=0), left
        if kind == "mean":
            return self.net.mean(x, place, keep=False), left
        if kind == "pick":
            return self.net.gather(x, self.net.number(0), axis=place), left
        if kind == "softmax":
            x = self.net.softmax(x, place)
        elif kind == "square":
            total = self.net.op("ReduceSum", self.net.mul(x, x), self.net.ints(place))
            x = self.net.op("Div", x, self.net.add(total, self.net.const(0.1)))
        else:
            x = self.net.mul(x, self.constant(outer, 1) if place == self.axis else self.constant(inner))
        return self.net.reshape(x, *self.shape(size)), size

    def step_repeat(self, x: str, size: int) -> tuple[str, int]:
        """Tiled, or every channel twice in a row."""
        if self.rng.random() < 0.5:
            repeats = [1] * (3 if self.last else 4)
            repeats[self.axis] = 2
            return self.net.op("Tile", x, self.net.ints(*repeats)), 2 * size
        x = self.net.unsqueeze(x, self.axis + 1)
        target = [1, 1, 1, 2] if self.last else [1, 1, 2, 1, 1]
        return self.net.reshape(self.net.op("Expand", x, self.net.ints(*target)), *self.shape(2 * size)), 2 * size

    def step_norm(self, x: str, size: int) -> tuple[str, int]:
        """Over the channels, decomposed, or without the mean."""
        if self.rng.random() < 0.5:
            x = self.net.op("Sub", x, self.net.mean(x, self.axis))
        square = self.net.add(self.net.mean(self.net.mul(x, x), self.axis), self.net.const(1e-3))
        return self.net.mul(self.net.op("Div", x, self.net.op("Sqrt", square)), self.constant(size)), size

    def step_norm_fused(self, x: str, size: int) -> tuple[str, int]:
        if self.last:
            return (self.net.fused_layer_norm(x, size) if self.net.opset >= 17 else self.net.layer_norm(x, size)), size
        return self.net.op("InstanceNormalization", x, self.net.gain(size), self.net.bias(size)), size


def random_transformer(seed: int) -> onnx.ModelProto:
    """One or two blocks: queries, keys and values fused in any order or apart, grouped, rotated, normalized or not."""
    return _Transformer(seed).model()


class _Transformer:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.net = Net(f"transformer{seed}", int(self.rng.choice([13, 17])))
        self.size, self.length = int(self.rng.choice([8, 12])), 5
        self.kv, self.repeats = int(self.rng.integers(1, 4)), int(self.rng.integers(1, 4))
        self.width = int(self.rng.choice([4, 6]))
        self.fused = self.pick("apart", "three first", "heads first", "blocks", "pair")
        if self.fused in ("three first", "heads first"):
            self.repeats = 1
        self.rotary, self.qk_norm, self.post = (bool(self.rng.random() < 0.4) for _ in range(3))
        self.norm = self.pick(self.net.layer_norm, self.net.rms_norm)
        if self.rotary:
            angles = np.arange(self.length)[:, None] / 10.0 ** (np.arange(self.width // 2) / 2)
            both = np.concatenate([angles, angles], axis=1)
            self.cos, self.sin = self.net.const(np.cos(both)), self.net.const(np.sin(both))

    def pick(self, *options: Any) -> Any:
        return options[self.rng.integers(len(options))]

    def model(self) -> onnx.ModelProto:
        x = self.net.embed(self.net.ids("ids", "N", self.length), 9, self.size)
        for _ in range(int(self.rng.integers(1, 3))):
            if self.post:
                x = self.norm(self.net.add(x, self.attention(x)), self.size)
                x = self.norm(self.net.add(x, self.feed_forward(x)), self.size)
            else:
                x = self.net.add(x, self.attention(self.norm(x, self.size)))
                x = self.net.add(x, self.feed_forward(self.norm(x, self.size)))
        return self.net.model(self.net.linear(self.norm(x, self.size), self.size, 4))

    def feed_forward(self, x: str) -> str:
        net, hidden = self.net, int(self.rng.choice([10, 14]))
        kind = self.pick("mlp", "gated", "gated at once")
        if kind == "mlp":
            return net.mlp(x, self.size, hidden)
        if kind == "gated":
            left, right = (net.linear(x, self.size, hidden) for _ in range(2))
        else:
            left, right = net.split(net.linear(x, self.size, 2 * hidden), hidden, hidden, axis=-1)
        return net.linear(net.mul(net.silu(left), right), hidden, self.size)

    def attention(self, x: str) -> str:
        net, heads, width = self.net, self.kv * self.repeats, self.width
        q, k, v = self.projections(x)
        if self.qk_norm:
            q, k = self.norm(q, width), self.norm(k, width)
        if self.rotary:
            q, k = self.rotated(q), self.rotated(k)
        if self.repeats > 1:
            k, v = self.repeated(k), self.repeated(v)
        y = net.attend(q, k, v, width)
        if self.rng.random() < 0.3:  # a gain for each head
            y = net.mul(y, net.gain(heads, 1, 1))
        return net.linear(net.heads_last(y, heads * width, self.length), heads * width, self.size)

    def projections(self, x: str) -> list[str]:
        """[N, H, S, d] each."""
        net, length, width, heads = self.net, self.length, self.width, self.kv * self.repeats
        if self.fused == "three first":
            y = net.reshape(net.linear(x, self.size, 3 * heads * width), 0, length, 3, heads, width)
            y = net.transpose(y, 2, 0, 3, 1, 4)
            return [net.gather(y, net.number(place)) for place in range(3)]
        if self.fused == "heads first":
            y = net.reshape(net.linear(x, self.size, 3 * heads * width), 0, length, heads, 3 * width)
            return net.split(net.transpose(y, 0, 2, 1, 3), width, width, width, axis=3)
        counts = (heads, self.kv, self.kv)
        if self.fused == "blocks":
            sizes = [count * width for count in counts]
            parts = net.split(net.linear(x, self.size, sum(sizes)), *sizes, axis=2)
        elif self.fused == "pair":
            both = net.reshape(net.linear(x, self.size, 2 * self.kv * width), 0, length, 2, self.kv * width)
            parts = [net.linear(x, self.size, heads * width)]
            parts += [net.squeeze(part, 2) for part in net.split(both, 1, 1, axis=2)]
        else:
            parts = [net.linear(x, self.size, count * width) for count in counts]
        return [net.heads_first(part, count, width, length) for part, count in zip(parts, counts, strict=True)]

    def rotated(self, x: str) -> str:
        net, half = self.net, self.width // 2
        low, high = net.split(x, half, half, axis=3)
        turned = net.concat(net.op("Neg", high), low, axis=3)
        return net.add(net.mul(x, self.cos), net.mul(turned, self.sin))

    def repeated(self, x: str) -> str:
        net, length, width = self.net, self.length, self.width
        x = net.op("Expand", net.unsqueeze(x, 2), net.ints(1, self.kv, self.repeats, length, width))
        return net.reshape(x, -1, self.kv * self.repeats, length, width)
