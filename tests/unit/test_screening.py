"""What candidates are compared by, against the model's own distributions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from heretic_ds.scoring.kl import Divergence
from heretic_ds.scoring.likelihood import RefusalLikelihood
from heretic_ds.search.screened import screening
from heretic_ds.search.screened.screening import Screening
from heretic_ds.world import Replicas
from tests import families
from tests.unit.test_output_edits import ONE_BLOCK, STRONG
from tests.unit.test_resident import EDIT, ablation_for, engine_for, prompts

EDITS = [EDIT, ONE_BLOCK, STRONG]


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def engine(request: pytest.FixtureRequest) -> Any:
    model = families.build(request.param)
    engine = engine_for(model)
    engine.prepare(ablation_for(engine))
    return engine


@torch.inference_mode()
def alone(engine: Any, prompt: list[int], tokens: list[int]) -> list[float]:
    """Probabilities of the first token after a prompt, of the first two, and so on, one forward pass each, no batch."""
    found = [1.0]
    for at, token in enumerate(tokens):
        logits_V = engine.model(torch.tensor([[*prompt, *tokens[:at]]])).logits[0, -1]
        found.append(found[-1] * logits_V.softmax(-1)[token].item())
    return found[1:]


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_likelihood_is_the_mean_over_beginnings_of_answers(engine: Any, tokens: int) -> None:
    rows, answers = prompts(), [row[: 1 + at % tokens] for at, row in enumerate(prompts()[::-1])]
    scorer = RefusalLikelihood().begin(engine, rows, answers)
    found, own = scorer.of(EDITS), [alone(engine, *each) for each in zip(rows, answers, strict=True)]
    assert scorer.of([None]) == pytest.approx([1.0], rel=1e-5)
    for edit, likelihood in zip(EDITS, found, strict=True):
        engine.apply(edit)
        edited = [alone(engine, *each) for each in zip(rows, answers, strict=True)]
        engine.restore()
        pairs = [zip(*each, strict=True) for each in zip(edited, own, strict=True)]
        beginnings = [[min(1.0, one / other) for one, other in each] for each in pairs]
        expected = [sum(each) / len(each) for each in beginnings]
        assert likelihood == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert len(set(found)) == 3


def test_one_pass_gives_both_numbers(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "TARGET", (3, 3)), monkeypatch.setattr(screening, "BASELINE", (4, 4))
    target, baseline = prompts()[::-1], prompts()
    answers = [row[1:] for row in prompts()]
    answers[1], answers[2] = [], answers[2][:1]  # says nothing of a likelihood; ends early
    screened = Screening(engine, target, answers, baseline)
    found = screened.of(EDITS)
    places = screening.spread([at for at, answer in enumerate(answers) if answer], 3)
    likelihood = RefusalLikelihood().begin(
        engine, [target[at] for at in places], [answers[at][: screening.TOKENS] for at in places]
    )
    divergence = Divergence().begin(engine, screening.spread(baseline, 4))
    assert [each.refusals for each in found] == pytest.approx(likelihood.of(EDITS), rel=1e-4)
    assert [each.kl for each in found] == pytest.approx(divergence.of(EDITS), rel=1e-3, abs=1e-7)
    one_by_one = [screened.of([edit])[0] for edit in EDITS]
    assert [each.kl for each in one_by_one] == pytest.approx([each.kl for each in found], rel=1e-3, abs=1e-7)
    assert [e.refusals for e in one_by_one] == pytest.approx([each.refusals for each in found], rel=1e-4)


@pytest.mark.parametrize("baseline", [3, 4])
def test_replicas_compare_with_what_they_have_seen(engine: Any, baseline: int) -> None:
    """Each has a share of the rows, whatever the numbers of both kinds of prompts."""

    class Share:
        """One of two replicas: it reads its rows alone, and is told of the other's."""

        def __init__(self, index: int) -> None:
            self.replicas = Replicas(2, 1, index, 0, None, None)

        def distributions(self, rows: Any, edits: Any, read: Any, more: Any = None) -> Any:
            mine = self.replicas.share(len(rows))
            own, others = ([each[at] for at in mine] for each in (rows, more))

            def read_own(places: Any, logits: Any) -> Any:
                return read([mine[at] for at in places], logits)

            return engine.distributions(own, edits, read_own, others)

    target, answers = prompts(), [row[1:] for row in prompts()[::-1]]
    for index in range(2):
        found = Screening(Share(index), target, answers, prompts()[:baseline])  # type: ignore[arg-type]
        mine = Replicas(2, 1, index, 0, None, None).share(baseline + len(found._target))
        assert sorted(found._likelihood._original_K) == [at - baseline for at in sorted({*mine}) if at >= baseline]
        shares = found._engine.distributions(found._rows, [None], found._read, found._continuations)[0]
        expected = [float(at >= baseline) for at in mine]  # the original's own: no KL, and all of its answers
        assert shares == pytest.approx(expected, abs=1e-5)


def test_where_distributions_lie_elsewhere_it_is_two_passes(engine: Any) -> None:
    class Elsewhere:
        """An engine that compares distributions itself."""

        def __init__(self) -> None:
            self.inner, self.measured = engine, 0

        def distributions(self, rows: Any, edits: Any, read: Any, more: Any = None) -> Any:
            return self.inner.distributions(rows, edits, read, more)

        def divergence_from_now(self, rows: Any, more: Any = None) -> Any:
            inner = Divergence().begin(self.inner, rows)

            def measure(edits: Any) -> list[list[float]]:
                self.measured += 1
                return [[value] for value in inner.of(edits)]

            return measure

    elsewhere, rows = Elsewhere(), prompts()
    answers = [row[1:] for row in rows]
    found = Screening(elsewhere, rows, answers, rows).of(EDITS)
    expected = Screening(engine, rows, answers, rows).of(EDITS)
    assert elsewhere.measured == 1
    assert [each.kl for each in found] == pytest.approx([each.kl for each in expected], rel=1e-3, abs=1e-7)
    assert [each.refusals for each in found] == pytest.approx([e.refusals for e in expected], rel=1e-4)
