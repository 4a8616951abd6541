"""Passes that begin where edits begin: the numbers are those of whole passes, and less is computed."""

from __future__ import annotations

import logging

import pytest
import torch

from heretic_ds.ablation import ROW_NORMS, Edit, Profile
from heretic_ds.anatomy import find_anatomy
from heretic_ds.runner import graphs, reuse
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.forward import rope_depends_on_length
from heretic_ds.runner.kept import Kept
from heretic_ds.runner.parity import is_rounding
from heretic_ds.runner.rows import rows_of
from heretic_ds.scoring.kl import Divergence
from tests import families
from tests.recorded_graphs import Recorder
from tests.unit.test_resident import ablation_for, engine_for

LAYERS = 4
OWN = (9, 4, 6, 11, 5, 4)
STATEFUL = {"qwen3_next", "qwen3_5", "lfm2"}
"""Families whose caches hold more than keys and values."""


def prompts(shared=5, lengths=OWN, seed=7):
    generator = torch.Generator().manual_seed(seed)
    low, high = len(families.SPECIAL_TOKENS), len(families.VOCABULARY) - 5
    drawn = torch.randint(low, high, (shared + sum(lengths),), generator=generator).tolist()
    begin, rest = drawn[:shared], iter(drawn[shared:])
    return [begin + [next(rest) for _ in range(length)] for length in lengths]


def edit(first, index=0.4, strength=1.2):
    """An edit that changes nothing before block `first`."""
    tent = Profile(strength, float(LAYERS - 1), 0.4, LAYERS - 1 - first + 0.5)
    return Edit(index, {"attention": tent, "mlp": Profile(0.9, float(LAYERS - 1), 0.3, 0.5)})


def stop_some(answers):
    """Ends about half of the rows, by their first token alone."""
    return [answer[0] % 2 == 0 for answer in answers]


EDITS = [edit(2), edit(1, None, 0.8), edit(3, 1.5)]


@pytest.fixture(autouse=True)
def few_tokens_are_worth_a_pass(monkeypatch):
    monkeypatch.setattr(reuse, "PASS_IN_TOKENS", 1)


def built(family="llama", window=64, **options):
    """A model whose layers with a window see so much, if it has any."""
    model = families.build(family, layers=LAYERS, **options)
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "sliding_window", None):
        config.sliding_window = window
    return model


def engine_of(model, reuse=True, row_norm="full", through_norm=False, **options):
    engine = engine_for(model, batch_size=4, prefill_reuse=reuse, **options)
    engine.prepare(ablation_for(engine, row_norm, through_norm))
    return engine


def scores(engine, rows, passes):
    """KL divergences and answers of the edits of several passes."""
    reference = Divergence().begin(engine, rows)
    kl = [kl for edits in passes for kl in reference.of(edits)]
    answers = [of_edit for edits in passes for of_edit in engine.generate(rows, edits, stop_some)]
    engine.restore()  # for other engines of the same model
    return kl, answers


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-6)
    assert found[1] == expected[1]


def kept_of(engine):
    return list(engine._forward._kept.values())


