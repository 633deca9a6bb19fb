"""Every node gets a name, and no two the same; names that the file gives stay."""

from __future__ import annotations

from spa_compiler.graph.model import Model, scopes


def make_unique(model: Model) -> None:
    """Unnamed nodes become `<OpType>_<index>`, repeated names get a number, in place."""
    taken = {node.name for scope in scopes(model.graph) for node in scope.nodes}
    seen: set[str] = set()
    for scope in scopes(model.graph):
        for index, node in enumerate(scope.nodes):
            if node.name and node.name not in seen:
                seen.add(node.name)
                continue
            stem = node.name or node.op
            number = 1 if node.name else index
            while f"{stem}_{number}" in taken:
                number += 1
            node.name = f"{stem}_{number}"
            taken.add(node.name)
            seen.add(node.name)
