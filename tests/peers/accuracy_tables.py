"""docs/accuracy.md from the rows of docs/accuracy.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

from tests.peers.accuracy_bars import BARS, TIMED, Verdict, findings, judge, judge_memory, judge_time, refusals
from tests.peers.accuracy_rows import DENSE, Row, Rows
from tests.peers.accuracy_settings import METHODS, MODELS, Model

NOTHING = "-"
NOT_YET = "Nothing has been measured yet: `python tests/peers/accuracy.py` does, and writes this table."
SMALL = 0.05
"""A dense score this far from the stated one is pointed out."""
FAR_OFF = 1000.0
"""Percent of a perplexity above which digits say nothing."""

_INTRODUCTION = """\
# Accuracy after one-shot compression

What real models lose when they are compressed from calibration data alone, against the dense model. Scores are those of
`../shared/evaluate.py`; calibration is `evaluate.calibration`, and no metric shares a sample with it. `random` (seeded
masks) and `magnitude` are the controls, at the same budget as everything else in their column: they see no data.
`magnitude + data` is magnitude with what the pass does for every method that has samples: biases take up the shift of
the means. All layers get the same share, except with `magnitude, global`, `auto` and its variants. `auto` is what
`spa-compile` does when no method is named. The best of a column is bold; its bar is for `auto`, unless the section on
bars names another method. `-`: not measured, or refused. onnxsim is the peer: the same files and calibration data
(fewer batches where a note says so), its result taken for the layers that our passes take. Written by
`tests/peers/accuracy.py` from `accuracy.json`, which also has the recipes and versions of every row.\
"""


def render(rows: Rows) -> str:
    """The whole document."""
    lines = [_INTRODUCTION]
    for model in MODELS.values():
        if any(row.model == model.name for row in rows.values()):
            lines += ["", f"## {model.title}", "", *_model(model, rows)]
    lines += ["", "## Bars", "", *_bars(rows)]
    lines += ["", "## Does each method beat the baseline that its paper beats?", "", *_claims(rows)]
    refused = refusals(rows)
    if refused:
        lines += ["", "## Refused", ""]
        lines += [f"- {row.model}, {row.setting}, {row.method}: {row.refused}" for row in refused]
    return "\n".join(lines) + "\n"


def brief(rows: Rows) -> str:
    """The README's table: each bar's method beside the controls at the same budget."""
    known = [bar for bar in BARS if rows.drop(bar.model, bar.setting, bar.method) is not None]
    if not known:
        return NOT_YET
    lines = [_line(["model and metric", "zeros or form", "dense", "compressed", "lost", "magnitude", "random"])]
    lines.append(_line(["---", "---", *["---:"] * 5]))
    for bar in known:
        model, row = MODELS[bar.model], rows[bar.model, bar.setting, bar.method]
        dense = rows[bar.model, DENSE, DENSE]
        unit = " %" if model.perplexity else ""
        controls = [rows.drop(bar.model, bar.setting, name) for name in ("magnitude", "random")]
        lines.append(
            _line(
                [
                    model.title,
                    bar.setting,
                    _score(model, dense.score or 0.0),
                    _score(model, row.score or 0.0),
                    f"**{_number(row.drop or 0.0)}{unit}**",
                    *(NOTHING if drop is None else f"{_number(drop)}{unit}" for drop in controls),
                ]
            )
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- one model


def _model(model: Model, rows: Rows) -> Iterator[str]:
    dense = rows.get((model.name, DENSE, DENSE))
    if dense is not None and dense.score is not None:
        second = f" ({model.also}: {dense.also:.2f})" if dense.also is not None else ""
        yield f"Dense: {_score(model, dense.score)}{second}. {_unit(model)}"
        if abs(dense.score - model.dense) > SMALL:
            yield f"The stated dense value is {model.dense:g}."
        yield ""
    settings = [setting.name for setting in model.settings]
    yield _line(["drop", *settings])
    yield _line(["---", *["---:"] * len(settings)])
    best = {name: rows.least(model.name, name, model.setting(name).methods) for name in settings}
    for method in _methods(model, rows):
        cells = []
        for name in settings:
            text = _cell(rows.get((model.name, name, method)))
            winner = best[name]
            cells.append(f"**{text}**" if winner is not None and winner[1] == method else text)
        yield _line([method, *cells])
    limits = {bar.setting: bar for bar in BARS if bar.model == model.name}
    if limits:
        yield _line(["*bar*", *(limits[name].text if name in limits else "" for name in settings)])
        yield _line(["*met*", *(_met(judge(limits[name], rows)) if name in limits else "" for name in settings)])
    yield ""
    yield from _cost(model, rows)


def _unit(model: Model) -> str:
    if model.perplexity:
        return "Drops are percent of that perplexity, so below 0 is better than dense."
    if model.also:
        return f"Drops in points; behind the stroke, those of `{model.also}`. Below 0 is better than dense."
    return "Drops in points; below 0 is better than dense."


def _methods(model: Model, rows: Rows) -> list[str]:
    """Those with a row, in the order of the settings file."""
    present = {row.method for row in rows.values() if row.model == model.name and not row.refused}
    return [name for name in METHODS if name in present]


def _cell(row: Row | None) -> str:
    if row is None or row.drop is None:
        return NOTHING
    if row.also_drop is None:
        return _number(row.drop)
    return f"{_number(row.drop)} / {_number(row.also_drop)}"


def _cost(model: Model, rows: Rows) -> Iterator[str]:
    """Time, memory and layer error of each method, over the settings."""
    measured = [name for name in _methods(model, rows) if _of(model, name, rows)]
    if not measured:
        return
    yield "Means over the settings above (memory: the most):"
    yield ""
    yield _line(["method", "seconds", "peak memory, MB", "layers' output error", "hold-out estimate"])
    yield _line(["---", *["---:"] * 4])
    for name in measured:
        own = _of(model, name, rows)
        seconds = _mean([row.seconds for row in own])
        memory = [row.memory for row in own if row.memory is not None]
        errors = _mean([row.site_error for row in own])
        holdout = _mean([row.holdout for row in own])
        yield _line(
            [
                name,
                NOTHING if seconds is None else f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}",
                f"{max(memory) / 1e6:.0f}" if memory else NOTHING,
                NOTHING if errors is None else f"{errors:.3f}",
                NOTHING if holdout is None else f"{holdout:.3f}",
            ]
        )
    notes = sorted({f"{row.method}: {row.note}" for row in rows.values() if row.model == model.name and row.note})
    if notes:
        yield ""
        yield from (f"- {note}" for note in notes)


def _of(model: Model, method: str, rows: Rows) -> list[Row]:
    """A method's rows that have a time."""
    return [r for r in rows.values() if (r.model, r.method) == (model.name, method) and r.seconds is not None]


