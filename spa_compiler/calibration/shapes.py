"""The shapes to compile for: from `--shape`, or chosen so that the model runs."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.calibration.examples import example_feeds
from spa_compiler.errors import UsageError
from spa_compiler.graph.model import Dim, Model, ValueInfo
from spa_compiler.graph.operators import describe
from spa_compiler.graph.session import open_model, run

Shapes = dict[str, tuple[int, ...]]
"""Input name -> concrete shape, for every input."""

SEQUENCE = 128
IMAGE = 224
_SEQUENCES = (128, 64, 32, 16, 8, 4, 2, 1)
_IMAGES = (224, 256, 299, 384, 128, 96, 64, 32, 512, 640)
_SEQUENCE_WORDS = re.compile(r"seq|len|time|token|frame|step|past|cache|length", re.IGNORECASE)
_OPTION = re.compile(r"(?P<name>.+?)\s*[=:]\s*(?P<dims>\[\s*\d*(?:\s*[,x]\s*\d+)*\s*\]|\d+(?:\s*[,x]\s*\d+)*)")
_SPELLINGS = "Write it as x=1,3,224,224 or x:1x3x224x224 or x:[1,3,224,224]"


def parse_shapes(options: Sequence[str], model: Model) -> list[Shapes]:
    """`--shape` options -> complete shape sets, in order; an input that comes again starts the next set.

    Inputs that a set leaves out follow by their symbols, then by the defaults.

    Raises:
        UsageError: an unknown input, a spelling that cannot be read, a shape that does not fit the model.
    """
    inputs = {value.name: value for value in model.signature.inputs}
    sets: list[Shapes] = []
    current: Shapes = {}
    for option in options:
        name, shape = _parse_option(option, inputs)
        if name in current:
            sets.append(current)
            current = {}
        _check_fit(inputs[name], shape, option)
        current[name] = shape
    if current:
        sets.append(current)
    return [_complete(given, model) for given in sets]


def default_shapes(model: Model) -> Shapes:
    """Shapes to time and verify with where the user names none.

    A symbolic dimension is 1 on the first axis, 128 for sequences but never more than a position table holds, and what
    the graph's convolutions need elsewhere; equal symbols are equal. Sequences and images shrink until the model runs.

    Raises:
        UsageError: no choice runs; the message names the inputs to give shapes for.
        EnvironmentFault: ONNX Runtime is missing.
    """
    return _first_that_runs(model, {})


def _first_that_runs(model: Model, bound: dict[str, int]) -> Shapes:
    inputs = model.signature.inputs
    if all(isinstance(dim, int) for value in inputs for dim in value.shape):
        return {value.name: tuple(int(dim) for dim in value.shape if isinstance(dim, int)) for value in inputs}
    session = open_model(model, optimize="basic", prepack=False)
    reason = ""
    tried: list[Shapes] = []
    for sequence, image in _sizes(model):
        shapes = {value.name: _choose(value, model, bound, sequence, image) for value in inputs}
        if shapes in tried:
            continue
        tried.append(shapes)
        try:
            run(session, example_feeds(model, shapes, np.random.default_rng(0)))
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no common root
            reason = reason or str(error).splitlines()[0]
            continue
        return shapes
    names = ", ".join(value.name for value in inputs if not all(isinstance(dim, int) for dim in value.shape))
    raise UsageError(
        f"the model runs with none of the {len(tried)} shapes tried for its symbolic dimensions ({reason})",
        where=model.source.name,
        fix=f"Say which shapes it takes with --shape, for: {names}",
    )


def _sizes(model: Model) -> Iterator[tuple[int, int]]:
    """Sequence length and image side, in the order to try; table sizes below 128 come in between the powers of two."""
    tables: set[int] = set()
    for node in model.graph.nodes:
        if node.op in ("Gather", "Add", "Slice") and not node.domain:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant):
                    tables.update(int(size) for size in tensor.shape if 1 < size < SEQUENCE)
    sequences = sorted(tables | set(_SEQUENCES), reverse=True)
    for sequence in sequences:
        yield sequence, IMAGE
    for image in _IMAGES:
        for sequence in _SEQUENCES:
            yield sequence, image


def _choose(value: ValueInfo, model: Model, bound: dict[str, int], sequence: int, image: int) -> tuple[int, ...]:
    """One input's shape; `bound` gives symbols their value and learns those chosen here."""
    sizes: list[int] = []
    for axis, dim in enumerate(value.shape):
        if isinstance(dim, int):
            sizes.append(dim)
            continue
        size = bound.get(dim) if dim is not None else None
        if size is None and dim is not None:
            size = _expression(dim, lambda name: bound.get(name, _by_rule(name, 1, value, model, sequence, image)))
        sizes.append(size if size is not None else _by_rule(dim, axis, value, model, sequence, image))
    return tuple(sizes)


