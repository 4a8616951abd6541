"""Chooses the prompts of the real example: `python -m benchmarks.demo_real.select_prompts [--dtype float32] [--test]`.

``candidates/`` holds prompts written for it: questions that put the model in the place of a person, and questions of
the same forms on plain knowledge and everyday things. The original model answers all of them as a search would have it
answer (``experiment=demo_real``). Kept are the questions of the first kind whose answers hold one of the markers of
``conf/scoring/chatbot.yaml``, and those of the second kind whose answers hold none. A fixed shuffle then halves each
kind into a train and an eval part. With ``--test`` the same is done for other candidates, ``*_test.txt``, which were
written when these parts were there: all that are kept of them are the test part, for final scores.

So what is kept is a sample selected by the model's own behaviour: all of the target prompts show it, by construction.

Needs the model (``make demo-real`` fetches it) and some minutes on two cores. Leaves ``answers.json``, the original's
answers to all candidates, beside this file, and the four files in ``heretic_ds/demo/chatbot/``; with ``--test``
``answers_test.json``, and two files there.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from heretic_ds.errors import UserError

from .ask import KINDS, answers

HERE = Path(__file__).resolve().parent
CANDIDATES, ANSWERS, TEST_ANSWERS = HERE / "candidates", HERE / "answers.json", HERE / "answers_test.json"
KEPT = HERE.parents[1] / "heretic_ds" / "demo" / "chatbot"
Answers = Mapping[str, Mapping[str, str]]
"""The original's answers by kind and prompt."""


def selected(given: Answers, shows_behaviour: Callable[[str], bool]) -> dict[str, list[str]]:
    """The prompts to keep, by file: ``target_train`` and so on."""
    files = {}
    for kind in KINDS:
        kept = _kept(given, kind, shows_behaviour)
        random.Random(0).shuffle(kept)
        half = (len(kept) + 1) // 2
        files[f"{kind}_train"], files[f"{kind}_eval"] = kept[:half], kept[half:]
    return files


def selected_for_test(given: Answers, shows_behaviour: Callable[[str], bool]) -> dict[str, list[str]]:
    """The prompts of the test part to keep, by file: ``target_test`` and ``baseline_test``."""
    return {f"{kind}_test": _kept(given, kind, shows_behaviour) for kind in KINDS}


def _kept(given: Answers, kind: str, shows_behaviour: Callable[[str], bool]) -> list[str]:
    return [prompt for prompt, answer in given[kind].items() if shows_behaviour(answer) == (kind == "target")]


def run(dtype: str, keep_answers: bool, test: bool = False) -> None:
    """Ask the model, or take the answers that are kept; write the prompt files and say how many there are."""
    from heretic_ds.cli import compose
    from heretic_ds.scoring import RefusalScorer

    file, end = (TEST_ANSWERS, "_test") if test else (ANSWERS, "")
    if not keep_answers:
        found = answers({kind: CANDIDATES / f"{kind}{end}.txt" for kind in KINDS}, f"model.dtype={dtype}")
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    given = json.loads(file.read_text(encoding="utf-8"))
    scorer = RefusalScorer.from_settings(compose(["experiment=demo_real"]).scoring)
    files = (selected_for_test if test else selected)(given, scorer.is_refusal)
    KEPT.mkdir(exist_ok=True)
    for name, lines in files.items():
        (KEPT / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for kind in KINDS:
        shown = sum(map(scorer.is_refusal, given[kind].values()))
        parts = ", ".join(f"{len(lines)} {name.partition('_')[2]}" for name, lines in files.items() if kind in name)
        print(f"{kind}: {shown} of {len(given[kind])} answers hold a marker; kept {parts}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_real.select_prompts")
    parser.add_argument("--dtype", default="float32", help="what the model computes in (default float32)")
    parser.add_argument("--keep-answers", action="store_true", help="take answers.json as it is; run no model")
    parser.add_argument("--test", action="store_true", help="choose the test part, and leave the others")
    options = parser.parse_args(arguments)
    try:
        run(options.dtype, options.keep_answers, options.test)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
