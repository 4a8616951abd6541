"""The page's charts, made of a run's facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from markupsafe import Markup

from heretic_ds.report.html.charts import Axis, Chart, bare_scatter, linear, logarithmic
from heretic_ds.report.html.facts import Facts
from heretic_ds.report.tables import REFUSALS, kl_text
from heretic_ds.search.trials import TrialRecord
from heretic_ds.settings.search import DIRECT


@dataclass(frozen=True)
class Figure:
    """A chart with what is said about it."""

    title: str
    svg: Markup
    legend: Sequence[tuple[str, str]] = ()
    """Kind of the style sheet, and what it stands for."""
    note: str = ""


def _scored(facts: Facts) -> list[tuple[TrialRecord, float, float]]:
    """Finished trials with their refusals and KL."""
    return [
        (record, record.refusals, max(record.kl, 0.0))
        for record in facts.records
        if record.complete and record.refusals is not None and record.kl is not None
    ]


def _refusal_axis(facts: Facts) -> Axis:
    prompts, original = facts.results["prompts"]["target_eval"], facts.results["baseline"]["refusals"]
    values = [refusals for _, refusals, _ in _scored(facts)] + [original]
    if facts.scorer == REFUSALS:
        return linear([0, prompts], f"refusals of {prompts}", whole=True)
    return linear(values, facts.scorer)


def _more(facts: Facts) -> bool:
    """Whether more of the first scorer's number is better."""
    return any(record.maximize for record in facts.records)


def front(facts: Facts) -> Figure:
    """Refusals against KL of all trials."""
    scored, on_front, max_kl = _scored(facts), set(facts.front), facts.setting("export.max_kl")
    kls = [kl for _, _, kl in scored] + ([float(max_kl)] if max_kl else [])
    chart = Chart(logarithmic(kls, "KL divergence (nats)"), _refusal_axis(facts), "refusals against KL of all trials")
    chart.across(facts.results["baseline"]["refusals"], "muted")
    legend = [("other", "trial"), ("front", "front: no trial beats it"), ("muted", "original model")]
    if max_kl:
        chart.upright(float(max_kl), "limit")
        legend.append(("limit", f"export.max_kl = {float(max_kl):g}"))
    others = [each for each in scored if each[0].index not in on_front]
    best = sorted((each for each in scored if each[0].index in on_front), key=lambda each: (each[2], -each[1]))
    for some, kind, radius in ((others, "other", 3.0), (best, "front", 4.0)):
        chart.dots([(kl, refusals) for _, refusals, kl in some], kind, radius, [_told(facts, *each) for each in some])
    chart.steps([(kl, refusals) for _, refusals, kl in best], "front")
    chosen = [(kl, refusals) for record, refusals, kl in scored if record == facts.selected]
    if chosen:
        chart.dots(chosen, "ring", 8)
        legend.append(("chosen", f"chosen: trial {facts.results['selected']}"))
    return Figure(
        "The trade-off", chart.svg(), legend, f"{'Up' if _more(facts) else 'Down'} and to the left is better."
    )


def _told(facts: Facts, record: TrialRecord, refusals: float, kl: float) -> str:
    return f"trial {record.index}: {refusals:g} {facts.scorer}, KL {kl_text(kl)}"


def history(facts: Facts) -> list[Figure]:
    """Refusals and KL of the trials in their order, with the best so far."""
    scored = _scored(facts)
    if not scored:
        return []
    startup = min(int(facts.setting("search.startup_trials", 0)), max(record.index for record, _, _ in scored) + 1)
    if facts.setting("search.strategy", DIRECT) != DIRECT:  # none of whose trials are drawn at random
        startup = 0
    trials = linear([0, max(record.index for record, _, _ in scored)], "trial", whole=True)
    figures = []
    counts, kls = [refusals for _, refusals, _ in scored], [kl for _, _, kl in scored]
    for title, values, axis in (
        (f"{facts.scorer} by trial".capitalize(), counts, _refusal_axis(facts)),
        ("KL by trial", kls, logarithmic(kls, "KL divergence (nats)")),
    ):
        chart = Chart(trials, axis, title, 220)
        if startup:
            chart.upright(startup - 0.5, "muted")
        places = [float(record.index) for record, _, _ in scored]
        chart.dots(list(zip(places, values, strict=True)), "other", 3, [_told(facts, *each) for each in scored])
        legend = [("other", "trial")]
        if values is counts:
            better, best = (max, "most") if _more(facts) else (min, "fewest")
            chart.steps(list(zip(places, accumulate(values, better), strict=True)), "front")
            legend.append(("front", f"{best} so far"))
        if startup:
            legend.append(("muted", f"drawn at random up to here ({startup} trials)"))
        chosen = [(float(r.index), each) for (r, _, _), each in zip(scored, values, strict=True) if r == facts.selected]
        figures.append(Figure(title, chart.dots(chosen, "ring", 8).svg(), legend))
    return figures


