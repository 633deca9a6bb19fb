"""Noise in place of samples, for runs without data: like real inputs in the statistics that one can know.

    images (rank 4 and more)   Gaussian with a power spectrum of 1 / f^2, as natural images have (Field, 1987), mean 0
                               and variance 1 per channel, as preprocessing makes them
    other floats               normal
    whole numbers              drawn within the bounds that the graph states; masks are ones

What a model makes of noise is not what it makes of data: statistics of deep layers are off, and results of methods
that use them are worse. Whoever has fifty real samples should use those.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from spa_compiler.calibration.examples import example_feeds
from spa_compiler.calibration.shapes import Shapes
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import Feeds

FEEDS = 16
BATCH = 16
"""Samples of a feed, where the model's first axis is open."""


def feeds(model: Model, shapes: Shapes, seed: int) -> Iterator[Feeds]:
    """The same `FEEDS` feeds at every call."""
    grown = dict(shapes)
    symbols = {value.shape[0] for value in model.signature.inputs if value.shape}
    if len(symbols) == 1 and not isinstance(next(iter(symbols)), int):
        grown = {name: (BATCH, *shape[1:]) if shape else shape for name, shape in shapes.items()}
    for number in range(FEEDS):
        rng = np.random.default_rng((seed, number))
        feed = example_feeds(model, grown, rng)
        yield {name: _image(array, rng) if _is_image(array) else array for name, array in feed.items()}


def _is_image(array: np.ndarray[Any, Any]) -> bool:
    return array.dtype.kind == "f" and array.ndim >= 4 and min(array.shape[2:]) > 1


def _image(array: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Noise of the array's shape whose amplitudes fall with the frequency."""
    space = array.shape[2:]
    squares = sum(np.square(grid) for grid in np.meshgrid(*(np.fft.fftfreq(size) for size in space), indexing="ij"))
    radius = np.sqrt(squares)
    radius.flat[0] = np.inf  # the mean is taken out below anyway
    axes = tuple(range(2, array.ndim))
    spectrum = np.fft.fftn(rng.standard_normal(array.shape), axes=axes) / radius
    noise = np.fft.ifftn(spectrum, axes=axes).real
    noise -= noise.mean(axis=axes, keepdims=True)
    noise /= noise.std(axis=axes, keepdims=True)
    return np.asarray(noise.astype(array.dtype))
