"""Benchmarks: this package's engines beside the harness's own model, on a tiny task."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from heretic_ds.cli.command import compose
from heretic_ds.errors import UserError
from heretic_ds.harness.asking import Harness, Score, _scores, difference
from heretic_ds.job import Job
from heretic_ds.placements import build_engine
from heretic_ds.report.benchmarks import benchmark_table
from heretic_ds.settings import Settings
from heretic_ds.stages.sharing import benchmarking
from heretic_ds.world import World

pytest.importorskip("lm_eval", reason='lm-evaluation-harness is missing: pip install "heretic-ds[eval]"')

from heretic_ds.harness.model import EngineModel, _packed, _unpacked

QUESTIONS = [
    {"question": "Which is a colour?", "choices": [" red", " seven o'clock", " table"], "answer": 0},
    {"question": "Which is a number?", "choices": [" green leaves", " nine"], "answer": 1},
    {"question": "Which one swims?", "choices": [" a stone wall", " a fish", " a fish in the wide sea"], "answer": 1},
    {"question": "Which one is cold?", "choices": [" ice", " fire and smoke"], "answer": 0},
]
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "tiny_answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "tiny_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: bits_per_byte}
  - {metric: word_perplexity}
""",
}


def write_tasks(folder: Path) -> Path:
    """A folder with the tasks above."""
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text)
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    names = ",".join(TASKS)
    words = ["experiment=demo", "task=benchmark", f"benchmark.tasks=[{names}]", "benchmark.chat_template=false"]
    return compose([*words, f"benchmark.include={write_tasks(tmp_path / 'tasks')}"])


def engine_model(settings: Settings, tokens: int) -> EngineModel:
    """The demo model behind an engine."""
    settings = replace(settings, generation=replace(settings.generation, max_new_tokens=tokens))
    job = Job.check(settings, World(0, 1), with_prompts=False)
    return EngineModel(build_engine(job, "evaluate"), job.chat, job.opened.config, tokens)


def test_scores_are_those_of_the_harness_s_own_model(settings: Settings) -> None:
    """Log-likelihoods, greedy answers with stop texts, and whole texts."""
    pytest.importorskip("accelerate", reason='the harness\'s own model needs it: pip install "heretic-ds[dev]"')
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    harness, path = Harness(settings.benchmark), settings.model.path
    ours = harness.ask(engine_model(settings, harness.answer_tokens()))
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    whole.generation_config.max_new_tokens = None  # else it stands for what a task asks
    theirs = harness.ask(HFLM(pretrained=whole, tokenizer=AutoTokenizer.from_pretrained(path), batch_size=2))
    assert {score.task for score in ours} == set(TASKS)
    assert [score.key for score in ours] == [score.key for score in theirs]
    for own, other in zip(ours, theirs, strict=True):
        assert own.value == pytest.approx(other.value, rel=1e-5, abs=1e-6), own.key
        assert own.each == other.each or own.each == pytest.approx(other.each, rel=1e-5)
    assert next(score for score in ours if score.metric == "acc").questions == len(QUESTIONS)


