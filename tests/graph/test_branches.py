"""Graphs inside of graphs are found at any depth."""

from __future__ import annotations

from onnx import helper

from spa_compiler.graph.branches import with_branches


def test_branches_at_any_depth_and_in_lists_are_found() -> None:
    deep = helper.make_graph([], "deep", [], [])
    inner = helper.make_graph([helper.make_node("If", ["c"], [], then_branch=deep)], "inner", [], [])
    other = helper.make_graph([], "other", [], [])
    nodes = [
        helper.make_node("Loop", [], [], body=inner, count=1),
        helper.make_node("Many", [], [], domain="own", bodies=[other, other]),
    ]
    graph = helper.make_graph(nodes, "outer", [], [])
    assert [found.name for found in with_branches(graph)] == ["outer", "inner", "deep", "other", "other"]
