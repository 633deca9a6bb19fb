"""Tile sizes of a form: which there are, and which to try first.

A tile is `chunk` outputs by `k_block` inputs. What is best depends on the number of tokens: with many, a block of the
panel should stay in L1 and a chunk's weights in L2; with few, every block costs the start of a loop for each group of
rows. A cost model ranks tiles; what won at the most alike question before, here or where the package's own records were
measured, comes first. Both only rank: what is taken was timed.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources

import msgspec

from spa_compiler.errors import EnvironmentFault
from spa_compiler.kernels.form import Form
from spa_compiler.kernels.panel import lanes_for
from spa_compiler.kernels.rx1 import CHUNK_STEP
from spa_compiler.placement.candidates import DENSE, SiteClass, Stored
from spa_compiler.placement.measure import Timing

CHUNKS = (32, 64, 128, 256)
K_BLOCKS = (64, 128, 256, 768)  # and all of k
FEWEST_ROWS = 64  # of a weight that is worth cutting otherwise than usual
SHIPPED = "tiles.json"

_REGISTER = 16  # floats
_L1, _L2 = 32 << 10, 512 << 10  # bytes: of L1, and of the part of L2 that weights may have
_FAR = 2.0  # from here on, in natural logarithms added up, two questions are not alike
_OTHER_THREADS = 0.5


class Winner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tile that won one question; `k_block` is 0 where it was all of k, and both are 0 for the usual tile."""

    isa: str
    layout: str
    form: str  # its name, in the usual tile
    n: int
    k: int
    tokens: int
    threads: int
    share: float  # of the weight's elements stored
    chunk: int
    k_block: int

    def distance(self, other: Winner) -> float:
        """How unlike two questions are; infinite where they have nothing to do with each other."""
        if (self.isa, self.layout, self.form) != (other.isa, other.layout, other.form):
            return math.inf
        sizes = ((self.n, other.n), (self.k, other.k), (self.tokens, other.tokens), (self.share, other.share))
        threads = _OTHER_THREADS * (self.threads != other.threads)
        return threads + sum(abs(math.log(max(a, 1e-3) / max(b, 1e-3))) for a, b in sizes)


@functools.cache
def shipped() -> tuple[Winner, ...]:
    """What won where the package's records were measured.

    Raises:
        EnvironmentFault: the file is missing or damaged.
    """
    try:
        data = resources.files(__package__).joinpath(SHIPPED).read_bytes()
        return msgspec.json.decode(data, type=tuple[Winner, ...], strict=True)
    except (OSError, msgspec.MsgspecError) as error:
        raise EnvironmentFault(
            f"the package is damaged: {error}",
            where=SHIPPED,
            fix="Install it again: pip install --force-reinstall spa-compiler",
        ) from error


def tiles(stored: Stored, n: int, k: int) -> list[Stored]:
    """A form of a weight [n, k] in all tiles but the usual one."""
    if n < FEWEST_ROWS:
        return []
    step = math.lcm(CHUNK_STEP, stored.form.rows)
    chunks = [chunk // step * step for chunk in CHUNKS if step <= chunk < n + CHUNKS[0]]
    blocks = [block for block in K_BLOCKS if block < k] + [k]
    forms = dict.fromkeys(stored.form.cut(chunk, block) for chunk in chunks for block in blocks)
    return [Stored(form, stored.share) for form in forms if form != stored.form]


def ranked(each: SiteClass, isa: str, threads: int, known: Sequence[Iterable[Winner]]) -> list[Stored]:
    """The tiles of all forms of a class, those to try first at the beginning.

    Args:
        known: winners of earlier questions, the sources that count most first.
    """
    site = each.sites[0]
    tokens = max((site.pixels(shape) for shape in each.shapes), default=1)
    queues = []
    for stored in each.stored:
        asked = Winner(
            isa=isa, layout=site.layout, form=stored.name, n=site.n, k=site.k, tokens=tokens,
            threads=threads, share=stored.share, chunk=0, k_block=0,
        )  # fmt: skip
        found = tiles(stored, site.n, site.k)
        found.sort(key=lambda s: cost(s, site.n, site.k, tokens, threads))
        for source in reversed(known):
            best = min(source, key=asked.distance, default=None)
            if best is not None and best.chunk and asked.distance(best) < _FAR:
                # In turns: what won on another machine says little of how far this one's caches carry.
                near = sorted(found, key=lambda s: _unlike(s.form, best, site.k))
                found = list(dict.fromkeys(itertools.chain.from_iterable(zip(near, found, strict=True))))
        queues.append(found)
    # Of every form in turns: the model's word is worth less between forms than between tiles of one.
    queues.sort(key=lambda queue: min((cost(s, site.n, site.k, tokens, threads) for s in queue[:1]), default=0.0))
    longest = max(map(len, queues), default=0)
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)]


