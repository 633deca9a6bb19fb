"""What every command does with errors, interrupts and its log."""

from __future__ import annotations

import functools
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from spa_compiler.errors import SpaError

P = ParamSpec("P")
R = TypeVar("R")
INTERRUPTED = 130


def exit_codes(command: Callable[P, R]) -> Callable[P, R]:
    """Turns errors into one line on stderr and the exit code of their class; a traceback goes to the log only."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            return command(*args, **kwargs)
        except SpaError as error:
            logging.getLogger(__name__).debug("", exc_info=True)
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted: nothing was written", err=True)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            sys.exit(1)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            logging.getLogger(__name__).debug("", exc_info=True)
            click.echo(
                f"internal error: {type(error).__name__}: {error}. Please report it, with the log that -v prints",
                err=True,
            )
            sys.exit(1)
        finally:
            signal.signal(signal.SIGTERM, previous)

    return wrapped


def logging_to(verbose: bool, quiet: bool, log_file: str | None) -> None:
    """The log goes to stderr (warnings, with -v everything) and, whole, to `log_file`."""
    root = logging.getLogger("spa_compiler")
    root.setLevel(logging.DEBUG)
    for handler in list(root.handlers):
        root.removeHandler(handler)
    screen = logging.StreamHandler()
    screen.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.WARNING)
    screen.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    root.addHandler(screen)
    if log_file is not None:
        try:
            file = logging.FileHandler(Path(log_file), "w")
        except OSError as error:
            raise click.UsageError(f"--log-file {log_file} cannot be written: {error.strerror}") from error
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(file)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
