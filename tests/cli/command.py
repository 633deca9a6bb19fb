"""Runs commands in this process."""

from __future__ import annotations

import click
from click.testing import CliRunner, Result


def invoke(command: click.Command, *arguments: str) -> Result:
    """As if typed in a wide terminal."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(command, list(arguments))
