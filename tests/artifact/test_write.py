# ruff: noqa: PT012, what happens inside of a `staging` block that raises is what is tested
import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from spa_compiler.artifact import write
from spa_compiler.artifact.write import is_ours, keep_only, staging
from spa_compiler.errors import EnvironmentFault, UsageError

MANIFEST = json.dumps({"artifact_version": 1, "spa_compiler": "0"})

#: a run that tells when it is half-way, and ends when it is told to
RUN = """
import sys
from pathlib import Path
from spa_compiler.artifact.write import staging
with staging(Path(sys.argv[1])) as new:
    (new / "manifest.json").write_text('{"artifact_version": 1, "spa_compiler": "0"}')
    for name in "ab":
        (new / name).write_text(sys.argv[2])
    print(new.parent, flush=True)
    sys.stdin.readline()
"""


def start(target: Path, content: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(target), content]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.home = Path(process.stdout.readline().strip())  # type: ignore[attr-defined]
    return process


def finish(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=20)
    assert process.returncode == 0


def write_into(target: Path, content: str = "new", **options: Any) -> None:
    with staging(target, **options) as new:
        (new / "manifest.json").write_text(MANIFEST)
        (new / "a").write_text(content)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.fixture(params=["exchange", "aside"])
def renames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every publishing test runs with `renameat2` and without."""
    if request.param == "aside":
        monkeypatch.setattr(write, "_rename", lambda *_, **__: False)


@pytest.mark.usefixtures("renames")
class TestPublish:
    def test_a_new_folder(self, tmp_path: Path) -> None:
        write_into(tmp_path / "deep" / "out")
        assert names(tmp_path / "deep") == {"out"}
        assert names(tmp_path / "deep" / "out") == {"manifest.json", "a"}

    def test_nothing_is_seen_before_the_end(self, tmp_path: Path) -> None:
        with staging(tmp_path / "out") as new:
            (new / "a").write_text("x")
            assert not (tmp_path / "out").exists()
        assert names(tmp_path / "out") == {"a"}

    def test_our_own_is_replaced_as_a_whole(self, tmp_path: Path) -> None:
        write_into(tmp_path / "out", "old")
        (tmp_path / "out" / "extra").write_text("")
        write_into(tmp_path / "out", "new")
        assert names(tmp_path / "out") == {"manifest.json", "a"}
        assert (tmp_path / "out" / "a").read_text() == "new"
        assert names(tmp_path) == {"out"}

    def test_an_empty_folder_is_taken_and_keeps_its_mode(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out").chmod(0o750)
        write_into(tmp_path / "out")
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "out").symlink_to("real")
        write_into(tmp_path / "out")
        assert (tmp_path / "out").is_symlink()
        assert names(tmp_path / "real") == {"manifest.json", "a"}

    def test_an_exception_leaves_what_was_there(self, tmp_path: Path) -> None:
        write_into(tmp_path / "out", "old")
        for error in (ValueError, KeyboardInterrupt, SystemExit):
            with pytest.raises(error), staging(tmp_path / "out") as new:
                (new / "a").write_text("half")
                raise error
        assert (tmp_path / "out" / "a").read_text() == "old"
        assert names(tmp_path) == {"out"}

    def test_an_exception_leaves_no_parents(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError), staging(tmp_path / "x" / "y" / "out"):
            raise ValueError
        assert names(tmp_path) == set()

    def test_many_writers_never_mix(self, tmp_path: Path) -> None:
        target, failures = tmp_path / "out", []

        def work(content: str) -> None:
            try:
                for _ in range(5):
                    with staging(target) as new:
                        (new / "manifest.json").write_text(MANIFEST)
                        for name in "ab":
                            (new / name).write_text(content)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert names(target) == {"manifest.json", "a", "b"}
        assert (target / "a").read_text() == (target / "b").read_text()
        assert names(tmp_path) == {"out"}


class TestTwoProcesses:
    def test_the_last_one_wins(self, tmp_path: Path) -> None:
        first, second = start(tmp_path / "out", "first"), start(tmp_path / "out", "second")
        finish(second)
        assert (tmp_path / "out" / "a").read_text() == "second"
        finish(first)
        assert [(tmp_path / "out" / name).read_text() for name in "ab"] == ["first", "first"]
        assert names(tmp_path) == {"out"}

    def test_a_killed_run_is_tidied_up_and_a_living_one_is_not(self, tmp_path: Path) -> None:
        living, killed = start(tmp_path / "out", "living"), start(tmp_path / "out", "killed")
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert killed.home.is_dir()  # type: ignore[attr-defined]
        assert not (tmp_path / "out").exists()
        write_into(tmp_path / "out")
        assert names(tmp_path) == {"out", living.home.name}  # type: ignore[attr-defined]
        finish(living)
        assert (tmp_path / "out" / "a").read_text() == "living"
        assert names(tmp_path) == {"out"}

    def test_an_interrupted_run_leaves_nothing(self, tmp_path: Path) -> None:
        process = start(tmp_path / "out", "x")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode != 0
        assert names(tmp_path) == set()

    def test_other_targets_leftovers_are_not_ours(self, tmp_path: Path) -> None:
        other = tmp_path / ".other.spa-1-00000000"
        other.mkdir()
        write_into(tmp_path / "out")
        assert names(tmp_path) == {"out", other.name}

    def test_a_kill_between_two_renames_is_undone(self, tmp_path: Path) -> None:
        write_into(tmp_path / "out", "old")
        home = tmp_path / ".out.spa-1-00000000"
        home.mkdir()
        (tmp_path / "out").rename(home / "old-000")
        with pytest.raises(ValueError), staging(tmp_path / "out"):
            raise ValueError
        assert (tmp_path / "out" / "a").read_text() == "old"
        assert names(tmp_path) == {"out"}


class TestRefusals:
    def test_foreign_content(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("")
        with pytest.raises(UsageError, match="--force"), staging(tmp_path / "out"):
            pytest.fail("no work before the check")
        write_into(tmp_path / "out", force=True)
        assert names(tmp_path / "out") == {"manifest.json", "a"}

    @pytest.mark.parametrize("content", ["{}", "[]", "text", '{"artifact_version": "1"}', '{"artifact_version": 1}'])
    def test_a_manifest_of_somebody_else(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "manifest.json").write_text(content)
        assert not is_ours(tmp_path)

    def test_foreign_content_that_came_meanwhile(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError), staging(tmp_path / "out") as new:
            (new / "a").write_text("")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.txt").write_text("")
        assert names(tmp_path) == {"out"}
        assert names(tmp_path / "out") == {"thesis.txt"}

    def test_force_never_takes_the_model_or_the_folder_one_is_in(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "model.onnx").write_text("")
        with pytest.raises(UsageError, match=r"model\.onnx lies in it"):
            write_into(tmp_path, force=True, inputs=[tmp_path / "model.onnx"])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError, match="lies in it"):
            write_into(Path(), force=True)

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("")
        with pytest.raises(UsageError, match="must be a folder"):
            write_into(tmp_path / "out", force=True)

    def test_the_root(self) -> None:
        with pytest.raises(UsageError):
            write_into(Path("/"), force=True)

    def test_a_mount_point(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "out").mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda _: True)
        with pytest.raises(EnvironmentFault, match="mount point"):
            write_into(tmp_path / "out")

    def test_an_unwritable_place(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(EnvironmentFault, match="cannot be written"):
            write_into(tmp_path / "file" / "out")
        with pytest.raises(EnvironmentFault, match="cannot be written"):
            write_into(Path("/proc/out"))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_without_the_right_to_write(self, tmp_path: Path) -> None:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(EnvironmentFault, match="cannot be written"):
            write_into(tmp_path / "closed" / "out")


class TestFullDisk:
    def test_while_the_caller_writes(self, tmp_path: Path) -> None:
        with pytest.raises(EnvironmentFault, match="disk is full") as caught, staging(tmp_path / "out") as new:
            (new / "a").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
        assert caught.value.exit_code == 6
        assert names(tmp_path) == set()

    def test_while_syncing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_into(tmp_path / "out", "old")

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(EnvironmentFault, match="disk is full"):
            write_into(tmp_path / "out")
        assert (tmp_path / "out" / "a").read_text() == "old"
        assert names(tmp_path) == {"out"}

    def test_for_real(self, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"tmpfs", bytes(disk), b"tmpfs", 0, b"size=64k") != 0:
            pytest.skip("only root can mount a small disk")
        try:
            with pytest.raises(EnvironmentFault, match="disk is full"), staging(disk / "out") as new:
                (new / "a").write_bytes(bytes(1 << 20))
            assert names(disk) == set()
        finally:
            libc.umount2(bytes(disk), 2)

    def test_another_oserror_stays_what_it_is(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError), staging(tmp_path / "out"):
            (tmp_path / "model.onnx").read_bytes()


def test_a_rename_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_into(tmp_path / "out", "old")
    monkeypatch.setattr(write, "_rename", lambda *_, **__: False)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(EnvironmentFault, match="Input/output error"):
        write_into(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_a_failed_verification_leaves_the_report_alone(tmp_path: Path) -> None:
    with staging(tmp_path / "out") as new:
        (new / "report.json").write_text(MANIFEST)
        (new / "model.onnx").write_text("")
        (new / "folder").mkdir()
        (new / "link").symlink_to(new / "folder")
        keep_only(new, ["report.json"])
    assert names(tmp_path / "out") == {"report.json"}
    write_into(tmp_path / "out")  # ours, so the next run replaces it