@pytest.mark.parametrize("family", families.REQUIRED)
def test_scores_are_those_of_whole_passes(family):
    model, rows = built(family), prompts()
    passes = [[one] for one in EDITS]
    engine = engine_of(model)
    if engine.max_edits_per_pass > 1:
        passes += [EDITS, [EDITS[2], None], [EDITS[0]] * 2]
    expected = scores(engine_of(model, reuse=False), rows, passes)
    assert_same(scores(engine, rows, passes), expected)
    assert len(set(expected[0])) > 2  # edits make a difference
    scored, answered = kept_of(engine)
    assert scored.boundaries == (1, 2, 3)
    if family in STATEFUL:
        assert answered is None and not scored.shared
    else:
        assert answered.boundaries == (1, 2, 3) and scored.shared
        assert len(answered.shared) == 5


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("phases", [("kl", "generate"), ("generate", "kl")])
def test_what_is_kept_is_the_originals_though_weights_are_edited_when_it_is_learned(phases, family):
    """Trials one at a time: the first phase leaves the edit of the first one in the weights that the second learns."""
    model, rows = built(family), prompts()
    edits, found = (edit(1, None, 3.0), edit(3)), []
    for reused in (False, True):
        engine, scored = engine_of(model, reused, "none"), {"kl": [], "generate": []}
        reference = Divergence().begin(engine, rows)
        for one in edits:
            for phase in phases:
                scored[phase] += reference.of([one]) if phase == "kl" else engine.generate(rows, [one])
        found.append((scored["kl"], scored["generate"]))
        engine.restore()
    assert_same(found[1], found[0])
    states = engine._forward._kept
    original = engine_of(model)
    Divergence().begin(original, rows).of([edits[1]])
    original.generate(rows, [edits[1]])
    original.restore()
    for key, expected in original._forward._kept.items():
        for boundary in (1, 2, 3):
            found_ND, expected_ND = (each.hidden_ND[boundary] for each in (states[key], expected))
            assert torch.allclose(found_ND, expected_ND, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row_norm", ROW_NORMS)
@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
def test_every_form_of_edit(family, row_norm):
    model, rows, passes = built(family), prompts(), [EDITS[:2], EDITS[2:]]
    expected = scores(engine_of(model, False, row_norm, True), rows, passes)
    assert_same(scores(engine_of(model, True, row_norm, True), rows, passes), expected)


def test_answers_by_replayed_steps(monkeypatch):
    recorder, model, rows = Recorder(), built(), prompts()
    expected = scores(engine_of(model, reuse=False), rows, [EDITS, EDITS[:1]])
    monkeypatch.setattr(graphs, "makers_for", lambda device: lambda: recorder)
    assert_same(scores(engine_of(model, cuda_graphs=True), rows, [EDITS, EDITS[:1]]), expected)
    assert recorder.replayed > 5


class Counted:
    """Tokens that each block of a model computes."""

    def __init__(self, model):
        self.of = [0] * LAYERS
        for index, block in enumerate(model.get_submodule(find_anatomy(model).blocks).children()):
            block.mlp.register_forward_pre_hook(lambda module, args, index=index: self._add(index, args[0]))

    def _add(self, index, hidden_BSD):
        self.of[index] += hidden_BSD.shape[0] * hidden_BSD.shape[1]

    def take(self):
        taken, self.of = self.of, [0] * LAYERS
        return taken


def test_blocks_before_an_edit_and_shared_tokens_are_left_out():
    model, rows = built(), prompts(lengths=(6, 6, 6, 6))
    engine, counted = engine_of(model), Counted(model)
    reference = Divergence().begin(engine, rows)
    reference.of(EDITS[:1])
    counted.take()
    reference.of([EDITS[0]])
    assert counted.take() == [0, 0, 5 + 4 * 6, 5 + 4 * 6]
    reference.of(EDITS[:2])  # the batches of four rows mix both trials
    assert counted.take() == [0, 2 * (5 + 4 * 6)] + [2 * (5 + 4 * 6)] * 2
    engine.generate(rows, [EDITS[2]])
    counted.take()
    steps = len(max(engine.generate(rows, [EDITS[2]])[0], key=len))
    assert counted.take()[3] >= 5 + 4 * 6 + steps - 1
    assert reference.of([None]) == pytest.approx([0], abs=1e-7)
    assert counted.take() == [4 * 11] * LAYERS  # the original is not what is scored with less


def test_really_edited_weights_are_scored_from_the_first_block():
    model, rows = built(), prompts()
    engine, counted = engine_of(model), Counted(model)
    reference = Divergence().begin(engine, rows)
    expected = reference.of([EDITS[0]])
    engine.apply(EDITS[0])
    counted.take()
    assert reference.of([None]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert counted.take()[0] == counted.of[0] + sum(map(len, rows)) + padding_of(rows)
    # Edits asked for while another is applied take its place, on the original's states.
    expected = Divergence().begin(engine_of(built(), reuse=False), rows).of([EDITS[1]])
    assert reference.of([EDITS[1]]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def padding_of(rows):
    in_order = sorted(map(len, rows), reverse=True)
    return sum(max(batch) * len(batch) - sum(batch) for batch in (in_order[:4], in_order[4:]))


@pytest.mark.parametrize("reader", [2, 3])
def test_a_model_that_carries_something_past_its_blocks_is_found_out(reader, caplog):
    """A later block reads what the first has noted."""
    model, rows = built(), prompts()
    noted, layers = [], model.model.layers
    layers[0].register_forward_hook(lambda module, args, output: noted.append(output))
    layers[reader].register_forward_pre_hook(lambda module, args: (args[0] + 0.5 * noted[-1], *args[1:]))
    expected = scores(engine_of(model, reuse=False), rows, [EDITS])
    engine = engine_of(model)
    with caplog.at_level(logging.INFO):
        assert_same(scores(engine, rows, [EDITS]), expected)
    assert "blocks before an edit are computed in every pass: a trial pass" in caplog.text
    assert [(states.boundaries, len(states.shared)) for states in kept_of(engine)] == [((), 5)] * 2


def test_a_model_whose_blocks_give_each_other_more_than_the_stream_gets_whole_passes(caplog):
    model, rows = built(), prompts()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: (args[0][0] if isinstance(args[0], tuple) else args[0],))
        layer.register_forward_hook(lambda module, args, output: (output, output[:, :, :1]))
    model.model.norm.register_forward_pre_hook(lambda module, args: (args[0][0],))
    engine = engine_of(model)
    with caplog.at_level(logging.INFO):
        assert_same(scores(engine, rows, [EDITS]), scores(engine_of(model, reuse=False), rows, [EDITS]))
    assert "NotImplementedError: a block gives more than the residual stream to the next" in caplog.text


def test_a_model_whose_numbers_depend_on_the_longest_row_gets_whole_passes():
    config = families.build("phi3").config
    assert not rope_depends_on_length(config)
    config.rope_parameters = {"full_attention": {"rope_type": "longrope"}}
    assert rope_depends_on_length(config)
    assert not is_rounding(0.2, rounding=0.1) and is_rounding(0.02, rounding=0.01)  # 0.1 is none


def test_memory_that_is_lacking_before_anything_is_kept(caplog):
    model, rows = built(), prompts()
    expected = scores(engine_of(model, reuse=False), rows, [EDITS])
    engine = engine_of(model)
    reference = Divergence().begin(engine, rows)

    def full(*arguments):
        raise torch.OutOfMemoryError("pretended")

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(reuse, "Kept", full)
        assert reference.of(EDITS) == pytest.approx(expected[0], rel=1e-4, abs=1e-6)
    assert "the blocks before an edit are computed in every pass: memory ran out" in caplog.text
    assert "the tokens that all prompts begin with are computed in every pass: memory ran out" in caplog.text
    assert engine.batch_sizes["kl"] == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    """In bfloat16 scores of single passes are no closer to each other than rounding lets them be."""
    model, rows = built(dtype=dtype), prompts()
    expected, found = (scores(engine_of(model, reuse=reuse), rows, [EDITS]) for reuse in (False, True))
    if dtype == torch.float64:
        assert_same(found, expected)
    assert found[0] == pytest.approx(expected[0], rel=0.3)


def test_a_model_whose_rows_cannot_attend_to_kept_keys_is_found_out(caplog, monkeypatch):
    model, rows = built(), prompts()
    forward = model.forward

    def without_a_past(*args, past_key_values=None, **kwargs):
        if past_key_values is not None and past_key_values.get_seq_length() == 5 and kwargs["input_ids"].shape[1] > 1:
            raise NotImplementedError("one prompt at a time")
        return forward(*args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(model, "forward", without_a_past)
    expected = scores(engine_of(model, reuse=False), rows, [EDITS])
    engine = engine_of(model)
    with caplog.at_level(logging.INFO):
        assert_same(scores(engine, rows, [EDITS]), expected)
    assert "begin with are computed in every pass: a trial pass failed (NotImplementedError: one prompt" in caplog.text
    assert [states.boundaries for states in kept_of(engine)] == [(1, 2, 3)] * 2


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize(("window", "shared"), [(10, 0), (36, 0), (37, 6), (64, 6)])
def test_rows_wider_than_a_window_see_what_they_would(family, window, shared):
    """A window counts the padding between shared tokens and a row's own: nothing is shared where that matters."""
    model, rows = built(family, window), prompts(shared=6, lengths=(3, 2, 30, 2, 20, 9, 1, 2))
    passes, engine = [EDITS, EDITS[:1]], engine_of(model)
    expected = scores(engine_of(model, reuse=False), rows, passes)
    assert_same(scores(engine, rows, passes), expected)
    assert [(states.boundaries, len(states.shared)) for states in kept_of(engine)] == [((1, 2, 3), shared)] * 2


def test_memory_is_given_back_before_batches_get_smaller():
    model, rows = built(), prompts()
    engine = engine_of(model)
    expected = scores(engine, rows, [EDITS])
    assert any(states.bytes for states in kept_of(engine))
    attempts = []

    def full(module, args):
        attempts.append(None)
        if len(attempts) == 2:
            raise torch.OutOfMemoryError("pretended")

    handle = model.model.layers[3].register_forward_pre_hook(full)
    found = scores(engine, rows, [EDITS])
    handle.remove()
    assert_same(found, expected)
    assert not kept_of(engine) and engine.batch_sizes["generate"] == 4
    assert not engine._forward.wants(rows, answers=True)


def test_memory_that_runs_out_is_asked_back_from_all_who_can_spare_some(monkeypatch):
    """Not only from the first who has any: what replayed steps keep goes too."""
    monkeypatch.setattr(graphs, "makers_for", lambda device: Recorder)
    model, rows = built(), prompts()
    engine = engine_of(model, cuda_graphs=True)
    expected = scores(engine, rows, [EDITS])
    assert any(states.bytes for states in kept_of(engine)) and engine._decoder._graphs is not None
    reference, failures = Divergence().begin(engine, rows), [torch.OutOfMemoryError("so")]

    def full(module, args):
        if failures:
            raise failures.pop()

    handle = model.model.layers[3].register_forward_pre_hook(full)
    assert reference.of(EDITS) == pytest.approx(expected[0], rel=1e-4, abs=1e-6)
    handle.remove()
    assert not failures and not kept_of(engine) and engine._decoder._graphs is None
    assert engine.batch_sizes["kl"] == 4


def test_memory_that_learning_lacks_leaves_whole_passes(caplog):
    caplog.set_level(logging.INFO, "heretic_ds")
    model, rows = built(), prompts()
    expected = scores(engine_of(model, reuse=False), rows, [EDITS])
    engine = engine_of(model)
    reference = Divergence().begin(engine, rows)

    put = Kept.put

    def full(states, *more):
        if len(states._start) == len(rows):  # else they are those of a trial
            raise torch.OutOfMemoryError("pretended")
        put(states, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kept, "put", full)
        assert reference.of(EDITS) == pytest.approx(expected[0], rel=1e-4, abs=1e-6)
    assert not kept_of(engine) and engine.batch_sizes["kl"] == 4
    assert caplog.text.count("passes over prompts go through the whole model: memory ran out") == 1
    assert engine.generate(rows, EDITS, stop_some) == expected[1]


def test_a_model_that_cannot_be_looked_into_gets_whole_passes(monkeypatch, caplog):
    model, rows = built(), prompts()
    expected = scores(engine_of(model, reuse=False), rows, [EDITS])

    def opaque(states, rows, *more):
        raise NotImplementedError("no cache of this kind")

    monkeypatch.setattr(Kept, "put", opaque)
    engine = engine_of(model)
    with caplog.at_level(logging.INFO):
        assert_same(scores(engine, rows, [EDITS]), expected)
    for what in ("the blocks before an edit", "the tokens that all prompts begin with"):
        reason = "a trial pass failed (NotImplementedError: no cache of this kind)"
        assert f"{what} are computed in every pass: {reason}" in caplog.text
    assert kept_of(engine) == [None, None]  # and are not tried again


def test_lent_memory_is_taken_again():
    model, rows = built(), prompts()
    engine = engine_of(model)
    expected = scores(engine, rows, [EDITS])
    assert engine._forward in engine._batches.evictable
    for spare in engine._batches.evictable:
        spare.rest()
    assert not kept_of(engine)
    assert_same(scores(engine, rows, [EDITS]), expected)
    assert len(kept_of(engine)) == 2


def test_no_more_than_six_sets_are_kept():
    model, engine = built(), engine_of(built())
    for seed in range(5):
        rows = prompts(seed=seed)
        assert_same(scores(engine, rows, [EDITS]), scores(engine_of(model, reuse=False), rows, [EDITS]))
        assert len(kept_of(engine)) == min(6, 2 + 2 * seed)


def test_states_take_no_more_memory_than_allowed(monkeypatch):
    model, rows = built(), prompts()
    expected = scores(engine_of(model, reuse=False), rows, [EDITS])
    monkeypatch.setattr(reuse, "_SHARE_OF_WEIGHTS", 0.0)
    seen = set()
    for most in (0, 10_000, 20_000, 30_000, 10**9):
        monkeypatch.setattr(reuse, "_LEAST_BYTES", most)
        engine = engine_of(model)
        assert_same(scores(engine, rows, [EDITS]), expected)
        assert all(states.bytes <= most for states in kept_of(engine))
        seen.add(kept_of(engine)[1].boundaries)
    assert seen >= {(), (2,), (1, 2, 3)}


@pytest.mark.parametrize("placement", ["replicated", "tensor_parallel"])
def test_the_setting_reaches_the_engine(placement, evaluated):
    for words, wants in ((["generation.prefill_reuse=false"], False), ([], True)):
        engine = evaluated(f"evaluate={placement}", *words)
        assert engine._forward.wants([[1, 2], [1, 3]], answers=True) is wants
        engine.close()


def test_ranks_of_one_replica_decide_alike():
    """The first rank's word counts."""
    told = []

    class Partners(Comm):
        def alike(self, value):  # numbers are equal on all ranks here; but on the first one no trial pass went well
            told.append(value)
            return False if isinstance(value, bool) else value

    model, rows = built(), prompts()
    forward = reuse.Reuse(model, find_anatomy(model), families.PAD, True, Partners())
    forward.learn(rows, True, lambda work: work(rows_of(rows)))
    assert told == [True, True, True]  # both ways together, and each by itself, went well here
    assert list(forward._kept.values()) == [None]
