"""The lists of prompts of a run: two kinds, of each a part for directions, one for scores, one for the last look."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import combinations

from heretic_ds.prompts.sources import Prompts, read_prompts
from heretic_ds.settings import PromptPair, PromptSettings
from heretic_ds.settings.verifying import AUTO_TEST, NO_TEST

log = logging.getLogger(__name__)

KINDS = ("target", "baseline")
PARTS = ("train", "eval")
"""Parts that there always are."""
TEST = "test"
"""The part that nothing is chosen by, where there is one."""
TESTS = tuple(f"{kind}.{TEST}" for kind in KINDS)
"""Lists that final scores alone are taken on."""


def read_all(settings: PromptSettings, most: int) -> dict[str, Prompts]:
    """All lists of prompts by kind and part, as in ``target.train``; ``target.test`` where there are such prompts.

    ``most`` bounds the test prompts of each kind that are found behind the others. Raises UserError.
    """
    found: dict[str, Prompts] = {}
    for kind in KINDS:
        pair: PromptPair = getattr(settings, kind)
        for part in PARTS:
            found[f"{kind}.{part}"] = read_prompts(getattr(pair, part), f"prompts.{kind}.{part}")
        if pair.test.source == AUTO_TEST:
            held_out = held_out_rows(found[f"{kind}.train"], found[f"{kind}.eval"], most)
        elif pair.test.source == NO_TEST:
            held_out = None
        else:
            held_out = read_prompts(pair.test, f"prompts.{kind}.{TEST}")
        if held_out is not None:
            found[f"{kind}.{TEST}"] = held_out
    return found


def held_out_rows(train: Prompts, evaluated: Prompts, most: int) -> Prompts | None:
    """Rows of the two lists' sources that neither took: first those behind the eval prompts. None where there are none,
    as of files that are used whole. White space and case make no other prompt."""
    taken = {_plain(text) for text in (*train.texts, *evaluated.texts)}
    texts = []
    for text in (*evaluated.behind, *train.behind):
        if (plain := _plain(text)) not in taken:
            taken.add(plain)
            texts.append(text)
    return Prompts(texts[:most], len(texts)) if texts else None


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def overlaps(texts: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """How many prompts of the second of two lists are in the first, too, by ``first, second``, where there are any.

    White space and case make no other prompt.
    """
    plain = {name: [_plain(text) for text in found] for name, found in texts.items()}
    counts = {}
    for first, second in combinations(plain, 2):
        known = set(plain[first])
        if shared := sum(text in known for text in plain[second]):
            counts[f"{first}, {second}"] = shared
    return counts


def tell_of_overlaps(texts: Mapping[str, Sequence[str]]) -> None:
    """Warn of prompts that are in two lists."""
    for names, shared in overlaps(texts).items():
        (kind, part), (other, second) = (name.split(".") for name in names.split(", "))
        count = len(texts[f"{other}.{second}"])
        if kind == other and second == TEST:
            text = "prompts.%s: %d of %d test prompts are %s prompts too, so they were not held back"
            log.warning(text, kind, shared, count, part)
        elif kind == other:
            text = "prompts.%s: %d of %d eval prompts are train prompts too, on which edits do better"
            log.warning(text, kind, shared, count)
        else:
            where = f"prompts.{kind}.{part}"
            log.warning("prompts.%s.%s: %d of %d prompts are in %s too", other, second, shared, count, where)
