"""What the model's outputs make of other weights: one session whose weights are inputs, asked as often as one likes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from spa_compiler.calibration.estimate import squares
from spa_compiler.calibration.samples import Samples, size_of
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import WeightedOp
from spa_compiler.graph.save import to_proto
from spa_compiler.graph.session import Feeds, open_session, run
from spa_compiler.graph.weights import array_of


class Probe:
    """Relative squared change of the outputs over a few samples, those held out not among them.

    Args:
        sites: whose weights can be changed. Sites with one weight change together.
        most: samples to keep in memory, with the outputs of the model as it is. Padding does not count.
        half: only every second feed, those that `Moments.half` is of; all where there is but one.

    Raises:
        ModelError: the weights do not fit one protobuf message (2 GB).
    """

    def __init__(
        self,
        model: Model,
        sites: Sequence[WeightedOp],
        samples: Samples,
        *,
        most: int,
        threads: int,
        half: bool = False,
    ) -> None:
        proto = to_proto(model)
        self._sites = sites
        self._own = {op.weight.name: array_of(op.weight) for op in sites}
        kept = [tensor for tensor in proto.graph.initializer if tensor.name not in self._own]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)
        for name, array in self._own.items():
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            proto.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, list(array.shape)))
        self._session = open_session(proto.SerializeToString(), threads=threads)
        self._feeds: list[tuple[Feeds, NDArray[np.bool_] | None, Feeds]] = []
        left = most
        seen = (sample for sample in samples.feeds() if not sample.held)
        several = sum(not samples.holds_out(number) for number in range(samples.count)) > 1
        for sample in itertools.islice(seen, 1, None, 2) if half and several else seen:
            if left <= 0:
                break
            self._feeds.append((sample.feed, sample.mask, run(self._session, sample.feed | self._own)))
            left -= size_of(sample.feed)

    def change(self, rows: Mapping[int, NDArray[Any]], feeds: int | None = None) -> float:
        """The sum of squared differences over that of squares, all float outputs together.

        Args:
            rows: site -> weight `[n, k]`; all others are as they were.
            feeds: only the first so many.
        """
        weights = dict(self._own)
        for site, values in rows.items():
            op = self._sites[site]
            weights[op.weight.name] = op.laid_out(values)
        difference = whole = 0.0
        for feed, mask, before in itertools.islice(self._feeds, feeds):
            changed, all_of_it = squares(before, run(self._session, feed | weights), mask)
            difference, whole = difference + changed, whole + all_of_it
        return difference / whole if whole > 0 else 0.0

    @property
    def feeds(self) -> int:
        """How many feeds it holds."""
        return len(self._feeds)
