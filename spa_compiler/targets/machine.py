"""What is shared by every run of this user on this machine: a cache folder, the right to take times, memory."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spa_compiler.errors import EnvironmentFault

_log = logging.getLogger(__name__)

# A second flock of the same file through another descriptor would wait for the first for ever, so one process takes
# the file once, and counts.
_in_process = threading.RLock()
_depth = 0


def cache_dir() -> Path:
    """The folder for records, kernels and prepared models: `SPA_CACHE_DIR`, else `spa-compiler` in the XDG cache.

    Created when it is missing.

    Raises:
        EnvironmentFault: it cannot be created.
    """
    asked, xdg = os.environ.get("SPA_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME", "")
    if asked:
        folder = Path(asked).expanduser()
    else:
        # The XDG specification: a relative path in the variable is to be ignored.
        try:
            folder = (Path(xdg) if Path(xdg).is_absolute() else Path.home() / ".cache") / "spa-compiler"
        except RuntimeError as error:  # no HOME, and the user is not in the password database
            raise EnvironmentFault(
                "there is no home folder to keep the cache in", fix="set SPA_CACHE_DIR to a folder that can be written"
            ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"the cache folder cannot be created ({error.strerror})",
            where=str(folder),
            fix="Set SPA_CACHE_DIR to a folder that can be written",
        ) from error
    return folder


@contextmanager
def timing_lock() -> Iterator[None]:
    """Held while times are taken, so that two runs never measure each other's work. May be nested in one thread.

    Raises:
        EnvironmentFault: the lock file cannot be opened.
    """
    global _depth
    with _in_process:
        if _depth:
            _depth += 1
            try:
                yield
            finally:
                _depth -= 1
            return
        path = cache_dir() / "timing.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise EnvironmentFault(
                f"the lock for measuring cannot be opened ({error.strerror})",
                where=str(path),
                fix="Set SPA_CACHE_DIR to a folder that can be written",
            ) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.info("another run on this machine is taking times: waiting for it")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            _depth = 1
            try:
                yield
            finally:
                _depth = 0
        finally:
            os.close(descriptor)


def give_back() -> None:
    """Frees what is not used any more: graphs are full of cycles, and glibc keeps what sessions have freed.

    A tenth of a second; for the moments when something large has just gone.
    """
    gc.collect()
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
