"""Writes ``docs/example/`` from a finished run: `python -m benchmarks.demo_real.write_example [--run runs/demo-real]`.

Both models, the original and the exported one, are asked the test prompts once more, for the answers that the page
shows. Takes some minutes on two cores. Leaves in ``docs/example/`` the page, the run's results, its figure, its
report where it has one, the exported model's card, and all answers; no weights. Run it on the machine that the run was
on: the page names it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from heretic_ds.cli import compose
from heretic_ds.errors import UserError
from heretic_ds.export.final import final_rows, number_text, range_text

from .ask import KINDS, answers, counted, read_lines
from .select_prompts import ANSWERS, CANDIDATES, KEPT, TEST_ANSWERS

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "docs" / "example"
TEMPLATE = "page.md.j2"
ANSWER_TOKENS = 60
COPIES = ("results.json", "pareto.png", "report.html")
"""What is taken over from the run folder, where it is there."""
CARD = "model_card.md"
SHOWN = {"target": 6, "baseline": 4}
"""How many answers the page shows of each kind: the first ones of the test file, whatever they are."""

NAMES = re.compile(r"\b(AI|[Cc]hatbot|SmolLM|[Aa]ssistant|language model)\b")
"""By which a model names itself, also in answers that hold no marker."""

Asked = Mapping[str, Mapping[str, Mapping[str, str]]]
"""Answers by ``original`` or ``edited``, kind and prompt."""


def facts(
    results: Mapping[str, Any], asked: Asked | None, machine: Mapping[str, Any], note: str = ""
) -> dict[str, Any]:
    """Everything that the page says, from what was measured; ``note`` is about the time that it took.

    Without answers of the two models the page leaves out what needs them.
    """
    settings = compose(["experiment=demo_real"])
    trials = {trial["index"]: trial for trial in results["trials"]}
    files = [f"{kind}_{part}" for kind in KINDS for part in ("train", "eval", "test")]
    first, later = (json.loads(file.read_text(encoding="utf-8")) for file in (ANSWERS, TEST_ANSWERS))
    example = read_lines(KEPT / "target_eval.txt")[1]
    return {
        "results": results,
        "dtype": settings.model.dtype,
        "search_tokens": settings.generation.max_new_tokens,
        "front": [trials[index] for index in results["pareto"]],
        "trials": list(trials.values()),
        "chosen": trials[results["selected"]],
        "minutes": sum(results["timings"].values()) / 60,
        "machine": machine,
        "note": note,
        "kept": {name: len(read_lines(KEPT / f"{name}.txt")) for name in files},
        "candidates": {kind: len(read_lines(CANDIDATES / f"{kind}.txt")) for kind in KINDS},
        "shown_by": {kind: counted(list(first[kind].values())) for kind in KINDS},
        "test_candidates": {kind: len(later[kind]) for kind in KINDS},
        "final": results.get("final"),
        "rows": list(final_rows(results["final"])) if results.get("final") else [],
        "example": (example, first["target"][example]),
        "longer": _longer_answers(asked) if asked else None,
    }


def _longer_answers(asked: Asked) -> dict[str, Any]:
    """What the page says of the answers that both models gave once more."""
    original, edited = asked["original"], asked["edited"]
    return {
        "tokens": ANSWER_TOKENS,
        "asked": {kind: len(original[kind]) for kind in KINDS},
        "counts": {name: counted(list(asked[name]["target"].values())) for name in asked},
        "veiled": sum(NAMES.search(text) is not None and not counted([text]) for text in edited["target"].values()),
        "same": sum(original["baseline"][prompt] == edited["baseline"][prompt] for prompt in original["baseline"]),
        "shown": {
            kind: [(prompt, original[kind][prompt], edited[kind][prompt]) for prompt in list(original[kind])[:count]]
            for kind, count in SHOWN.items()
        },
    }


def profile(trial: Mapping[str, Any], component: str) -> str:
    """A profile of a trial in short: the largest weight and its layer, the weight at the foot and its distance."""
    given = trial["profiles"][component]
    if not given["max_weight"] and not given["min_weight"]:
        return "not edited"
    return (
        f"{given['max_weight']:.2f} at {given['max_weight_position']:.1f}, "
        f"{given['min_weight']:.2f} at ±{given['min_weight_distance']:.1f}"
    )


def quoted(answer: str) -> str:
    """An answer of a model as the text of a table's cell: one line, nothing of it read as Markdown."""
    line = " ".join(answer.split())
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>|#" else sign for sign in line)


def page(told: Mapping[str, Any]) -> str:
    """The page's Markdown."""
    here = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    here.filters |= {"quoted": quoted}
    here.globals |= {"profile": profile, "number": number_text, "interval": range_text}
    return here.get_template(TEMPLATE).render(**told)


def ask_both(run: Path, original: str) -> dict[str, dict[str, dict[str, str]]]:
    """What the original model and the exported one answer to the test prompts."""
    prompts = {kind: KEPT / f"{kind}_test.txt" for kind in KINDS}
    longer, models = f"generation.max_new_tokens={ANSWER_TOKENS}", {"original": original, "edited": f"{run}/model"}
    return {name: answers(prompts, longer, f"model.path={path}") for name, path in models.items()}


def write(run: Path, note: str = "", which: str = "new", target: Path = TARGET) -> None:
    """Write everything; the models are asked for ``new`` answers, or those ``kept`` are taken, or ``none``.

    Raises UserError where the run is not finished, or exported nothing.
    """
    from benchmarks.figures import machine  # beside this package, whose modules are run as benchmarks.demo_real

    file, card = run / "results.json", run / "model" / "README.md"
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not results.get("finished") or not card.is_file():
        raise UserError(f"{run} holds no finished search with its exported model; run `make demo-real` first")
    kept = target / "answers.json"
    asked = ask_both(run, results["model"]) if which == "new" else None
    if which == "kept":
        asked = json.loads(kept.read_text(encoding="utf-8"))
    target.mkdir(parents=True, exist_ok=True)
    for name in COPIES:
        if (run / name).is_file():
            shutil.copyfile(run / name, target / name)
    shutil.copyfile(card, target / CARD)
    if asked:
        kept.write_text(json.dumps(asked, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (target / "README.md").write_text(page(facts(results, asked, machine(), note)), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_real.write_example")
    parser.add_argument("--run", type=Path, default=Path("runs/demo-real"), help="run folder (default runs/demo-real)")
    parser.add_argument("--note", default="", help="a sentence for the page, about the time that the run took")
    parser.add_argument(
        "--answers",
        choices=("new", "kept", "none"),
        default="new",
        help="ask both models, take answers.json, or neither",
    )
    options = parser.parse_args(arguments)
    try:
        write(options.run, options.note, options.answers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {TARGET.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
