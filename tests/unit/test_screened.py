"""The screened strategy: what is screened, what is chosen, and that it goes on exactly after any kill."""

from __future__ import annotations

import copy
import math
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from heretic_ds.ablation.edit import Edit
from heretic_ds.errors import UserError
from heretic_ds.search.journal import tell
from heretic_ds.search.screened import candidates, choice
from heretic_ds.search.screened.area import front, gains, height
from heretic_ds.search.screened.candidates import FIRST, Candidates, warm_starts
from heretic_ds.search.screened.choice import Candidate, pick
from heretic_ds.search.screened.modelled import Modelled
from heretic_ds.search.screened.screening import part, screened_rows, spread
from heretic_ds.search.screened.surrogate import Surrogate, features
from heretic_ds.search.space import edit_of, search_space
from heretic_ds.search.study import Search
from heretic_ds.search.trials import TrialRecord, TrialScores
from heretic_ds.settings import SearchSettings
from tests.unit.test_search import LAYERS, cheap_scores, trials_of

EACH = 3
COUNT, LIKELIHOOD = "screened_before_trials", "refusal_likelihood"
"""What a study of candidates keeps."""


class Killed(Exception):
    """The process ends here."""


def screened(edit: Edit) -> TrialScores:
    """What a part of the prompts tells of :func:`cheap_scores`."""
    scores = cheap_scores(edit)
    return TrialScores(min(1.0, scores.refusals / 60 + 0.01), scores.kl * 1.2)


def open_search(folder: Path, trials: int = 12, per_pass: int = 1, together: int = 1, seed: int = 0) -> Search:
    settings = SearchSettings(
        strategy="screened", trials=trials, startup_trials=4, seed=seed, trials_per_pass=str(per_pass), candidates=EACH
    )
    folder.mkdir(exist_ok=True)
    candidates = Candidates(folder / "screening.journal", LAYERS, settings, 60.0, together)
    return Search(folder / "study.journal", LAYERS, settings, 60.0, per_pass, propose=candidates)


def run(search: Search, alive: int = 10**6) -> list[TrialRecord]:
    """Search as the loop does; dies before the numbered number is told, of whichever kind."""

    def lives() -> None:
        nonlocal alive
        alive -= 1
        if alive < 0:
            raise Killed

    while True:
        while asks := search.to_screen():
            for ask in asks:
                lives()
                bad = TrialScores(0.5, float("nan")) if ask.index == 9 else screened(ask.edit)
                search.tell_screened([ask], [bad], 0.1)
        if not (asks := search.ask()):
            return search.records
        for ask in asks:
            lives()
            search.tell(ask, TrialScores(3, math.nan) if ask.index == 5 else cheap_scores(ask.edit), 0.5)


@pytest.mark.parametrize(("per_pass", "together"), [(1, 1), (3, 4)])
def test_ended_anywhere_it_asks_for_the_same(tmp_path: Path, per_pass: int, together: int) -> None:
    whole, random_ = run(open_search(tmp_path / "whole", 12, per_pass, together)), random.Random(0)
    ends = 0
    while True:
        try:
            records = run(open_search(tmp_path / "parts", 12, per_pass, together), alive=random_.randint(1, 9))
            break
        except Killed:
            ends += 1
    assert ends > 5 and records == whole
    for name in ("study.journal", "screening.journal"):
        study = "heretic_ds" if name == "study.journal" else "heretic_ds, screened"
        assert trials_of(tmp_path / "parts" / name, study) == trials_of(tmp_path / "whole" / name, study)


@pytest.mark.parametrize("per_pass", [1, 3])
def test_the_journal_of_trials_has_scored_ones_alone(tmp_path: Path, per_pass: int) -> None:
    records = run(open_search(tmp_path, per_pass=per_pass))
    scored, candidates = (
        trials_of(tmp_path / "study.journal"),
        trials_of(tmp_path / "screening.journal", "heretic_ds, screened"),
    )
    assert len(scored) == len(records) == 12 and len(candidates) == FIRST + (12 - per_pass) * EACH
    params = [entry[2] for entry in candidates]
    assert all(entry[2] in params for entry in scored)  # every trial was a candidate, and none twice
    assert len({tuple(entry[2].items()) for entry in scored}) == 12
    assert [params.index(entry[2]) < FIRST + at * EACH for at, entry in enumerate(scored)] == [True] * 12


