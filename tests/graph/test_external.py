"""External data: lazily read, from below the model's own folder alone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from spa_compiler.errors import ModelError, UsageError
from spa_compiler.graph.load import load
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.graph.save import save, to_proto, weight_bytes
from spa_compiler.graph.session import open_model, open_session, run

ROWS, COLUMNS = 64, 32


def write(folder: Path, location: str = "net.data", *, offset: int = 0, length: int | None = None) -> Path:
    """A MatMul with its weight in `location`, as the model says; the file itself is always `net.data`."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[ROWS, COLUMNS])
    weight.data_location = TensorProto.EXTERNAL
    entries = {"location": location, "offset": str(offset)}
    entries["length"] = str(ROWS * COLUMNS * 4 if length is None else length)
    for key, value in entries.items():
        weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", ROWS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", COLUMNS])],
        [weight],
    )
    folder.mkdir(exist_ok=True)
    path = folder / "net.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    (folder / "net.data").write_bytes(values().tobytes())
    return path


def values() -> np.ndarray:
    return np.arange(ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS)


def test_weights_come_from_the_models_folder_wherever_we_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    model = load(path)
    assert model.source.bytes == path.stat().st_size + ROWS * COLUMNS * 4
    assert np.array_equal(weighted_ops(model.graph)[0].rows(), values().T)
    assert onnx.numpy_helper.to_array(to_proto(model).graph.initializer[0]).tolist() == values().tolist()


@pytest.mark.parametrize("location", ["../a/net.data", "/etc/passwd", "sub/../../a/net.data", "..\\net.data", "C:\\x"])
def test_paths_out_of_the_folder(tmp_path: Path, location: str) -> None:
    with pytest.raises(ModelError, match=r"tensor 'w'.*points out of the model's folder.*beside the model"):
        load(write(tmp_path / "a", location))


def test_symbolic_link(tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    target = tmp_path / "elsewhere"
    (tmp_path / "a" / "net.data").rename(target)
    (tmp_path / "a" / "net.data").symlink_to(target)
    with pytest.raises(ModelError, match="symbolic link"):
        load(path)


def test_linked_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "a", "inner/net.data")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "net.data").write_bytes(values().tobytes())
    (tmp_path / "a" / "inner").symlink_to(outside)
    with pytest.raises(ModelError, match="symbolic link"):
        load(path)


def test_hard_link(tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    os.link(tmp_path / "a" / "net.data", tmp_path / "other-name")
    with pytest.raises(ModelError, match="hard links"):
        load(path)


def test_missing_and_short_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    data = tmp_path / "a" / "net.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ModelError, match="too short: 8192 bytes needed, 8191 there"):
        load(path)
    data.unlink()
    with pytest.raises(ModelError, match=r"'net\.data' is missing\. Put it into"):
        load(path)
    data.mkdir()
    with pytest.raises(ModelError, match="not a plain file"):
        load(path)


def test_lengths_that_contradict_the_dims(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"says 100 bytes at offset 0, but dims \[64, 32\] need 8192"):
        load(write(tmp_path / "a", length=100))
    with pytest.raises(ModelError, match="offset -4"):
        load(write(tmp_path / "b", offset=-4))


def test_a_proto_in_memory_has_no_folder(tmp_path: Path) -> None:
    proto = onnx.load(write(tmp_path / "a"), load_external_data=False)
    with pytest.raises(ModelError, match=r"a model in memory has no folder.*Pass the path"):
        load(proto)


def test_save_writes_the_data_too(tmp_path: Path) -> None:
    model = load(write(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    files = save(model, tmp_path / "b" / "out.onnx", threshold=1)
    assert [file.name for file in files] == ["out.onnx", "out.onnx.data"]
    feed = {"x": np.eye(ROWS, dtype=np.float32)}
    assert np.array_equal(run(open_session(files[0]), feed)["y"], values())
    again = load(files[0])
    assert np.array_equal(weighted_ops(again.graph)[0].rows(), values().T)
    assert np.array_equal(run(open_model(model), feed)["y"], values())


def test_save_does_not_overwrite_what_it_still_reads(tmp_path: Path) -> None:
    model = load(write(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    first = save(model, tmp_path / "b" / "out.onnx", threshold=1)[0]
    with pytest.raises(UsageError, match="would overwrite weights"):
        save(load(first), first, threshold=1)


def test_above_two_gigabytes_nothing_is_read(tmp_path: Path) -> None:
    rows, columns = 1 << 15, (1 << 14) + 1  # 2 GiB and a bit, as a file with nothing in it
    path = write(tmp_path / "a")
    proto = onnx.load(path, load_external_data=False)
    weight = proto.graph.initializer[0]
    weight.dims[:] = [rows, columns]
    del weight.external_data[:]
    weight.external_data.add(key="location", value="net.data")
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = rows
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = columns
    path.write_bytes(proto.SerializeToString())
    os.truncate(tmp_path / "a" / "net.data", rows * columns * 4)
    model = load(path)
    assert weight_bytes(model) == rows * columns * 4
    assert weighted_ops(model.graph)[0].n == columns
    with pytest.raises(ModelError, match=r"2\.0 GiB of weights.*Save it to a file"):
        to_proto(model)
