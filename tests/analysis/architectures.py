"""Small architectures as raw exports look, every classic family: what the analysis must find in each.

Sizes are tiny, and within a net distinct where the architecture does not ask for equal ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from tests.analysis.builder import Net

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Architecture:
    """A net, and what the analysis must find in it at least.

    `groups`: how many groups; `share`: the part of the parameters that some unit can remove.
    """

    build: Callable[[], onnx.ModelProto]
    groups: int
    share: float


ALL: dict[str, Architecture] = {}

SIZES = {"N": 2, "S": 6, "T": 5, "H": 8, "W": 12}
"""What the nets' open dimensions are when they run."""

_Builder = Callable[[], onnx.ModelProto]


def architecture(groups: int, share: float = 0.95) -> Callable[[_Builder], _Builder]:
    """Registers a net."""

    def register(build: _Builder) -> _Builder:
        ALL[build.__name__] = Architecture(build, groups, share)
        return build

    return register


# ---------------------------------------------------------------- residual nets


def _basic(net: Net, x: str, before: int, after: int, hidden: int, stride: int, norm: bool) -> str:
    layer = net.conv_bn if norm else net.conv
    y = net.relu(layer(x, before, hidden, stride=stride))
    y = layer(y, hidden, after)
    skip = layer(x, before, after, 1, stride=stride) if (before, stride) != (after, 1) else x
    return net.relu(net.add(y, skip))


def _resnet(name: str, norm: bool) -> onnx.ModelProto:
    net = Net(name, 13)
    x = net.input("x", "N", 3, 12, 12)
    x = net.relu(net.conv_bn(x, 3, 8, stride=2) if norm else net.conv(x, 3, 8, stride=2))
    x = _basic(net, net.maxpool(x), 8, 8, 10, 1, norm)
    x = _basic(net, x, 8, 14, 12, 2, norm)
    return net.model(net.head(x, 14))


@architecture(groups=4)
def resnet() -> onnx.ModelProto:
    return _resnet("resnet", norm=True)


@architecture(groups=4)
def resnet_folded() -> onnx.ModelProto:
    return _resnet("resnet_folded", norm=False)


@architecture(groups=6)
def bottleneck() -> onnx.ModelProto:
    net = Net("bottleneck", 11)
    x = net.input("x", 2, 3, 8, 8)
    x = net.relu(net.conv_bn(x, 3, 8))
    for before in (8, 20):
        y = net.relu(net.conv_bn(x, before, 6, 1))
        y = net.relu(net.conv_bn(y, 6, 7, 3))
        y = net.conv_bn(y, 7, 20, 1)
        x = net.relu(net.add(y, net.conv_bn(x, before, 20, 1) if before == 8 else x))
    return net.model(net.head(x, 20))


@architecture(groups=3)
def preact() -> onnx.ModelProto:
    net = Net("preact", 12)
    x = net.conv(net.input("x", "N", 3, 8, 8), 3, 10, bias=False)
    for hidden in (6, 9):
        y = net.conv(net.relu(net.bn(x, 10)), 10, hidden, bias=False)
        y = net.conv(net.relu(net.bn(y, hidden)), hidden, 10, bias=False)
        x = net.add(y, x)
    return net.model(net.head(net.relu(net.bn(x, 10)), 10))


@architecture(groups=5)
def option_a() -> onnx.ModelProto:
    """CIFAR shortcut: every second pixel, and zero channels before and after."""
    net = Net("option_a", 13)
    x = net.relu(net.conv_bn(net.input("x", "N", 3, 8, 8), 3, 8))
    x = _basic(net, x, 8, 8, 6, 1, norm=True)
    y = net.conv_bn(net.relu(net.conv_bn(x, 8, 10, stride=2)), 10, 16)
    skip = net.op("Slice", x, net.ints(0, 0), net.ints(2**62, 2**62), net.ints(2, 3), net.ints(2, 2))
    skip = net.op("Pad", skip, net.ints(0, 4, 0, 0, 0, 4, 0, 0), net.const(0.0), mode="constant")
    return net.model(net.head(net.relu(net.add(y, skip)), 16))


@architecture(groups=3)
def repvgg() -> onnx.ModelProto:
    net = Net("repvgg", 14)
    x = net.input("x", "N", 3, 8, 8)
    before = 3
    for after in (8, 8, 12, 12):
        branches = [net.conv_bn(x, before, after, 3), net.conv_bn(x, before, after, 1)]
        if before == after:
            branches.append(net.bn(x, before))
        x, before = net.relu(net.add(*branches)), after
    return net.model(net.head(net.relu(net.conv_bn(x, 12, 9)), 9))


@architecture(groups=7)
def resnext() -> onnx.ModelProto:
    net = Net("resnext", 13)
    x = net.relu(net.conv_bn(net.input("x", "N", 3, 8, 8), 3, 12))
    for width in (16, 24):
        y = net.relu(net.conv_bn(x, 12, width, 1))
        y = net.relu(net.conv_bn(y, width, width, 3, group=4))
        x = net.relu(net.add(net.conv_bn(y, width, 12, 1), x))
    return net.model(net.head(x, 12))


@architecture(groups=6)
def res2net() -> onnx.ModelProto:
    net = Net("res2net", 13)
    x = net.relu(net.conv_bn(net.input("x", "N", 3, 8, 8), 3, 10))
    y = net.relu(net.conv_bn(x, 10, 16, 1))
    parts = net.split(y, 4, 4, 4, 4)
    done = [net.relu(net.conv_bn(parts[0], 4, 4))]
    for part in parts[1:3]:
        done.append(net.relu(net.conv_bn(net.add(done[-1], part), 4, 4)))
    y = net.conv_bn(net.concat(*done, parts[3]), 16, 10, 1)
    return net.model(net.head(net.relu(net.add(y, x)), 10))


# ---------------------------------------------------------------- concatenation


@architecture(groups=8)
def densenet() -> onnx.ModelProto:
    net = Net("densenet", 13)
    features = [net.relu(net.conv_bn(net.input("x", "N", 3, 8, 8), 3, 8))]
    sizes = [8]
    for _ in range(3):
        x = net.concat(*features) if len(features) > 1 else features[0]
        y = net.conv(net.relu(net.bn(x, sum(sizes))), sum(sizes), 10, 1, bias=False)
        features.append(net.conv(net.relu(net.bn(y, 10)), 10, 5, 3, bias=False))
        sizes.append(5)
    x = net.relu(net.bn(net.concat(*features), sum(sizes)))
    x = net.avgpool(net.conv(x, sum(sizes), 11, 1, bias=False))
    return net.model(net.head(net.relu(net.bn(x, 11)), 11))


@architecture(groups=7)
def unet() -> onnx.ModelProto:
    net = Net("unet", 13)
    skips: list[tuple[str, int]] = []
    x, before = net.input("x", "N", 2, 8, 8), 2
    for size in (6, 9):
        x = net.relu(net.conv_bn(x, before, size))
        skips.append((x, size))
        x, before = net.maxpool(x), size
    x, before = net.relu(net.conv_bn(x, before, 12)), 12
    for skip, size in reversed(skips):
        x = net.concat(net.deconv(x, before, size), skip)
        x, before = net.relu(net.conv_bn(x, 2 * size, size + 1)), size + 1
    return net.model(net.conv(x, before, 3, 1))


@architecture(groups=4)
def unet_resize() -> onnx.ModelProto:
    """Dynamic sizes: what is upsampled gets the size of the skip."""
    net = Net("unet_resize", 13)
    x = net.input("x", "N", 2, "H", "W")
    skip = net.relu(net.conv(x, 2, 7))
    deep = net.relu(net.conv(net.maxpool(skip), 7, 10))
    sizes = net.concat(
        *(net.size_of(deep, 0), net.size_of(deep, 1)), net.size_of(skip, 2), net.size_of(skip, 3), axis=0
    )
    up = net.op("Resize", deep, "", "", sizes, mode="nearest", nearest_mode="floor")
    up = net.op("Resize", up, "", net.const([1.0, 1.0, 2.0, 2.0]), mode="linear")
    x = net.relu(net.conv(net.maxpool(up), 10, 8))
    x = net.relu(net.conv(net.concat(skip, x), 15, 9))
    return net.model(net.conv(x, 9, 2, 1))


@architecture(groups=8)
def inception() -> onnx.ModelProto:
    net = Net("inception", 13)
    x = net.relu(net.conv(net.input("x", "N", 3, 8, 8), 3, 9))
    branches = [
        net.relu(net.conv(x, 9, 5, 1)),
        net.relu(net.conv(net.relu(net.conv(x, 9, 6, 1)), 6, 7, 3)),
        net.relu(net.conv(net.relu(net.conv(x, 9, 4, 1)), 4, 6, 5)),
        net.relu(net.conv(net.maxpool(x, 3, 1), 9, 5, 1)),
    ]
    return net.model(net.head(net.relu(net.conv(net.concat(*branches), 23, 10)), 10))


