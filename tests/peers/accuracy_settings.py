"""What the accuracy benchmark measures: models, settings (how much remains, in which form), methods, and the bars.

A method is a column of options for one pass; a setting says how much of the weights remains. Both together are a recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

ROUNDING = 12
"""Digits of shares: 1 - 0.3 is 0.7."""


@dataclass(frozen=True)
class Method:
    """One way to spend a budget.

    Attributes:
        name: as tables and `--method` call it.
        pass_name: the pass that runs; empty for a method of another tool.
        options: of that pass, besides the budget and the pattern.
        data: whether it gets the calibration samples.
    """

    name: str
    pass_name: str
    options: dict[str, Any] = field(default_factory=dict)
    data: bool = True

    @property
    def foreign(self) -> bool:
        """Whether another tool does the work."""
        return not self.pass_name


@dataclass(frozen=True)
class Setting:
    """So much of the weights that a pass takes remains, in such a form.

    Attributes:
        name: as tables and `--setting` call it.
        remains: share of the weights that stays.
        pattern: which zeros are allowed where a method makes zeros.
        methods: names of the methods to compare.
    """

    name: str
    remains: float
    pattern: str
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """A trained model and how it is scored.

    Attributes:
        name: as `--only` calls it; also the function of `accuracy_calibration.py`.
        file: what `graphs.py` calls it.
        title: for people.
        metric: the name of a metric of `evaluate.py`.
        dense: its value for the model as it is, by `../shared/models/README.md`.
        also: a metric that is reported but has no bar.
        perplexity: lower is better, and drops are percent of the dense value.
        targets: the option of the passes.
        peer_batches: how many of the calibration batches onnxsim gets, evenly spread; 0 for all. Its Gram matrices of
            convolutions are scalar loops, an hour for a network that ours take seconds for.
    """

    name: str
    file: str
    title: str
    metric: str
    dense: float
    settings: tuple[Setting, ...]
    also: str = ""
    perplexity: bool = False
    targets: tuple[str, ...] = ()
    peer_batches: int = 0

    def setting(self, name: str) -> Setting:
        """The setting of that name."""
        return next(setting for setting in self.settings if setting.name == name)


def _sparsify(name: str, **options: Any) -> Method:
    return Method(name, "sparsify", options)


def _factorize(name: str, **options: Any) -> Method:
    return Method(name, "factorize", options)


# The controls see no data. With samples a pass also moves biases, so there is a row for what that alone gives magnitude.
CONTROLS = ("random", "magnitude")
"""What every column carries: the baselines that methods keep losing to."""
_PLAIN = (
    *(Method(name, "sparsify", {"method": name, "allocate": "uniform"}, data=False) for name in CONTROLS),
    Method("magnitude, global", "sparsify", {"method": "magnitude", "scope": "global"}, data=False),
)
# All layers get the same share, so that methods compare like with like; `auto` chooses.
_UNIFORM = (
    _sparsify("magnitude + data", method="magnitude", allocate="uniform"),
    *(
        _sparsify(name, method=name, allocate="uniform")
        for name in ("wanda", "dass", "dsnot", "spectrum", "envelope", "swap", "sparsegpt", "admm")
    ),
    # Pruner-Zero's expression, with the norms of the inputs in the place of gradients, which an ONNX file has not.
    _sparsify("symbolic", method="symbolic", allocate="uniform", expression="sq(W)*mms(X)"),
)
ALLOCATIONS = ("uniform", "global", "lamp", "erk", "error", "proportional", "ecoflap", "evolution")
LOW_RANK = ("svd", "fwsvd", "whitened", "tucker")
_METHODS = (
    *_PLAIN,
    *_UNIFORM,
    _sparsify("auto", method="auto"),
    *(_sparsify(f"auto, {name}", method="auto", allocate=name) for name in ALLOCATIONS),
    *(_factorize(name, method=name, allocate="uniform") for name in LOW_RANK),
    _factorize("sparse-low-rank", method="sparse-low-rank"),
    _factorize("low rank, auto", method="auto"),
    Method("onnxsim wanda", "", {"method": "wanda"}),
    Method("onnxsim sparsegpt", "", {"method": "sparsegpt"}),
)
METHODS = {method.name: method for method in _METHODS}

_PEERS = ("onnxsim wanda", "onnxsim sparsegpt")
_ALLOCATED = tuple(f"auto, {name}" for name in ALLOCATIONS)
_FIXED = "2:4"
_EVERYWHERE = (*CONTROLS, "magnitude + data", "wanda", "sparsegpt", "admm", "auto")
"""What every setting with zeros compares; one setting of each kind of network compares all methods."""
# DaSS is for gated feed-forward blocks, which one model here has.
_OTHERS = tuple(m.name for m in (*_PLAIN, *_UNIFORM) if m.name not in (*_EVERYWHERE, "dass"))
_MATRICES = ("svd", "fwsvd", "whitened", "low rank, auto")


def _unstructured(share: float, *more: str) -> Setting:
    methods = (*_EVERYWHERE, *more, *_PEERS)
    return Setting(f"{share:.0%} unstructured", _rest(share), "unstructured", methods)


def _blocks(share: float) -> Setting:
    return Setting(f"{share:.0%} in 4x1 blocks", _rest(share), "block:4x1", _EVERYWHERE)


def _rest(share: float) -> float:
    return round(1 - share, ROUNDING)


TWO_OF_FOUR = Setting(_FIXED, 0.5, _FIXED, (*_EVERYWHERE, *_PEERS))
LOW_RANK_70 = Setting("low rank, 70% of params", 0.7, "unstructured", (*CONTROLS, *_MATRICES, "sparse-low-rank"))
HALF = Setting(
    "50% of params, any form",
    0.5,
    "unstructured",
    (*_EVERYWHERE, *_PEERS, *_MATRICES, "sparse-low-rank"),
)
_TUCKER_70 = Setting("low rank, 70% of params", 0.7, "unstructured", (*CONTROLS, *_MATRICES, "tucker"))

MODELS = {
    model.name: model
    for model in (
        Model(
            name="minilm",
            file="minilm_l6_v2",
            title="MiniLM-L6, STS-B dev, Spearman x 100",
            metric="stsb_dev",
            dense=86.72,
            also="stsb_test",
            settings=(
                _unstructured(0.6),
                _unstructured(0.7, *_OTHERS, *_ALLOCATED),
                _unstructured(0.8),
                _blocks(0.5),
                _blocks(0.6),
                TWO_OF_FOUR,
                LOW_RANK_70,
                HALF,
            ),
        ),
        Model(
            name="resnet56",
            file="resnet56_cifar10",
            title="ResNet-56, CIFAR-10 top-1",
            metric="cifar10",
            dense=93.39,
            peer_batches=16,
            settings=(_unstructured(0.7, *_OTHERS), _blocks(0.5), _TUCKER_70),
        ),
        Model(
            name="efficientnet_lite0",
            file="efficientnet_lite0_imagenet",
            title="EfficientNet-Lite0, sample top-1, 1x1 layers",
            metric="imagenet_sample",
            dense=88.00,
            # An op type takes neither the depthwise nor the first convolution; what remains are the 1x1 ones.
            targets=("Conv",),
            settings=(_unstructured(0.3), _unstructured(0.5)),
        ),
        Model(
            name="cct",
            file="cct4_cifar10",
            title="CCT, CIFAR-10 top-1",
            metric="cifar10",
            dense=84.50,
            peer_batches=16,
            settings=(_unstructured(0.6),),
        ),
        Model(
            name="stories260k",
            file="stories260k",
            title="stories260K, perplexity",
            metric="tinystories_perplexity",
            dense=3.658,
            perplexity=True,
            settings=(_unstructured(0.2), _unstructured(0.3, *_OTHERS, "dass", *_ALLOCATED)),
        ),
    )
}


def cells(model: Model) -> Iterator[tuple[Setting, Method]]:
    """Every setting with every method that it compares."""
    for setting in model.settings:
        for name in setting.methods:
            yield setting, METHODS[name]


def recipe(model: Model, setting: Setting, method: Method) -> dict[str, Any]:
    """The recipe, as `from_yaml` reads it."""
    options = dict(method.options)
    if model.targets:
        options["targets"] = list(model.targets)
    if method.pass_name == "factorize":
        options["params"] = setting.remains
    else:
        options["pattern"] = setting.pattern
        if setting.pattern != _FIXED:
            options["sparsity"] = round(1 - setting.remains, ROUNDING)
    return {"version": 1, "passes": [{"name": method.pass_name, **options}]}
