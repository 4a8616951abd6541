"""Hostile files that are in nobody's way: the command ends well, says so where something is missing, and prints nothing
of them as it is."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import yaml

from tests.hostile.cases_model import DEEP, all_of, changed, written
from tests.hostile.cases_run import SOURCE
from tests.hostile.harness import Case, Ended, Place

BOMB = "a: &a [x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 8)}]\n" for n in range(8)
)
CARDS = [
    ("deep", "license: " + "[" * 3000, "cannot be read"),
    ("surrogate", 'license: "\\ud800"', "no plain text as its license"),
    ("control", 'license: "mit\\x1b[31m"', "no plain text as its license"),
    ("long", f"license: {'x' * 5000}", "no plain text as its license"),
    ("lines", 'license: "mit\\n# Heading\\n<script>x</script>"', "no plain text as its license"),
    ("list", "license: [mit, [apache-2.0]]", "no plain text as its license"),
    ("object", "license: {a: b}", "no plain text as its license"),
    ("bomb", BOMB + "license: *h", "no plain text as its license"),
    ("date", "license: 2025-13-45", "cannot be read"),
    ("digits", "license: " + "9" * 6000, "cannot be read"),
    ("large", "license: mit\nx: " + "y" * 2**17, "front matter of"),
    ("code", "license: !!python/object/apply:os.system ['touch was_run']", "cannot be read"),
]


@pytest.mark.parametrize(("name", "front", "said"), CARDS, ids=lambda value: str(value)[:12])
def test_a_card_is_never_in_the_way(name: str, front: str, said: str, judged: Callable, place: Place) -> None:
    """It is read before the search, its licence left out with a warning, and the export is made."""
    card = f"---\n{front}\n---\nA <script>model</script>.\n"
    ended: Ended = judged(Case(f"card_{name}", written("model/README.md", card), said, {"search.trials": 1}, status=0))
    assert "not carried over" in ended.out and ended.out.index("not carried over") < ended.out.index("trial 0")
    ours = (place.run / "model" / "README.md").read_text()
    assert "license" not in yaml.safe_load(ours.split("---\n")[1]) and "<script>" not in ours and "look there" in ours


def test_what_a_card_says_stays_text(judged: Callable, place: Place) -> None:
    name = "`x` <img src=y> [a](b)"
    card = f"---\nlicense: other\nlicense_name: {json.dumps(name)}\n---\n"
    judged(Case("card_marks", written("model/README.md", card), "", {"search.trials": 1}, status=0))
    ours = (place.run / "model" / "README.md").read_text()
    assert yaml.safe_load(ours.split("---\n")[1])["license_name"] == name
    assert "`'x' <img src=y> [a](b)`" in ours.split("---\n", 2)[2]


def test_files_that_are_not_needed(judged: Callable) -> None:
    spoil = all_of(written("model/preprocessor_config.json", DEEP), written("model/README.md", b"\xff\xfe\0"))
    judged(Case("processor", spoil, "is not needed here", {"search.trials": 1}, status=0))


def test_code_that_comes_with_a_model_is_not_needed_and_not_run(judged: Callable, place: Place) -> None:
    """Of models that transformers knows itself; nothing is asked either."""
    own = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    spoil = all_of(
        written("model/evil.py", "open('was_run', 'w')\nclass Config: pass\nclass Model: pass\nclass Own: pass\n"),
        changed("model/config.json", auto_map=own),
        written("model/processor_config.json", json.dumps({"auto_map": {"AutoProcessor": "evil.Own"}})),
        written("model/preprocessor_config.json", json.dumps({"auto_map": {"AutoImageProcessor": "evil.Own"}})),
    )
    judged(Case("code", spoil, "", {"search.trials": 1}, status=0))
    assert not list(place.root.rglob("was_run"))


def test_prompts_that_are_searched_and_scored_on_are_told_of(judged: Callable) -> None:
    given = {"search.trials": 1, "prompts.target.train.source": "target.eval.txt"}
    said = "prompts.target: 8 of 8 eval prompts are train prompts too"
    judged(Case("overlap", None, said, given, status=0))


def test_a_line_that_a_kill_cut_is_made_again(judged: Callable, place: Place) -> None:
    def cut(place: Place) -> None:
        file = place.run / "study.journal"
        lines = file.read_bytes().splitlines(keepends=True)
        last = max(n for n, line in enumerate(lines) if json.loads(line)["op_code"] == 4)  # a trial; notes follow it
        file.write_bytes(b"".join(lines[: last + 1])[:-40])

    judged(Case("journal_cut", cut, "1 of 3 trials are done already", status=0, after_run=True))
    assert len(json.loads((place.run / "results.json").read_text())["trials"]) == 3


def test_prompts_with_escapes_are_shown_without(judged: Callable, place: Place) -> None:
    """On the terminal and in the log; the model gets them as they are."""
    text = "".join(f'{{"text": "cook \\u001b[31mplums\\u202e\\u0007 {n}"}}\n' for n in range(6))
    given = {
        "search.trials": 1,
        "scoring.markers": ["3", "n"],
        "scoring.print_answers": True,
        "prompts.target.eval.source": "p.jsonl",
    }
    ended = judged(Case("escapes", written("p.jsonl", text), "cook ␛[31mplums\ufffd␇ 0", given, status=0))
    log = (place.run / "run.log").read_text()
    assert "cook ␛[31mplums\ufffd␇ 0" in log and "\x1b" not in log + ended.out


def test_an_odd_name_of_a_file(judged: Callable) -> None:
    name = "p\x1b[2J.txt"
    judged(Case("name", written(name, ""), "p␛[2J.txt is empty", {SOURCE: name}))


def test_what_a_run_leaves_is_nobody_elses_to_write(judged: Callable, place: Place) -> None:
    """Others may read all of it, as this process's mask lets them, and nobody but its owner may write."""
    judged(Case("modes", None, "", {"search.trials": 1}, status=0))
    modes = {file.name: file.stat().st_mode & 0o777 for file in (place.run).rglob("*") if file.is_file()}
    assert modes and {name: oct(mode) for name, mode in modes.items() if mode & 0o022 or not mode & 0o044} == {}
