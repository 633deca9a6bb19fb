"""Takes the times by which forms are chosen: ONNX Runtime's dense operators and every sparse kernel take turns."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spa_compiler.calibration.progress import Progress
from spa_compiler.kernels.form import Form, Packed
from spa_compiler.placement.candidates import DENSE
from spa_compiler.placement.measure import Timing
from spa_compiler.placement.nodes import Packer
from spa_compiler.placement.records import Records
from spa_compiler.placement.regions import Group
from spa_compiler.placement.sites import Site
from spa_compiler.placement.timer import Contender, LocalTimer, Timer
from spa_compiler.placement.trial import dense_model, pick, region_of, sparse_model
from spa_compiler.runtime.generate import Region
from spa_compiler.runtime.link import link

_BUDGET_S = 0.25  # the least of one contest at one shape
_EACH_S = 0.1  # of each of its candidates


@dataclass(frozen=True)
class Contest:
    """Like groups of sites, timed together in every form.

    Attributes:
        forms: the candidate's name -> the form of each site by name.
        questions: what the records call it, one for each of `shapes`.
        more: further candidates, the first ones as the referee's `trials` allow.
    """

    groups: list[Group]
    shapes: tuple[tuple[int, ...], ...]
    forms: dict[str, dict[str, Form]]
    questions: list[dict[str, object]]
    more: dict[str, dict[str, Form]] = field(default_factory=dict)


@dataclass(frozen=True)
class Referee:
    """Times contests, or looks them up.

    Attributes:
        mcpu: what kernels are compiled for.
        threads: of ONNX Runtime.
        records: what was timed before; what is timed now goes there.
        workspace: a folder for the trials' library, which is removed again.
        timer: the machine that they are timed on.
        trials: the most candidates of a contest besides its own forms.
    """

    mcpu: str
    threads: int
    records: Records
    workspace: Path
    progress: Progress
    rng: np.random.Generator
    timer: Timer = field(default_factory=LocalTimer)
    trials: int = 0

    def timings(self, what: str, contests: Sequence[Contest]) -> list[list[dict[str, Timing]]]:
        """Of each contest at each of its shapes, by form; `what` is for the progress."""
        out = []
        with tempfile.TemporaryDirectory(prefix="trial-", dir=self.workspace) as folder:
            library = Path(folder) / "kernels.so"
            known = [[self.records.get(q) for q in c.questions] for c in contests]
            tried = [self._tried(c, answers) for c, answers in zip(contests, known, strict=True)]
            missing = [(c, forms) for c, forms, answers in zip(contests, tried, known, strict=True) if None in answers]
            if missing:
                link([spec for contest, forms in missing for spec in _regions(contest, forms)], (self.mcpu,), library)
            for i, (contest, forms, answers) in enumerate(zip(contests, tried, known, strict=True)):
                timings = []
                for shape, question, answer in zip(contest.shapes, contest.questions, answers, strict=True):
                    if answer is None:
                        answer = self._time(contest, forms, shape, library)
                        self.records.put(question, answer)
                    timings.append(answer)
                out.append(timings)
                self.progress(what, i + 1, len(contests))
        return out

    def _tried(self, contest: Contest, answers: Sequence[Mapping[str, Timing] | None]) -> dict[str, dict[str, Form]]:
        """The contest's own forms, and of the others first those that were timed at its other shapes."""
        before = [name for answer in answers for name in answer or () if name in contest.more]
        names = list(dict.fromkeys([*before, *contest.more]))[: self.trials]
        return contest.forms | {name: contest.more[name] for name in names}

    def _time(
        self,
        contest: Contest,
        forms: Mapping[str, dict[str, Form]],
        shape: Sequence[int],
        library: Path,
    ) -> dict[str, Timing]:
        groups = pick(contest.groups)
        feeds = {"x": self.rng.standard_normal(tuple(shape), np.float32)}
        contenders: dict[str, Contender] = {}

        def add(name: str, model: bytes) -> None:
            # Files: all forms of a large layer side by side are more than a model, and sessions hold them once more.
            path = library.with_name(f"{len(contenders)}.onnx")
            path.write_bytes(model)
            contenders[name] = Contender(path, library)

        add(DENSE, dense_model(groups, shape))
        for name, own in forms.items():
            add(name, sparse_model(groups, shape, own, Packer()))
        count, budget = len(groups), max(_BUDGET_S, _EACH_S * len(contenders))
        return {
            name: Timing(t.median_us / count, t.p10_us / count, t.p90_us / count, t.runs)
            for name, t in self.timer.time(contenders, feeds, self.threads, budget, stays=(DENSE,)).items()
        }


class _Sizes(Packer):
    """What a region is depends on a weight only where its form leaves the tile open; all others are packed as zeros."""

    def __init__(self) -> None:
        super().__init__()
        self._zeros: dict[tuple[Form, int, int], Packed] = {}

    def __call__(self, site: Site, form: Form) -> Packed:
        if None in (form.chunk, form.k_block):
            return form.pack(site.weight).with_bias(site.bias)  # not kept
        key = (form, site.n, site.k)
        if key not in self._zeros:
            self._zeros[key] = form.pack(np.zeros((site.n, site.k), np.float32))
        return self._zeros[key]


def _regions(contest: Contest, forms: Mapping[str, dict[str, Form]]) -> list[Region]:
    packer = _Sizes()
    return [region_of(group, own, packer).spec for own in forms.values() for group in pick(contest.groups)]