@architecture(groups=7)
def c2f() -> onnx.ModelProto:
    """YOLOv8: split in two, bottlenecks on the second half, everything concatenated."""
    net = Net("c2f", 13)
    x = net.silu(net.conv_bn(net.input("x", "N", 3, 8, 8), 3, 8))
    parts = net.split(net.silu(net.conv_bn(x, 8, 12, 1)), 6, 6)
    for _ in range(2):
        y = net.silu(net.conv_bn(net.silu(net.conv_bn(parts[-1], 6, 7)), 7, 6))
        parts.append(net.add(parts[-1], y))
    x = net.silu(net.conv_bn(net.concat(*parts), 24, 10, 1))
    pooled = [x]
    for _ in range(2):  # SPPF
        pooled.append(net.maxpool(pooled[-1], 3, 1))
    return net.model(net.conv(net.silu(net.conv_bn(net.concat(*pooled), 30, 9, 1)), 9, 4, 1))


@architecture(groups=3)
def ghost() -> onnx.ModelProto:
    """A cheap depthwise half is concatenated; a slice trims it to the size wanted."""
    net = Net("ghost", 13)
    x, before = net.relu(net.conv_bn(net.input("x", "N", 3, 8, 8), 3, 8)), 8
    for after, primary in ((12, 6), (11, 6)):
        main = net.relu(net.conv_bn(x, before, primary, 1))
        cheap = net.relu(net.conv_bn(main, primary, primary, 3, group=primary))
        x, before = net.slice(net.concat(main, cheap), 0, after, 1), after
    return net.model(net.head(x, before))


@architecture(groups=7)
def fpn() -> onnx.ModelProto:
    """Lateral connections, three outputs."""
    net = Net("fpn", 13)
    x, before, stages = net.input("x", 1, 3, 16, 16), 3, []
    for size in (6, 8, 10):
        x, before = net.relu(net.conv_bn(x, before, size, stride=2)), size
        stages.append((x, size))
    laterals = [net.conv(stage, size, 7, 1) for stage, size in stages]
    tops = [laterals[-1]]
    for lateral in reversed(laterals[:-1]):
        up = net.op("Resize", tops[-1], "", net.const([1.0, 1.0, 2.0, 2.0]), mode="nearest")
        tops.append(net.add(lateral, up))
    heads = [net.conv(net.relu(net.conv(top, 7, 9)), 9, 4, 1) for top in tops]
    return net.model(*heads)


# ---------------------------------------------------------------- groups, shuffles, attention over channels