# ---------------------------------------------------------------- bars and papers


def _bars(rows: Rows) -> Iterator[str]:
    yield _line(["model", "setting", "method", "drop allowed", "measured", "met"])
    yield _line(["---", "---", "---", "---", "---", "---"])
    for bar in BARS:
        verdict = judge(bar, rows)
        yield _line([bar.model, bar.setting, bar.method, bar.text, verdict.shown, _met(verdict)])
    for text, verdict in (("under 3 minutes", judge_time(rows)), ("under 3x the model + 1 GB", judge_memory(rows))):
        yield _line([*TIMED, text, verdict.shown, _met(verdict)])


def _met(verdict: Verdict) -> str:
    return {True: "met", False: "**not met**", None: NOTHING}[verdict.holds]


def _claims(rows: Rows) -> Iterator[str]:
    found = list(findings(rows))
    if not found:
        yield "No method and its baseline have been measured yet."
        return
    good = sum(one.holds for one in found)
    yield f"{good} of {len(found)} comparisons go as the paper says; all layers the same share, the same calibration data."
    yield ""
    yield _line(["method", "over", "paper", "holds", "where (its drop against the baseline's)"])
    yield _line(["---", "---", "---", "---:", "---"])
    for claim in dict.fromkeys(one.claim for one in found):
        own = [one for one in found if one.claim == claim]
        where = [
            f"{one.model} {one.setting}: {_number(one.drop)} against {_number(one.baseline)}"
            f"{'' if one.holds else ' **(no)**'}"
            for one in own
        ]
        over = claim.baseline if claim.factor == 1 else f"{claim.factor:g} x {claim.baseline}"
        share = f"{sum(one.holds for one in own)} of {len(own)}"
        yield _line([claim.method, over, claim.paper, share, "; ".join(where)])
    lost = [one for one in found if not one.holds]
    if lost:
        yield ""
        yield "Where it does not:"
        yield ""
        for one in lost:
            pair = f"{one.claim.method} over {one.claim.baseline}, {one.model}, {one.setting}"
            yield f"- {pair}: {one.why or 'no reason is known'}."


# ---------------------------------------------------------------- words


def told(row: Row) -> str:
    """A row in one line, for the terminal."""
    if row.refused:
        return f"refused: {row.refused}"
    parts = [f"drop {_number(row.drop or 0.0)}", f"score {row.score:.3f}"]
    if row.also_drop is not None:
        parts.append(f"second metric {_number(row.also_drop)}")
    parts += [f"kept {row.kept:.3f}"] if row.kept is not None else []
    parts += [f"{row.seconds:.0f} s"] if row.seconds is not None else []
    parts += [f"{row.memory / 1e6:.0f} MB"] if row.memory is not None else []
    parts += [row.note] if row.note else []
    return ", ".join(parts)


def _number(value: float) -> str:
    if value >= FAR_OFF:
        return f"> {FAR_OFF:.0f}"
    return f"{value:.2f}".replace("-0.00", "0.00")


def _score(model: Model, value: float) -> str:
    return f"{value:.3f}" if model.perplexity else f"{value:.2f}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