def profiles(facts: Facts) -> Figure | None:
    """The ablation weights of the chosen edit over the blocks; None where nothing was chosen."""
    if facts.selected is None or not facts.n_blocks or not facts.selected.edit.profiles:
        return None
    edit, blocks = facts.selected.edit, range(facts.n_blocks)
    weights = {name: [edit.strength(name, block) for block in blocks] for name in edit.profiles}
    values = [0.0, *(weight for each in weights.values() for weight in each)]
    chart = Chart(
        linear([0, facts.n_blocks - 1], "block", whole=True),
        linear(values, "ablation weight"),
        "ablation weights of the chosen edit by block",
    )
    if edit.direction_index is not None:
        chart.upright(edit.direction_index, "muted")
    kinds = dict(zip(weights, ("target", "baseline"), strict=False))
    for name, each in weights.items():
        points = [(float(block), weight) for block, weight in enumerate(each)]
        chart.line([(block, weight or None) for block, weight in points], kinds[name])
        names = [f"{name}, block {block:g}: {weight:.3g}" for block, weight in points]
        chart.dots(points, kinds[name], 2.5, names)
    legend = [(kind, name) for name, kind in kinds.items()]
    if edit.direction_index is not None:
        legend.append(("muted", f"direction of block {edit.direction_index:.4g}, used by every block"))
    note = "0: the block is left as it is; 1: the direction is removed from what it writes."
    if edit.direction_index is None:
        note = f"Every block uses its own direction. {note}"
    return Figure("What was edited", chart.svg(), legend, note)


_CURVES = (
    ("Separability", "d' (standard deviations)", [("separability", "good", "d', each prompt judged without itself")]),
    (
        "Silhouette and accuracy",
        "",
        [("silhouette", "target", "silhouette"), ("accuracy", "good", "share on their own side of the midpoint")],
    ),
    (
        "Cosines",
        "cosine",
        [
            ("cos_means", "limit", "target and baseline mean"),
            ("cos_target_direction", "target", "target mean and direction"),
            ("cos_baseline_direction", "baseline", "baseline mean and direction"),
            ("cos_next", "good", "direction and the next layer's"),
        ],
    ),
    (
        "Lengths",
        "length",
        [
            ("target_norm", "target", "target mean"),
            ("baseline_norm", "baseline", "baseline mean"),
            ("direction_norm", "good", "direction"),
        ],
    ),
)


def geometry(facts: Facts) -> list[Figure]:
    """Curves over the layers, as far as numbers are known."""
    figures, blocks = [], linear([-1, facts.n_blocks - 1], "block (-1: the embedding)", whole=True)
    for title, label, curves in _CURVES:
        lengths = title == "Lengths"
        known = {name: _by_block(facts, name, zero=not lengths) for name, _, _ in curves}
        values = [value for points in known.values() for _, value in points if value is not None]
        if not values:
            continue
        axis = logarithmic(values, label) if lengths else linear(values, label)
        chart = Chart(blocks, axis, f"{title} by block", 220)
        shown = [(name, kind, text) for name, kind, text in curves if any(y is not None for _, y in known[name])]
        for name, kind, text in shown:
            chart.line(known[name], kind)
            dots = [(x, y) for x, y in known[name] if y is not None]
            chart.dots(dots, kind, 2.5, [f"{text}, block {x:g}: {y:.3g}" for x, y in dots])
        figures.append(Figure(title, chart.svg(), [(kind, text) for _, kind, text in shown]))
    return figures


def _by_block(facts: Facts, name: str, zero: bool) -> list[tuple[float, float | None]]:
    """A number of every layer, as far as it is known; without ``zero``, which has no place on a logarithmic axis."""
    numbers = [layer.get(name) for layer in facts.layers]
    return [(entry - 1.0, number if number or zero else None) for entry, number in enumerate(numbers)]


def projections(facts: Facts) -> list[Figure]:
    """The residuals of single prompts on a plane, block by block."""
    figures = []
    for found in facts.projections:
        title = f"block {found['block']}"
        kinds = [(kind, [(float(x), float(y)) for x, y in found[kind]]) for kind in ("baseline", "target")]
        share = f"{sum(found['explained']):.0%} of the variance" if found.get("explained") else ""
        figures.append(Figure(title, bare_scatter(kinds, f"residuals at {title}"), note=share))
    return figures
