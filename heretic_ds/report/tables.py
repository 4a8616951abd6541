"""Trials as text: a plain line each for tools, rows that fit a terminal, and the Pareto front as a table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.text import Text

from heretic_ds.ablation.edit import Edit
from heretic_ds.ablation.profile import Profile
from heretic_ds.foreign.text import printable
from heretic_ds.scoring.agreement import Agreement
from heretic_ds.search.trials import TrialRecord

_KL, _SECONDS, _DIRECTION = len("1.23e-05"), len("999.9"), len("global 11.5")
_LONGEST_NAME = 16

REFUSALS = "refusals"
"""Name of the scorer that counts prompts, so that its scores can be told as a share of them."""
LEGEND = Text("* the best so far: no earlier trial beats it", "dim")
"""What stands above rows of trials."""


def score_in_words(score: float, scorer: str = REFUSALS) -> str:
    """``3 refusals``, or ``length 12.5`` of a first scorer that counts no prompts."""
    return f"{score:g} refusals" if scorer == REFUSALS else f"{scorer} {score:g}"


def share_in_words(score: float, prompts: int, scorer: str = REFUSALS) -> str:
    """``3 of 80 target prompts declined``, or ``length 12.5 on 80 target prompts``."""
    if scorer == REFUSALS:
        return f"{score:g} of {prompts} target prompts declined"
    return f"{scorer} {score:g} on {prompts} target prompts"


def kl_text(kl: float | None) -> str:
    """A KL divergence in nats with three significant digits."""
    return "-" if kl is None else f"{kl:.3g}"


def direction_text(edit: Edit, digits: int = 2) -> str:
    """Which direction an edit uses: ``per layer``, or ``global 11.50``."""
    return "per layer" if edit.direction_index is None else f"global {edit.direction_index:.{digits}f}"


def profile_text(profile: Profile | None) -> str:
    """``1.20 at 14.3, to 0.40 within 6.1``: largest weight and layer, weight at the foot and its distance."""
    if profile is None:
        return "-"
    if _is_idle(profile):
        return "not edited"
    return (
        f"{profile.max_weight:.2f} at {profile.max_weight_position:.1f}, "
        f"to {profile.min_weight:.2f} within {profile.min_weight_distance:.1f}"
    )


def trial_line(record: TrialRecord, total: int, prompts: int, scorer: str = REFUSALS) -> str:
    """One finished trial in one line, of ``total`` trials and with ``prompts`` target eval prompts.

    ``scorer`` is the name of the first scorer, whose scores a record keeps as its ``refusals``. Trials are
    numbered as everywhere (from 0), so that the number can be given to ``export.trial``. Tools read this form.
    """
    head = f"trial {record.index:>{len(str(total))}}"
    if not record.complete:
        return f"{head}  failed  {record.seconds:.1f} s"
    width = len(str(prompts))
    profiles = "  ".join(f"{name} {profile_text(profile)}" for name, profile in record.edit.profiles.items())
    return (
        f"{head}  {scorer} {_score(record.refusals, prompts, scorer, width)}  KL {kl_text(record.kl):<8}  "
        f"{record.seconds:.1f} s  {direction_text(record.edit)}  {profiles}"
    )


@dataclass(frozen=True)
class _Detail:
    """How much of its profiles a row tells."""

    profile: Callable[[str, Profile], str]
    widest: int
    """Columns of the widest text for one component."""
    about: str
    """The heading, for the components' names."""

    gap: int = 2

    def text(self, edit: Edit) -> str:
        told = (f"{self.profile(name, profile):<{self.widest}}" for name, profile in edit.profiles.items())
        return (" " * self.gap).join(told).rstrip()

    @property
    def width(self) -> int:
        """Columns for both components."""
        return 2 * self.widest + self.gap


def _in_words(name: str, profile: Profile) -> str:
    return f"{name} {profile_text(profile)}"


def _with_foot(name: str, profile: Profile) -> str:
    if _is_idle(profile):
        return f"{name} -"
    peak = f"{profile.max_weight:.2f}@{profile.max_weight_position:.1f}"
    return f"{name} {peak} to {profile.min_weight:.2f} in {profile.min_weight_distance:.1f}"


def _peak(name: str, profile: Profile) -> str:
    text = "-" if _is_idle(profile) else f"{profile.max_weight:.2f}@{profile.max_weight_position:.1f}"
    return f"{_SHORT.get(name, name[:4])} {text}"


def _short_peak(name: str, profile: Profile) -> str:
    return (
        f"{name[0]}-" if _is_idle(profile) else f"{name[0]}{profile.max_weight:.2f}@{profile.max_weight_position:.0f}"
    )


_SHORT = {"attention": "attn"}
_DETAILS = (
    _Detail(_in_words, len("attention 1.20 at 14.2, to 0.40 within 16.1"), "profiles: weight at layer"),
    _Detail(_with_foot, len("attention 1.20@14.2 to 0.40 in 16.1"), "profiles: weight@layer to foot in layers"),
    _Detail(_peak, len("attn 1.20@14.2"), "profiles: weight@layer"),
    _Detail(_short_peak, len("a1.20@14"), "attn, mlp @layer", gap=1),
)
"""The most telling first; the first that fits is taken. Of models with a hundred layers the last digits may be cut."""


