"""Operators through which no channel can be followed: all of their axes stay. Each says why, in words for users."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Facts, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK
from spa_compiler.analysis.rules.inputs import axis_of, given, pin_matrix, put_outputs

_CONTROL = "control flow: its branches and bodies are not followed"
_SEQUENCE = "a sequence of tensors"
_STRING = "text"
_LOSS = "a training loss over classes"
_SIGNAL = "a signal transform"

OPAQUE: dict[str, str] = {
    "ConcatFromSequence": _SEQUENCE,
    "If": _CONTROL,
    "ImageDecoder": "decodes an image",
    "Loop": _CONTROL,
    "MelWeightMatrix": _SIGNAL,
    "NegativeLogLikelihoodLoss": _LOSS,
    "NonMaxSuppression": "selects boxes",
    "NonZero": "positions of values",
    "Optional": _SEQUENCE,
    "OptionalGetElement": _SEQUENCE,
    "OptionalHasElement": _SEQUENCE,
    "RegexFullMatch": _STRING,
    "STFT": _SIGNAL,
    "Scan": _CONTROL,
    "SequenceAt": _SEQUENCE,
    "SequenceConstruct": _SEQUENCE,
    "SequenceEmpty": _SEQUENCE,
    "SequenceErase": _SEQUENCE,
    "SequenceInsert": _SEQUENCE,
    "SequenceLength": _SEQUENCE,
    "SequenceMap": _CONTROL,
    "SoftmaxCrossEntropyLoss": _LOSS,
    "SplitToSequence": _SEQUENCE,
    "StringConcat": _STRING,
    "StringNormalizer": _STRING,
    "StringSplit": _STRING,
    "TfIdfVectorizer": _STRING,
    "Unique": "selects what differs",
}
"""Operators of the default domain."""

DOMAINS = {
    "ai.onnx.ml": "classical machine learning on features",
    "ai.onnx.preview": "an operator that may still change",
    "ai.onnx.preview.training": "training",
}
"""Why other domains of the ONNX standard stay, all of their operators."""


def pinned(reason: str) -> Rule:
    """The rule that all axes stay."""
    return lambda node, facts: reason


def determinant(node: gs.Node, facts: Facts) -> str | None:
    """[.., m, m] -> [..]."""
    x = node.inputs[0]
    axes = facts.of(x)
    if axes is None:
        return UNKNOWN_RANK
    pin_matrix(node, facts, x, "a determinant over the axis")
    put_outputs(node, facts, axes[:-2])
    return None


def fourier(node: gs.Node, facts: Facts) -> str | None:
    """[.., n, .., 1 or 2] -> [.., frequencies, .., 2]; the other axes pass."""
    x, out = node.inputs[0], node.outputs[0]
    axes, results = facts.of(x), facts.of(out)
    if axes is None or results is None:
        return UNKNOWN_RANK
    rank = len(axes)
    stays = {rank - 1, 1, rank - 2}  # opset 17 transforms axis 1 where the node names none, opset 20 the last but one
    if "axis" in node.attrs:
        stays = {rank - 1, axis_of(node, rank, 1)}
    elif (named := given(node, 2)) is not None:
        known = facts.value(named)
        if known is None:
            return "an axis that is computed"
        stays = {rank - 1, int(known.reshape(-1)[0]) % rank}
    facts.put(out, [results[place] if place in stays else own for place, own in enumerate(axes)])
    for tensor in (x, out):
        for place in sorted(stays):
            facts.pin(node.op, tensor, place, _SIGNAL, window=True)
    return None


RULES: dict[str, Rule] = {op: pinned(reason) for op, reason in OPAQUE.items()} | {"DFT": fourier, "Det": determinant}
