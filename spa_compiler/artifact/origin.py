"""What is compiled: a file, a model in memory, or an artifact that is placed anew."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import onnx

from spa_compiler.artifact import manifest
from spa_compiler.errors import UsageError
from spa_compiler.passes.recipe import Recipe
from spa_compiler.report.report import Report
from spa_compiler.report.report import read as read_report


@dataclass(frozen=True)
class Origin:
    """Where the model comes from, and where the result goes."""

    model: Path | onnx.ModelProto
    path: Path | None
    name: str
    output: Path
    source: manifest.Source  # the model that was compiled first, if this is an artifact
    recipe: str  # recipe.yaml: of all that was done to the source
    files: tuple[Path, ...]
    bytes: int | None  # None: what loading counts
    before: Report | None = None  # of an artifact: how it was measured

    @staticmethod
    def of(model: str | Path | onnx.ModelProto, recipe: Recipe, output: str | Path | None) -> Origin:
        """Of a file, a model in memory or an artifact; `output` as in `compile`.

        Raises:
            UsageError: passes were asked for on an artifact.
            ModelError: the folder is no artifact, or damaged.
        """
        if isinstance(model, onnx.ModelProto):
            name = model.graph.name or "model"
            digest = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
            target = Path(output or f"{name}-spa").resolve()
            return Origin(model, None, name, target, manifest.Source(name, digest), recipe.to_yaml(), (), None)
        path = Path(model)
        if path.is_dir():
            source = manifest.check(path).source
            if recipe.passes:
                raise UsageError(
                    "an artifact is placed anew as it is, no passes can run on it",
                    where=str(path),
                    fix="Give the original model to compile it with another recipe",
                )
            file = path.resolve() / "portable.onnx"
            done = (path / "recipe.yaml").read_text()
            before = read_report(path)
            return Origin(file, file, source.name, Path(output or path).resolve(), source, done, (), None, before)
        target = Path(output) if output else Path.cwd() / f"{path.stem}-spa"
        digest = manifest.digest(path) if path.is_file() else ""
        source = manifest.Source(path.name, digest)
        return Origin(path, path.resolve(), path.name, target.resolve(), source, recipe.to_yaml(), (path,), None)
