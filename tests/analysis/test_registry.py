"""Every operator of the installed onnx has a rule, and so have those that ONNX Runtime's optimizer and exporters write."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from types import ModuleType

import onnx.defs
import pytest

from spa_compiler.analysis import rules
from spa_compiler.analysis.rules import opaque
from spa_compiler.graph import runtime_ops

FAMILIES: list[ModuleType] = [
    importlib.import_module(f"{rules.__name__}.{found.name}") for found in pkgutil.iter_modules(rules.__path__)
]

MICROSOFT = """
    Attention BiasGelu DequantizeLinear DynamicQuantizeMatMul FastGelu FusedConv FusedMatMul Gelu GroupQueryAttention
    MatMulIntegerToFloat MatMulNBits MultiHeadAttention QGemm QLinearAdd QLinearConcat QuantizeLinear QuickGelu
    RotaryEmbedding SkipLayerNormalization SkipSimplifiedLayerNormalization
"""
"""What exporters and ONNX Runtime's optimizer write into files."""


def known(domain: str) -> set[str]:
    return {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == domain}


@pytest.mark.parametrize("op", sorted(known("")))
def test_default_domain(op: str) -> None:
    assert op in rules.RULES


@pytest.mark.parametrize("op", MICROSOFT.split())
def test_microsoft(op: str) -> None:
    assert op in rules.MICROSOFT


def test_tables_name_operators_that_exist() -> None:
    assert set(rules.RULES) - runtime_ops.NAMES <= known("")
    assert set(rules.RULES) >= runtime_ops.NAMES


@pytest.mark.parametrize("table", ["RULES", "MICROSOFT"])
def test_each_has_one_family(table: str) -> None:
    count = Counter(op for family in FAMILIES for op in getattr(family, table, {}))
    assert [op for op, times in count.items() if times > 1] == []
    assert set(count) == set(getattr(rules, table))


def test_other_domains_have_a_reason() -> None:
    domains = {schema.domain for schema in onnx.defs.get_all_schemas_with_history()} - {""}
    assert domains <= set(opaque.DOMAINS)
