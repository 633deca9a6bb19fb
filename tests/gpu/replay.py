"""Runs of one session on inputs that stay in one place and change there: what a CUDA graph must get right."""

from __future__ import annotations

from spa_compiler.graph.session import Feeds
from spa_compiler.placement.gpu_timer import CudaTimer
from spa_compiler.placement.timer import Contender


def replayed(timer: CudaTimer, contender: Contender, first: Feeds, second: Feeds) -> tuple[Feeds, Feeds, Feeds]:
    """Outputs for `first`, for `second` written over it, and then of a run with `first` bound at another place.

    A session that launches a recorded graph reads the place that it was recorded with, so its third outputs are those
    of `second`; one that has no graph gives those of `first` again.
    """
    session = timer.open(contender)
    # on a CPU a place is the array itself
    places = {name: timer.placed(value.copy()) for name, value in first.items()}
    call = timer.bound_to(session, places)
    names = [output.name for output in session.get_outputs()]

    def values() -> Feeds:
        return {name: value.numpy().copy() for name, value in zip(names, call(), strict=True)}

    before = values()
    for name, value in second.items():
        places[name].update_inplace(value)
    after = values()
    binding = session.io_binding()
    for name, value in first.items():
        binding.bind_ortvalue_input(name, timer.placed(value))
    outputs = call()
    for name, value in zip(names, outputs, strict=True):
        binding.bind_ortvalue_output(name, value)
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    last = {name: value.numpy().copy() for name, value in zip(names, outputs, strict=True)}
    return before, after, last
