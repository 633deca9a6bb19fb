"""Real exports, every one of the zoo, in 16 bits: valid files that ONNX Runtime runs, with outputs near those of float32.

The zoo lies beside the repository (`../shared/graphs`); without it these tests are skipped.
"""

from __future__ import annotations

from typing import get_args

import pytest

from spa_compiler.graph.half_kernels import Half
from tests.graph.halved import halved
from tests.peers import graphs

pytestmark = [pytest.mark.peers, pytest.mark.slow]

TOLERANCE: dict[str, float] = {"fp16": 2e-2, "bf16": 8e-2}
LOOSE: dict[str, float] = {"focalnet_tiny": 4.0, "t5": 2.0, "starnet_s1": 1e6}
"""With random weights their layers multiply rounding, in starnet until nothing of the result is left: name -> how many
times as far outputs may move. They stay finite."""


@pytest.mark.parametrize("half", get_args(Half))
@pytest.mark.parametrize("name", graphs.zoo_names())
def test_outputs_move_as_little_as_rounding_does(name: str, half: Half) -> None:
    given, feeds = graphs.zoo_graph(name)
    found = halved(given, half, feeds)
    print(
        f"{name} {half}: {found.rounded:.1e} rounded, {found.direct or 0.0:.1e} in ONNX Runtime; {found.converted.notes[0]}"
    )
    allowed = TOLERANCE[half] * LOOSE.get(name, 1.0)
    assert found.rounded <= allowed
    assert (found.direct or 0.0) <= allowed
