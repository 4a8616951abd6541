"""Classifiers: what they are shown, what their numbers are made of, what is refused, where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from heretic_ds.errors import UserError
from heretic_ds.scoring import Classifier, make_scorers
from heretic_ds.scoring import judge as judges
from heretic_ds.scoring.values import Values, values_of
from heretic_ds.settings import ScoringSettings
from tests import families
from tests.judges import SIGN, save_judge

ANSWERS = ["plain", f"{SIGN}", f"a long answer with a {SIGN} in it", "b", "", f"c{SIGN}"]
EXPECTED = [0, 1, 1, 0, 0, 1]
PROMPTS = [f"prompt {number}" for number in range(len(ANSWERS))]


@pytest.fixture(scope="module")
def sequence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_judge(tmp_path_factory.mktemp("judge") / "sequence")


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_judge(tmp_path_factory.mktemp("judge") / "causal", "causal")


def classifier(folder: Path, **given: Any) -> Classifier:
    """One made as the command makes it."""
    node = {"_target_": "classifier", "model": str(folder), "device": "cpu", **given}
    [made] = make_scorers(ScoringSettings(scorers=[node]))
    assert isinstance(made, Classifier)
    made.check()
    return made


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_sequence_classifier_counts_answers(sequence: Path, batch_size: int) -> None:
    made = classifier(sequence, batch_size=batch_size)
    assert values_of(made, PROMPTS, ANSWERS) == Values(tuple(EXPECTED), "sum")
    assert made.score(PROMPTS, ANSWERS) == 3 and made.decided is None and made.flags


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_causal_model_is_asked(causal: Path, batch_size: int) -> None:
    made = classifier(causal, yes="Y", no="N", batch_size=batch_size)
    assert list(made.each(PROMPTS, ANSWERS)) == EXPECTED
    assert classifier(causal, yes="N", no="Y").score(PROMPTS, ANSWERS) == 3  # of six: those without the sign


def test_the_prompt_counts_where_the_template_shows_it(sequence: Path) -> None:
    asked = [SIGN, "plain"]
    assert list(classifier(sequence).each(asked, ["a", "b"])) == [0, 0]
    assert list(classifier(sequence, template="{prompt}: {answer}").each(asked, ["a", "b"])) == [1, 0]
    # What is filled in is not read as a template again.
    assert list(classifier(sequence, template="{answer}{prompt}").each(asked, ["{prompt}", "{prompt}"])) == [1, 0]


def test_probabilities_are_those_of_the_model_by_itself(tmp_path: Path) -> None:
    """Of a random encoder, whose rows are padded: its softmax over three labels, the mean of which counts."""
    fields: dict[str, Any] = {"vocab_size": len(families.VOCABULARY), "hidden_size": 16, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**fields, num_labels=3, pad_token_id=families.PAD))
    families.randomise(model, seed=5)
    model.save_pretrained(tmp_path)
    families.tokenizer().save_pretrained(tmp_path)
    made = classifier(tmp_path, label="LABEL_2", count=False, batch_size=4)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    expected = []
    for answer in ANSWERS[:4]:
        ids = families.tokenizer()(answer)["input_ids"]
        with torch.no_grad():
            logits_C = loaded(input_ids=torch.tensor([ids])).logits[0]
        expected.append(float(logits_C.double().softmax(0)[2]))
    each = made.each(PROMPTS[:4], ANSWERS[:4])
    assert list(each) == pytest.approx(expected, abs=1e-6) and max(expected) - min(expected) > 1e-3
    assert made.score(PROMPTS[:4], ANSWERS[:4]) == pytest.approx(sum(expected) / 4, abs=1e-6)
    assert made.combine == "mean" and not made.flags


def test_replies_are_those_of_the_model_by_itself(tmp_path: Path) -> None:
    """Of a random language model, whose rows are padded in batches on the left."""
    families.save("llama", tmp_path)
    made = classifier(tmp_path, yes="Y", no="N", template="{answer}?", count=False, batch_size=4)
    model, tokenizer = families.build("llama"), families.tokenizer()
    yes, no = (tokenizer(reply, add_special_tokens=False)["input_ids"][0] for reply in "YN")
    expected = []
    for answer in ANSWERS[:4]:
        asked = [{"role": "user", "content": f"{answer}?"}]
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        with torch.no_grad():
            logits_V = model(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits[0, -1]
        expected.append(float(torch.sigmoid((logits_V[yes] - logits_V[no]).double())))
    assert list(made.each(PROMPTS[:4], ANSWERS[:4])) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3


def test_one_output_and_several_labels_at_once_are_told_by_sigmoids(tmp_path: Path) -> None:
    one = classifier(save_judge(tmp_path / "one", labels=("toxic",)), count=False)
    several = save_judge(tmp_path / "several", labels=("a", "refuses"), problem_type="multi_label_classification")
    # Nothing but the constant in the stream: the counted label's logit is 0, whatever the other's is.
    assert list(one.each(["p"], ["plain"])) == [0.5]
    assert list(classifier(several, count=False).each(["p"], ["plain"])) == [0.5]


def test_the_threshold(sequence: Path) -> None:
    probabilities = classifier(sequence, count=False).each(["p"] * 2, ["plain", "plain" * 9 + SIGN])
    between = sum(probabilities) / 2
    assert list(classifier(sequence, threshold=between).each(["p"] * 2, ["plain", "plain" * 9 + SIGN])) == [0, 1]
    low = min(probabilities) / 2
    assert list(classifier(sequence, threshold=low).each(["p"], ["plain"])) == [1]


@pytest.mark.parametrize("kind", ["sequence", "causal"])
def test_of_a_long_answer_the_end_is_left_out(kind: str, sequence: Path, causal: Path) -> None:
    """And never the question behind it, nor more than need be."""
    given = {"yes": "Y", "no": "N", "template": "{answer} declined?"} if kind == "causal" else {}
    made = classifier(causal if kind == "causal" else sequence, **given)
    most = 254  # positions, without what some families leave out
    encode = made.judge._encoded
    assert len(encode("p", "y" * 1000)) == most
    text = made.judge._tokenizer.decode(encode("p", SIGN + "y" * 1000))
    assert text.count("y") > 200 and (kind == "sequence" or "declined?" in text)
    assert list(made.each(["p"] * 2, [SIGN + "y" * 1000, "y" * 1000 + SIGN])) == [1, 0]


def test_of_a_long_prompt_the_end_is_left_out_next(sequence: Path) -> None:
    made = classifier(sequence, template="{prompt}|{answer}")
    ids = made.judge._encoded("x" * 1000, "y" * 1000)
    text = made.judge._tokenizer.decode(ids)
    assert len(ids) == 254 and text.endswith("|") and "y" not in text


def test_memory_that_runs_out_halves_batches(sequence: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, sizes, of_batch = classifier(sequence, batch_size=6), [], judges.Judge._of_batch

    def tight(self: judges.Judge, rows: Any) -> list[float]:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return of_batch(self, rows)

    monkeypatch.setattr(judges.Judge, "_of_batch", tight)
    assert list(made.each(PROMPTS, ANSWERS)) == EXPECTED and sizes == [6, 3, 1, 1, 1, 1, 1, 1]

    def none(self: judges.Judge, rows: Any) -> list[float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(judges.Judge, "_of_batch", none)
    with pytest.raises(UserError, match="over a single answer; set device: cpu, or a smaller model"):
        made.each(PROMPTS, ANSWERS)


@pytest.mark.parametrize(
    ("keep", "free", "stays"), [(None, 10**12, True), (None, 10, False), (True, 10, True), (False, 10**12, False)]
)
def test_it_lies_on_an_accelerator_only_while_it_scores_unless_it_is_small(
    sequence: Path, monkeypatch: pytest.MonkeyPatch, keep: bool | None, free: int, stays: bool
) -> None:
    """The device ``meta`` stands for an accelerator: weights go there and come back."""
    made, moves = classifier(sequence, keep=keep), []
    monkeypatch.setattr(judges, "free_bytes", lambda device: free)
    to = torch.nn.Module.to

    def moved(self: Any, device: Any) -> Any:
        moves.append(str(device))
        return to(self, "cpu")

    monkeypatch.setattr(torch.nn.Module, "to", moved)
    made.judge.device = torch.device("meta")
    made.ready()
    assert moves == (["meta"] if stays else [])
    monkeypatch.setattr(judges.Judge, "_of_batch", lambda self, rows: [0.0] * len(rows))
    made.each(PROMPTS, ANSWERS)
    assert moves[int(stays) :] == (["meta"] if stays else ["meta", "cpu"])
    made.ready()
    assert len(moves) == 2  # the weights are read once


def test_its_files_are_what_a_run_is_bound_to(tmp_path: Path) -> None:
    folder = save_judge(tmp_path)
    before = classifier(folder).inputs()
    assert "model.safetensors" in before["files"] and classifier(folder).inputs() == before
    save_judge(tmp_path, labels=("REFUSAL", "ANSWER"))
    assert classifier(folder).inputs() != before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "no such folder/at all"}, "classifier.model=no such folder/at all cannot be opened"),
        ({"label": "nothing"}, "label is 'nothing'; choose one of the labels of .*: ANSWER, REFUSAL"),
        ({"label": "2"}, "label is '2'; choose one of the labels"),
        ({"template": "{prompt}"}, r"template has no \{answer\} in it"),
        ({"template": "{answer}" + "t" * 300}, "template leaves no room in the 254 tokens"),
        ({"device": "gpu"}, "device is 'gpu'; choose auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:7"}, "device is 'cuda:7', which is not there; choose auto or cpu"),
        ({"threshold": 1.0}, "classifier.threshold is 1.0; it has to be above 0 and below 1"),
        ({"kind": "judge"}, "classifier.kind is 'judge'; choose one of sequence, causal"),
        ({"batch_size": 0}, "classifier.batch_size is 0; it has to be at least 1"),
        ({"modell": "x"}, "classifier has no setting modell; did you mean model?"),
        ({"count": "maybe"}, "classifier.count=maybe does not fit: .* takes true or false"),
    ],
)
def test_what_is_refused(sequence: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        classifier(sequence, **given)
    assert "\n" not in str(refused.value)


def test_what_is_refused_of_other_models(tmp_path: Path, causal: Path) -> None:
    with pytest.raises(UserError, match=r"classifier\.model is not set"):
        make_scorers(ScoringSettings(scorers=["classifier"]))[0].check()
    unlabelled = save_judge(tmp_path / "two", labels=("LABEL_0", "LABEL_1"))
    with pytest.raises(UserError, match=r"label is not set; choose one of the labels of .*: LABEL_0, LABEL_1"):
        classifier(unlabelled)
    with pytest.raises(UserError, match="'Yes' and 'Y' begin with the same token"):
        classifier(causal, no="Y")
    with pytest.raises(UserError, match="no is '', which is no token"):
        classifier(causal, no="")
    # A language model has no head that was trained to tell labels: one would be drawn at random.
    made = classifier(causal, kind="sequence", label="1")
    with pytest.raises(UserError, match=r"lacks score\.weight, so it is no trained sequence model"):
        made.ready()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; give the folder of a model or a hub id"):
        classifier(tmp_path / "file")
