"""`spa-compile --check-hardware`: what this machine can compile for, and what it lacks."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

from spa_compiler.errors import SpaError
from spa_compiler.graph.session import onnxruntime_version, runtime
from spa_compiler.runtime.link import link
from spa_compiler.targets import cuda, host, nvrtc, parse


def show(as_json: bool) -> None:
    """Prints the findings; raises the first SpaError that would stop a compilation."""
    cpu = host()
    facts: dict[str, object] = {
        "cpu": cpu.model or cpu.name,
        "isa": cpu.level,
        "physical cores": cpu.cores_physical,
        "sparse kernels": f"yes, made for {parse('cpu').arch}",
    }
    facts |= _gpu()
    failure: SpaError | None = None
    try:
        facts["onnxruntime"] = f"{onnxruntime_version()} ({', '.join(runtime().get_available_providers())})"
        with tempfile.TemporaryDirectory() as folder:
            link([], (parse("cpu").arch,), Path(folder) / "kernels.so")
        facts["linker"] = "works"
    except SpaError as error:
        failure = error
        facts["missing"] = str(error)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            click.echo(f"{name:{width}}  {value}")
    if failure is not None:
        raise failure


def _gpu() -> dict[str, object]:
    """What there is for `--target cuda`: nothing of it is needed for CPUs."""
    found: dict[str, object] = {}
    try:
        device = cuda.device()
        found["gpu"] = f"{device.name} ({device.arch})" if device else "none (cuda:sm_90 needs none)"
    except SpaError as error:
        found["gpu"] = str(error)
    try:
        found["cuda compiler"] = str(nvrtc.find())
    except SpaError as error:
        found["cuda compiler"] = f"none: {error}"
    return found
