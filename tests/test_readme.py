"""README.md and docs/ say what is so: the measured table, the flags, the error texts, the links."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from spa_compiler.cli.compile import main as spa_compile
from spa_compiler.passes.recipe import from_flags
from tests.peers import accuracy, accuracy_tables, tables
from tests.peers.accuracy_rows import Rows

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEPLOY = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
COMMANDS = {
    name: f"spa_compiler.cli.{name.removeprefix('spa-').replace('-', '_')}"
    for name in ("spa-compile", "spa-analyze", "spa-bench", "spa-tune-server")
}
#: who an error's text comes from, as the "Said by:" line begins, if it is ours
OURS = ("spa-compile", "kernels.so", "`spa_compiler.load`")


# ---------------------------------------------------------------- the measured table


def test_the_table_is_what_was_measured() -> None:
    assert README.count(tables.BEGIN) == README.count(tables.END) == 1
    between = README.split(tables.BEGIN)[1].split(tables.END)[0].strip()
    expected = tables.render(tables.read(tables.MEASURED))
    assert between == expected, "run: python tests/peers/tables.py --render"


def test_the_accuracies_are_what_was_measured() -> None:
    assert README.count(accuracy.BEGIN) == README.count(accuracy.END) == 1
    between = README.split(accuracy.BEGIN)[1].split(accuracy.END)[0].strip()
    expected = accuracy_tables.brief(Rows.read(accuracy.JSON))
    assert between == expected, "run: python tests/peers/accuracy.py --render"


def test_the_table_says_where_int8_wins() -> None:
    rows = [
        tables.Row(what="onnxruntime", median_ms=10.0, p10_ms=9.9, p90_ms=10.2),
        tables.Row(what="onnxruntime-int8", median_ms=4.0, p10_ms=3.9, p90_ms=4.2),
        tables.Row(what="90 % 4x1", median_ms=2.0, p10_ms=1.9, p90_ms=2.2, compiled=True, error=2e-7),
        tables.Row(what="50 % 4x1", median_ms=5.0, p10_ms=4.9, p90_ms=5.2, compiled=True, error=3e-7),
    ]
    race = tables.Race(key="m", model="M", shape="1x128", threads=1, runs=9, rows=rows)
    text = tables.render(tables.Measured(machine="a machine", versions={"onnxruntime": "1.99"}, races=[race]))
    assert "| M | 1x128 | 1 | **spa-compiler, 90 % 4x1** | 2 | 1.9 - 2.2 | **5.00** |" in text
    assert "Dense int8 wins in 1 of 2 rows: M 1x128 at 50 % 4x1 (4 against 5 ms)." in text
    assert "3e-07" in text


# ---------------------------------------------------------------- commands


def _code(text: str) -> Iterator[str]:
    """Inline code, and the lines of code blocks, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    for block in blocks:
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    yield from re.findall(r"`([^`\n]+)`", rest)


def _options(command: str) -> set[str]:
    main: click.Command = importlib.import_module(COMMANDS[command]).main
    return {"--help", *(name for parameter in main.params for name in (*parameter.opts, *parameter.secondary_opts))}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_exists(command: str) -> None:
    used = {
        option
        for page in PAGES
        for line in _code(page.read_text(encoding="utf-8"))
        if line.removeprefix("$ ").startswith(f"{command} ")
        for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", line.partition("#")[0])
    }
    assert used
    assert used <= _options(command)


def test_every_option_that_stands_alone_exists() -> None:
    known = set().union(*map(_options, COMMANDS))
    #: of the plan: the page says that they are not there
    planned = {"--calib"}
    for page in PAGES:
        for line in _code(page.read_text(encoding="utf-8")):
            if line.startswith("--"):
                for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", line):
                    assert option in known | (planned if page.name == "design.md" else set()), page.name


def test_recipes_in_the_text_can_be_read() -> None:
    texts = re.findall(r'(?:from_flags\(|--passes )"([^"]+)"', "".join(p.read_text(encoding="utf-8") for p in PAGES))
    assert texts
    for text in texts:
        from_flags(text)


def test_python_in_the_text_is_python() -> None:
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            ast.parse(block)


