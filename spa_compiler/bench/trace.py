"""ONNX Runtime's profile of a session: what ran, and how long each node took.

A session that is profiled leaves two files. The trace has an event for each node of each run: its name, its operator,
begin and duration in whole microseconds. The optimized model has the nodes that ran, in the order in which they ran,
with the names of what they read and write, which fusions keep where they rename nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx

from spa_compiler.errors import ModelError

_NODE, _RUN, _SUFFIX = "Node", "model_run", "_kernel_time"
_FORMAT = "Name an interpreter with onnxruntime 1.19 or newer with --python onnxruntime=PATH"


@dataclass(frozen=True)
class Op:
    """A node of a model file. Of the nodes in its branches it reads what they read from outside."""

    name: str
    kind: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    activation: str = ""  # an attribute of convolutions in ONNX Runtime's blocked layout
    sources: tuple[str, ...] = ()  # names of the nodes that an `ai.spa` node took the place of, where it says so
    depth: int = 0  # in how many branches of control flow it lies


@dataclass(frozen=True)
class Profile:
    """What one session did, medians over its runs, in milliseconds.

    Attributes:
        ops: the nodes that ran.
        ms: of each of them by itself: an If without the nodes of its branches.
        wall_ms: of a whole run, with all that lies between the nodes.
    """

    ops: list[Op]
    ms: list[float]
    wall_ms: float


class _Args(msgspec.Struct):
    op_name: str = ""


class _Event(msgspec.Struct):
    cat: str
    name: str
    ts: int = 0
    dur: int = 0
    args: _Args = msgspec.field(default_factory=_Args)


def ops_of(model: onnx.ModelProto) -> list[Op]:
    """The nodes of a model, those in branches of control flow before the one that has them."""
    return list(_ops(model.graph, 0))


def read(trace: Path, optimized: Path, counted: Sequence[bool]) -> Profile:
    """The profile of a session.

    Args:
        trace: what `end_profiling` wrote.
        optimized: what `optimized_model_filepath` named; external data is not read.
        counted: for each run, whether it is one to count: warming up is not.

    Raises:
        ModelError: the trace holds less than all runs, or is of another form than ONNX Runtime 1.19 to 1.31 write.
    """
    try:
        events = msgspec.json.decode(trace.read_bytes(), type=list[_Event])
    except msgspec.DecodeError as error:
        raise ModelError(f"the profile cannot be read: {error}", where="onnxruntime", fix=_FORMAT) from error
    runs = sorted((e for e in events if e.name == _RUN), key=lambda e: e.ts)
    if len(runs) != len(counted):
        raise ModelError(
            f"ONNX Runtime's profile ends after {len(runs)} of {len(counted)} runs: it holds a million events",
            where="onnxruntime",
            fix="Ask for fewer --runs",
        )
    ops = ops_of(onnx.load(str(optimized), load_external_data=False))
    nodes = [e for e in events if e.cat == _NODE and e.name.endswith(_SUFFIX)]
    begins = np.array([e.ts for e in runs])
    of_run: list[list[_Event]] = [[] for _ in runs]
    for event in nodes:  # in the order in which they ended
        at = int(np.searchsorted(begins, event.ts, side="right")) - 1
        if at >= 0:
            of_run[at].append(event)
    taken = [_times(own, ops) for own, counts in zip(of_run, counted, strict=True) if counts]
    medians = np.median(np.array(taken), axis=0) / 1e3
    wall = float(np.median([run.dur for run, counts in zip(runs, counted, strict=True) if counts])) / 1e3
    return Profile(ops, [float(value) for value in medians], wall)


def _ops(graph: onnx.GraphProto, depth: int) -> Iterator[Op]:
    for node in graph.node:
        read = list(node.input)
        for attribute in node.attribute:
            branches = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
            for branch in branches:
                inner = list(_ops(branch, depth + 1))
                yield from inner
                read += _outer(branch, inner)
        texts = {a.name: a.s.decode(errors="replace") for a in node.attribute if a.type == onnx.AttributeProto.STRING}
        props = {entry.key: entry.value for entry in node.metadata_props}
        yield Op(
            node.name,
            node.op_type,
            node.domain,
            tuple(dict.fromkeys(name for name in read if name)),
            tuple(name for name in node.output if name),
            texts.get("activation", ""),
            tuple(filter(None, props.get("spa.source", "").split(","))),
            depth,
        )


def _outer(branch: onnx.GraphProto, inner: Sequence[Op]) -> Iterator[str]:
    """What a branch reads and does not make itself."""
    own = {tensor.name for tensor in branch.initializer} | {value.name for value in branch.input}
    own |= {name for op in inner for name in op.outputs}
    for name in (*(name for op in inner for name in op.inputs), *(value.name for value in branch.output)):
        if name not in own:
            yield name


def _times(events: Sequence[_Event], ops: Sequence[Op]) -> list[int]:
    """Microseconds of every node in one run, those of its branches not counted twice.

    Nodes of the outermost graph run in the file's order. Those in branches end before the one that has them, and begin
    after it.
    """
    times = [0] * len(ops)
    outer = [i for i, op in enumerate(ops) if op.depth == 0]
    branching = {op.kind for i, op in enumerate(ops) if i and ops[i - 1].depth > op.depth}
    named = {op.name: i for i, op in enumerate(ops) if op.name and op.depth}
    around: list[tuple[_Event, int]] = []
    for event in reversed(events):
        name = event.name.removesuffix(_SUFFIX)
        while around and event.ts < around[-1][0].ts:
            around.pop()
        fits = bool(outer) and ops[outer[-1]].kind == event.args.op_name and ops[outer[-1]].name in ("", name)
        beside = bool(around) and fits and event.ts == around[-1][0].ts and event.dur == 0
        if around and not beside:
            of = around[-1][1]
            where = named.get(name, of)
            times[of] -= event.dur
        elif fits:
            where = outer.pop()
        else:
            raise _other_form(f"{name} is none of the model's nodes")
        times[where] += event.dur
        if event.args.op_name in branching:
            around.append((event, where))
    if outer:
        raise _other_form(f"{ops[outer[-1]].name} is not in it")
    return times


def _other_form(what: str) -> ModelError:
    return ModelError(f"ONNX Runtime's profile is of another form: {what}", where="onnxruntime", fix=_FORMAT)
