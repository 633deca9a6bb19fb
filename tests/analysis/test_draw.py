"""The picture and the page: well-formed whatever the names are, self-contained, and saying what the analysis says."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.analysis import Analysis, analyze, draw
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from tests.analysis import nets
from tests.analysis.told import weighted

SVG = "{http://www.w3.org/2000/svg}"
GREY = "#d9d9d9"
HOSTILE = (
    "<script>alert(1)</script>",
    '" onload="alert(2)',
    "' onmouseover='alert(3)",
    "]]><b>x</b>",
    "--><svg onload=alert(4)>",
    "&lt;&amp;&#60;",
    "$svg ${script} %s {0}",
    "名前 é 😀",
    "</title></style></script><h1>",
)


def read(proto: onnx.ModelProto) -> tuple[Model, Analysis]:
    model = load(proto)
    return model, analyze(model)


def of(text: str) -> tuple[Model, Analysis]:
    return read(weighted(text))


def boxes(svg: str) -> dict[str, ElementTree.Element]:
    """By the first line of text in the box."""
    root = ElementTree.fromstring(svg)
    out = {}
    for box in root.iter(f"{SVG}g"):
        out[box.findall(f"{SVG}text")[0].text or ""] = box
    return out


def fill(box: ElementTree.Element) -> str:
    return box.findall(f"{SVG}rect")[0].get("fill") or ""


def texts(box: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in box.findall(f"{SVG}text")]


def title(element: ElementTree.Element) -> str:
    return element.findall(f"{SVG}title")[0].text or ""


class Tags(HTMLParser):
    """Tags with attributes, and the text of each element."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def renamed(names: tuple[str, ...]) -> onnx.ModelProto:
    """RESIDUAL with hostile names everywhere, each made unique by a number behind it."""
    proto = weighted(nets.RESIDUAL)
    new: dict[str, str] = {}

    def name(old: str) -> str:
        return new.setdefault(old, f"{names[len(new) % len(names)]}{len(new)}")

    for value in [*proto.graph.input, *proto.graph.output, *proto.graph.initializer]:
        value.name = name(value.name)
    for number, node in enumerate(proto.graph.node):
        node.name = f"{names[number % len(names)]}{number}"
        node.input[:] = [name(old) for old in node.input]
        node.output[:] = [name(old) for old in node.output]
    proto.graph.name = names[0]
    return proto


@pytest.mark.parametrize("name", nets.ALL)
def test_well_formed_and_complete(name: str) -> None:
    model, analysis = of(nets.ALL[name])
    root = ElementTree.fromstring(draw.svg(model, analysis))
    assert root.tag == f"{SVG}svg"
    said = "\n".join(title(box) for box in root.iter(f"{SVG}g"))
    for node in model.graph.nodes:
        if node.op != "Constant":
            assert f"makes {node.outputs[0].name} " in said
    for tensor in (*model.graph.inputs, *model.graph.outputs):
        assert f"put {tensor.name} " in said
    for group in analysis.groups:
        assert re.search(rf"\(group [0-9, ]*\b{group.id}\b", said)
    (inside,) = re.findall(r"<svg.*</svg>", draw.page(model, analysis), re.S)
    assert ElementTree.tostring(ElementTree.fromstring(inside)) == ElementTree.tostring(root)


def test_colours_are_groups_and_grey_stays() -> None:
    model, analysis = of(nets.RESIDUAL)
    found = boxes(draw.svg(model, analysis))
    assert [len(analysis.groups), fill(found["input"]), fill(found["Conv 4x8x1x1"])] == [2, GREY, GREY]
    spine = fill(found["Conv 8x3x1x1"])
    assert fill(found["Conv 8x6x3x3"]) == fill(found["Add"]) == spine
    assert fill(found["Conv 6x8x3x3"]) not in (spine, GREY)
    assert texts(found["Conv 8x3x1x1"]) == ["Conv 8x3x1x1", "+ Relu", "group 0: 8 x channel"]
    assert "reads w1 [6 (group 1), 8 (group 0), 3, 3]" in title(found["Conv 6x8x3x3"])
    assert "stays: interface (graph input)" in title(found["input"])


def test_open_sizes_are_told_by_their_names() -> None:
    model, analysis = of(nets.MLP)
    found = boxes(draw.svg(model, analysis))
    assert texts(found["input"])[1] == "x [N, 6]"
    assert "makes r1 [?, 10 (group 0)]" in title(found["Gemm 10x6"])


def test_rows_and_boxes_know_each_other() -> None:
    model, analysis = of(nets.RESIDUAL)
    page = Tags(draw.page(model, analysis))
    rows = {attributes["data-row"] for tag, attributes in page.tags if tag == "tr" and "data-row" in attributes}
    keys = {key for _, attributes in page.tags for key in (attributes.get("data-k") or "").split()}
    assert {f"g{group.id}" for group in analysis.groups} <= rows
    assert keys <= rows
    assert {"g0", "g1", "p0"} <= keys


def test_elementwise_diamonds_share_a_box() -> None:
    model, analysis = of("""g (float[N, 6] x, float[6, 8] w, float[8, 2] v) => (float[N, 2] y) {
      a = MatMul(x, w)
      b = Erf(a)
      c = Mul(a, b)
      d = Sigmoid(c)
      y = MatMul(d, v)
    }""")
    found = boxes(draw.svg(model, analysis))
    assert set(found) == {"input", "MatMul 6x8", "MatMul 8x2", "output"}
    assert texts(found["MatMul 6x8"])[1] == "+ Erf, Mul, Sigmoid"


