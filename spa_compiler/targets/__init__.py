"""What a machine can run: `parse` names a target, `host` says what this machine is."""

from __future__ import annotations

from spa_compiler.targets.cpu import AARCH64, LEVELS, HostCpu, check_platform, host, level_number
from spa_compiler.targets.target import SPELLINGS, Target, parse

__all__ = ["AARCH64", "LEVELS", "SPELLINGS", "HostCpu", "Target", "check_platform", "host", "level_number", "parse"]