def _program(page: str, words: str) -> str:
    """The Python block that has these words."""
    (found,) = [block for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if words in block]
    return str(found)


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(spa_compile, [*arguments, "--threads", "1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_masks_of_the_readme_and_the_check_of_a_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trainer's program makes masks, the command beside it cuts, the program of deploy.md checks the cut."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    exec(compile(_program(README, "masks.npz"), "README.md", "exec"), {})
    (command,) = re.findall(r'^spa-compile (models/\S+) --passes "(prune-groups\{masks=masks.npz\})"$', README, re.M)
    model, passes = command
    _run(model, "--passes", passes, "--shape", "image=2,1,8,8", "-o", "model-spa")

    report = Path("model-spa", "report.json")
    told = json.loads(report.read_text())
    (cut,) = told["passes"]
    assert [len(group["units"]) for group in cut["removed"]] == [96] * 5, "a quarter of 384 channels, in five blocks"
    assert cut["warnings"] == []

    shutil.copyfile(model, "model.onnx")
    check = compile(_program(DEPLOY, "report.json"), "docs/deploy.md", "exec")
    assert _errors(check, capsys)[0] < 1e-5
    cut["removed"][0]["activations"] = []
    report.write_text(json.dumps(told))
    assert _errors(check, capsys)[0] > 1e-3, "a slab that is left out shows"


def _errors(program: object, capsys: pytest.CaptureFixture[str]) -> list[float]:
    capsys.readouterr()
    exec(program, {})  # type: ignore[arg-type]
    return [float(number) for number in re.findall(r"relative error (\S+)", capsys.readouterr().out)]


def _on_examples() -> list[str]:
    """Commands of the README that anybody can run after cloning; the masks have a test of their own."""
    lines = [line.partition("  #")[0].strip() for line in _code(README)]
    return [line for line in lines if re.match(r"spa-(compile|analyze) models/", line) and "masks.npz" not in line]


@pytest.mark.parametrize("line", _on_examples())
def test_commands_on_the_example_models_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    command, *arguments = shlex.split(line)
    if command == "spa-compile" and "--dry-run" not in arguments:
        arguments.append("--dry-run")
    main: click.Command = importlib.import_module(COMMANDS[command]).main
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output


def test_every_target_of_make_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for line in _code(page.read_text(encoding="utf-8")):
            for target in re.findall(r"^make ([a-z-]+)", line):
                assert re.search(rf"^{target}:", makefile, re.M), f"{page.name}: make {target}"


# ---------------------------------------------------------------- links


def _anchor(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            linked = (page.parent / path) if path else page
            assert linked.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.M)
                assert anchor in map(_anchor, headings), f"{page.name}: {target}"


# ---------------------------------------------------------------- error texts


def _headings(text: str, level: str) -> dict[str, str]:
    """Error text -> the section below it, for headings that are code."""
    sections = re.split(rf"^{level} `+(.+?)`+$", text, flags=re.M)[1:]
    return dict(zip(sections[::2], sections[1::2], strict=True))


def _fixed(text: str) -> str:
    """A text without what differs from message to message: numbers and everything filled in become #."""
    return re.sub(r"#+", "#", re.sub(r"\d+", "#", text))


def _texts() -> set[str]:
    """Every string of the package's Python and of the C that ships."""
    found = set()
    for path in (ROOT / "spa_compiler").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(v.value) if isinstance(v, ast.Constant) else "#" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    for path in (ROOT / "spa_compiler" / "runtime" / "c").glob("*.c"):
        for literals in re.findall(r'"(?:[^"\\\n]|\\.)*"(?:\s*"(?:[^"\\\n]|\\.)*")*', path.read_text()):
            found.add(re.sub(r"%\.?\d*(?:ll|z)?[dsu]", "#", re.sub(r'"\s*"', "", literals)[1:-1]))
    return {_fixed(text) for text in found}


def _said(heading: str, texts: set[str]) -> bool:
    return any(_fixed(heading) in text for text in texts)


def test_every_error_text_of_ours_is_in_the_code() -> None:
    texts = _texts()
    found = _headings(DEPLOY, "##")
    assert len(found) > 10
    for heading, section in found.items():
        said = re.search(r"^Said by: (.+)", section, re.M)
        assert said, heading
        if said[1].startswith(OURS):
            assert _said(heading, texts), heading
        assert "\nCause: " in section, heading
        assert "\nFix: " in section, heading


def test_an_error_text_that_is_not_in_the_code_is_noticed() -> None:
    texts = _texts()
    assert _said("this kernels.so was compiled for x86-64-v4", texts)
    for wrong in ("this kernels.so was built for x86-64-v4", "opset 6 is too new", "is not a register function"):
        assert not _said(wrong, texts), wrong


def test_the_errors_in_the_readme_have_a_section_in_deploy() -> None:
    sections = {re.sub(r"_[0-9a-f]{10}\(-1\)", "_...", heading) for heading in _headings(DEPLOY, "##")}
    for heading in _headings(README, "###"):
        assert any(heading in section for section in sections), heading