def test_what_only_computes_sizes_is_left_out() -> None:
    model, analysis = of("""g (float[N, 4, 6] x, float[6, 8] w, float[8, 2] v) => (float[N, 4, 2] y) {
      a = MatMul(x, w)
      s = Shape(a)
      i = Constant <value = int64[1] {0}> ()
      n = Gather(s, i)
      k = Constant <value = int64[2] {4, 8}> ()
      t = Concat <axis = 0> (n, k)
      r = Reshape(a, t)
      y = MatMul(r, v)
    }""")
    titles = [title(box) for box in boxes(draw.svg(model, analysis)).values()]
    assert not any("Shape s" in text or "Gather" in text or "Concat" in text for text in titles)
    assert any("reads t " in text for text in titles), "what a drawn node reads is told all the same"


def test_tensors_captured_by_branches_are_lines() -> None:
    model, analysis = of("""g (float[N, 4] x, float[4, 6] w, float[6, 2] v) => (float[N, 2] y) {
      a = MatMul(x, w)
      yes = Constant <value = bool {1}> ()
      b = If (yes) <
        then_branch = g1 () => (float[N, 6] b1) { b1 = Relu(a) },
        else_branch = g2 () => (float[N, 6] b2) { b2 = Identity(a) }
      >
      y = MatMul(b, v)
    }""")
    svg = draw.svg(model, analysis)
    assert "If" in boxes(svg)
    root = ElementTree.fromstring(svg)
    assert any(title(line).startswith("a [") for line in root.iter(f"{SVG}path"))


def test_hostile_names_stay_text() -> None:
    model, analysis = read(renamed(HOSTILE))
    svg, page = draw.svg(model, analysis), draw.page(model, analysis)
    root = ElementTree.fromstring(svg)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == {
        "svg", "title", "style", "path", "g", "rect", "text",
    }  # fmt: skip
    assert not [key for element in root.iter() for key in element.keys() if key.startswith("on")]  # noqa: SIM118
    said = "\n".join(element.text or "" for element in root.iter(f"{SVG}title"))
    for name in HOSTILE:
        assert name in said
    told = Tags(page)
    assert [tag for tag, _ in told.tags].count("script") == 1
    assert {tag for tag, _ in told.tags} <= {
        "html", "head", "meta", "title", "style", "body", "main", "nav", "button", "svg", "g", "rect", "text", "path",
        "aside", "h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "i", "script",
    }  # fmt: skip
    assert not [key for _, attributes in told.tags for key in attributes if key.startswith("on")]
    assert "alert(1)</script>" not in page
    assert "<script>alert" in "".join(told.text), "it is there, as text"


def test_what_xml_cannot_hold_is_replaced() -> None:
    model, analysis = read(renamed(("a\x01b\x0b", "line\nbreak", "\x7f\x85\ufffe", "tab\t\r")))
    ElementTree.fromstring(draw.svg(model, analysis))
    said = "".join(title(box) for box in boxes(draw.svg(model, analysis)).values())
    assert "a\ufffdb\ufffd" in said
    assert "line\ufffdbreak" in said


def test_long_names_are_cut() -> None:
    model, analysis = read(renamed(("x" * 100_000,)))
    assert len(draw.svg(model, analysis)) < 30_000
    assert len(draw.page(model, analysis)) < 60_000


def test_the_page_is_self_contained() -> None:
    page = draw.page(*of(nets.RESIDUAL))
    told = Tags(page)
    assert not [key for _, attributes in told.tags for key in attributes if key in ("src", "href", "srcset", "action")]
    assert set(re.findall(r"\w+://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in page
    assert "@import" not in page
    (script,) = re.findall(r"<script>(.*)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [attributes["content"] for tag, attributes in told.tags if "http-equiv" in attributes]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_the_same_model_gives_the_same_bytes() -> None:
    model, analysis = of(nets.CONV_FLATTEN)
    assert draw.page(model, analysis) == draw.page(*of(nets.CONV_FLATTEN))


def test_a_model_without_groups_is_drawn() -> None:
    model, analysis = of("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
    assert {fill(box) for box in boxes(draw.svg(model, analysis)).values()} == {GREY}
    ElementTree.fromstring(re.findall(r"<svg.*</svg>", draw.page(model, analysis), re.S)[0])


def test_2000_nodes_stay_small_and_quick() -> None:
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for layer in range(500):
        weights.append(numpy_helper.from_array(rng.normal(size=(8, 8, 1, 1)).astype(np.float32), f"layer{layer}.w"))
        nodes += [
            helper.make_node("Conv", [last, f"layer{layer}.w"], [f"c{layer}"]),
            helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]),
            helper.make_node("MaxPool", [f"r{layer}"], [f"p{layer}"], kernel_shape=[1, 1]),
            helper.make_node("Add", [f"p{layer}", f"c{layer}"], [f"a{layer}"]),
        ]
        last = f"a{layer}"
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8, 4, 4]) for name in ("x", last)]
    graph = helper.make_graph(nodes, "deep", value[:1], value[1:], weights)
    model, analysis = read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    start = time.process_time()
    svg = draw.svg(model, analysis)
    assert time.process_time() - start < 15
    assert len(svg) < 4_000_000
    root = ElementTree.fromstring(svg)
    assert max(int(root.attrib["width"]), int(root.attrib["height"])) <= 16_000
    assert len(list(root.iter(f"{SVG}g"))) < 1600, "element-wise nodes have no boxes of their own"
