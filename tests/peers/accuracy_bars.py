"""What the rows must show: bars on drops, time and memory, and that each method beats what its paper says it beats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.peers.accuracy_rows import Row, Rows
from tests.peers.accuracy_settings import HALF, LOW_RANK, LOW_RANK_70, MODELS, TWO_OF_FOUR

HALF_OF_IT = 0.5
MINUTES = 3.0
MINILM_BYTES = 90_364_429


@dataclass(frozen=True)
class Than:
    """At most `factor` times the smallest drop of `methods`, plus `plus`; smaller than that where `less`."""

    methods: tuple[str, ...]
    factor: float = 1.0
    plus: float = 0.0
    less: bool = False

    @property
    def text(self) -> str:
        """In words."""
        whose = self.methods[0] if len(self.methods) == 1 else f"the best of {', '.join(self.methods)}"
        share = "half of " if self.factor == HALF_OF_IT else "" if self.factor == 1 else f"{self.factor:g} times "
        more = f" + {self.plus:g}" if self.plus else ""
        return f"{'less than' if self.less else 'at most'} {share}{whose}{more}"


@dataclass(frozen=True)
class Bar:
    """A promise: the method loses no more than `at_most` in that setting, and does as well as others do."""

    model: str
    setting: str
    method: str
    at_most: float | None = None
    than: tuple[Than, ...] = ()

    @property
    def text(self) -> str:
        """In words."""
        unit = " %" if MODELS[self.model].perplexity else ""
        own = [] if self.at_most is None else [f"at most {self.at_most:g}{unit}"]
        return ", ".join([*own, *(than.text for than in self.than)])

    @property
    def needs(self) -> tuple[str, ...]:
        """The methods whose rows decide."""
        return (self.method, *(name for than in self.than for name in than.methods))


@dataclass(frozen=True)
class Verdict:
    """Whether a promise holds; None while rows are missing."""

    holds: bool | None
    shown: str


BARS = (
    Bar("minilm", "60% unstructured", "auto", 0.1),
    Bar("minilm", "70% unstructured", "auto", 0.9),
    Bar("minilm", "80% unstructured", "auto", 3.0),
    Bar("minilm", "50% in 4x1 blocks", "auto", 0.5),
    Bar("minilm", "60% in 4x1 blocks", "auto", 1.5),
    Bar("minilm", TWO_OF_FOUR.name, "auto", 0.2),
    Bar("minilm", LOW_RANK_70.name, "low rank, auto", 0.6, (Than(("svd",), factor=HALF_OF_IT),)),
    Bar(
        "minilm",
        HALF.name,
        "sparse-low-rank",
        None,
        (Than(LOW_RANK[:3], less=True), Than(("auto",), plus=0.3)),
    ),
    Bar("resnet56", "70% unstructured", "auto", 0.7),
    Bar("resnet56", "50% in 4x1 blocks", "auto", 1.0),
    Bar("efficientnet_lite0", "30% unstructured", "auto", 1.5),
    Bar("efficientnet_lite0", "50% unstructured", "auto", 6.0),
    Bar("cct", "60% unstructured", "auto", 0.3),
    Bar("stories260k", "20% unstructured", "auto", 2.5),
    Bar("stories260k", "30% unstructured", "auto", 10.0),
)

TIMED = ("minilm", "60% unstructured", "sparsegpt")
"""The row whose time and memory have bars."""
MEMORY = 3 * MINILM_BYTES + 10**9


def judge(bar: Bar, rows: Rows) -> Verdict:
    """Whether a bar is met, by the rows."""
    drop = rows.drop(bar.model, bar.setting, bar.method)
    if drop is None:
        return Verdict(None, "not measured")
    holds = bar.at_most is None or drop <= bar.at_most
    shown = [f"{drop:.2f}"]
    for than in bar.than:
        best = rows.least(bar.model, bar.setting, than.methods)
        if best is None:
            return Verdict(None, f"{drop:.2f}, {', '.join(than.methods)} not measured")
        limit = than.factor * best[0] + than.plus
        holds = holds and (drop < limit if than.less else drop <= limit)
        shown.append(f"{best[1]} {best[0]:.2f}")
    return Verdict(holds, "; ".join(shown))


def judge_time(rows: Rows) -> Verdict:
    """A whole pass over MiniLM on 2 cores."""
    row = rows.get(TIMED)
    if row is None or row.seconds is None:
        return Verdict(None, "not measured")
    return Verdict(row.seconds < 60 * MINUTES, f"{row.seconds:.0f} s")


def judge_memory(rows: Rows) -> Verdict:
    """What that pass needs at most."""
    row = rows.get(TIMED)
    if row is None or row.memory is None:
        return Verdict(None, "not measured")
    return Verdict(row.memory < MEMORY, f"{row.memory / 1e9:.2f} GB of {MEMORY / 1e9:.2f}")


# ---------------------------------------------------------------- the papers


@dataclass(frozen=True)
class Claim:
    """A method loses less than the baseline of its paper, wherever both are measured in these settings.

    Attributes:
        paper: who says so.
        settings: names of settings; empty for all.
        factor: of the baseline's drop, which it must stay at or below.
    """

    method: str
    baseline: str
    paper: str
    settings: tuple[str, ...] = ()
    factor: float = 1.0


_PRUNED_HARD = ("60% unstructured", "70% unstructured")
CLAIMS = (
    Claim("magnitude", "random", "Han 2015"),
    Claim("magnitude, global", "magnitude", "Gupta 2022, Global MP"),
    Claim("wanda", "magnitude + data", "Sun 2023, Wanda", _PRUNED_HARD),
    Claim("dass", "wanda", "Guo 2024, DaSS"),
    Claim("dsnot", "wanda", "Zhang 2023, DSnoT", _PRUNED_HARD),
    Claim("symbolic", "wanda", "Dong 2024, Pruner-Zero", _PRUNED_HARD),
    Claim("spectrum", "magnitude + data", "spectrum preservation"),
    Claim("envelope", "magnitude + data", "k-level group envelope"),
    Claim("swap", "magnitude + data", "Benbaki 2023, CHITA"),
    Claim("sparsegpt", "wanda", "Frantar 2023, SparseGPT", _PRUNED_HARD),
    Claim("admm", "wanda", "Boza 2024, ADMM weight update", _PRUNED_HARD),
    Claim("auto, lamp", "auto, uniform", "Lee 2021, LAMP"),
    Claim("auto, erk", "auto, uniform", "Evci 2020, RigL"),
    Claim("auto, global", "auto, uniform", "Gupta 2022, Global MP"),
    Claim("auto, error", "auto, uniform", "shares by the error of each layer"),
    Claim("auto, proportional", "auto, uniform", "shares in proportion to the error"),
    Claim("auto, ecoflap", "auto, uniform", "Sung 2024, ECoFLaP"),
    Claim("auto, evolution", "auto, uniform", "Tang 2025, DarwinLM"),
    Claim("fwsvd", "svd", "Hsu 2022, FWSVD"),
    Claim("whitened", "svd", "Wang 2024, SVD-LLM: at most half", factor=HALF_OF_IT),
    Claim("tucker", "svd", "Kim 2016, Tucker-2"),
    *(Claim("sparse-low-rank", name, "Li 2025, LOST", (HALF.name,)) for name in (*LOW_RANK[:3], "sparsegpt")),
)

_STORIES = ("stories260k", "30% unstructured")
_MINILM = ("minilm", "70% unstructured")
_RESNET = ("resnet56", "70% unstructured")
_RESNET_LOW = ("resnet56", "low rank, 70% of params")
WHY: dict[tuple[str, str, str, str], str] = {
    ("magnitude, global", "magnitude", *_RESNET): (
        "with BatchNormalization folded, the first convolution of a block has weights 2 to 13 times smaller than the "
        "second one; one threshold takes 84 to 94 % of every first one, which is all that the floor allows"
    ),
    ("wanda", "magnitude + data", *_RESNET): (
        "Wanda takes as much from each output; with BatchNormalization folded, the weights of a layer's outputs differ by "
        "2.5 (tenth to ninetieth percentile), and magnitude spares the strong ones. The layers' errors say the same, "
        "0.272 against 0.259, and so does onnxsim's Wanda. The paper has language models, without such a scale"
    ),
    ("auto, global", "auto, uniform", *_MINILM): (
        "one threshold leaves queries and keys half of their weights and takes 80 to 89 % of what leads out of the feed-forward "
        "parts, because their weights are smaller, which says nothing of what they do; what stays makes up for most of it "
        "(0.25 against 0.20)"
    ),
    ("auto, lamp", "auto, uniform", *_MINILM): (
        "0.24 against 0.20 is less than two sets of sentences agree on: on stsb_test it is the other way round, 0.34 against "
        "0.47. MiniLM's layers have much the same to spare"
    ),
    ("auto, erk", "auto, uniform", *_MINILM): (
        "0.24 against 0.20, and 0.49 against 0.47 on stsb_test: by shape alone, the square layers get fewer zeros and the wide "
        "ones of the feed-forward parts more, which is not what they have to spare; the hold-out saw it (0.423 against 0.416)"
    ),
    ("auto, error", "auto, uniform", *_MINILM): (
        "0.25 against 0.20 is less than two sets of sentences agree on: on stsb_test it is the other way round, 0.34 against "
        "0.47, as on the hold-out that it was chosen by (0.411 against 0.416)"
    ),
    ("auto, proportional", "auto, uniform", *_MINILM): (
        "as on stories260K, one error at one level says nothing of how it grows; the hold-out saw it (0.433 against 0.416)"
    ),
    ("magnitude, global", "magnitude", *_STORIES): (
        "its value and output projections have weights of 0.05 to 0.08 (root mean square), all others 0.1 to 0.3, so one "
        "threshold takes up to 68 % of them; nothing says that they matter less"
    ),
    ("dsnot", "wanda", *_RESNET): (
        "DSnoT mends the mean of each output, which the biases here take up for Wanda as well; its layers' errors are "
        "hardly smaller (0.267 against 0.272), and both have lost more than half of what the network knew"
    ),
    ("dass", "wanda", *_STORIES): (
        "DaSS weighs gate and up by what their product's norms are and leaves the inputs' norms out; here those differ by "
        "2, and with 172 gated outputs none is spare enough to be emptied first"
    ),
    ("auto, erk", "auto, uniform", *_STORIES): (
        "by shape, gate, up and down get 39 % zeros and key and value none, but gate and up are what the outputs feel most"
    ),
    ("auto, proportional", "auto, uniform", *_STORIES): (
        "one error at one level says nothing of how it grows: shares run from 0 to 79 %, and at 79 % the projections that "
        "looked cheap are what is lost"
    ),
    ("wanda", "magnitude + data", "cct", "60% unstructured"): (
        "Wanda takes as much from each output; the weights of its outputs differ by 4.9 (tenth to ninetieth percentile, "
        "the median of its layers; MiniLM: 1.4), and in the queries, keys and values a tenth of the outputs has weights of "
        "nothing at all, which magnitude empties first. The layers' errors say the same, 0.128 against 0.115, and onnxsim's "
        "Wanda loses more than plain magnitude, too"
    ),
    ("fwsvd", "svd", *_RESNET_LOW): (
        "without gradients the Fisher information is one number for each input, its mean square; their roots differ by 2.1 "
        "here (tenth to ninetieth percentile, the median of its layers), which turns the factors little: the layers' errors "
        "are 0.321 against 0.327, and as many images are right"
    ),
    ("whitened", "svd", *_RESNET_LOW): (
        "what is lost here is lost by the form: a 3 x 3 kernel as one thin layer of equal shares. Whitening takes the layers' "
        "errors from 0.327 to 0.264, Tucker-2 to 0.164, and ranks by their error to 0.096 (low rank, auto: 0.37 points)"
    ),
    ("auto, ecoflap", "auto, uniform", *_STORIES): (
        "shaking all weights of a layer alike says how much the outputs feel it, not how well what stays makes up for "
        "zeros; queries and keys get none for that (a difference of 2 % of the drop)"
    ),
}
"""What is known of a claim that does not hold, by (method, baseline, model, setting)."""


@dataclass(frozen=True)
class Found:
    """One claim in one setting."""

    claim: Claim
    model: str
    setting: str
    drop: float
    baseline: float

    @property
    def holds(self) -> bool:
        """Whether the method loses less; with a factor, no more than that share of the baseline's drop."""
        if self.claim.factor == 1:
            return self.drop < self.baseline
        return self.drop <= self.claim.factor * self.baseline

    @property
    def why(self) -> str:
        """The reason that is known, if it does not hold."""
        return WHY.get((self.claim.method, self.claim.baseline, self.model, self.setting), "")


def findings(rows: Rows) -> Iterator[Found]:
    """Every claim wherever both of its rows are there."""
    for claim in CLAIMS:
        for model in MODELS.values():
            for setting in model.settings:
                if claim.settings and setting.name not in claim.settings:
                    continue
                ours = rows.drop(model.name, setting.name, claim.method)
                theirs = rows.drop(model.name, setting.name, claim.baseline)
                if ours is not None and theirs is not None:
                    yield Found(claim, model.name, setting.name, ours, theirs)


def refusals(rows: Rows) -> list[Row]:
    """Rows without a result."""
    return [row for row in rows.values() if row.refused]
