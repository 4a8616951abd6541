"""Final scores as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.text import Text

from heretic_ds.export.final import FinalRow, final_rows, number_text, range_text, worded
from heretic_ds.foreign.text import in_one_line

_SHORT = {
    "kl_first_token": "KL, first token",
    "kl": "KL, {kl_tokens} tokens",
    "perplexity": "perplexity",
    "tokens": "answer tokens",
    "repetition": "repetition",
}
_LONGEST_NAME = 20
_FORM = {"adapter": "the adapter on the original", "model": "the exported model", "both": "the exported model"}


def final_table(final: Mapping[str, Any], width: int = 80) -> Group:
    """Both models beside each other, in rows of at most ``width`` columns; what does not fit is cut at the end."""
    held = "held-out prompts" if final["held_out"] else "prompts"
    what = f"Final scores: {_FORM[final['form']]}, read from disk again, on {held}"
    about = f"with {100 * final['confidence']:g} % intervals; answers of up to {final['answer_tokens']} tokens"
    rows = list(final_rows(final))
    cells = [[_name(row, final), *_numbers(row, "original"), *_numbers(row, "edited")] for row in rows]
    heads = ["", "original", "", "edited", ""]
    wide = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines: list[Text] = [Text(what, "bold"), Text(about, "dim"), _line(heads, wide, "dim")]
    kind = None
    for row, each in zip(rows, cells, strict=True):
        if row.kind != kind:
            kind, part = row.kind, final["prompts"][row.kind]
            lines.append(Text(f"{part['prompts']} {kind} prompts ({part['part']})", "cyan"))
        lines.append(_line(each, wide))
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return Group(*lines)


def _name(row: FinalRow, final: Mapping[str, Any]) -> str:
    return in_one_line(worded(_SHORT, row.name, final), _LONGEST_NAME)


def _numbers(row: FinalRow, which: str) -> tuple[str, str]:
    """A score and its interval."""
    scored = row.original if which == "original" else row.edited
    if scored is None:
        return "-", ""
    return number_text(scored["score"], row.counts), range_text(scored, row.counts)


def _line(cells: list[str], wide: list[int], style: str = "") -> Text:
    name, before, before_range, after, after_range = cells
    text = (
        f"{name:<{wide[0]}}  {before:>{wide[1]}} {before_range:<{wide[2]}}  {after:>{wide[3]}} {after_range:<{wide[4]}}"
    )
    return Text(text.rstrip(), style)