def test_requests_equal_the_harness_s_own_model(settings: Settings) -> None:
    """Single requests, whose values scores hide: greediness, an empty context, a text longer than the context."""
    pytest.importorskip("accelerate", reason='the harness\'s own model needs it: pip install "heretic-ds[dev]"')
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, model = settings.model.path, engine_model(settings, 20)
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    whole.generation_config.max_new_tokens = None  # else it stands for what a task asks
    own = HFLM(pretrained=whole, tokenizer=AutoTokenizer.from_pretrained(path), batch_size=1, max_length=24)
    model.max_length = 24
    greedy = own.generate_until([_asked("Which one swims?", {"until": [], "max_gen_toks": 4})], disable_tqdm=True)[0]
    pairs = [
        _asked("Which one swims?", greedy),
        _asked("Which one swims?", " not this at all"),
        _asked("", "a text"),
        _asked("one two three " * 20, " four five"),
    ]
    found, expected = model.loglikelihood(pairs, disable_tqdm=True), own.loglikelihood(pairs, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [bool(is_greedy) for _, is_greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    texts = [_asked("one two three four five six " * 12), _asked("short")]
    expected_rolling = own.loglikelihood_rolling(texts, disable_tqdm=True)
    assert model.loglikelihood_rolling(texts) == pytest.approx(expected_rolling, rel=1e-5)
    wanted = [
        _asked("Which one swims?", {"until": ["s"], "max_gen_toks": 10}),
        _asked("Which is a colour? " * 10, {"until": [], "max_gen_toks": 6}),
    ]
    assert model.generate_until(wanted) == own.generate_until(wanted, disable_tqdm=True)


def _asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def test_what_cannot_be_asked_is_refused(settings: Settings, tmp_path: Path) -> None:
    """One sentence each, before a model is loaded."""
    with pytest.raises(UserError, match="give benchmark=heretic"):
        Harness(replace(settings.benchmark, tasks=[]))
    with pytest.raises(UserError, match="no task 'tiny_choise'"):
        Harness(replace(settings.benchmark, tasks=["tiny_choise"]))
    with pytest.raises(UserError, match="is no folder"):
        Harness(replace(settings.benchmark, include=str(tmp_path / "nowhere")))
    model = engine_model(settings, 8)
    with pytest.raises(UserError, match="at random"):
        model.generate_until([_asked("a", {"do_sample": True, "temperature": 0.7})])
    for choice in ("", "a long one " * model.max_length):
        with pytest.raises(UserError, match="no token of its own, or longer"):
            model.loglikelihood([_asked("Which one?", choice)])


def test_answers_that_cannot_be_had_are_refused_before_any_question(settings: Settings, tmp_path: Path) -> None:
    """Those that are drawn at random, and those as long as the context."""
    file = tmp_path / "tasks" / "tiny_answer.yaml"
    file.write_text(file.read_text().replace("max_gen_toks: 12", "max_gen_toks: 12, do_sample: true, temperature: 1.0"))
    with pytest.raises(UserError, match="at random"):
        Harness(settings.benchmark).answer_tokens()
    model = engine_model(settings, 8)
    with pytest.raises(UserError, match="no room in the model's context"):
        EngineModel(model._engine, model._chat, SimpleNamespace(max_position_embeddings=8), 8)


def test_scores_of_other_questions_or_another_model_are_not_known_again(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tasks = tmp_path / "model", tmp_path / "tasks"
    model.mkdir()
    (model / "config.json").write_text("{}")
    first = benchmarking._asked(settings, str(model))
    (tasks / "__pycache__").mkdir()
    (tasks / "__pycache__" / "utils.pyc").write_bytes(b"0")
    assert benchmarking._asked(settings, str(model)) == first
    told = [first]
    (tasks / "questions.jsonl").write_text("{}")
    told.append(benchmarking._asked(settings, str(model)))
    (model / "config.json").write_text('{"layers": 2}')
    told.append(benchmarking._asked(settings, str(model)))
    other = replace(settings, model=replace(settings.model, dtype="float64"))
    told.append(benchmarking._asked(other, str(model)))
    (tmp_path / "template").write_text("A")
    other = replace(other, prompts=replace(other.prompts, template=str(tmp_path / "template")))
    told.append(benchmarking._asked(other, str(model)))
    (tmp_path / "template").write_text("B")
    told.append(benchmarking._asked(other, str(model)))
    monkeypatch.setattr(benchmarking, "version", lambda name: "0")
    told.append(benchmarking._asked(other, str(model)))
    assert all(one != another for place, one in enumerate(told) for another in told[:place])
    assert json.loads(json.dumps(told)) == told  # as they come back from the file


def test_conversations_go_through_the_format_s_own_template(settings: Settings) -> None:
    """Which ``prompts.template`` names, in a process with limits."""
    given = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    model = engine_model(replace(settings, prompts=replace(settings.prompts, template=given)), 8)
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "It is"}]
    assert model.apply_chat_template(turns[:1]) == "<user>Which?<me>"
    assert model.apply_chat_template(turns, add_generation_prompt=False) == "<user>Which?<assistant>It is"


def test_tasks_of_a_group_that_has_their_score_are_left_out_of_the_table() -> None:
    """Also where groups lie in groups, of which only the outer one has a score; they stay in the list."""
    results = {
        "groups": {"all": {"acc,none": 0.5, "acc_stderr,none": 0.1}},
        "results": {"one": {"acc,none": 0.25, "f1,none": 0.3}, "two": {"acc,none": 0.75}, "alone": {"acc,none": 1.0}},
        "group_subtasks": {"all": ["inner", "two"], "inner": ["one"], "loose": ["alone"]},
    }
    scores = list(_scores(results))
    assert {score.task: score.group for score in scores} == {"all": None, "one": "all", "two": "all", "alone": None}
    table = benchmark_table({"original": scores})
    shown = [str(cell) for cell in table.columns[0].cells]
    assert shown == ["all (acc, n=0)", "one (f1, n=0)", "alone (acc, n=0)"]


@pytest.mark.parametrize(("value", "greedy"), [(-3.5, True), (-3.5, False), (0.0, True)])
def test_a_row_s_number_holds_both(value: float, greedy: bool) -> None:
    """Log-likelihood and greediness."""
    assert _unpacked(_packed(value, greedy)) == (value, greedy)


def _score(value: float, each: Sequence[float] | None, error: float | None = 0.3) -> Score:
    return Score("t", "m", "none", value, error, 4, None if each is None else tuple(each))


def test_error_of_a_difference() -> None:
    """By the same questions' differences; of scores that are no means, as of independent samples."""
    one, other = _score(0.5, [1, 0, 1, 0]), _score(0.75, [1, 0, 1, 1])
    assert difference(one, other) == (0.25, pytest.approx(0.5 / math.sqrt(4)))
    change, error = difference(_score(2.0, None), _score(1.0, None, 0.4))
    assert (change, error) == (-1.0, pytest.approx(0.5))
    assert difference(_score(2.0, None, None), _score(1.0, None)) == (-1.0, None)