def _by_rule(dim: Dim, axis: int, value: ValueInfo, model: Model, sequence: int, image: int) -> int:
    rank = len(value.shape)
    channels = _channels(value, model)
    if axis == 0 and not (rank == 1 and isinstance(dim, str) and _SEQUENCE_WORDS.search(dim)):
        return 1
    if isinstance(dim, str) and re.search(r"batch", dim, re.IGNORECASE) and not _SEQUENCE_WORDS.search(dim):
        return 1
    if isinstance(dim, str) and _SEQUENCE_WORDS.search(dim):
        return sequence
    if channels is not None:
        channel_axis, count, spatial = channels
        if axis == channel_axis:
            return count
        return image if spatial >= 2 else sequence
    if rank >= 4 and value.dtype.kind == "f":
        return image if axis >= 2 else 3
    return sequence


def _channels(value: ValueInfo, model: Model) -> tuple[int, int, int] | None:
    """Channel axis, channel count and number of spatial axes, if the input goes into a Conv (or through one
    Transpose).
    """
    tensor = next((t for t in model.graph.inputs if t.name == value.name), None)
    queue = [] if tensor is None else [(node, 1) for node in tensor.outputs]
    for node, axis in queue:
        op = describe(node)
        if op is not None and op.kind == "Conv":
            return axis, int(op.weight.shape[1]) * op.group, len(op.kernel)
        if node.op == "Transpose" and "perm" in node.attrs and len(node.attrs["perm"]) > 1:
            queue += [(user, int(node.attrs["perm"][1])) for user in node.outputs[0].outputs]
        elif node.op in ("Cast", "Sub", "Div", "Mul", "Add", "Pad", "Identity", "BatchNormalization"):
            queue += [(user, axis) for user in node.outputs[0].outputs]
    return None


def _complete(given: Shapes, model: Model) -> Shapes:
    """Fills the inputs that the user did not name."""
    bound: dict[str, int] = {}
    for value in model.signature.inputs:
        for dim, size in zip(value.shape, given.get(value.name, ()), strict=False):
            if isinstance(dim, str) and bound.setdefault(dim, size) != size:
                raise UsageError(
                    f"the symbol {dim!r} cannot be {bound[dim]} and {size} at once",
                    where=f"--shape {value.name}",
                    fix="Inputs that share a symbol share its size",
                )
    rest = [value for value in model.signature.inputs if value.name not in given]
    if not rest:
        return {value.name: given[value.name] for value in model.signature.inputs}
    free = [dim for value in rest for dim in value.shape if not isinstance(dim, int) and dim not in bound]
    if not free:
        filled = {value.name: _choose(value, model, bound, SEQUENCE, IMAGE) for value in rest}
    else:
        filled = _first_that_runs(model, bound)
    return {value.name: given.get(value.name) or filled[value.name] for value in model.signature.inputs}


def _parse_option(option: str, inputs: dict[str, ValueInfo]) -> tuple[str, tuple[int, ...]]:
    match = _OPTION.fullmatch(option.strip())
    if match is None:
        raise UsageError(f"cannot read the shape {option!r}", where="--shape", fix=_SPELLINGS)
    name = match["name"]
    if name not in inputs:
        raise UsageError(
            f"the model has no input {name!r}", where=f"--shape {option}", fix=f"Its inputs are: {', '.join(inputs)}"
        )
    return name, tuple(int(size) for size in re.findall(r"\d+", match["dims"]))


def _check_fit(value: ValueInfo, shape: tuple[int, ...], option: str) -> None:
    where, wanted = f"--shape {option}", f"Input {value.name!r} is {_text(value)}"
    if value.ranked and len(shape) != len(value.shape):
        raise UsageError(f"{len(shape)} dimensions for an input of {len(value.shape)}", where=where, fix=wanted)
    for axis, size in enumerate(shape):
        if size < 1:
            raise UsageError(f"axis {axis} has size zero: there is nothing to compute", where=where, fix=wanted)
    for axis, (dim, size) in enumerate(zip(value.shape, shape, strict=False)):
        if isinstance(dim, int) and dim != size:
            raise UsageError(f"axis {axis} is {size}, but the model fixes it to {dim}", where=where, fix=wanted)


def _text(value: ValueInfo) -> str:
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in value.shape) + "]"


_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def _expression(symbol: str, value_of: Callable[[str], int]) -> int | None:
    """The value of a symbol that is a sum or product of others (`past_length + 1`), else None."""
    try:
        tree = ast.parse(symbol, mode="eval").body
    except (SyntaxError, ValueError):
        return None

    def evaluate(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](evaluate(node.left), evaluate(node.right))
        if isinstance(node, ast.Name):
            return value_of(node.id)
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        raise ValueError(symbol)

    if not isinstance(tree, ast.BinOp):
        return None
    try:
        size = evaluate(tree)
    except (ValueError, ZeroDivisionError):
        return None
    return size if size > 0 else None
