"""The passes that exist, by name."""

from __future__ import annotations

from spa_compiler.errors import UsageError
from spa_compiler.passes.drop_blocks import DropBlocks
from spa_compiler.passes.factorize import Factorize
from spa_compiler.passes.names import did_you_mean
from spa_compiler.passes.pass_ import Pass
from spa_compiler.passes.permute_outputs import PermuteOutputs
from spa_compiler.passes.prune_groups import PruneGroups
from spa_compiler.passes.quantize import Quantize
from spa_compiler.passes.remove_dead_channels import RemoveDeadChannels
from spa_compiler.passes.sparsify import Sparsify

_PASSES: tuple[type[Pass], ...] = (
    Sparsify,
    PermuteOutputs,
    Factorize,
    Quantize,
    RemoveDeadChannels,
    PruneGroups,
    DropBlocks,
)


def passes() -> dict[str, type[Pass]]:
    """Every pass by its name, in the order in which they are listed."""
    return {pass_.name: pass_ for pass_ in _PASSES}


def find(name: str) -> type[Pass]:
    """The pass of that name.

    Raises:
        UsageError: there is none; the message lists what exists.
    """
    known = passes()
    if name not in known:
        raise UsageError(f"there is no pass {name!r}", fix=did_you_mean(name, list(known)))
    return known[name]
