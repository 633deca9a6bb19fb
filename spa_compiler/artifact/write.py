"""The output folder appears whole or not at all.

    parent/
      NAME/                         what users load; the old one until the moment of the exchange
      .NAME.spa-<pid>-<random>/     this run's
        lock                        locked with flock for as long as the run lives
        new/                        what `staging` hands out; becomes NAME
        old-<i>/                    NAME, on file systems that cannot exchange two folders

A run first removes what killed runs have left: folders of that name whose lock nobody holds. `lock` is the first thing
made and the last one removed, by the cleaner too, so a folder in use is never taken for a leftover.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spa_compiler.errors import EnvironmentFault, UsageError

_log = logging.getLogger(__name__)

_LOCK, _NEW = "lock", "new"
_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
#: errno of file systems and C libraries without `renameat2`'s flags
_NO_FLAGS = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
#: other runs can take the target between two of our steps; each pass of the loop means that one of them has finished
_PUBLISH_ATTEMPTS = 100


@contextmanager
def staging(target: Path, force: bool = False, *, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Hands out an empty folder that becomes `target`, atomically, when the block ends without an exception.

    Two runs into one target at once both succeed: the folder is what the later one wrote, never a mixture.

    Args:
        target: the output folder; its missing parents are created.
        force: replace a non-empty folder that this tool did not write.
        inputs: files the run reads. With `force`, a folder that holds one of them is refused still.

    Raises:
        UsageError: `target` is a file, or a non-empty folder of somebody else.
        EnvironmentFault: it cannot be written, or the disk is full (also when the block raised the OSError).
    """
    target = target.expanduser().resolve()
    check_target(target, force, inputs)
    with _faults(target):
        made = _make_parents(target.parent)
    done = False
    try:
        with _faults(target):
            _remove_leftovers(target)
            home, lock = _claim(target)
        try:
            new = home / _NEW
            with _faults(target):
                new.mkdir()
            with _faults(target, home):
                yield new
            check_target(target, force, inputs)
            with _faults(target):
                _sync(new)
                _publish(new, target, home)
            done = True
        finally:
            _remove(home)
            os.close(lock)
    finally:
        if not done:
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()


def keep_only(folder: Path, names: Iterable[str]) -> None:
    """Removes everything from `folder` but the files named (after a failed verification: all but the report)."""
    kept = set(names)
    for entry in folder.iterdir():
        if entry.name not in kept:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def is_ours(folder: Path) -> bool:
    """Whether this tool wrote `folder`: manifest.json, or a lone report.json, states an `artifact_version`."""
    names = {entry.name for entry in folder.iterdir()}
    if "manifest.json" in names:
        witness = folder / "manifest.json"
    elif names == {"report.json"}:
        witness = folder / "report.json"
    else:
        return False
    try:
        content = json.loads(witness.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and type(content.get("artifact_version")) is int and "spa_compiler" in content


# ---------------------------------------------------------------- before


def check_target(target: Path, force: bool, inputs: Iterable[Path]) -> None:
    """Refuses what must not be replaced, before any work is done for it and once more before it is replaced."""
    if target.name == "":
        raise UsageError("the output folder cannot be the root of the file system", where=str(target))
    empty, ours = _look_at(target)
    if os.path.ismount(target):
        raise EnvironmentFault(
            "the output folder is a mount point, which cannot be replaced in one step",
            where=str(target),
            fix="Name a folder below it with -o",
        )
    if empty or ours:
        return
    if not force:
        raise UsageError(
            "the output folder holds files that this tool did not write",
            where=str(target),
            fix="Name another one with -o, or replace it with --force",
        )
    for path in (*inputs, *_precious()):
        if path.resolve().is_relative_to(target):
            raise UsageError(
                f"the output folder cannot be replaced: {path} lies in it", where=str(target), fix="Name another one"
            )


def _look_at(target: Path) -> tuple[bool, bool]:
    """(nothing is there, this tool wrote it). If another run takes the folder away between two looks: once more."""
    for _ in range(_PUBLISH_ATTEMPTS):
        try:
            before = target.lstat()
            if not stat.S_ISDIR(before.st_mode):
                raise UsageError("the output must be a folder", where=str(target), fix="Name another one with -o")
            seen = not any(target.iterdir()), is_ours(target)
            if os.path.samestat(before, target.lstat()):
                return seen
        except FileNotFoundError:
            if not os.path.lexists(target):
                return True, False
        except OSError as error:
            raise _fault(error, target) from error
    raise EnvironmentFault("other runs keep replacing the output folder", where=str(target))


def _precious() -> Iterator[Path]:
    """What nobody means to replace: the folder one works in, and the home folder."""
    with suppress(OSError):
        yield Path.cwd()
    with suppress(RuntimeError):
        yield Path.home()


def _make_parents(parent: Path) -> list[Path]:
    """Creates `parent`; the folders that were missing, innermost first."""
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    return missing


def _claim(target: Path) -> tuple[Path, int]:
    """Makes this run's own folder beside `target`: the folder, and the descriptor that holds its lock."""
    while True:
        home = target.with_name(f".{target.name}.spa-{os.getpid()}-{secrets.token_hex(4)}")
        with suppress(FileExistsError):
            home.mkdir()
            lock = _try_lock(home)
            if lock is not None:
                return home, lock


def _try_lock(home: Path) -> int | None:
    """The descriptor of `home`'s lock, held; None if another run has it or has removed it."""
    path = home / _LOCK
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), path.stat()):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def _remove_leftovers(target: Path) -> None:
    """Removes the folders of killed runs into `target`; one that was killed between two renames is undone."""
    name = re.compile(re.escape(f".{target.name}.spa-") + r"\d+-[0-9a-f]{8}")
    for home in list(target.parent.iterdir()):
        if not name.fullmatch(home.name) or home.is_symlink() or not home.is_dir():
            continue
        try:
            lock = _try_lock(home)
        except OSError as error:  # another user's, as in /tmp: not ours to remove
            _log.debug("leaving %s: %s", home, error)
            continue
        if lock is None:
            continue
        try:
            aside = sorted(home.glob("old-*"))
            if aside and not target.exists():
                with suppress(OSError):
                    aside[-1].rename(target)
            _log.info("removing what a killed run left: %s", home)
            _remove(home)
        finally:
            os.close(lock)


