"""Writes ``docs/example/`` from a finished run: `python -m benchmarks.demo_real.write_example [--run runs/demo-real]`.

Both models, the original and the exported one, are asked the eval prompts once more, with longer answers than the
search needed. Takes some minutes on two cores. Leaves in ``docs/example/`` the page, the run's results, its figure, its
report where it has one, the exported model's card, and all answers; no weights. Run it on the machine that the run was
on: the page names it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from heretic_ds.cli import compose
from heretic_ds.errors import UserError

from .ask import KINDS, answers, counted, read_lines
from .select_prompts import ANSWERS, CANDIDATES, KEPT

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "docs" / "example"
TEMPLATE = "page.md.j2"
ANSWER_TOKENS = 60
COPIES = ("results.json", "pareto.png", "report.html")
"""What is taken over from the run folder, where it is there."""
CARD = "model_card.md"
SHOWN = {"target": 6, "baseline": 4}
"""How many answers the page shows of each kind: the first ones of the eval file, whatever they are."""

Asked = Mapping[str, Mapping[str, Mapping[str, str]]]
"""Answers by ``original`` or ``edited``, kind and prompt."""


def facts(results: Mapping[str, Any], asked: Asked, machine: Mapping[str, Any], note: str = "") -> dict[str, Any]:
    """Everything that the page says, from what was measured; ``note`` is about the time that it took."""
    settings = compose(["experiment=demo_real"])
    trials = {trial["index"]: trial for trial in results["trials"]}
    original, edited = asked["original"], asked["edited"]
    candidates = {kind: read_lines(CANDIDATES / f"{kind}.txt") for kind in KINDS}
    files = [f"{kind}_{part}" for kind in KINDS for part in ("train", "eval")]
    first = json.loads(ANSWERS.read_text(encoding="utf-8"))
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
        "candidates": {kind: len(lines) for kind, lines in candidates.items()},
        "shown_by": {kind: counted(list(first[kind].values())) for kind in KINDS},
        "tokens": ANSWER_TOKENS,
        "asked": {kind: len(original[kind]) for kind in KINDS},
        "longer": {name: counted(list(asked[name]["target"].values())) for name in asked},
        "same": sum(original["baseline"][prompt] == edited["baseline"][prompt] for prompt in original["baseline"]),
        "answers": {
            kind: [(prompt, original[kind][prompt], edited[kind][prompt]) for prompt in list(original[kind])[:count]]
            for kind, count in SHOWN.items()
        },
    }


def profile(trial: Mapping[str, Any], component: str) -> str:
    """A profile of a trial in short: the largest weight and its layer, the weight at the foot and its distance."""
    given = trial["profiles"][component]
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
    here.globals |= {"profile": profile}
    return here.get_template(TEMPLATE).render(**told)


def ask_both(run: Path, original: str) -> dict[str, dict[str, dict[str, str]]]:
    """What the original model and the exported one answer to the eval prompts."""
    prompts = {kind: KEPT / f"{kind}_eval.txt" for kind in KINDS}
    longer, models = f"generation.max_new_tokens={ANSWER_TOKENS}", {"original": original, "edited": f"{run}/model"}
    return {name: answers(prompts, longer, f"model.path={path}") for name, path in models.items()}


def write(run: Path, note: str = "", keep_answers: bool = False, target: Path = TARGET) -> None:
    """Write everything; the models are not asked where their answers are kept.

    Raises UserError where the run is not finished, or exported nothing.
    """
    from benchmarks.figures import machine  # beside this package, whose modules are run as benchmarks.demo_real

    file, card = run / "results.json", run / "model" / "README.md"
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not results.get("finished") or not card.is_file():
        raise UserError(f"{run} holds no finished search with its exported model; run `make demo-real` first")
    kept = target / "answers.json"
    asked = json.loads(kept.read_text(encoding="utf-8")) if keep_answers else ask_both(run, results["model"])
    target.mkdir(parents=True, exist_ok=True)
    for name in COPIES:
        if (run / name).is_file():
            shutil.copyfile(run / name, target / name)
    shutil.copyfile(card, target / CARD)
    kept.write_text(json.dumps(asked, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (target / "README.md").write_text(page(facts(results, asked, machine(), note)), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_real.write_example")
    parser.add_argument("--run", type=Path, default=Path("runs/demo-real"), help="run folder (default runs/demo-real)")
    parser.add_argument("--note", default="", help="a sentence for the page, about the time that the run took")
    parser.add_argument("--keep-answers", action="store_true", help="take answers.json as it is; ask no model")
    options = parser.parse_args(arguments)
    try:
        write(options.run, options.note, options.keep_answers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {TARGET.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