def test_more_trials_go_on(tmp_path: Path) -> None:
    whole = run(open_search(tmp_path / "whole", 9))
    search = open_search(tmp_path / "parts", 4)
    assert run(search) == whole[:4]
    search.trials = 9
    assert run(search) == whole


def test_the_seed_decides(tmp_path: Path) -> None:
    one, other = (run(open_search(tmp_path / str(seed), 8, seed=seed)) for seed in (0, 1))
    assert all(ours.edit != theirs.edit for ours, theirs in zip(one[4:], other[4:], strict=True))


@pytest.mark.parametrize(("per_pass", "together"), [(1, 1), (3, 4)])
def test_candidates_that_are_gone_are_screened_again(tmp_path: Path, per_pass: int, together: int) -> None:
    """Each by the trials that were recorded when it was first."""
    whole = run(open_search(tmp_path / "whole", 9, per_pass, together))
    run(open_search(tmp_path / "parts", 6, per_pass, together))
    (tmp_path / "parts" / "screening.journal").unlink()
    for alive in (FIRST + 2, 5, 3):
        with pytest.raises(Killed):
            run(open_search(tmp_path / "parts", 9, per_pass, together), alive)
    assert run(open_search(tmp_path / "parts", 9, per_pass, together)) == whole
    of_parts, of_whole = (
        trials_of(tmp_path / name / "screening.journal", "heretic_ds, screened") for name in ("parts", "whole")
    )
    assert of_parts == of_whole


