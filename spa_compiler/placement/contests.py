"""Takes the times by which forms are chosen: ONNX Runtime's dense operators and every sparse kernel take turns."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spa_compiler.calibration.progress import Progress
from spa_compiler.kernels.form import Form
from spa_compiler.placement.candidates import DENSE
from spa_compiler.placement.measure import Timing
from spa_compiler.placement.nodes import Packer
from spa_compiler.placement.records import Records
from spa_compiler.placement.regions import Group
from spa_compiler.placement.timer import Contender, LocalTimer, Timer
from spa_compiler.placement.trial import dense_model, pick, region_of, sparse_model
from spa_compiler.runtime.link import link
from spa_compiler.runtime.region import RegionSpec

_BUDGET_S = 0.25  # of one contest at one shape


@dataclass(frozen=True)
class Contest:
    """Like groups of sites, timed together in every form.

    Attributes:
        forms: the candidate's name -> the form of each site by name.
        questions: what the records call it, one for each of `shapes`.
    """

    groups: list[Group]
    shapes: tuple[tuple[int, ...], ...]
    forms: dict[str, dict[str, Form]]
    questions: list[dict[str, object]]


@dataclass(frozen=True)
class Referee:
    """Times contests, or looks them up.

    Attributes:
        mcpu: what kernels are compiled for.
        threads: of ONNX Runtime.
        records: what was timed before; what is timed now goes there.
        workspace: a folder for the trials' library, which is removed again.
        timer: the machine that they are timed on.
    """

    mcpu: str
    threads: int
    records: Records
    packer: Packer
    workspace: Path
    progress: Progress
    rng: np.random.Generator
    timer: Timer = field(default_factory=LocalTimer)

    def timings(self, what: str, contests: Sequence[Contest]) -> list[list[dict[str, Timing]]]:
        """Of each contest at each of its shapes, by form; `what` is for the progress."""
        out = []
        with tempfile.TemporaryDirectory(prefix="trial-", dir=self.workspace) as folder:
            library = Path(folder) / "kernels.so"
            known = [[self.records.get(q) for q in c.questions] for c in contests]
            missing = [c for c, answers in zip(contests, known, strict=True) if any(a is None for a in answers)]
            if missing:
                link([spec for contest in missing for spec in self._regions(contest)], (self.mcpu,), library)
            for i, (contest, answers) in enumerate(zip(contests, known, strict=True)):
                timings = []
                for shape, question, answer in zip(contest.shapes, contest.questions, answers, strict=True):
                    if answer is None:
                        answer = self._time(contest, shape, library)
                        self.records.put(question, answer)
                    timings.append(answer)
                out.append(timings)
                self.progress(what, i + 1, len(contests))
        return out

    def _regions(self, contest: Contest) -> list[RegionSpec]:
        return [
            region_of(group, forms, self.packer).spec
            for forms in contest.forms.values()
            for group in pick(contest.groups)
        ]

    def _time(self, contest: Contest, shape: Sequence[int], library: Path) -> dict[str, Timing]:
        groups = pick(contest.groups)
        feeds = {"x": self.rng.standard_normal(tuple(shape), np.float32)}
        models = {DENSE: dense_model(groups, shape)}
        models |= {name: sparse_model(groups, shape, forms, self.packer) for name, forms in contest.forms.items()}
        contenders = {name: Contender(model, library) for name, model in models.items()}
        count = len(groups)
        return {
            name: Timing(t.median_us / count, t.p10_us / count, t.p90_us / count, t.runs)
            for name, t in self.timer.time(contenders, feeds, self.threads, _BUDGET_S).items()
        }
