"""Activations that a linear kernel applies in its epilogue.

    none        x
    relu        max(x, 0)
    clip        min(max(x, low), high)
    gelu_erf    x/2 (1 + erf(x / sqrt 2))
    gelu_tanh   x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    silu        x sigmoid(x)
    sigmoid     1 / (1 + exp(-x))
    hard_swish  x min(max(x / 6 + 1/2, 0), 1)
    hard_sigmoid  min(max(low x + high, 0), 1): the bounds stand for its slope and its value at 0
    leaky_relu  max(x, low x), of a slope below 1

Absolute errors against float64 stay below 1e-6 of max(1, |x|); `tests/kernels/test_activation.py` measures them.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import scipy.special
from numpy.polynomial import Chebyshev, Polynomial
from numpy.typing import NDArray
from tvm.script import tirx as T

from spa_compiler.kernels.vector import LOG2_E, ZMM, const, constants, exp2, horner, pick, reciprocal, spread

NAMES = ("none", "relu", "clip", "gelu_erf", "gelu_tanh", "silu", "sigmoid", "hard_swish", "hard_sigmoid", "leaky_relu")

# erf(x) ~ x P(x^2) / Q(x^2) on [-4, 4]: Eigen's rational approximation, also in tvm.topi.fast_erf (Apache-2.0).
_ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)

# The left halves of both GELUs as ZMM polynomials, for equal parts of [-LEFT, 0]; further left they are 0.
_LEFT, _DEGREE = 5.5, 4


def reference(x: NDArray[np.float64], name: str, low: float = 0.0, high: float = 0.0) -> NDArray[np.float64]:
    """What `emit` computes, in float64."""
    if name == "relu":
        return np.maximum(x, 0.0)
    if name == "clip":
        return np.minimum(np.maximum(x, low), high)
    if name == "gelu_erf":
        return np.asarray(0.5 * x * (1.0 + scipy.special.erf(x / math.sqrt(2.0))))
    if name == "gelu_tanh":
        return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    if name == "silu":
        return np.asarray(x * scipy.special.expit(x))
    if name == "sigmoid":
        return np.asarray(scipy.special.expit(x))
    if name == "hard_swish":
        return x * np.minimum(np.maximum(x / 6.0 + 0.5, 0.0), 1.0)
    if name == "hard_sigmoid":
        return np.minimum(np.maximum(low * x + high, 0.0), 1.0)
    if name == "leaky_relu":
        return np.maximum(x, low * x)
    return x


def emit(x, name, low, high, width, isa):
    """The activation of `width` lanes as an expression; `low` and `high` are scalar expressions."""
    if name not in NAMES:
        raise ValueError(f"there is no activation {name!r}")
    if name == "none":
        return x
    x = T.bind(x)
    # max(a, b) is `a > b ? a : b`: x comes second, so that NaN stays NaN, as in ONNX Runtime
    if name == "relu":
        return T.max(const(0.0, width), x)
    if name == "clip":
        return T.min(spread(high, width), T.max(spread(low, width), x))
    if name == "leaky_relu":
        return T.max(spread(low, width) * x, x)
    if name in ("hard_swish", "hard_sigmoid"):
        slope, middle = (const(1 / 6, width), const(0.5, width))
        if name == "hard_sigmoid":
            slope, middle = spread(low, width), spread(high, width)
        gate = T.min(const(1.0, width), T.max(const(0.0, width), slope * x + middle))
        return x * gate if name == "hard_swish" else gate
    if name.startswith("gelu") and width == ZMM and isa.width == ZMM:
        return _gelu_by_parts(x, name)
    # Below these bounds the results are 0, but a large x times the last bit of the other factor would not be.
    x = T.bind(T.max(const(-4 * 2**0.5 if name == "gelu_erf" else -100.0, width), x))
    if name == "gelu_erf":
        z = T.bind(T.min(x * const(0.5**0.5, width), const(4.0, width)))
        zz = T.bind(z * z)
        # Q is negative all over the interval
        erf = z * horner(zz, _ERF_P, width) * reciprocal(horner(zz, _ERF_Q, width), width, isa)
        return x * const(0.5, width) * (const(1.0, width) + erf)
    # x sigmoid(y) in both: gelu_tanh has 1 + tanh(u) = 2 sigmoid(2 u)
    y = x
    if name == "gelu_tanh":
        y = x * (const(2 * math.sqrt(2 / math.pi), width) + const(2 * math.sqrt(2 / math.pi) * 0.044715, width) * x * x)
    sigmoid = reciprocal(const(1.0, width) + exp2(y * const(-LOG2_E, width), width), width, isa)
    return sigmoid if name == "sigmoid" else x * sigmoid


def _gelu_by_parts(x, name):
    """gelu(x) = max(x, 0) + gelu(-|x|), the second from a polynomial whose coefficients permutations find in registers.

    Half the instructions of the quotients below, and few of them multiply: products have the multipliers all the time.
    """
    kind = f"int32x{ZMM}"
    end = const(np.nextafter(np.float32(ZMM), np.float32(0)).item(), ZMM)
    # min(a, b) is `a < b ? a : b`: NaN, which no integer stands for, is the end here, and itself in what is added
    place = T.bind(T.min(T.max(x, -x) * const(ZMM / _LEFT, ZMM), end))
    part = T.bind(T.Cast(kind, place))
    inside = T.bind(place - T.Cast(kind.replace("int", "float"), part))
    first, *others = (pick([constants(row)], part) for row in _parts(name))
    for coefficient in others:
        first = first * inside + coefficient
    return T.max(const(0.0, ZMM), x) + first


@functools.cache
def _parts(name: str) -> NDArray[np.float64]:
    """The coefficients of each power, the highest first: [_DEGREE + 1, parts]. `name` is 0 at 0 and at the far end."""
    rows = []
    for part in range(ZMM):
        fitted = Chebyshev.interpolate(
            lambda t, part=part: reference(-(part + t) * (_LEFT / ZMM), name), _DEGREE, domain=[0, 1]
        )
        row = fitted.convert(kind=Polynomial).coef
        if part == 0:
            row[0] = 0.0
        if part == ZMM - 1:
            row[0] -= row.sum()
        rows.append(row[::-1])
    return np.asarray(np.array(rows).T, np.float64)