class TrialTable:
    """Trials as rows of at most ``width`` columns, which line up; the profiles are as short as that asks for.

    A row is printed as soon as its trial is finished, so that columns are as wide as any of the ``total`` trials may
    need. What does not fit even so is cut at the end, behind the numbers.
    """

    def __init__(self, width: int, total: int, prompts: int, scorer: str = REFUSALS) -> None:
        self._width, self._prompts, self._scorer = width, prompts, scorer
        widest = _score(prompts, prompts, scorer)
        self._number = max(len(str(max(total - 1, 0))), 3)
        self._score = max(len(widest), min(len(scorer), _LONGEST_NAME))
        numbers = 2 + self._number + self._score + _KL + _SECONDS + _DIRECTION
        self._detail: _Detail | None = None
        for self._gap, details in ((2, _DETAILS[:3]), (1, _DETAILS[3:])):
            room = width - numbers - 5 * self._gap
            self._detail = next((detail for detail in details if detail.width <= room), None)
            if self._detail is not None:
                break

    def header(self) -> Text:
        """Names of the columns."""
        about = "" if self._detail is None else self._detail.about
        return self._line("", "trial", self._scorer[: self._score], "KL", "s", "direction", about, style="dim")

    def row(self, record: TrialRecord, marked: bool = False) -> Text:
        """One trial; those that no other beats are marked."""
        number, seconds = str(record.index), record.seconds
        took = f"{seconds:.1f}" if seconds < 1000 else f"{seconds:.0f}"
        if not record.complete:
            return self._line("", number, "failed", "-", took, "", "", style="red")
        score = _score(record.refusals, self._prompts, self._scorer)
        told = "" if self._detail is None else self._detail.text(record.edit)
        mark, style = ("*", "bold green") if marked else ("", "")
        return self._line(mark, number, score, kl_text(record.kl), took, direction_text(record.edit, 1), told, style)

    def original(self, refusals: float) -> Text:
        """The row of the model as it is."""
        return self._line("", "-", _score(refusals, self._prompts, self._scorer), "0", "", "the original", "")

    def _line(
        self, mark: str, number: str, score: str, kl: str, seconds: str, direction: str, profiles: str, style: str = ""
    ) -> Text:
        gap = " " * self._gap
        into_marks = len(number) > self._number  # the heading
        first = f"{number:>{self._number + 2}}" if into_marks else f"{mark:<2}{number:>{self._number}}"
        head = gap.join((first, f"{score:>{self._score}}", f"{kl:>{_KL}}"))
        rest = gap.join(("", f"{seconds:>{_SECONDS}}", f"{direction:<{_DIRECTION}}", profiles)).rstrip()
        line = Text(head, style=style, no_wrap=True).append(rest, style if style in ("dim", "red") else "not bold")
        line.truncate(self._width, overflow="ellipsis")
        return line


def pareto_table(
    records: Iterable[TrialRecord],
    front: Sequence[int],
    baseline_refusals: float,
    prompts: int,
    selected: int | None = None,
    scorer: str = REFUSALS,
    width: int = 80,
) -> Group:
    """The Pareto front, fewest refusals first, below the original model; the selected trial is marked.

    Args:
        records: all finished trials.
        front: indices in the order of rows, from :func:`heretic_ds.search.pareto.pareto_front`.
        baseline_refusals: the original model's.
        prompts: number of target eval prompts.
        selected: index of the trial that is or would be exported.
        scorer: name of the first scorer, whose scores stand where refusals do.
        width: columns that there are.
    """
    by_index = {record.index: record for record in records}
    table = TrialTable(width, max(by_index, default=0) + 1, prompts, scorer)
    rows = [table.row(by_index[index], marked=index == selected) for index in front]
    told = [Text("* selected", "dim")] if selected is not None else []
    title = Text("Pareto front: trials that no other trial beats", "bold")
    return Group(title, table.header(), table.original(baseline_refusals), *rows, *told)


def agreement_table(found: Agreement, of: str) -> Group:
    """How many answers two scorers flag, both, one alone, or neither, and Cohen's kappa; ``of`` says whose answers."""
    first, second = (printable(name)[:_LONGEST_NAME] for name in (found.first, found.second))
    columns = (second, f"not {second}")
    rows = ((first, found.both, found.first_only), (f"not {first}", found.second_only, found.neither))
    left, width = max(len(name) for name, *_ in rows), max(len(column) for column in columns)
    kappa = "-" if found.kappa is None else f"{found.kappa:.2f}"
    title = Text(f"Agreement on answers of {of}: Cohen's kappa {kappa}", "bold")
    header = Text("  ".join((" " * left, *(f"{column:>{width}}" for column in columns))), "dim")
    counts = [Text("  ".join((f"{name:<{left}}", *(f"{n:>{width}}" for n in each)))) for name, *each in rows]
    return Group(title, header, *counts)


def _score(number: float | None, prompts: int, scorer: str, width: int = 0) -> str:
    """A first score: ``3/100`` where it counts prompts, else a bare number."""
    text = f"{'-' if number is None else f'{number:g}':>{width}}"
    return f"{text}/{prompts}" if scorer == REFUSALS else text


def _is_idle(profile: Profile) -> bool:
    return profile.max_weight == 0.0 and profile.min_weight == 0.0
