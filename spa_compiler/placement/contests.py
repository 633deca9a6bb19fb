"""Takes the times by which forms are chosen: ONNX Runtime's dense operators and every sparse kernel take turns."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
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
#: a form this much slower than the best one, both in usual tiles, is not tried in others: they bring a third at most
_FAR_BEHIND = 1.35


@dataclass(frozen=True)
class Contest:
    """Like groups of sites, timed together in every form.

    Attributes:
        forms: the candidate's name -> the form of each site by name.
        questions: what the records call it, one for each of `shapes`.
        more: further candidates, of which the first ones are timed, as the referee's `trials` allow.
        of: for each of `more`, the one of `forms` that it is a variant of; those of forms that are far behind are not
            timed.
    """

    groups: list[Group]
    shapes: tuple[tuple[int, ...], ...]
    forms: dict[str, dict[str, Form]]
    questions: list[dict[str, object]]
    more: dict[str, dict[str, Form]] = field(default_factory=dict)
    of: dict[str, str] = field(default_factory=dict)


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
        known = [[self.records.get(q) for q in c.questions] for c in contests]
        turns = 2 if self.trials and any(c.more for c in contests) else 1
        found = self._turn(
            what, contests, [c.forms for c in contests], known, [[{} for _ in a] for a in known], 1, turns
        )
        if turns == 2:
            chosen = [self._promising(c, answers) for c, answers in zip(contests, found, strict=True)]
            found = self._turn(what, contests, chosen, known, found, 2, turns)
        return found

    def _turn(
        self,
        what: str,
        contests: Sequence[Contest],
        forms: Sequence[dict[str, dict[str, Form]]],
        known: Sequence[Sequence[dict[str, Timing] | None]],
        before: Sequence[Sequence[dict[str, Timing]]],
        turn: int,
        turns: int,
    ) -> list[list[dict[str, Timing]]]:
        """What is known, else what was timed `before` and, beside it, `forms`; after the last turn it becomes known."""
        out = []
        with tempfile.TemporaryDirectory(prefix="trial-", dir=self.workspace) as folder:
            library = Path(folder) / "kernels.so"
            missing = [(c, own) for c, own, answers in zip(contests, forms, known, strict=True) if None in answers]
            if any(own for _, own in missing):
                link([spec for contest, own in missing for spec in _regions(contest, own)], (self.mcpu,), library)
            for i, (contest, own, answers) in enumerate(zip(contests, forms, known, strict=True)):
                timings = []
                for j, (shape, question, answer) in enumerate(
                    zip(contest.shapes, contest.questions, answers, strict=True)
                ):
                    if answer is None:
                        answer = before[i][j] | (self._time(contest, own, shape, library) if own else {})
                        if turn == turns:
                            self.records.put(question, answer)
                    timings.append(answer)
                out.append(timings)
                self.progress(what, (turn - 1) * len(contests) + i + 1, turns * len(contests))
        return out

    def _promising(self, contest: Contest, answers: Sequence[Mapping[str, Timing]]) -> dict[str, dict[str, Form]]:
        """The forms that lead at some shape, and as many of their variants as may be tried: first those that were
        timed before, at other shapes. Empty where there is no variant."""
        leading = {name for answer in answers for name in _leading(answer, contest.forms)}
        before = [name for answer in answers for name in answer if name in contest.more]
        names = [name for name in dict.fromkeys([*before, *contest.more]) if contest.of.get(name, name) in leading]
        if not names:
            return {}
        variants = {name: contest.more[name] for name in names[: self.trials]}
        return {name: own for name, own in contest.forms.items() if name in leading} | variants

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


def _leading(answer: Mapping[str, Timing], forms: Collection[str]) -> list[str]:
    """The fastest of `forms` and those that a better tile might bring ahead of it."""
    times = {name: answer[name].median_us for name in forms if name in answer}
    return [name for name, time in times.items() if time <= min(times.values()) * _FAR_BEHIND]


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