def cost(stored: Stored, n: int, k: int, tokens: int, threads: int) -> float:
    """About how many cycles a product takes: two registers are loaded, and two multiply-adds done, in one.

    Only differences between tiles count: what all have in common (reading activations and weights once) is left out.
    """
    rows, chunk, k_block = stored.form.rows, stored.form.chunk or CHUNKS[-1], stored.form.k_block or k
    lanes = lanes_for(tokens)
    vectors, calls = -(-lanes // _REGISTER), -(-tokens // lanes)
    chunks, blocks = -(-n // chunk), -(-k // k_block)
    groups, entries = n / rows * blocks, stored.share * n * k / rows
    from_l2 = vectors if k_block * lanes * 4 > _L1 else 0.0  # a line a cycle, while multiply-adds go on
    multiply = entries * max(rows * vectors / 2, (rows + vectors) / 2, from_l2)
    loops = groups * (12 + rows * vectors * (1 if blocks > 1 else 0))
    of_chunk = entries / chunks * (4 * rows + 2)
    again = chunks * of_chunk / 32 if calls > 1 and of_chunk > _L2 else 0.0
    items = chunks * calls
    idle = -(-items // threads) * threads / items
    return calls * (multiply + loops + again) * idle / threads + items * 200


def winners(isa: str, records: Iterable[tuple[Mapping[str, object], Mapping[str, Timing]]]) -> list[Winner]:
    """The best tile of every form in every record that tells of tiles, on machines of one level."""
    found = []
    for question, timings in records:
        try:
            asked = msgspec.convert(question, _Question)
        except msgspec.ValidationError:
            continue  # of something else: low-rank layers, whole models
        if isa not in asked.isa.split(","):
            continue
        for form, share in asked.stored.items():
            named = [name for name in timings if name != DENSE and name.partition(" in ")[0] == form]
            best = min(named, key=lambda name: timings[name].median_us, default=None)
            tile = re.fullmatch(r"(\d+)x(\d+)", (best or "").partition(" in ")[2])
            if best is None or len(named) == 1:
                continue
            chunk, k_block = (int(tile[1]), int(tile[2])) if tile else (0, 0)
            found.append(
                Winner(
                    isa=isa, layout=asked.layout, form=form, n=asked.n, k=asked.k, tokens=asked.tokens,
                    threads=asked.threads, share=share, chunk=chunk, k_block=k_block if k_block < asked.k else 0,
                )
            )  # fmt: skip
    return found


class _Question(msgspec.Struct):
    """What of a record's question is looked at."""

    isa: str
    layout: str
    n: int
    k: int
    tokens: int
    threads: int
    stored: dict[str, float]


def _unlike(form: Form, winner: Winner, k: int) -> float:
    """How far a tile is from one that won."""
    block = winner.k_block or k
    return abs(math.log((form.chunk or 1) / winner.chunk)) + abs(math.log((form.k_block or 1) / min(block, k)))