def _shuffle(net: Net, x: str, groups: int, size: int, height: int) -> str:
    x = net.reshape(x, -1, groups, size // groups, height, height)
    return net.reshape(net.transpose(x, 0, 2, 1, 3, 4), -1, size, height, height)


@architecture(groups=2, share=0.6)
def shufflenet_v1() -> onnx.ModelProto:
    """Between grouped convolutions, a shuffle of 3 x 4 channels ties all of them; only the slots of the trunk are free."""
    net = Net("shufflenet_v1", 13)
    x = net.relu(net.conv_bn(net.input("x", "N", 3, 8, 8), 3, 12))
    y = net.relu(net.conv_bn(x, 12, 12, 1, group=3))
    y = net.conv_bn(_shuffle(net, y, 3, 12, 8), 12, 12, 3, group=12)
    x = net.relu(net.add(net.conv_bn(y, 12, 12, 1, group=3), x))
    y = net.relu(net.conv_bn(x, 12, 18, 1, group=3))
    y = net.conv_bn(_shuffle(net, y, 3, 18, 8), 18, 18, 3, group=18, stride=2)
    y = net.conv_bn(y, 18, 15, 1, group=3)
    x = net.relu(net.concat(net.avgpool(x), y))
    return net.model(net.head(x, 27))


@architecture(groups=5)
def shufflenet_v2() -> onnx.ModelProto:
    net = Net("shufflenet_v2", 13)
    x = net.relu(net.conv_bn(net.input("x", "N", 3, 8, 8), 3, 12))
    for _ in range(2):
        left, right = net.split(x, 6, 6)
        right = net.relu(net.conv_bn(right, 6, 6, 1))
        right = net.conv_bn(right, 6, 6, 3, group=6)
        right = net.relu(net.conv_bn(right, 6, 6, 1))
        x = _shuffle(net, net.concat(left, right), 2, 12, 8)
    return net.model(net.head(net.relu(net.conv_bn(x, 12, 10, 1)), 10))


@architecture(groups=3)
def depthwise_multiplier() -> onnx.ModelProto:
    net = Net("depthwise_multiplier", 9)
    x = net.relu(net.conv(net.input("x", 2, 3, 8, 8), 3, 6))
    x = net.relu(net.conv_bn(x, 6, 18, 3, group=6))
    x = net.relu(net.conv(x, 18, 10, 1))
    return net.model(net.head(x, 10))


@architecture(groups=5)
def mobilenet_v2() -> onnx.ModelProto:
    net = Net("mobilenet_v2", 13)
    x = net.relu6(net.conv_bn(net.input("x", "N", 3, 8, 8), 3, 6, stride=2))
    x = net.conv_bn(net.relu6(net.conv_bn(x, 6, 6, 3, group=6)), 6, 5, 1)
    for hidden in (15, 20):
        y = net.relu6(net.conv_bn(x, 5, hidden, 1))
        y = net.relu6(net.conv_bn(y, hidden, hidden, 3, group=hidden))
        x = net.add(x, net.conv_bn(y, hidden, 5, 1))
    x = net.relu6(net.conv_bn(x, 5, 24, 1))
    return net.model(net.gemm(net.mean(x, 2, 3, keep=False), 24, 7))


def _squeeze_excite(net: Net, x: str, size: int, squeezed: int) -> str:
    gate = net.relu(net.conv(net.mean(x, 2, 3), size, squeezed, 1))
    gate = net.op("HardSigmoid", net.conv(gate, squeezed, size, 1), alpha=1 / 6)
    return net.mul(gate, x)


@architecture(groups=7)
def mobilenet_v3() -> onnx.ModelProto:
    net = Net("mobilenet_v3", 13)
    x = net.hardswish(net.conv_bn(net.input("x", "N", 3, 8, 8), 3, 6))
    for hidden in (14, 18):
        y = net.hardswish(net.conv_bn(x, 6, hidden, 1))
        y = net.hardswish(net.conv_bn(y, hidden, hidden, 5, group=hidden))
        x = net.add(x, net.conv_bn(_squeeze_excite(net, y, hidden, 5), hidden, 6, 1))
    x = net.op("Flatten", net.op("GlobalAveragePool", net.hardswish(net.conv(x, 6, 16, 1))))
    return net.model(net.gemm(net.hardswish(net.gemm(x, 16, 11)), 11, 4))


@architecture(groups=3)
def seresnet_linear() -> onnx.ModelProto:
    """Squeeze and excite through Gemm: the gate is reshaped back to [N, C, 1, 1] and expanded."""
    net = Net("seresnet_linear", 13)
    x = net.relu(net.conv_bn(net.input("x", "N", 3, 6, 6), 3, 8))
    y = net.conv_bn(net.relu(net.conv_bn(x, 8, 9)), 9, 8)
    squeezed = net.op(
        "Reshape", net.op("GlobalAveragePool", y), net.concat(net.size_of(y, 0), net.size_of(y, 1), axis=0)
    )
    gate = net.sigmoid(net.gemm(net.relu(net.gemm(squeezed, 8, 4)), 4, 8))
    gate = net.reshape_to(gate, net.size_of(y, 0), net.size_of(y, 1), 1, 1)
    y = net.mul(y, net.op("Expand", gate, net.op("Shape", y)))
    return net.model(net.head(net.relu(net.add(y, x)), 8))


@architecture(groups=4)
def selective_kernel() -> onnx.ModelProto:
    """Softmax over two branches, not over channels."""
    net = Net("selective_kernel", 13)
    x = net.relu(net.conv_bn(net.input("x", "N", 3, 8, 8), 3, 7))
    paths = [net.relu(net.conv_bn(x, 7, 10, 3, dilation=d)) for d in (1, 2)]
    stacked = net.concat(*(net.unsqueeze(path, 1) for path in paths), axis=1)
    summed = net.op("ReduceSum", stacked, net.ints(1), keepdims=0)
    squeezed = net.relu(net.conv_bn(net.op("GlobalAveragePool", summed), 10, 6, 1))
    gate = net.reshape(net.conv(squeezed, 6, 20, 1), -1, 2, 10, 1, 1)
    x = net.op("ReduceSum", net.mul(stacked, net.softmax(gate, 1)), net.ints(1), keepdims=0)
    return net.model(net.head(net.relu(net.conv(x, 10, 9, 1)), 9))


@architecture(groups=4)
def split_attention() -> onnx.ModelProto:
    """ResNeSt: a grouped convolution makes radix x channels, weighted by a softmax over the radix."""
    net = Net("split_attention", 13)
    x = net.relu(net.conv_bn(net.input("x", "N", 3, 6, 6), 3, 8))
    y = net.relu(net.conv_bn(x, 8, 20, 3, group=2))
    radix = net.reshape(y, -1, 2, 10, 6, 6)
    pooled = net.op("GlobalAveragePool", net.op("ReduceSum", radix, net.ints(1), keepdims=0))
    gate = net.conv(net.relu(net.conv_bn(pooled, 10, 6, 1)), 6, 20, 1)
    gate = net.softmax(net.transpose(net.reshape(gate, -1, 1, 2, 10), 0, 2, 1, 3), 1)
    gate = net.reshape(net.reshape(gate, -1, 20, 1, 1), -1, 2, 10, 1, 1)
    x = net.op("ReduceSum", net.mul(radix, gate), net.ints(1), keepdims=0)
    return net.model(net.head(net.relu(net.conv(x, 10, 9, 1)), 9))


@architecture(groups=3)
def eca() -> onnx.ModelProto:
    """A 1-D convolution over channels holds them; the inner ones stay free."""
    net = Net("eca", 13)
    x = net.relu(net.conv_bn(net.input("x", "N", 3, 8, 8), 3, 8))
    y = net.conv_bn(net.relu(net.conv_bn(x, 8, 10)), 10, 9)
    gate = net.transpose(net.squeeze(net.op("GlobalAveragePool", y), 3), 0, 2, 1)
    gate = net.sigmoid(net.conv(gate, 1, 1, 3, rank=1, bias=False))
    y = net.mul(y, net.unsqueeze(net.transpose(gate, 0, 2, 1), 3))
    return net.model(net.head(net.relu(net.conv(y, 9, 11)), 11))


# ---------------------------------------------------------------- other convolutional shapes


@architecture(groups=3)
def vgg_flatten() -> onnx.ModelProto:
    net = Net("vgg_flatten", 9)
    x = net.maxpool(net.relu(net.conv(net.input("x", "N", 3, 8, 8), 3, 6)))
    x = net.maxpool(net.relu(net.conv(x, 6, 9)))
    x = net.op("Dropout", net.relu(net.gemm(net.op("Flatten", x), 36, 12)))
    return net.model(net.op("LogSoftmax", net.gemm(x, 12, 5), axis=1))


@architecture(groups=3)
def dynamic_flatten() -> onnx.ModelProto:
    """x.view(x.size(0), -1), everything dynamic."""
    net = Net("dynamic_flatten", 13)
    x = net.relu(net.conv(net.input("x", "N", 3, 8, 8), 3, 6, stride=2))
    x = net.relu(net.conv(x, 6, 9, stride=2))
    x = net.reshape_to(x, net.size_of(x, 0), -1)
    return net.model(net.gemm(net.relu(net.gemm(x, 36, 10)), 10, 3))


@architecture(groups=4)
def generator() -> onnx.ModelProto:
    """DCGAN: a linear layer reshaped to an image, transposed convolutions."""
    net = Net("generator", 13)
    x = net.gemm(net.input("x", "N", 7), 7, 10 * 2 * 2)
    x = net.relu(net.bn(net.reshape(x, -1, 10, 2, 2), 10))
    x = net.relu(net.bn(net.deconv(x, 10, 8, 4), 8))
    x = net.relu(net.deconv(x, 8, 6, 4, group=2))
    return net.model(net.op("Tanh", net.deconv(x, 6, 3, 4)))


@architecture(groups=5)
def autoencoder() -> onnx.ModelProto:
    """A variational one: two heads, a linear bottleneck in between."""
    net = Net("autoencoder", 13)
    x = net.relu(net.conv(net.input("x", "N", 1, 8, 8), 1, 6, stride=2))
    flat = net.op("Flatten", net.relu(net.conv(x, 6, 8, stride=2)))
    mean, spread = net.gemm(flat, 32, 5), net.gemm(flat, 32, 5)
    z = net.add(mean, net.mul(net.op("Exp", net.mul(spread, net.const(0.5))), net.const(0.3)))
    x = net.relu(net.deconv(net.reshape(net.gemm(z, 5, 28), 0, 7, 2, 2), 7, 6))
    return net.model(net.sigmoid(net.deconv(x, 6, 1)))


@architecture(groups=3)
def super_resolution() -> onnx.ModelProto:
    net = Net("super_resolution", 13)
    head = net.conv(net.input("x", 1, 3, "H", "W"), 3, 8)
    x = net.add(head, net.conv(net.relu(net.conv(head, 8, 6)), 6, 8))
    x = net.op("DepthToSpace", net.conv(x, 8, 20), blocksize=2, mode="CRD")
    return net.model(net.op("DepthToSpace", net.conv(net.relu(x), 5, 12), blocksize=2, mode="DCR"))


@architecture(groups=2)
def pixel_shuffle() -> onnx.ModelProto:
    """Decomposed: Reshape, Transpose, Reshape."""
    net = Net("pixel_shuffle", 13)
    x = net.relu(net.conv(net.input("x", "N", 3, 4, 4), 3, 7))
    x = net.reshape(net.conv(x, 7, 20), -1, 5, 2, 2, 4, 4)
    x = net.reshape(net.transpose(x, 0, 1, 4, 2, 5, 3), -1, 5, 8, 8)
    return net.model(net.conv(net.relu(x), 5, 3))


@architecture(groups=3)
def focus() -> onnx.ModelProto:
    """Space to depth, as four strided slices of features, and as an operator."""
    net = Net("focus", 13)
    x = net.relu(net.conv(net.input("x", "N", 3, 8, 8), 3, 5))
    parts = [net.slice(net.slice(x, i, 2**62, 2, 2), j, 2**62, 3, 2) for j in (0, 1) for i in (0, 1)]
    x = net.relu(net.conv(net.concat(*parts), 20, 7))
    x = net.conv(net.op("SpaceToDepth", x, blocksize=2), 28, 6)
    return net.model(net.head(net.relu(x), 6))


@architecture(groups=3)
def nhwc() -> onnx.ModelProto:
    """As tf2onnx writes it: Transpose around every convolution, biases and BatchNormalization as Mul and Add."""
    net = Net("nhwc", 13)
    x = net.input("x", "N", 8, 8, 3)
    for before, after in ((3, 6), (6, 8), (8, 9)):
        x = net.transpose(x, 0, 3, 1, 2)
        x = net.transpose(net.conv(x, before, after, bias=False), 0, 2, 3, 1)
        x = net.relu(net.add(net.mul(x, net.gain(after)), net.bias(after)))
    x = net.mean(x, 1, 2, keep=False)
    return net.model(net.softmax(net.linear(x, 9, 4)))


@architecture(groups=2)
def volumes() -> onnx.ModelProto:
    net = Net("volumes", 13)
    x = net.relu(net.conv_bn(net.input("x", "N", 2, 4, 6, 6), 2, 6, rank=3))
    y = net.conv_bn(net.relu(net.conv_bn(x, 6, 7, rank=3)), 7, 6, rank=3)
    x = net.op("GlobalAveragePool", net.relu(net.add(x, y)))
    return net.model(net.gemm(net.op("Flatten", x), 6, 3))


@architecture(groups=4)
def convnext() -> onnx.ModelProto:
    """Depthwise, transposes, LayerNormalization over channels, linear layers, a layer scale."""
    net = Net("convnext", 13)
    x = net.conv(net.input("x", "N", 3, 8, 8), 3, 8, 2, stride=2, pad=0)

    def channels_first(x: str, size: int) -> str:
        return net.transpose(net.layer_norm(net.transpose(x, 0, 2, 3, 1), size), 0, 3, 1, 2)

    x = channels_first(x, 8)
    for size, hidden in ((8, 14), (10, 18)):
        if size == 10:
            x = net.conv(channels_first(x, 8), 8, 10, 2, stride=2, pad=0)
        y = net.transpose(net.conv(x, size, size, 3, group=size), 0, 2, 3, 1)
        y = net.mlp(net.layer_norm(y, size), size, hidden)
        x = net.add(net.transpose(net.mul(net.gain(size), y), 0, 3, 1, 2), x)
    x = net.op("Flatten", channels_first(net.op("GlobalAveragePool", x), 10))
    return net.model(net.gemm(x, 10, 4))


@architecture(groups=5)
def group_normalized() -> onnx.ModelProto:
    net = Net("group_normalized", 13)
    x = net.relu(net.group_norm(net.conv(net.input("x", "N", 3, 6, 6), 3, 12), 12, 3, 6, 6))
    y = net.relu(net.group_norm(net.conv(x, 12, 8), 8, 4, 6, 6))
    x = net.relu(net.add(net.group_norm(net.conv(y, 8, 12), 12, 3, 6, 6), x))
    return net.model(net.head(net.relu(net.conv(x, 12, 7)), 7))


@architecture(groups=2)
def instance_normalized() -> onnx.ModelProto:
    net = Net("instance_normalized", 13)
    x = net.conv(
        net.op("Pad", net.input("x", "N", 3, 6, 6), net.ints(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect"), 3, 8, pad=0
    )
    x = net.op("LeakyRelu", net.op("InstanceNormalization", x, net.gain(8), net.bias(8)), alpha=0.1)
    y = net.op("PRelu", net.conv(x, 8, 9), net.weight(9, 1, 1, std=0.3))
    y = net.op("InstanceNormalization", net.conv(y, 9, 8), net.gain(8), net.bias(8))
    return net.model(net.op("Tanh", net.conv(net.add(x, y), 8, 3)))


@architecture(groups=4)
def weight_normalized() -> onnx.ModelProto:
    """A temporal net whose weights are g * v / |v|, computed at run time."""
    net = Net("weight_normalized", 13)

    def layer(x: str, before: int, after: int, dilation: int) -> str:
        v = net.weight(after, before, 3)
        norm = net.op("ReduceL2", v, axes=[1, 2], keepdims=1)
        weight = net.mul(v, net.op("Div", net.gain(after, 1, 1), norm))
        pads: dict[str, Any] = {"pads": [2 * dilation, 2 * dilation], "dilations": [dilation], "kernel_shape": [3]}
        y = net.op("Conv", x, weight, net.bias(after), **pads)
        return net.relu(net.slice(y, 0, -2 * dilation, 2))

    x = net.input("x", "N", 4, "T")
    for before, size in ((4, 8), (8, 10)):
        y = layer(layer(x, before, size, 1), size, size, 2)
        x = net.relu(net.add(y, net.conv(x, before, size, 1, rank=1)))
    return net.model(net.linear(net.transpose(x, 0, 2, 1), 10, 3))


@architecture(groups=2)
def weight_standardized() -> onnx.ModelProto:
    net = Net("weight_standardized", 13)

    def layer(x: str, before: int, after: int) -> str:
        weight = net.weight(after, before, 3, 3)
        centred = net.op("Sub", weight, net.mean(weight, 1, 2, 3))
        spread = net.mean(net.mul(centred, centred), 1, 2, 3)
        weight = net.op("Div", centred, net.op("Sqrt", net.add(spread, net.const(1e-5))))
        weight = net.mul(weight, net.weight(after, 1, 1, 1, std=0.3))
        return net.op("Conv", x, weight, net.bias(after), kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    x = net.relu(layer(net.input("x", "N", 3, 6, 6), 3, 8))
    x = net.relu(net.add(x, layer(net.relu(layer(x, 8, 9)), 9, 8)))
    return net.model(net.head(x, 8))


@architecture(groups=2)
def quantized_weights() -> onnx.ModelProto:
    """Weights as int8 codes with a scale per output channel; activations quantized per tensor."""
    net = Net("quantized_weights", 13)
    rng = np.random.default_rng(5)

    def layer(x: str, before: int, after: int, k: int) -> str:
        codes = net.const(rng.integers(-127, 128, (after, before, k, k)), np.int8, "codes")
        scale = net.const(rng.uniform(0.5, 1.5, after) / (74 * math.sqrt(before * k * k)), hint="scale")
        zero = net.const(np.zeros(after), np.int8, "zero")
        weight = net.op("DequantizeLinear", codes, scale, zero, axis=0)
        return net.op("Conv", x, weight, net.bias(after), kernel_shape=[k, k], pads=[k // 2] * 4)

    def quantized(x: str) -> str:
        scale, zero = net.const(0.03), net.const(128, np.uint8, "zero")
        return net.op("DequantizeLinear", net.op("QuantizeLinear", x, scale, zero), scale, zero)

    x = net.relu(layer(quantized(net.input("x", "N", 3, 6, 6)), 3, 8, 3))
    x = net.add(x, layer(quantized(net.relu(layer(quantized(x), 8, 9, 3))), 9, 8, 3))
    return net.model(net.head(quantized(net.relu(x)), 8))


@architecture(groups=6)
def wavenet() -> onnx.ModelProto:
    """tanh * sigmoid of two halves, skip connections summed."""
    net = Net("wavenet", 13)
    x = net.conv(net.input("x", "N", 3, 20), 3, 8, 1, rank=1)
    skips = []
    for dilation in (1, 2, 4):
        left, right = net.split(net.conv(x, 8, 14, 3, rank=1, dilation=dilation), 7, 7)
        z = net.mul(net.op("Tanh", left), net.sigmoid(right))
        skips.append(net.conv(z, 7, 9, 1, rank=1))
        x = net.add(x, net.conv(z, 7, 8, 1, rank=1))
    y = net.relu(net.conv(net.relu(net.add(*skips)), 9, 6, 1, rank=1))
    return net.model(net.conv(y, 6, 4, 1, rank=1))


@architecture(groups=2)
def squeezed_conv1d() -> onnx.ModelProto:
    """1-D convolutions as 2-D ones between Unsqueeze and Squeeze."""
    net = Net("squeezed_conv1d", 13)
    x = net.input("x", "N", 4, 12)
    for before, after in ((4, 7), (7, 9)):
        y = net.op("Conv", net.unsqueeze(x, 2), net.weight(after, before, 1, 3), pads=[0, 1, 0, 1], kernel_shape=[1, 3])
        x = net.relu(net.add(net.squeeze(y, 2), net.weight(after, 1, std=0.3)))
    return net.model(net.gemm(net.op("ReduceMax", x, axes=[2], keepdims=0), 9, 3))


@architecture(groups=4)
def pointnet() -> onnx.ModelProto:
    """A global feature is expanded to all points and concatenated with the local ones."""
    net = Net("pointnet", 13)
    x = net.transpose(net.input("x", "N", 16, 3), 0, 2, 1)
    local = net.relu(net.conv_bn(x, 3, 7, 1, rank=1))
    wide = net.conv_bn(net.relu(net.conv_bn(local, 7, 8, 1, rank=1)), 8, 10, 1, rank=1)
    whole = net.op("ReduceMax", wide, axes=[2], keepdims=1)
    repeated = net.op("Expand", whole, net.ints(1, 1, 16))
    tiled = net.op("Tile", whole, net.ints(1, 1, 16))
    x = net.relu(net.conv(net.concat(local, repeated, tiled), 27, 9, 1, rank=1))
    return net.model(net.conv(x, 9, 4, 1, rank=1))


@architecture(groups=3)
def siamese() -> onnx.ModelProto:
    """One encoder, two inputs; the distance of the two embeddings goes through a linear layer."""
    net = Net("siamese", 13)
    images = net.input("a", "N", 3, 6, 6), net.input("b", "N", 3, 6, 6)
    w1, b1 = net.weight(7, 3, 3, 3), net.bias(7)
    w2, b2, w3 = net.weight(9, 7, 3, 3), net.bias(9), net.weight(6, 9)

    def embed(x: str) -> str:
        x = net.relu(net.op("Conv", x, w1, b1, pads=[1, 1, 1, 1]))
        x = net.relu(net.op("Conv", x, w2, b2, pads=[1, 1, 1, 1], strides=[2, 2]))
        return net.op("Gemm", net.op("Flatten", net.op("GlobalAveragePool", x)), w3, transB=1)

    left, right = map(embed, images)
    return net.model(net.sigmoid(net.gemm(net.op("Abs", net.op("Sub", left, right)), 6, 2)))


@architecture(groups=5)
def hydra() -> onnx.ModelProto:
    """Several outputs at several depths, one of them features that must stay."""
    net = Net("hydra", 13)
    x = net.relu(net.conv_bn(net.input("x", "N", 3, 8, 8), 3, 8))
    early = net.head(net.relu(net.conv(x, 8, 6)), 6, 3)
    x = net.relu(net.conv_bn(x, 8, 9, stride=2))
    pooled = net.op("Flatten", net.op("GlobalAveragePool", x))
    features = net.gemm(net.relu(net.gemm(pooled, 9, 10)), 10, 5)
    boxes = net.conv(net.relu(net.conv(x, 9, 7)), 7, 4, 1)
    return net.model(early, features, boxes, net.gemm(features, 5, 2))


@architecture(groups=4)
def mlp_with_norm() -> onnx.ModelProto:
    """Tabular: BatchNormalization on [N, C], a gated unit, dropout, LpNormalization."""
    net = Net("mlp_with_norm", 13)
    x = net.bn(net.relu(net.gemm(net.input("x", "N", 6), 6, 12)), 12)
    x = net.op("Dropout", net.add(x, net.gemm(net.relu(net.gemm(x, 12, 9)), 9, 12)))
    x = net.mul(net.gemm(x, 12, 7), net.sigmoid(net.gemm(x, 12, 7)))
    x = net.op("LpNormalization", net.gemm(x, 7, 8), axis=1, p=2)
    return net.model(net.gemm(x, 8, 3))


@architecture(groups=2)
def conv_glu() -> onnx.ModelProto:
    """A chunk of the channels gates the others, split by Slice as old exports do."""
    net = Net("conv_glu", 10)
    x = net.input("x", "N", 4, 10)
    for before in (4, 6):
        y = net.conv(x, before, 12, 3, rank=1)
        x = net.mul(net.slice(y, 0, 6, 1), net.sigmoid(net.slice(y, 6, 12, 1)))
    return net.model(net.conv(x, 6, 3, 1, rank=1))


@architecture(groups=6)
def hourglass_attention() -> onnx.ModelProto:
    """Attention over pixels inside a convolutional net (diffusion U-Nets): q, k, v as 1x1 convolutions."""
    net = Net("hourglass_attention", 13)
    x = net.conv(net.input("x", "N", 3, 4, 4), 3, 8)
    y = net.group_norm(x, 8, 2, 4, 4)
    q, k, v = (net.reshape(net.conv(y, 8, 12, 1), 0, 3, 4, 16) for _ in range(3))
    scores = net.op("MatMul", net.transpose(q, 0, 1, 3, 2), k)
    weights = net.softmax(net.mul(scores, net.const(0.5)))
    mixed = net.op("MatMul", v, net.transpose(weights, 0, 1, 3, 2))
    x = net.add(x, net.conv(net.reshape(mixed, 0, 12, 4, 4), 12, 8, 1))
    steps = net.gemm(net.silu(net.gemm(net.input("t", "N", 5), 5, 9)), 9, 8)
    x = net.add(x, net.unsqueeze(steps, 2, 3))
    return net.model(net.conv(net.silu(x), 8, 3))


# ---------------------------------------------------------------- recurrent


def _recurrent(net: Net, kind: str, x: str, before: int, hidden: int, directions: int) -> list[str]:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    weights = net.weight(directions, gates * hidden, before, fan=before)
    state = net.weight(directions, gates * hidden, hidden, fan=hidden)
    bias = net.weight(directions, 2 * gates * hidden, std=0.2)
    options: dict[str, Any] = {"linear_before_reset": 1} if kind == "GRU" else {}
    direction = "bidirectional" if directions == 2 else "forward"
    count = 3 if kind == "LSTM" else 2
    return net.ops(kind, x, weights, state, bias, count=count, hidden_size=hidden, direction=direction, **options)


@architecture(groups=3)
def lstm_tagger() -> onnx.ModelProto:
    """Embedding, two bidirectional layers, a linear layer for each token; length and batch dynamic."""
    net = Net("lstm_tagger", 14)
    x = net.transpose(net.embed(net.ids("ids", "N", "T"), 11, 6), 1, 0, 2)
    for before in (6, 14):
        y, _, _ = _recurrent(net, "LSTM", x, before, 7, 2)
        x = net.reshape(net.transpose(y, 0, 2, 1, 3), 0, 0, -1)
    return net.model(net.transpose(net.linear(x, 14, 3), 1, 0, 2))


@architecture(groups=3)
def gru_classifier() -> onnx.ModelProto:
    """The last states of both directions, concatenated."""
    net = Net("gru_classifier", 14)
    x = net.transpose(net.linear(net.input("x", "N", 6, 4), 4, 5), 1, 0, 2)
    y, _ = _recurrent(net, "GRU", x, 5, 8, 1)
    _, last = _recurrent(net, "GRU", net.squeeze(y, 1), 8, 6, 2)
    both = net.concat(*(net.squeeze(part, 0) for part in net.split(last, 1, 1, axis=0)), axis=1)
    return net.model(net.gemm(both, 12, 3))


@architecture(groups=2)
def rnn_with_state() -> onnx.ModelProto:
    net = Net("rnn_with_state", 14)
    x = net.input("x", 5, "N", 4)
    start = net.unsqueeze(net.op("Tanh", net.gemm(net.input("z", "N", 3), 3, 7)), 0)
    weights, state = net.weight(1, 7, 4, fan=4), net.weight(1, 7, 7, fan=7)
    y, _ = net.ops("RNN", x, weights, state, net.weight(1, 14, std=0.2), "", start, count=2, hidden_size=7)
    return net.model(net.linear(net.relu(net.linear(net.squeeze(y, 1), 7, 6)), 6, 2))


@architecture(groups=4)
def crnn() -> onnx.ModelProto:
    """Convolutions, height squeezed, then a bidirectional LSTM over the width."""
    net = Net("crnn", 14)
    x = net.maxpool(net.relu(net.conv_bn(net.input("x", "N", 1, 4, 12), 1, 6)))
    x = net.relu(net.conv(x, 6, 8, 2, pad=0))
    x = net.transpose(net.squeeze(x, 2), 2, 0, 1)
    y, _, _ = _recurrent(net, "LSTM", x, 8, 5, 2)
    y = net.reshape(net.transpose(y, 0, 2, 1, 3), 0, 0, 10)
    return net.model(net.linear(net.linear(y, 10, 7), 7, 4))


@architecture(groups=4)
def seq2seq() -> onnx.ModelProto:
    """LSTM encoder and decoder, its states handed over, dot-product attention between them."""
    net = Net("seq2seq", 14)
    source = net.transpose(net.embed(net.ids("source", "N", "S"), 9, 5), 1, 0, 2)
    target = net.transpose(net.embed(net.ids("target", "N", "T"), 8, 6), 1, 0, 2)
    y, h, c = _recurrent(net, "LSTM", source, 5, 8, 1)
    weights, state, bias = net.weight(1, 32, 6, fan=6), net.weight(1, 32, 8, fan=8), net.weight(1, 64, std=0.2)
    z, _, _ = net.ops("LSTM", target, weights, state, bias, "", h, c, count=3, hidden_size=8)
    keys, queries = net.transpose(net.squeeze(y, 1), 1, 0, 2), net.transpose(net.squeeze(z, 1), 1, 0, 2)
    scores = net.softmax(net.op("MatMul", queries, net.transpose(keys, 0, 2, 1)))
    context = net.op("MatMul", scores, keys)
    x = net.op("Tanh", net.linear(net.concat(queries, context, axis=2), 16, 7))
    return net.model(net.linear(x, 7, 8))


# ---------------------------------------------------------------- transformers


@architecture(groups=7)
def vit() -> onnx.ModelProto:
    """Patches, a class token, fused QKV as (3, H, d), pre-norm."""
    net = Net("vit", 13)
    x = net.conv(net.input("x", "N", 3, 8, 8), 3, 12, 4, stride=4, pad=0)
    x = net.transpose(net.reshape_to(x, net.size_of(x, 0), 12, -1), 0, 2, 1)
    token = net.op("Expand", net.weight(1, 1, 12), net.concat(net.size_of(x, 0), net.ints(1, 12), axis=0))
    x = net.add(net.concat(token, x, axis=1), net.weight(1, 5, 12, std=0.5))
    for _ in range(2):
        qkv = net.linear(net.layer_norm(x, 12), 12, 3 * 3 * 4)
        qkv = net.transpose(net.reshape_to(qkv, net.size_of(qkv, 0), 5, 3, 3, 4), 2, 0, 3, 1, 4)
        q, k, v = (net.gather(qkv, net.number(place)) for place in range(3))
        y = net.reshape_to(net.transpose(net.attend(q, k, v, 4), 0, 2, 1, 3), net.size_of(x, 0), 5, 12)
        x = net.add(x, net.linear(y, 12, 12))
        x = net.add(x, net.mlp(net.layer_norm(x, 12), 12, 18))
    x = net.gather(net.layer_norm(x, 12), net.number(0), axis=1)
    return net.model(net.gemm(x, 12, 5))


@architecture(groups=4)
def vit_split() -> onnx.ModelProto:
    """Fused LayerNormalization; the query is scaled; QKV split after the transpose, the mean of the tokens at the end."""
    net = Net("vit_split", 17)
    x = net.conv(net.input("x", "N", 3, 8, 8), 3, 12, 4, stride=4, pad=0)
    x = net.add(net.transpose(net.reshape(x, 0, 12, 4), 0, 2, 1), net.weight(4, 12))
    qkv = net.op("MatMul", net.fused_layer_norm(x, 12), net.weight(12, 36, fan=12))
    qkv = net.transpose(net.reshape(qkv, -1, 4, 3, 2, 6), 2, 0, 3, 1, 4)
    q, k, v = (net.squeeze(part, 0) for part in net.split(qkv, 1, 1, 1, axis=0))
    y = net.attend(net.mul(q, net.const(0.7)), k, v, 6)
    x = net.add(x, net.linear(net.heads_last(y, 12, 4), 12, 12))
    x = net.add(x, net.mlp(net.fused_layer_norm(x, 12), 12, 16))
    return net.model(net.gemm(net.fused_layer_norm(net.mean(x, 1, keep=False), 12), 12, 3))


@architecture(groups=10)
def bert() -> onnx.ModelProto:
    """Post-norm, every shape computed by Shape, Gather and Concat, a mask of 0 and -10000, a pooler."""
    net = Net("bert", 11)
    ids, attention_mask = net.ids("input_ids", "N", "S"), net.ids("attention_mask", "N", "S")

    def unsqueezed(x: str, *axes: int) -> str:
        return net.op("Unsqueeze", x, axes=list(axes))

    def size_of(x: str, axis: int) -> str:
        return unsqueezed(net.gather(net.op("Shape", x), net.number(axis)), 0)

    def heads(x: str) -> str:
        shape = net.concat(size_of(x, 0), size_of(x, 1), net.ints(3), net.ints(4), axis=0)
        return net.transpose(net.op("Reshape", x, shape), 0, 2, 1, 3)

    extra = net.op("Cast", unsqueezed(attention_mask, 1, 2), to=TensorProto.FLOAT)
    extra = net.mul(net.op("Sub", net.const(1.0), extra), net.const(-10000.0))
    positions = net.const(np.arange(16)[None], np.int64)
    length = size_of(ids, 1)
    positions = net.op("Slice", positions, net.ints(0), length, net.ints(1))
    x = net.add(net.embed(ids, 13, 12), net.gather(net.weight(16, 12, std=1.0), positions))
    x = net.layer_norm(x, 12)
    for _ in range(2):
        q, k, v = (heads(net.linear(x, 12, 12)) for _ in range(3))
        y = net.transpose(net.attend(q, k, v, 4, extra), 0, 2, 1, 3)
        y = net.op("Reshape", y, net.concat(size_of(y, 0), size_of(y, 1), net.ints(12), axis=0))
        x = net.layer_norm(net.add(net.linear(y, 12, 12), x), 12)
        x = net.layer_norm(net.add(net.mlp(x, 12, 17), x), 12)
    pooled = net.op("Tanh", net.gemm(net.gather(x, net.number(0), axis=1), 12, 12))
    return net.model(net.gemm(pooled, 12, 2), net.linear(x, 12, 4))


@architecture(groups=9)
def gpt2() -> onnx.ModelProto:
    """Split QKV, causal mask sliced from a constant, tied embedding and head."""
    net = Net("gpt2", 13)
    ids = net.ids("input_ids", "N", "S")
    table = net.weight(15, 12, std=1.0)
    length = net.size_of(ids, 1)
    positions = net.op("Range", net.number(0), net.squeeze(length, 0), net.number(1))
    x = net.add(net.gather(table, ids), net.gather(net.weight(20, 12, std=1.0), positions))
    causal = net.const(np.tril(np.ones((1, 1, 20, 20), np.bool_)), np.bool_)
    causal = net.op("Slice", causal, net.ints(0, 0), net.concat(length, length, axis=0), net.ints(2, 3))
    for _ in range(2):
        qkv = net.linear(net.layer_norm(x, 12), 12, 36)
        q, k, v = (net.heads_first(part, 3, 4, 0) for part in net.split(qkv, 12, 12, 12, axis=2))
        scores = net.op("Div", net.op("MatMul", q, net.transpose(k, 0, 1, 3, 2)), net.const(2.0))
        scores = net.softmax(net.op("Where", causal, scores, net.const(-1e9)))
        x = net.add(x, net.linear(net.heads_last(net.op("MatMul", scores, v), 12, 0), 12, 12))
        x = net.add(x, net.mlp(net.layer_norm(x, 12), 12, 19))
    return net.model(net.op("MatMul", net.layer_norm(x, 12), net.transpose(table, 1, 0)))


def _rotary(net: Net, length: str, width: int) -> tuple[str, str]:
    """cos and sin, [S, width], from inv_freq."""
    inverse = net.const(1.0 / 100.0 ** (np.arange(0, width, 2) / width), hint="inv_freq")
    positions = net.op("Range", net.number(0), net.squeeze(length, 0), net.number(1))
    positions = net.unsqueeze(net.op("Cast", positions, to=TensorProto.FLOAT), 1)
    angles = net.mul(positions, net.unsqueeze(inverse, 0))
    both = net.concat(angles, angles, axis=-1)
    return net.op("Cos", both), net.op("Sin", both)


def _rotate_half(net: Net, x: str, cos: str, sin: str, width: int) -> str:
    half = width // 2
    turned = net.concat(net.op("Neg", net.slice(x, half, 2**62, 3)), net.slice(x, 0, half, 3), axis=-1)
    return net.add(net.mul(x, cos), net.mul(turned, sin))


def _repeat_kv(net: Net, x: str, heads: int, repeats: int, width: int, length: str) -> str:
    """[B, Hkv, S, d] -> [B, Hkv r, S, d], as Hugging Face does it."""
    batch = net.size_of(x, 0)
    shape = net.concat(batch, net.ints(heads, repeats), length, net.ints(width), axis=0)
    x = net.op("Expand", net.unsqueeze(x, 2), shape)
    return net.reshape_to(x, batch, heads * repeats, length, width)


def _causal(net: Net, length: str) -> str:
    """[S, S] of 0 and -1e9."""
    ones = net.op("Expand", net.const(1.0), net.concat(length, length, axis=0))
    return net.mul(net.op("Trilu", ones, net.number(1), upper=1), net.const(-1e9))


def _llama(
    name: str, kv: int, repeats: int, width: int, *, qk_norm: bool = False, tied: bool = False
) -> onnx.ModelProto:
    net = Net(name, 17)
    ids = net.ids("input_ids", "N", "S")
    length = net.size_of(ids, 1)
    table = net.weight(15, 12, std=1.0)
    x = net.gather(table, ids)
    cos, sin = _rotary(net, length, width)
    extra = _causal(net, length)
    heads = kv * repeats
    for hidden in (17, 19):
        y = net.rms_norm(x, 12)
        q = net.heads_first(net.linear(y, 12, heads * width, bias=False), heads, width)
        k, v = (net.heads_first(net.linear(y, 12, kv * width, bias=False), kv, width) for _ in range(2))
        if qk_norm:
            q, k = net.rms_norm(q, width), net.rms_norm(k, width)
        q, k = (_rotate_half(net, part, cos, sin, width) for part in (q, k))
        if repeats > 1:
            k, v = (_repeat_kv(net, part, kv, repeats, width, length) for part in (k, v))
        y = net.heads_last(net.attend(q, k, v, width, extra), heads * width)
        x = net.add(x, net.linear(y, heads * width, 12, bias=False))
        y = net.rms_norm(x, 12)
        y = net.mul(net.silu(net.linear(y, 12, hidden, bias=False)), net.linear(y, 12, hidden, bias=False))
        x = net.add(x, net.linear(y, hidden, 12, bias=False))
    x = net.rms_norm(x, 12)
    head = net.op("MatMul", x, net.transpose(table, 1, 0)) if tied else net.linear(x, 12, 15, bias=False)
    return net.model(head)


@architecture(groups=10)
def llama() -> onnx.ModelProto:
    """Grouped queries, rotary pairs from inv_freq, RMS norms, a gated layer."""
    return _llama("llama", kv=2, repeats=3, width=4)


@architecture(groups=8)
def llama_mqa() -> onnx.ModelProto:
    """One key and value head for all queries."""
    return _llama("llama_mqa", kv=1, repeats=3, width=4, tied=True)


@architecture(groups=8)
def llama_qk_norm() -> onnx.ModelProto:
    return _llama("llama_qk_norm", kv=3, repeats=1, width=4, qk_norm=True)


@architecture(groups=10)
def neox() -> onnx.ModelProto:
    """Fused QKV as (H, 3, d), rotary on the first half of each head only, parallel residual."""
    net = Net("neox", 17)
    ids = net.ids("input_ids", "N", "S")
    length = net.size_of(ids, 1)
    x = net.embed(ids, 14, 12)
    cos, sin = _rotary(net, length, 4)
    extra = _causal(net, length)
    for _ in range(2):
        qkv = net.linear(net.fused_layer_norm(x, 12), 12, 3 * 3 * 8)
        qkv = net.transpose(net.reshape(qkv, 0, -1, 3, 24), 0, 2, 1, 3)
        q, k, v = net.split(qkv, 8, 8, 8, axis=3)
        turned = []
        for part in (q, k):
            rotated = _rotate_half(net, net.slice(part, 0, 4, 3), cos, sin, 4)
            turned.append(net.concat(rotated, net.slice(part, 4, 2**62, 3), axis=-1))
        y = net.heads_last(net.attend(turned[0], turned[1], v, 8, extra), 24)
        x = net.add(x, net.linear(y, 24, 12), net.mlp(net.fused_layer_norm(x, 12), 12, 17))
    return net.model(net.linear(net.fused_layer_norm(x, 12), 12, 14, bias=False))


@architecture(groups=4)
def interleaved_rotary() -> onnx.ModelProto:
    """GPT-J: even and odd positions of a head are a pair; tables are constants."""
    net = Net("interleaved_rotary", 17)
    x = net.input("x", "N", 5, 9)
    angles = np.arange(5)[:, None] / 10.0 ** (np.arange(3) / 3)
    cos, sin = (net.const(np.repeat(table, 2, axis=1), hint="table") for table in (np.cos(angles), np.sin(angles)))

    def rotated(x: str) -> str:
        even, odd = net.slice(x, 0, 2**62, 3, 2), net.slice(x, 1, 2**62, 3, 2)
        pairs = net.concat(net.unsqueeze(net.op("Neg", odd), 4), net.unsqueeze(even, 4), axis=-1)
        return net.add(net.mul(x, cos), net.mul(net.reshape(pairs, 0, 2, 5, 6), sin))

    q, k, v = (net.heads_first(net.linear(x, 9, 12), 2, 6, 5) for _ in range(3))
    y = net.heads_last(net.attend(rotated(q), rotated(k), v, 6), 12, 5)
    return net.model(net.linear(net.linear(y, 12, 7), 7, 3))


@architecture(groups=8)
def relative_bias() -> onnx.ModelProto:
    """T5: a bucket table [buckets, H] is gathered, transposed and added to the scores; no scale, RMS norms."""
    net = Net("relative_bias", 13)
    x = net.embed(net.ids("input_ids", "N", 6), 12, 10)
    buckets = np.abs(np.arange(6)[:, None] - np.arange(6)[None])
    bias = net.gather(net.weight(6, 3, std=1.0), net.const(buckets, np.int64))
    bias = net.unsqueeze(net.transpose(bias, 2, 0, 1), 0)
    for _ in range(2):
        y = net.rms_norm(x, 10)
        q, k, v = (net.heads_first(net.linear(y, 10, 12, bias=False), 3, 4, 6) for _ in range(3))
        scores = net.add(net.op("MatMul", q, net.transpose(k, 0, 1, 3, 2)), bias)
        y = net.heads_last(net.op("MatMul", net.softmax(scores), v), 12, 6)
        x = net.add(x, net.linear(y, 12, 10, bias=False))
        y = net.linear(net.relu(net.linear(net.rms_norm(x, 10), 10, 14, bias=False)), 14, 10, bias=False)
        x = net.add(x, y)
    return net.model(net.linear(net.rms_norm(x, 10), 10, 4, bias=False))


@architecture(groups=4)
def alibi() -> onnx.ModelProto:
    """BLOOM: slopes per head times distances, heads merged with the batch for the matrix products."""
    net = Net("alibi", 13)
    x = net.layer_norm(net.embed(net.ids("input_ids", "N", 5), 12, 8), 8)
    slopes = net.const(2.0 ** -np.arange(1, 4).reshape(3, 1, 1), hint="slopes")
    distances = net.mul(slopes, net.const(np.arange(5).reshape(1, 1, 5)))
    qkv = net.reshape(net.linear(x, 8, 36), 0, 5, 3, 3, 4)
    q, k, v = (net.gather(qkv, net.number(place), axis=3) for place in range(3))
    q, k, v = (net.transpose(part, 0, 2, 1, 3) for part in (q, k, v))
    q, v = (net.reshape(part, -1, 5, 4) for part in (q, v))
    k = net.reshape(net.transpose(k, 0, 1, 3, 2), -1, 4, 5)
    scores = net.reshape(net.op("MatMul", q, k), -1, 3, 5, 5)
    scores = net.softmax(net.add(net.mul(scores, net.const(0.5)), distances))
    y = net.op("MatMul", net.reshape(scores, -1, 5, 5), v)
    y = net.heads_last(net.reshape(y, -1, 3, 5, 4), 12, 5)
    x = net.add(x, net.linear(y, 12, 8))
    return net.model(net.linear(net.add(x, net.mlp(net.layer_norm(x, 8), 8, 13)), 8, 12))


@architecture(groups=11)
def swin() -> onnx.ModelProto:
    """Windows, a cyclic shift, relative position bias, patch merging by four strided slices."""
    net = Net("swin", 13)
    x = net.conv(net.input("x", "N", 3, 16, 16), 3, 8, 2, stride=2, pad=0)
    x = net.layer_norm(net.transpose(x, 0, 2, 3, 1), 8)

    def rolled(x: str, by: int) -> str:
        for axis in (1, 2):
            x = net.concat(net.slice(x, by, 2**62, axis), net.slice(x, 0, by, axis), axis=axis)
        return x

    def block(x: str, size: int, side: int, shift: int) -> str:
        y = net.layer_norm(x, size)
        if shift:
            y = rolled(y, shift)
        windows = side // 4
        y = net.transpose(net.reshape(y, -1, windows, 4, windows, 4, size), 0, 1, 3, 2, 4, 5)
        y = net.reshape(y, -1, 16, size)
        qkv = net.transpose(net.reshape(net.linear(y, size, 3 * 2 * 4), -1, 16, 3, 2, 4), 2, 0, 3, 1, 4)
        q, k, v = (net.gather(qkv, net.number(place)) for place in range(3))
        index = np.random.default_rng(1).integers(0, 49, 256)
        bias = net.reshape(net.gather(net.weight(49, 2, std=1.0), net.const(index, np.int64)), 16, 16, 2)
        bias = net.unsqueeze(net.transpose(bias, 2, 0, 1), 0)
        y = net.linear(net.heads_last(net.attend(q, k, v, 4, bias), 8, 16), 8, size)
        y = net.transpose(net.reshape(y, -1, windows, windows, 4, 4, size), 0, 1, 3, 2, 4, 5)
        y = net.reshape(y, -1, side, side, size)
        if shift:
            y = rolled(y, side - shift)
        x = net.add(x, y)
        return net.add(x, net.mlp(net.layer_norm(x, size), size, 13))

    x = block(block(x, 8, 8, 0), 8, 8, 2)
    parts = [net.slice(net.slice(x, i, 2**62, 1, 2), j, 2**62, 2, 2) for j in (0, 1) for i in (0, 1)]
    x = net.linear(net.layer_norm(net.concat(*parts, axis=-1), 32), 32, 10, bias=False)
    x = net.layer_norm(block(x, 10, 4, 0), 10)
    x = net.op("Flatten", net.op("GlobalAveragePool", net.transpose(x, 0, 3, 1, 2)))
    return net.model(net.gemm(x, 10, 4))


@architecture(groups=5)
def mixer() -> onnx.ModelProto:
    """Layers over tokens between transposes, layers over channels."""
    net = Net("mixer", 13)
    x = net.conv(net.input("x", "N", 3, 12, 12), 3, 10, 4, stride=4, pad=0)
    x = net.transpose(net.reshape(x, 0, 10, 9), 0, 2, 1)
    for _ in range(2):
        y = net.transpose(net.layer_norm(x, 10), 0, 2, 1)
        x = net.add(x, net.transpose(net.mlp(y, 9, 7), 0, 2, 1))
        x = net.add(x, net.mlp(net.layer_norm(x, 10), 10, 15))
    return net.model(net.gemm(net.mean(net.layer_norm(x, 10), 1, keep=False), 10, 4))


@architecture(groups=3, share=0.85)
def gmlp() -> onnx.ModelProto:
    """A spatial gate: half of the channels, normalized, projected over the tokens, gates the other half."""
    net = Net("gmlp", 13)
    x = net.linear(net.input("x", "N", 6, 5), 5, 8)
    for _ in range(2):
        y = net.gelu(net.linear(net.layer_norm(x, 8), 8, 18))
        left, right = net.split(y, 9, 9, axis=2)
        right = net.transpose(net.layer_norm(right, 9), 0, 2, 1)
        right = net.add(net.op("MatMul", right, net.weight(6, 6)), net.gain(6))
        x = net.add(x, net.linear(net.mul(left, net.transpose(right, 0, 2, 1)), 9, 8))
    return net.model(net.linear(net.mean(x, 1, keep=False), 8, 3))


@architecture(groups=6)
def albert() -> onnx.ModelProto:
    """One layer, used three times; a factorized embedding."""
    net = Net("albert", 13)
    x = net.linear(net.layer_norm(net.embed(net.ids("input_ids", "N", 6), 14, 7), 7), 7, 12)
    weights = [(net.weight(12, 12), net.bias(12)) for _ in range(4)]
    up, down = (net.weight(12, 16), net.bias(16)), (net.weight(16, 12), net.bias(12))
    gains = [(net.gain(12), net.bias(12)) for _ in range(2)]

    def linear(x: str, pair: tuple[str, str]) -> str:
        return net.add(net.op("MatMul", x, pair[0]), pair[1])

    def norm(x: str, pair: tuple[str, str]) -> str:
        centred = net.op("Sub", x, net.mean(x, -1))
        root = net.op("Sqrt", net.add(net.mean(net.mul(centred, centred), -1), net.const(1e-5)))
        return net.add(net.mul(net.op("Div", centred, root), pair[0]), pair[1])

    for _ in range(3):
        q, k, v = (net.heads_first(linear(x, pair), 3, 4, 6) for pair in weights[:3])
        y = linear(net.heads_last(net.attend(q, k, v, 4), 12, 6), weights[3])
        x = norm(net.add(x, y), gains[0])
        x = norm(net.add(x, linear(net.gelu(linear(x, up)), down)), gains[1])
    return net.model(net.linear(x, 12, 3))


@architecture(groups=14)
def encoder_decoder() -> onnx.ModelProto:
    """Cross attention, causal self attention, pre-norm, a convolutional stem (Whisper)."""
    net = Net("encoder_decoder", 17)
    x = net.gelu(net.conv(net.input("mel", "N", 4, 12), 4, 9, 3, rank=1))
    x = net.gelu(net.conv(x, 9, 8, 3, rank=1, stride=2))
    x = net.add(net.transpose(x, 0, 2, 1), net.weight(6, 8))
    x = net.add(x, net.attention(net.fused_layer_norm(x, 8), 8, 2, 5))
    memory = net.fused_layer_norm(net.add(x, net.mlp(net.fused_layer_norm(x, 8), 8, 11)), 8)
    ids = net.ids("input_ids", "N", "S")
    y = net.embed(ids, 13, 12)
    y = net.add(y, net.attention(net.fused_layer_norm(y, 12), 12, 3, 4, _causal(net, net.size_of(ids, 1))))
    q = net.heads_first(net.linear(net.fused_layer_norm(y, 12), 12, 12), 3, 4)
    k, v = (net.heads_first(net.linear(memory, 8, 12), 3, 4) for _ in range(2))
    y = net.add(y, net.linear(net.heads_last(net.attend(q, k, v, 4), 12), 12, 12))
    y = net.add(y, net.mlp(net.fused_layer_norm(y, 12), 12, 14))
    return net.model(net.linear(net.fused_layer_norm(y, 12), 12, 13))


@architecture(groups=4)
def einsum_attention() -> onnx.ModelProto:
    net = Net("einsum_attention", 13)
    x = net.input("x", "N", 5, 8)
    q, k, v = (net.op("Einsum", x, net.weight(8, 3, 4, fan=8), equation="bse,ehd->bshd") for _ in range(3))
    scores = net.softmax(net.op("Einsum", q, k, equation="bqhd,bkhd->bhqk"))
    y = net.op("Einsum", scores, v, equation="bhqk,bkhd->bqhd")
    y = net.op("Einsum", y, net.weight(3, 4, 9, fan=12), equation="bqhd,hde->bqe")
    return net.model(net.linear(net.relu(y), 9, 3))


@architecture(groups=7)
def uneven_heads() -> onnx.ModelProto:
    """Heads of two sizes, concatenated (multi-scale attention), then one projection."""
    net = Net("uneven_heads", 13)
    x = net.linear(net.input("x", "N", 6, 5), 5, 10)
    parts = []
    for heads, width in ((2, 4), (3, 3)):
        q, k, v = (net.heads_first(net.linear(x, 10, heads * width), heads, width, 6) for _ in range(3))
        parts.append(net.heads_last(net.attend(q, k, v, width), heads * width, 6))
    y = net.add(x, net.linear(net.concat(*parts, axis=2), 17, 10))
    return net.model(net.linear(net.layer_norm(y, 10), 10, 3))


@architecture(groups=6)
def latent_attention() -> onnx.ModelProto:
    """Low-rank key and value (MLA): a narrow projection, normalized, feeds all heads; a part of each key is shared."""
    net = Net("latent_attention", 13)
    x = net.input("x", "N", 6, 10)
    q = net.heads_first(net.linear(x, 10, 3 * 6, bias=False), 3, 6, 6)
    latent, shared = net.split(net.linear(x, 10, 7 + 2, bias=False), 7, 2, axis=2)
    kv = net.heads_first(net.linear(net.rms_norm(latent, 7), 7, 3 * (4 + 5), bias=False), 3, 9, 6)
    k, v = net.split(kv, 4, 5, axis=3)
    shared = net.op("Expand", net.unsqueeze(shared, 1), net.ints(1, 3, 6, 2))
    y = net.heads_last(net.attend(q, net.concat(k, shared, axis=3), v, 6), 15, 6)
    return net.model(net.linear(net.linear(y, 15, 8), 8, 3))


@architecture(groups=3)
def channel_attention() -> onnx.ModelProto:
    """XCiT: attention between the channels of a head, normalized along the tokens."""
    net = Net("channel_attention", 13)
    x = net.linear(net.input("x", "N", 6, 5), 5, 8)
    qkv = net.transpose(net.reshape(net.linear(x, 8, 24), 0, 6, 3, 2, 4), 2, 0, 3, 4, 1)
    q, k, v = (net.gather(qkv, net.number(place)) for place in range(3))
    q, k = (net.op("Div", part, net.op("ReduceL2", part, axes=[-1], keepdims=1)) for part in (q, k))
    weights = net.softmax(net.mul(net.op("MatMul", q, net.transpose(k, 0, 1, 3, 2)), net.gain(2, 1, 1)))
    y = net.reshape(net.transpose(net.op("MatMul", weights, v), 0, 3, 1, 2), 0, 6, 8)
    x = net.add(x, net.linear(y, 8, 8))
    return net.model(net.linear(net.add(x, net.mlp(net.layer_norm(x, 8), 8, 11)), 8, 3))


# ---------------------------------------------------------------- experts, graphs, fused operators


@architecture(groups=2)
def experts() -> onnx.ModelProto:
    """A dense mixture: weights [E, D, F] in batched products, summed with the router's softmax."""
    net = Net("experts", 13)
    x = net.linear(net.input("x", "N", 7), 7, 8)
    router = net.softmax(net.linear(x, 8, 4))
    y = net.op("MatMul", net.unsqueeze(x, 0), net.weight(4, 8, 11, fan=8))
    y = net.add(y, net.weight(4, 1, 11, std=0.3))
    y = net.op("MatMul", net.gelu(y), net.weight(4, 11, 8, fan=11))
    y = net.mul(net.transpose(y, 1, 0, 2), net.unsqueeze(router, 2))
    x = net.add(x, net.op("ReduceSum", y, net.ints(1), keepdims=0))
    return net.model(net.linear(x, 8, 3))


@architecture(groups=2)
def graph_convolution() -> onnx.ModelProto:
    """Messages gathered along edges, added up by ScatterElements; then a product with an adjacency matrix."""
    net = Net("graph_convolution", 16)
    x, edges = net.input("x", 6, 5), net.const([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]], np.int64)
    adjacency = net.input("adjacency", 6, 6)
    source, target = (net.gather(edges, net.number(place)) for place in (0, 1))
    h = net.linear(x, 5, 8)
    messages = net.gather(h, source)
    where = net.op("Expand", net.unsqueeze(target, 1), net.op("Shape", messages))
    zeros = net.op("ConstantOfShape", net.op("Shape", h), value=onnx.numpy_helper.from_array(np.zeros(1, np.float32)))
    h = net.relu(net.op("ScatterElements", zeros, where, messages, axis=0, reduction="add"))
    h = net.relu(net.op("MatMul", adjacency, net.linear(h, 8, 9)))
    return net.model(net.linear(h, 9, 3))


@architecture(groups=3)
def modern_norms() -> onnx.ModelProto:
    """Opset 21: GroupNormalization and Gelu as operators, LayerNormalization, Split by num_outputs."""
    net = Net("modern_norms", 21)
    x = net.conv(net.input("x", "N", 3, 6, 6), 3, 12)
    x = net.op("GroupNormalization", x, net.gain(12), net.bias(12), num_groups=3)
    x = net.op("Gelu", net.conv(x, 12, 9))
    x = net.fused_layer_norm(net.transpose(net.reshape(x, 0, 9, 36), 0, 2, 1), 9)
    left, right = net.ops("Split", net.linear(x, 9, 14), count=2, axis=-1, num_outputs=2)
    x = net.op("Mish", net.mul(left, net.op("Gelu", right, approximate="tanh")))
    return net.model(net.linear(net.mean(x, 1, keep=False), 7, 3))


@architecture(groups=6)
def fused_decoder() -> onnx.ModelProto:
    """Opset 23: RMSNormalization, RotaryEmbedding and Attention with grouped queries as operators."""
    net = Net("fused_decoder", 23)
    x = net.embed(net.ids("input_ids", 1, 6), 13, 12)
    angles = np.arange(6)[:, None] / 10.0 ** (np.arange(2) / 2)
    cos, sin = (net.const(table[None], hint="table") for table in (np.cos(angles), np.sin(angles)))
    y = net.op("RMSNormalization", x, net.gain(12), axis=-1, epsilon=1e-6)
    q = net.heads_first(net.linear(y, 12, 24, bias=False), 6, 4, 6)
    k, v = (net.heads_first(net.linear(y, 12, 8, bias=False), 2, 4, 6) for _ in range(2))
    q, k = (net.op("RotaryEmbedding", part, cos, sin) for part in (q, k))
    y = net.op("Attention", q, k, v, is_causal=1)
    x = net.add(x, net.linear(net.heads_last(y, 24, 6), 24, 12, bias=False))
    y = net.op("RMSNormalization", x, net.gain(12), axis=-1, epsilon=1e-6)
    y = net.mul(net.silu(net.linear(y, 12, 15)), net.linear(y, 12, 15))
    x = net.op("RMSNormalization", net.add(x, net.linear(y, 15, 12)), net.gain(12), axis=-1)
    return net.model(net.linear(x, 12, 13, bias=False))


@architecture(groups=4)
def microsoft_encoder() -> onnx.ModelProto:
    """What ONNX Runtime's transformer optimizer writes."""
    net = Net("microsoft_encoder", 17)
    x = net.embed(net.ids("input_ids", "N", 6), 12, 12)
    y = net.op("Attention", x, net.weight(12, 36, fan=12), net.bias(36), domain=MICROSOFT, num_heads=3)
    y = net.op("MatMul", y, net.weight(12, 12))
    x = net.op("SkipLayerNormalization", y, x, net.gain(12), net.bias(12), net.bias(12), domain=MICROSOFT)
    y = net.op("BiasGelu", net.op("MatMul", x, net.weight(12, 15, fan=12)), net.bias(15), domain=MICROSOFT)
    y = net.op("MatMul", y, net.weight(15, 12))
    x = net.op("SkipLayerNormalization", y, x, net.gain(12), net.bias(12), net.bias(12), domain=MICROSOFT)
    return net.model(net.linear(x, 12, 3))


@architecture(groups=4)
def half_precision() -> onnx.ModelProto:
    """A small residual net in float16."""
    model = _resnet("half_precision", norm=False)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.checker.check_model(model, full_check=True)
    return model


@architecture(groups=4)
def mamba() -> onnx.ModelProto:
    """Gated depthwise 1-D convolution, input-dependent scan unrolled over three steps."""
    net = Net("mamba", 13)
    x = net.linear(net.input("x", "N", 3, 5), 5, 8)
    main, gate = net.split(net.linear(net.rms_norm(x, 8), 8, 20, bias=False), 10, 10, axis=2)
    main = net.conv(net.transpose(main, 0, 2, 1), 10, 10, 3, rank=1, group=10)
    main = net.transpose(net.silu(main), 0, 2, 1)
    step, b, c = net.split(net.linear(main, 10, 4 + 3 + 3, bias=False), 4, 3, 3, axis=2)
    delta = net.op("Softplus", net.linear(step, 4, 10))
    decay = net.op("Exp", net.mul(net.unsqueeze(delta, 3), net.op("Neg", net.op("Exp", net.weight(10, 3, std=0.3)))))
    drive = net.mul(net.unsqueeze(net.mul(delta, main), 3), net.unsqueeze(b, 2))
    state, results = "", []
    for place in range(3):
        own = [net.gather(part, net.number(place), axis=1) for part in (decay, drive, c)]
        state = net.add(net.mul(own[0], state), own[1]) if state else own[1]
        results.append(net.squeeze(net.op("MatMul", state, net.unsqueeze(own[2], 2)), 2))
    y = net.concat(*(net.unsqueeze(result, 1) for result in results), axis=1)
    y = net.mul(net.add(y, net.mul(main, net.gain(10))), net.silu(gate))
    return net.model(net.linear(net.add(x, net.linear(y, 10, 8, bias=False)), 8, 3))
