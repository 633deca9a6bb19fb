"""A region of token layers as data: which steps run on which panels, and where the panels lie in scratch.

    b = RegionBuilder()
    x = b.pack(768)
    h = b.linear(x, LinearSpec(...gelu...))
    y = b.linear(h, LinearSpec(...), residual=x)
    b.unpack(b.norm(y, NormSpec(768, 1e-12)))
    spec = b.finish()

Scratch: a panel lives from the step that writes it to the last one that reads it; places are first fit, in panel rows,
so that one plan holds for every number of tokens. Equal regions, weights aside, are equal specs, and hence one op.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from spa_compiler.kernels import rx1
from spa_compiler.kernels.form import Form

MAX_INPUTS = 8  # of the C side: region.h
MAX_OUTPUTS = 8
MAX_MASKS = 4
MAX_TABLES = 4
MAX_CACHES = 32  # of keys and of values, each
MAX_SHARED = 32  # query heads that share one head of keys behind a cache, and the floats of their queries
MAX_QUERY = 4096


def rows_in_scratch(features: int) -> int:
    """Of a panel: `spa_rows` of region.h. Kernels write whole groups of rows."""
    return -(-features // 16) * 16


@dataclass(frozen=True)
class LinearSpec:
    """y = act(W x + b): W [n, k] in a form whose sizes are all decided, as `pack` gives it.

    Attributes:
        pitched: every pixel of an image by itself, unstructured; it has kernels of its own (`rx1_products.kernel`).
    """

    n: int
    k: int
    form: Form
    act: str = "none"
    low: float = 0.0
    high: float = 0.0
    pitched: bool = False

    def __post_init__(self) -> None:
        # steps.c keeps the accumulators of a chunk in an array of that many rows
        if not 0 < self.chunk <= rx1.MAX_CHUNK or self.chunk % self.form.rows:
            raise ValueError(f"a chunk of {self.chunk} rows: up to {rx1.MAX_CHUNK}, a multiple of {self.form.rows}")
        if -(-self.n // self.form.rows) * self.form.rows > rows_in_scratch(self.n):
            raise ValueError(f"{self.n} rows in groups of {self.form.rows} do not fit their panel")

    @property
    def chunk(self) -> int:
        """Rows that are computed as one work item."""
        return self.form.chunk or 0

    def same_chunks(self, other: LinearSpec) -> bool:
        """Whether both have the same rows in each chunk, so that two products can be added chunk by chunk."""
        return self.n == other.n and (self.chunk == other.chunk or self.n <= min(self.chunk, other.chunk))


@dataclass(frozen=True)
class NormSpec:
    """LayerNormalization over `features`; not `centred`: RMS normalization, which takes no mean off and has no beta."""

    features: int
    epsilon: float
    centred: bool = True

    @property
    def arrays(self) -> int:
        """Initializers of its own: gamma, and beta."""
        return 2 if self.centred else 1


@dataclass(frozen=True)
class AttentionSpec:
    """softmax(scale Q K^T + mask) V over `heads` heads of `depth` features; `scale` in natural units.

    Each head of keys and values serves `shared` heads of queries. `cached`: keys and values stand behind past ones.
    """

    heads: int
    depth: int
    scale: float
    shared: int = 1
    cached: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.shared:
            raise ValueError(f"{self.heads} heads of queries, {self.shared} for each head of keys")
        if self.cached and (self.shared > MAX_SHARED or self.shared * self.depth > MAX_QUERY):
            raise ValueError(
                f"{self.shared} heads of {self.depth} features share keys: more than the C side has room for"
            )

    @property
    def key_heads(self) -> int:
        """Heads of keys, and of values."""
        return self.heads // self.shared


@dataclass(frozen=True)
class RegionSpec:
    """Everything about a region but its weights. `lines` are the C calls, in order."""

    input_features: tuple[int, ...]
    output_features: tuple[int, ...]
    linears: tuple[LinearSpec, ...]
    norms: tuple[NormSpec, ...]
    attentions: tuple[AttentionSpec, ...]
    masks: int
    gates: bool  # whether a product is multiplied with a panel
    tables: tuple[int, ...]  # features of each
    lines: tuple[str, ...]
    scratch_rows: int

    @property
    def caches(self) -> tuple[tuple[int, int], ...]:
        """(heads, features of a head) of each cache, keys and values in turns."""
        return tuple((a.key_heads, a.depth) for a in self.attentions if a.cached for _ in range(2))

    @property
    def statements(self) -> list[str]:
        """The body of its function in C."""
        return [f"TRY({line});" for line in self.lines]

    @property
    def op_type(self) -> str:
        """`Region_<hash>`: the name of the op in the domain ai.spa."""
        return f"Region_{hashlib.sha256(repr(self).encode()).hexdigest()[:10]}"


@dataclass(eq=False)
class Panel:
    """[features, tokens] somewhere in scratch, alive from step `born` to step `dies`."""

    features: int
    born: int
    dies: int
    place: int = -1

    @property
    def rows(self) -> int:
        """Rows in scratch: kernels write whole groups of up to 16 rows (`spa_rows` of region.h)."""
        return rows_in_scratch(self.features)


@dataclass(frozen=True)
class Term:
    """A product that a linear step adds to its own."""

    source: Panel
    spec: LinearSpec


@dataclass
class _Step:
    text: str  # with {0}, {1}, ... for the places of `panels`
    panels: tuple[Panel, ...]


@dataclass
class RegionBuilder:
    """Collects the steps of one region."""

    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    linears: list[LinearSpec] = field(default_factory=list)
    norms: list[NormSpec] = field(default_factory=list)
    attentions: list[AttentionSpec] = field(default_factory=list)
    masks: int = 0
    tables: list[int] = field(default_factory=list)
    _gates: bool = False
    _panels: list[Panel] = field(default_factory=list)
    _steps: list[_Step] = field(default_factory=list)

    def pack(self, features: int) -> Panel:
        """The next input of the node, as a panel."""
        self.inputs.append(features)
        to = self._new(features)
        self._add(f"spa_pack(r, {len(self.inputs) - 1}, {{0}})", to)
        return to

    def linear(
        self,
        source: Panel,
        spec: LinearSpec,
        residual: Panel | None = None,
        term: Term | None = None,
        factor: Panel | None = None,
    ) -> Panel:
        """act(W source + b + residual) x factor as a panel; the activation is that of `spec`.

        Args:
            term: a second product, added in the same pass over the output's chunks; its bias is not read, and the
                activation is its own, since it comes last.
            factor: a panel of as many features; what an activation gave is multiplied with it.
        """
        to = self._new(spec.n)
        self._linear("_times" if factor else "", source, spec, residual, term, to, factor)
        return to

    def linear_out(
        self, source: Panel, spec: LinearSpec, residual: Panel | None = None, term: Term | None = None
    ) -> None:
        """The same, straight into the next output of the node: the panel exists chunk by chunk only."""
        self.outputs.append(spec.n)
        self._linear("_out", source, spec, residual, term, None)

    def norm(self, source: Panel, spec: NormSpec) -> Panel:
        """A norm, into a panel of its own (the source may be a residual that is still needed)."""
        self.norms.append(spec)
        to = self._new(spec.features)
        self._add(f"spa_norm(r, {len(self.norms) - 1}, {{0}}, {{1}})", source, to)
        return to

    def mask(self) -> int:
        """The next mask input of the node: additive, [batch or 1, heads or 1, tokens or 1, tokens]."""
        self.masks += 1
        return self.masks - 1

    def table(self, features: int) -> Panel:
        """The next table of the node, [batch or 1, 1, tokens, features] or without leading ones, as a panel."""
        self.tables.append(features)
        to = self._new(features)
        self._add(f"spa_table(r, {len(self.tables) - 1}, {{0}})", to)
        return to

    def rotate(self, source: Panel, cos: Panel, sin: Panel) -> Panel:
        """Rotary positions of every head of `source`; a head has as many features as `cos` and `sin`."""
        depth = cos.features
        to = self._new(source.features)
        heads = source.features // depth
        self._add(f"spa_rotate(r, {heads}, {depth}, {{0}}, {{1}}, {{2}}, {{3}})", source, cos, sin, to)
        return to

    def attention(self, q: Panel, k: Panel, v: Panel, spec: AttentionSpec, mask: int | None = None) -> Panel:
        """The attention core; `mask` is what `mask` returned. Tiles then never cross a sequence.

        A `cached` one reads the next two caches of the node, and gives them out with k and v behind.
        """
        cache = sum(2 for a in self.attentions if a.cached)
        self.attentions.append(spec)
        to = self._new(spec.heads * spec.depth)
        number, which = len(self.attentions) - 1, -1 if mask is None else mask
        if spec.cached:
            call = f"spa_attention_cached(r, {number}, {{0}}, {{1}}, {{2}}, {which}, {cache}, {{3}})"
        else:
            call = f"spa_attention(r, {number}, {{0}}, {{1}}, {{2}}, {which}, {{3}})"
        self._add(call, q, k, v, to)
        return to

    def unpack(self, source: Panel) -> None:
        """A panel as the next output of the node."""
        self.outputs.append(source.features)
        self._add(f"spa_unpack(r, {len(self.outputs) - 1}, {{0}})", source)

    def finish(self) -> RegionSpec:
        """Plans scratch."""
        placed: list[Panel] = []
        for p in self._panels:
            at = 0
            for low, high in sorted((q.place, q.place + q.rows) for q in placed if q.dies >= p.born):
                if at + p.rows <= low:
                    break
                at = max(at, high)
            p.place = at
            placed.append(p)
        return RegionSpec(
            tuple(self.inputs),
            tuple(self.outputs),
            tuple(self.linears),
            tuple(self.norms),
            tuple(self.attentions),
            self.masks,
            self._gates,
            tuple(self.tables),
            tuple(s.text.format(*(p.place for p in s.panels)) for s in self._steps),
            max((p.place + p.rows for p in placed), default=0),
        )

    def _linear(
        self,
        way: str,
        source: Panel,
        spec: LinearSpec,
        residual: Panel | None,
        term: Term | None,
        to: Panel | None,
        factor: Panel | None = None,
    ) -> None:
        panels: list[Panel] = []

        def place(panel: Panel) -> str:
            panels.append(panel)
            return f"{{{len(panels) - 1}}}"

        self.linears.append(spec)
        arguments = ["r", str(len(self.linears) - 1), place(source)]
        if term is not None:
            if not spec.same_chunks(term.spec):
                raise ValueError(f"two products that are cut differently: {spec} and {term.spec}")
            self.linears.append(term.spec)
            arguments += [str(len(self.linears) - 1), place(term.source)]
        arguments.append(place(residual) if residual else "-1")
        if factor:
            arguments.append(place(factor))
            self._gates = True
        arguments.append(place(to) if to else str(len(self.outputs) - 1))
        call = f"spa_{'linear' if term is None else 'sum'}{way}"
        self._add(f"{call}({', '.join(arguments)})", *panels)

    def _new(self, features: int) -> Panel:
        self._panels.append(Panel(features, len(self._steps), len(self._steps)))
        return self._panels[-1]

    def _add(self, text: str, *panels: Panel) -> None:
        for p in panels:
            p.dies = len(self._steps)
        self._steps.append(_Step(text, panels))
