"""Which nodes of a model another form of it stands for: after ONNX Runtime's fusions, or after a compilation.

Names of nodes change when nodes are fused, names of tensors do not: what fused nodes give out has the name that it had
before. So a node stands for all that lies, in the graph as it was, between the tensors that it and its neighbours give
out. Where tensors have new names, too, the node's own name is what is left of the old one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from spa_compiler.bench.trace import Op

#: ONNX Runtime's blocked layout of convolutions: a node is named after the tensor that the plain one gave out, and from
#: then on may take in the sum and the activation behind it (onnxruntime/core/optimizer/nchwc_transformer.cc)
_BLOCKED = re.compile(r"(?P<tensor>.+?)(_bn)?_nchwc(_token_\d+)?")
_SUM_INPUT = 3  # of a blocked convolution: what is added to its result


class Whole:
    """A graph that others are forms of, branches of control flow among its nodes."""

    def __init__(self, ops: Sequence[Op]) -> None:
        self.ops = list(ops)
        self.maker = {name: i for i, op in enumerate(ops) for name in op.outputs}
        self._named = {op.name: i for i, op in enumerate(ops) if op.name}
        self._readers: dict[str, list[int]] = {}
        for i, op in enumerate(ops):
            for name in op.inputs:
                self._readers.setdefault(name, []).append(i)

    def readers(self, op: Op) -> list[int]:
        """The nodes that read what a node gives out."""
        return [i for name in op.outputs for i in self._readers.get(name, ())]

    def claims(self, parts: Sequence[Op]) -> list[list[int]]:
        """For each node of another form, the nodes here that it stands for; none twice. In the order of this graph.

        Empty: it stands for none, it was put in.
        """
        heads = [self._heads(part) for part in parts]
        known = {name for own in heads for name in own}
        taken: set[int] = set()
        return [sorted(self._between(own, known, taken)) for own in heads]

    def _between(self, heads: Sequence[str], known: set[str], taken: set[int]) -> Iterator[int]:
        """Nodes on the ways to `heads` from what other nodes are known to give out."""
        queue = [self.maker[name] for name in heads]
        while queue:
            at = queue.pop()
            if at in taken:
                continue
            taken.add(at)
            yield at
            queue += [self.maker[name] for name in self.ops[at].inputs if name in self.maker and name not in known]

    def _heads(self, part: Op) -> list[str]:
        """The tensors here that a node of another form gives out, under whatever name."""
        same = [name for name in part.outputs if name in self.maker]
        if same:
            return same
        blocked = _BLOCKED.fullmatch(part.name)
        if blocked and blocked["tensor"] in self.maker:
            return [self._behind(blocked["tensor"], part)]
        names = [name for name in (*part.sources, part.name) if name in self._named]
        return [name for found in names for name in self.ops[self._named[found]].outputs]

    def _behind(self, tensor: str, part: Op) -> str:
        """The tensor behind the sum and the activation that a blocked convolution took in."""
        if len(part.inputs) > _SUM_INPUT:
            tensor = self._next(tensor, ("Add", "Sum"))
        if part.activation and self.ops[self.maker[tensor]].kind != part.activation:
            tensor = self._next(tensor, (part.activation,))
        return tensor

    def _next(self, tensor: str, kinds: Sequence[str]) -> str:
        found = [self.ops[i] for i in self._readers.get(tensor, ()) if self.ops[i].kind in kinds]
        return found[0].outputs[0] if len(found) == 1 else tensor
