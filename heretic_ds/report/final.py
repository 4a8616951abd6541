"""Final scores as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from heretic_ds.export.final import FinalRow, final_rows, number_text, range_text, worded
from heretic_ds.foreign.text import in_one_line

_HEADS = ("", "original", "95 %", "edited", "95 %")
_SHORT = {
    "kl_first_token": "KL, first token",
    "kl": "KL, {kl_tokens} tokens",
    "perplexity": "perplexity",
    "tokens": "answer tokens",
    "token_repetition": "repetition",
}
_LONGEST_NAME = 18
_FORM = {"adapter": "the adapter on the original", "model": "the exported model", "both": "the exported model"}
_LAYOUTS = ((" to ", 3, 2), ("..", 3, 2), ("..", 2, 1))
"""Between the ends of an interval, digits of these, columns between columns: the first that fits is taken."""


def final_table(final: Mapping[str, Any], width: int = 80) -> Group:
    """Both models beside each other, in rows of at most ``width`` columns; what does not fit is cut at the end."""
    held = "held-out prompts" if final["held_out"] else "prompts"
    what = f"Final scores: {_FORM[final['form']]}, read from disk again, on {held}"
    about = f"intervals by bootstrap; answers of up to {final['answer_tokens']} tokens"
    rows = list(final_rows(final))
    for between, digits, gap in _LAYOUTS:
        cells = [_cells(row, final, between, digits) for row in rows]
        wide = [max(map(len, column)) for column in zip(_HEADS, *cells, strict=True)]
        if sum(wide) + 2 * gap + 2 <= width:
            break
    lines = [_line(_HEADS, wide, gap, "dim")]
    kind = None
    for row, each in zip(rows, cells, strict=True):
        if row.kind != kind:
            kind, part = row.kind, final["prompts"][row.kind]
            lines.append(Text(f"{part['prompts']} {kind} prompts ({part['part']})", "cyan"))
        lines.append(_line(each, wide, gap))
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return Group(Text(what, "bold"), Text(about, "dim"), *lines)


def _cells(row: FinalRow, final: Mapping[str, Any], between: str, digits: int) -> list[str]:
    """A score's name, the original's number and interval, the edited model's."""
    cells = [in_one_line(worded(_SHORT, row.name, final), _LONGEST_NAME)]
    for scored in (row.original, row.edited):
        if scored is None:
            cells += ["-", ""]
        else:
            cells += [number_text(scored["score"], row.counts), range_text(scored, row.counts, between, digits)]
    return cells


def _line(cells: Sequence[str], wide: Sequence[int], gap: int, style: str = "") -> Text:
    name, before, before_range, after, after_range = cells
    apart = " " * gap
    first = f"{name:<{wide[0]}}{apart}{before:>{wide[1]}} {before_range:<{wide[2]}}"
    return Text(f"{first}{apart}{after:>{wide[3]}} {after_range}".rstrip(), style)