def test_candidates_that_another_version_asked_for_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pass of them was cut; what it is asked for now is something else than what was screened."""
    with monkeypatch.context() as other, pytest.raises(Killed):
        other.setattr(
            candidates, "known_scores", lambda pool, _: np.array([[1 - each.likelihood, each.kl] for each in pool])
        )
        run(open_search(tmp_path, 9, together=2), alive=FIRST + 1 + EACH + 1 + 1)
    search = open_search(tmp_path, 9, together=2)
    assert "was asked for with other parameters than now" in caplog.text
    records = run(search)
    asked = search._propose._study.asked  # type: ignore[attr-defined]  # what trials' parameters are taken from
    for index, entry in enumerate(trials_of(tmp_path / "screening.journal", "heretic_ds, screened")):
        assert asked[index] == ({} if index == 9 else entry[2])  # nothing is kept in memory of the one that failed
    assert len({str(record.edit) for record in records}) == 9  # none was scored twice


def candidates_of(folder: Path, worse: float) -> list[dict[str, float]]:
    """Parameters of the candidates of a search whose trials keep so many more refusals than was to be expected."""
    search = open_search(folder, 3)
    while True:
        while asks := search.to_screen():
            for ask in asks:
                search.tell_screened([ask], [screened(ask.edit)], 0.1)
        if not (asks := search.ask()):
            return [entry[2] for entry in trials_of(folder / "screening.journal", "heretic_ds, screened")]
        for ask in asks:
            scores = cheap_scores(ask.edit)
            search.tell(ask, TrialScores(min(60, scores.refusals + worse), scores.kl), 0.5)


def test_what_trials_were_scored_decides_which_candidates_come_next(tmp_path: Path) -> None:
    as_told, worse = (candidates_of(tmp_path / str(more), more) for more in (0, 40))
    assert as_told[:FIRST] == worse[:FIRST]  # before the first trial nothing is known of any
    assert len(as_told) == len(worse) == FIRST + 2 * EACH
    assert all(one != other for one, other in zip(as_told[FIRST:], worse[FIRST:], strict=True))


def test_candidates_are_proposed_by_what_they_would_be_scored(tmp_path: Path) -> None:
    """Screened, half of the edits look best; as trials would be scored, it is the other half."""
    space, draw = search_space(LAYERS), np.random.default_rng(1)
    study, records = optuna.create_study(directions=["minimize"] * 2), {}
    for index in range(40):
        params = {
            name: each.choices[index % 2] if name == "direction_scope" else draw.uniform(each.low, each.high)
            for name, each in space.items()
        }
        likelihood = 0.1 if params["direction_scope"] == "global" else 0.6
        study.add_trial(optuna.trial.create_trial(values=[likelihood, 0.05], params=params, distributions=space))
        records[index] = TrialRecord(index, index, "complete", edit_of(params), likelihood, 0.05, {}, 0.1)

    def proposed(expect: Any) -> str:
        settings = SearchSettings(trials=60, startup_trials=4, trials_per_pass="1")
        ask = Modelled(settings, space, LAYERS, (), expect)
        return str(ask(copy.deepcopy(study), 40, records).params["direction_scope"])

    def opposite(screened: Sequence[TrialRecord], params: Sequence[Mapping[str, Any]], count: int) -> np.ndarray:
        assert count == 40
        assert [record.edit for record in screened] == [edit_of(each) for each in params]
        return np.array([[0.7 - record.refusals, record.kl] for record in screened])

    assert proposed(lambda screened, params, count: None) == "global"
    assert proposed(opposite) == "per layer"


def test_scores_of_trials_are_not_predicted() -> None:
    pool = [Candidate(0.5, 0.02, taken=True, share=0.1, scored_kl=0.01), Candidate(0.5, 0.02)]
    predicted = choice.predict(pool)
    scores = choice.known_scores(pool, predicted)
    assert scores[0].tolist() == [0.1, 0.01]
    assert scores[1].tolist() == [predicted.share_N[1], predicted.kl_N[1]] != [0.5, 0.02]


def test_no_pass_goes_beyond_what_is_due(tmp_path: Path) -> None:
    """Candidates after those that are due are asked for when more trials are known."""
    search = open_search(tmp_path, 3, together=5)
    sizes = []
    while True:
        while asks := search.to_screen():
            sizes.append(len(asks))
            search.tell_screened(asks, [screened(ask.edit) for ask in asks], 0.1)
        if not (asks := search.ask()):
            break
        search.tell(asks[0], cheap_scores(asks[0].edit), 0.5)
    assert sizes == [*([5] * (FIRST // 5)), FIRST % 5, EACH, EACH]


def test_candidates_that_were_not_due_yet_do_not_count(tmp_path: Path) -> None:
    """Of a study that was brought back from an earlier day, whose candidates have gone on."""
    whole = run(open_search(tmp_path / "whole", 8))
    run(open_search(tmp_path / "parts", 3))
    shutil.copy(tmp_path / "whole" / "screening.journal", tmp_path / "parts")
    assert run(open_search(tmp_path / "parts", 8)) == whole


def test_a_pass_that_was_cut_needs_its_candidates(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(open_search(tmp_path, 6, per_pass=3), alive=FIRST + 2)
    (tmp_path / "screening.journal").unlink()
    with pytest.raises(UserError, match=r"screening\.journal does not hold what the trials were chosen from"):
        open_search(tmp_path, 6, per_pass=3)


@pytest.mark.parametrize("told", [{COUNT, LIKELIHOOD}, {COUNT}, set()])
def test_a_cut_pass_of_a_version_with_other_counts_goes_on(
    told: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """How many were screened before the first trial is kept, and by which likelihood; it was 16 before versions kept
    it, by another one."""

    def tell_those(study: Any, attributes: Mapping[str, Any]) -> None:
        tell(study, {name: value for name, value in attributes.items() if name in told})

    with monkeypatch.context() as earlier:
        earlier.setattr(candidates, "FIRST", 20 if told else 16)
        earlier.setattr(candidates, "tell", tell_those)
        whole = run(open_search(tmp_path / "whole", 6, per_pass=3))
        with pytest.raises(Killed):
            run(open_search(tmp_path / "parts", 6, per_pass=3), alive=candidates.FIRST + 2)
    assert candidates.FIRST == 32
    caplog.clear()
    for mixes in (LIKELIHOOD not in told, False):  # then all trials are there
        assert run(open_search(tmp_path / "parts", 6, per_pass=3)) == whole
        assert ("candidates of another version were compared by another likelihood" in caplog.text) is mixes
        caplog.clear()


def test_a_count_that_is_none_is_one_line(tmp_path: Path) -> None:
    run(open_search(tmp_path, 1))
    file = tmp_path / "screening.journal"
    kept = file.read_text()
    assert '"screened_before_trials":32' in kept
    file.write_text(kept.replace('"screened_before_trials":32', '"screened_before_trials":"x"'))
    with pytest.raises(UserError, match=r"screening\.journal is damaged \(screened_before_trials is 'x'\)"):
        open_search(tmp_path, 1)


@pytest.mark.parametrize("layers", [1, 2, 30])
def test_warm_starts_change_every_block_with_weight_one(layers: int) -> None:
    space = search_space(layers)
    for params in warm_starts(layers):
        assert all(space[name]._contains(space[name].to_internal_repr(value)) for name, value in params.items())
        edit = edit_of(params)
        assert [edit.strength(c, b) for c in edit.profiles for b in range(layers)] == pytest.approx([1.0] * 2 * layers)
    assert sum(edit_of(params).direction_index is None for params in warm_starts(layers)) == 1


def test_features_are_the_weights_of_writers() -> None:
    draw = np.random.default_rng(0)
    space = search_space(LAYERS)
    params = [
        {n: d.choices[at % 2] if n == "direction_scope" else draw.uniform(d.low, d.high) for n, d in space.items()}
        for at in range(6)
    ]
    found = features(params, LAYERS)
    for each, edit in zip(found, map(edit_of, params), strict=True):
        expected = [edit.strength(component, block) for component in edit.profiles for block in range(LAYERS)]
        assert each[: 2 * LAYERS] * math.sqrt(LAYERS) == pytest.approx(expected)
        assert (each[-1] > 0) == (edit.direction_index is None)


def test_the_surrogate_knows_what_it_was_told() -> None:
    known = np.random.default_rng(0).random((20, 3))
    outputs = np.stack([known.sum(axis=1), known[:, 0] ** 2 * 100], axis=1)
    mean, deviation = Surrogate(known, outputs).at(known)
    assert np.abs(mean - outputs).max() < 0.3 * outputs.std(axis=0).max()
    far, far_deviation = Surrogate(known, outputs).at(known + 50)
    assert far == pytest.approx(np.tile(outputs.mean(axis=0), (20, 1)))
    assert (far_deviation > 3 * deviation).all()


def test_gains_are_areas() -> None:
    known = np.array([[0.5, 1.0], [0.2, 1.5], [0.6, 1.2]])
    points = np.array([[0.3, 0.5], [0.5, 1.0], [0.0, 1.9], [2.0, 0.0], [0.7, 0.9]])
    by_counting = []
    grid = np.stack(np.meshgrid(np.arange(0, 1, 0.01) + 0.005, np.arange(0, 2, 0.01) + 0.005), axis=-1).reshape(-1, 2)
    is_known = (grid[:, None] >= known).all(-1).any(-1)
    for point in points:
        by_counting.append(((grid >= point).all(-1) & ~is_known).sum() * 1e-4)
    assert gains(points, known, 2.0) == pytest.approx(by_counting, abs=1e-9)
    assert front(known, 2.0).tolist() == [1, 0] and gains(points, known[:0], 2.0)[0] == pytest.approx(0.7 * 1.5)


def test_a_small_kl_is_worth_less_below_the_target() -> None:
    found = height(np.array([1e-9, 0.001, 0.01, 0.1, 1.0]), 0.01)
    assert found == pytest.approx([-2.0, -0.5, 0.0, 1.0, 2.0])


def test_what_is_picked() -> None:
    first = [Candidate(0.9, 0.02), Candidate(0.0, 0.05), Candidate(0.5, 0.5)]
    assert pick(first, 0.01) == 1
    scored = [Candidate(0.9, 0.02), Candidate(0.0, 0.05, taken=True, share=0.0, scored_kl=0.05), Candidate(0.0, 0.06)]
    assert pick(scored, 0.01) == 0  # the third one is beaten
    # A likelihood that was wrong of one trial is corrected for those that are like it.
    wrong = [Candidate(0.4, 0.02, taken=True, share=1.0, scored_kl=0.02), Candidate(0.41, 0.018), Candidate(0.0, 0.2)]
    assert pick(wrong, 0.01) == 2
    with pytest.raises(ValueError, match="trial already"):
        pick([Candidate(0.5, 0.1, taken=True)], 0.01)


def test_the_last_refusals_count_more_than_a_tiny_kl_beside_most_of_them() -> None:
    best = Candidate(0.05, 0.03, taken=True, share=0.05, scored_kl=0.03)
    others, none_left = Candidate(0.95, 1e-6), Candidate(0.0, 0.05)
    assert pick([best, others, none_left], 0.01) == 2
    assert pick([best, others, none_left, Candidate(0.25, 0.002)], 0.01) == 2


def test_a_tiny_kl_counts_where_little_else_can_be_filled() -> None:
    best = Candidate(0.0, 0.1, taken=True, share=0.0, scored_kl=0.1)
    assert pick([best, Candidate(0.0, 0.09), Candidate(0.92, 1e-6)], 0.01) == 2


def test_no_share_below_none_is_hoped_for() -> None:
    """Both are dominated: one by far, of which no number of refusals would make a better one."""
    best = Candidate(0.0, 1e-4, taken=True, share=0.0, scored_kl=1e-4)
    assert pick([best, Candidate(0.0, 0.5), Candidate(0.005, 1.02e-4)], 0.01) == 2


def test_deviations_grow_until_something_can_be_improved() -> None:
    """So many trials were as predicted that nothing is in doubt; then what comes nearest is picked."""
    sure = [Candidate(0.0, 1e-4, taken=True, share=0.0, scored_kl=1e-4)] * 100
    assert pick([*sure, Candidate(0.97, 1.3e-4), Candidate(0.0, 1.31e-4), Candidate(0.5, 2e-4)], 0.01) == 101
    perfect = Candidate(0.0, 1e-6, taken=True, share=0.0, scored_kl=1e-6)
    assert pick([perfect, Candidate(0.0, 0.5), Candidate(0.0, 1e-3)], 0.01) == 1, "the first, for nothing is better"


def test_the_kl_of_all_prompts_may_be_another_than_that_of_a_part() -> None:
    """On all prompts it is three times that of a part for each trial, so the candidate is dominated."""
    trials = [Candidate(0.5, kl, taken=True, share=0.5, scored_kl=3 * kl) for kl in (0.01, 0.02, 0.03)]
    best = Candidate(0.1, 0.01, taken=True, share=0.1, scored_kl=0.03)
    assert pick([best, *trials, Candidate(0.1, 0.02), Candidate(0.09, 0.03)], 0.01) == 5
    assert pick([best, *trials, Candidate(0.1, 0.009), Candidate(0.09, 0.2)], 0.01) == 4


@pytest.mark.parametrize(("scatter", "expected"), [(1.05, 5), (3.0, 4)])
def test_a_kl_that_scatters_may_be_a_smaller_one(scatter: float, expected: int) -> None:
    """One candidate is dominated by its KL alone, the other adds a little: it depends on how sure KLs are."""
    trials = [Candidate(0.9, 0.5, taken=True, share=0.9, scored_kl=0.5 * by) for by in (1 / scatter, 1.0, scatter)]
    best = Candidate(0.2, 0.04, taken=True, share=0.2, scored_kl=0.04)
    assert pick([best, *trials, Candidate(0.2, 0.05), Candidate(0.98, 1e-6)], 0.01) == expected


def test_a_trial_counts_as_what_it_was_scored() -> None:
    """Not as what is predicted of it, which lies between its likelihood and its share."""
    best = Candidate(0.5, 0.02, taken=True, share=0.0, scored_kl=0.01)
    assert pick([best, Candidate(0.05, 0.03), Candidate(0.9, 0.005)], 0.01) == 2


def test_what_one_edit_is_off_by_is_expected_of_edits_like_it() -> None:
    """Two candidates that are told alike: one is like a trial that was scored otherwise, the other like none."""
    trial, alike, unlike = np.zeros(3), np.array([0.1, 0.0, 0.0]), np.array([9.0, 0.0, 0.0])
    told = Candidate(0.2, 0.05)
    for share, scored_kl in ((0.5, 0.05), (0.2, 0.2)):
        pool = [Candidate(0.2, 0.05, taken=True, share=share, scored_kl=scored_kl), told, told]
        assert pick(pool, 0.01, np.stack([trial, alike, unlike])) == 2
    pool = [Candidate(0.2, 0.05, taken=True, share=0.5, scored_kl=0.2), told, told]
    of_features = choice.predict(pool, np.stack([trial, alike, unlike]))
    without = choice.predict(pool)
    # A share of 0.3 more: 1 / 1.5 of it is what all near in likelihood are off by, the rest of it as far as is alike.
    like = math.exp(-(0.1**2) / (2 * 0.5**2)) / 1.1
    assert without.share_N == pytest.approx([0.4] * 3)
    assert of_features.share_N == pytest.approx([0.4 + 0.1 / 1.1, 0.4 + 0.1 * like, 0.4])
    assert np.log(of_features.kl_N / without.kl_N) == pytest.approx(math.log(4) / 3 * np.array([1 / 1.1, like, 0]))
    for name in ("share_deviation_N", "kl_deviation_N"):
        less = getattr(of_features, name) / getattr(without, name)
        assert less == pytest.approx([math.sqrt(1 - 1 / 1.1), math.sqrt(1 - like**2 * 1.1), 1])
    unlike_any = choice.predict(pool, np.eye(3) * 99)
    assert unlike_any.share_N[1:] == pytest.approx(without.share_N[1:])


def test_nodes_lie_where_scores_can() -> None:
    points_QN2 = choice.predict([Candidate(0.99, 2e-6), Candidate(0.01, 0.9)]).at_nodes(100.0)
    assert points_QN2[..., 0].min() == 0 and points_QN2[..., 0].max() == 1
    assert points_QN2[..., 1].min() == pytest.approx(1e-6) and np.isfinite(points_QN2).all()


def test_points_at_nodes_scatter_as_predicted() -> None:
    """Share and logarithm of KL each by its own deviation, independently of each other."""
    trials = [Candidate(0.5, 0.1, taken=True, share=share, scored_kl=0.1 * by) for share, by in ((0.4, 2), (0.6, 0.5))]
    predicted = choice.predict([*trials, Candidate(0.5, 0.1)])
    at_Q2 = predicted.at_nodes(1.0)[:, 2]
    off_Q2 = np.stack([at_Q2[:, 0] - predicted.share_N[2], np.log(at_Q2[:, 1] / predicted.kl_N[2])], axis=1)
    expected = np.diag([predicted.share_deviation_N[2] ** 2, predicted.kl_deviation_N[2] ** 2])
    np.testing.assert_allclose(off_Q2.T @ (choice._WEIGHT_Q[:, None] * off_Q2), expected, atol=1e-12)
    # Two trials, and two of the first deviations: sqrt((2 * 0.1² + 2 * 0.015²) / 4), and the same of ln 2 and 0.05.
    assert predicted.share_deviation_N[2] == pytest.approx(0.0715, abs=1e-4)
    assert predicted.kl_deviation_N[2] == pytest.approx(0.4914, abs=1e-4)


def test_nodes_have_the_moments_of_two_normals() -> None:
    places_Q2, weight_Q = choice._NODE_Q2, choice._WEIGHT_Q
    assert weight_Q.sum() == pytest.approx(1)
    for power, moments in ((1, (0, 0)), (2, (1, 1)), (4, (3, 3))):
        assert weight_Q @ places_Q2**power == pytest.approx(moments, abs=1e-12)
    assert weight_Q @ places_Q2.prod(axis=1) == pytest.approx(0, abs=1e-12)


def test_an_expectation_knows_how_far_off_it_may_be() -> None:
    """Both are told 0.25 at a KL at which a trial has 0.2; but of trials that were like one of them some had less."""
    sure = [Candidate(0.25, 0.5, taken=True, share=share, scored_kl=0.5) for share in (0.24, 0.25, 0.26)]
    unsure = [Candidate(0.9, 0.5, taken=True, share=share, scored_kl=0.5) for share in (0.0, 0.1, 0.4)]
    best = Candidate(0.2, 0.04, taken=True, share=0.2, scored_kl=0.04)
    assert pick([*sure, *unsure, best, Candidate(0.25, 0.05), Candidate(0.9, 0.05)], 0.01) == 8


def test_a_pass_takes_different_candidates() -> None:
    pool = [Candidate(0.0, 0.05), Candidate(0.01, 0.05), Candidate(0.6, 0.011)]
    first = pick(pool, 0.01)
    pool[first] = Candidate(pool[first].likelihood, pool[first].kl, taken=True)
    assert (first, pick(pool, 0.01)) == (0, 2)


def test_a_part_of_prompts_is_spread_over_all() -> None:
    assert spread(range(10), 4) == [0, 2, 5, 7] and spread([1, 2], 4) == [1, 2]
    assert [part(count, 5, 16, 32) for count in (3, 40, 100, 1000)] == [3, 16, 20, 32]
    assert screened_rows(100, 100) == 13 + 20
