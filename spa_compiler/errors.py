"""One exception tree. Every error a user can meet says what is wrong, where, and what to do about it.

The exit codes are part of the command line's contract (docs/deploy.md lists them):
0 done, 1 internal, 2 usage, 3 unusable model, 4 verification failed, 5 budget not met, 6 environment, 130 interrupted.
"""

from __future__ import annotations


class SpaError(Exception):
    """Root of everything that `spa_compiler` raises on purpose.

    Args:
        what: what is wrong, one sentence without a full stop.
        where: the file, node or tensor it was found at.
        fix: what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        text = f"{where}: {what}" if where else what
        super().__init__(f"{text}. {fix}" if fix else text)


class UsageError(SpaError):
    """The command line, a recipe or an argument asks for something that does not exist or contradicts itself."""

    exit_code = 2


class ModelError(SpaError):
    """The model cannot be used: not ONNX, damaged, inconsistent, or outside of what is supported."""

    exit_code = 3


class VerificationError(SpaError):
    """The compiled model does not compute what its portable form computes."""

    exit_code = 4


class BudgetError(SpaError):
    """A budget that the user set was not met."""

    exit_code = 5


class EnvironmentFault(SpaError):
    """The machine lacks something: a linker, disk space, a supported platform, ONNX Runtime."""

    exit_code = 6
