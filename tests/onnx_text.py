"""ONNX text in, ONNX text out: the form in which pass tests state a graph before and after."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx.checker
import onnx.parser
import onnx.printer

from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.save import to_proto

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'


def proto_from(text: str, header: str = HEADER) -> onnx.ModelProto:
    """Parses ONNX text (with or without a header) and checks it."""
    model = onnx.parser.parse_model(text if text.lstrip().startswith("<") else header + text)
    onnx.checker.check_model(model, full_check=True)
    return model


def model_from(text: str, header: str = HEADER) -> Model:
    """ONNX text -> `Model`, through the same door as a file."""
    return load(proto_from(text, header))


def text_of(model: Model) -> str:
    """A canonical text of a model: no value_info, initializers and nodes in graphsurgeon's order."""
    proto = to_proto(model)
    proto.graph.ClearField("value_info")
    return str(onnx.printer.to_text(proto.graph))


def assert_becomes(run: Callable[[Model], object], before: str, after: str, header: str = HEADER) -> None:
    """`run` edits the model in place; the result must read exactly like `after`."""
    model = model_from(before, header)
    run(model)
    assert text_of(model) == text_of(model_from(after, header))


def assert_unchanged(run: Callable[[Model], object], before: str, header: str = HEADER) -> None:
    """The case that must not fire."""
    assert_becomes(run, before, before, header)