def _remove(home: Path) -> None:
    """Removes a run's own folder, the lock last. What cannot be removed stays, for a later run to try."""
    with suppress(OSError):
        for entry in home.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry, ignore_errors=True)
        if {entry.name for entry in home.iterdir()} == {_LOCK}:
            (home / _LOCK).unlink()
            home.rmdir()
            return
    if home.exists():
        _log.warning("could not remove %s", home)


# ---------------------------------------------------------------- after


def _sync(folder: Path) -> None:
    """Makes everything below `folder` durable: a rename must never outlive the data it shows."""
    for root, _, files in os.walk(folder):
        for path in (*(os.path.join(root, name) for name in files), root):  # noqa: PTH118, os.walk gives strings
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(new: Path, target: Path, home: Path) -> None:
    """Puts `new` in the place of `target`."""
    for attempt in range(_PUBLISH_ATTEMPTS):
        with suppress(FileNotFoundError):
            new.chmod(target.stat().st_mode & 0o7777)
        with suppress(FileNotFoundError, FileExistsError):
            if not _rename(new, target, exchange=target.exists()):
                _rename_aside(new, target, home / f"old-{attempt:03d}")
            _sync_folder(target.parent)
            return
        new.stat()  # FileNotFoundError: not the target is what is missing
    raise EnvironmentFault("other runs keep replacing the output folder", where=str(target))


def _rename(new: Path, target: Path, *, exchange: bool) -> bool:
    """`renameat2`, exchanging the two or taking a free name; False where it does not exist.

    Raises:
        FileNotFoundError, FileExistsError: `target` went or came in between.
        OSError: anything else.
    """
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    flag = _RENAME_EXCHANGE if exchange else _RENAME_NOREPLACE
    if call(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_FLAGS:
        return False
    raise OSError(code, os.strerror(code), str(target))


def _rename_aside(new: Path, target: Path, aside: Path) -> None:
    """Two renames with a moment between them in which there is no `target`: `_remove_leftovers` mends a kill there."""
    with suppress(FileNotFoundError):
        target.rename(aside)
    try:
        new.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another run's came in between
            raise FileExistsError(error.errno, error.strerror, str(target)) from error
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise


# ---------------------------------------------------------------- faults


@contextmanager
def _faults(target: Path, home: Path | None = None) -> Iterator[None]:
    """Turns the disk's refusals into an EnvironmentFault.

    Args:
        home: where the caller's block writes; of its OSErrors only those about files in there, and a full disk
            anywhere (the linker's temporary files), are faults of this kind. None: all are.
    """
    try:
        yield
    except OSError as error:
        inside = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(home or "/")
        if home is None or inside or error.errno in _FULL:
            raise _fault(error, target) from error
        raise


def _fault(error: OSError, target: Path) -> EnvironmentFault:
    if error.errno in _FULL:
        what, fix = "the disk is full", "Make room, or name a folder on another disk with -o"
    else:
        what = f"the output folder cannot be written ({error.strerror or error})"
        fix = "Name another one with -o"
    return EnvironmentFault(what, where=str(target), fix=fix)
