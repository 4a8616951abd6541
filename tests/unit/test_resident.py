"""The whole model on one device, for every family: capture, edits and their undoing, scores, export and reload."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from heretic_ds.ablation import ROW_NORMS, Ablation, Edit, Profile, edit_weight
from heretic_ds.anatomy import find_anatomy
from heretic_ds.edits.weights import WeightEditor
from heretic_ds.errors import UserError
from heretic_ds.runner.engine import Runner, RunnerOptions
from heretic_ds.runner.rows import rows_of
from heretic_ds.runner.sizing.sizes import Sizes
from heretic_ds.scoring.kl import Divergence
from tests import families

LENGTHS = (9, 4, 6, 11, 5)
NEW_TOKENS = 6
EDIT = Edit(0.4, {"attention": Profile(1.1, 1.0, 0.4, 1.5), "mlp": Profile(0.9, 0.0, 0.3, 1.0)})


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    low, high = len(families.SPECIAL_TOKENS), len(families.VOCABULARY) - 5
    return [torch.randint(low, high, (length,), generator=generator).tolist() for length in LENGTHS]


def engine_for(model, batch_size=3, **options) -> Runner:
    return Runner(model, find_anatomy(model), families.tokenizer(), RunnerOptions(NEW_TOKENS, batch_size, **options))


def ablation_for(engine, row_norm="full", through_norm=False) -> Ablation:
    generator = torch.Generator().manual_seed(3)
    shape = (engine.anatomy.n_blocks + 1, engine.anatomy.width)
    directions_LD = torch.nn.functional.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)
    return Ablation(directions_LD, row_norm, through_norm)


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def alone(model, row):
    """One prompt by itself, without padding: hidden states at its last position, and first-token logits."""
    output = model(input_ids=torch.tensor([row]), output_hidden_states=True, use_cache=False)
    hidden = getattr(output, "hidden_states", None)
    return torch.stack([h[0, -1] for h in hidden]), output.logits[0, -1]


@pytest.fixture(scope="module", params=families.REQUIRED)
def family(request):
    model = families.build(request.param)
    return request.param, model, state(model)


def test_captured_means_equal_those_of_unpadded_prompts(family):
    _, model, _ = family
    captured_LD = engine_for(model).capture(prompts())
    expected_LD = torch.stack([alone(model, row)[0].double() for row in prompts()]).mean(0)
    error = (captured_LD - expected_LD).norm(dim=-1) / expected_LD.norm(dim=-1)
    assert error.max() < 1e-5


@pytest.mark.parametrize("row_norm", ROW_NORMS)
def test_apply_edits_the_writers_and_restore_is_bit_exact(family, row_norm):
    _, model, before = family
    engine = engine_for(model)
    ablation = ablation_for(engine, row_norm, through_norm=True)
    engine.prepare(ablation)
    originals = {w.weight: w.weight_DK(model).clone() for w in engine.anatomy.writers}
    engine.apply(EDIT)
    edited = 0
    for writer in engine.anatomy.writers:
        strength = EDIT.strength(writer.component, writer.block)
        v_D = ablation.writer_directions(writer.block, writer.norm_gain(model), EDIT.direction_index)
        expected_DK = edit_weight(originals[writer.weight].double(), v_D, strength, row_norm)
        assert torch.allclose(writer.weight_DK(model).double(), expected_DK, atol=1e-6)
        edited += strength != 0.0
    assert edited >= 2
    writers = {w.weight for w in engine.anatomy.writers}
    for name, tensor in model.state_dict().items():
        assert name in writers or torch.equal(tensor, before[name]), f"{name} is no writer and changed"
    engine.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_kl_equals_that_of_unpadded_prompts_and_leaves_the_weights(family):
    _, model, before = family
    engine = engine_for(model)
    engine.prepare(ablation_for(engine))
    reference = Divergence().begin(engine, prompts())
    original = [alone(model, row)[1].double().log_softmax(-1) for row in prompts()]
    engine.apply(EDIT)
    edited = [alone(model, row)[1].double().log_softmax(-1) for row in prompts()]
    expected = sum((p.exp() * (p - q)).sum() for p, q in zip(original, edited, strict=True)).item() / len(LENGTHS)
    engine.restore()
    measured, unedited = (reference.of([edit])[0] for edit in (EDIT, None))
    assert measured == pytest.approx(expected, rel=1e-4, abs=1e-6) and expected > 1e-4
    assert abs(unedited) < 1e-6
    engine.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("reuse", [False, True])
def test_kl_after_continuations_is_that_of_every_position_by_itself(reuse):
    """Also of rows that have fewer tokens than the longest continuation, and of a prompt that occurs twice."""
    model = families.build("llama").double()
    engine = engine_for(model, batch_size=2, prefill_reuse=reuse)
    engine.prepare(ablation_for(engine))
    given = [*prompts(), prompts()[1]]
    generator = torch.Generator().manual_seed(5)
    more = [torch.randint(8, 40, (count,), generator=generator).tolist() for count in (14, 0, 3, 2, 7, 1)]
    reference, edits = Divergence().begin(engine, given, more), [EDIT, None, Edit(None, EDIT.profiles)]

    def positions(row, rest):
        return torch.stack([alone(model, [*row, *rest[:count]])[1].log_softmax(-1) for count in range(len(rest) + 1)])

    def all_positions():
        return [positions(row, rest) for row, rest in zip(given, more, strict=True)]

    original, expected = all_positions(), []
    for edit in edits:
        engine.restore() if edit is None else engine.apply(edit)
        pairs = zip(original, all_positions(), strict=True)
        expected.append(sum((p.exp() * (p - q)).sum(-1).mean().item() for p, q in pairs) / len(given))
    engine.restore()
    assert min(expected[0], expected[2]) > 1e-4
    assert reference.of(edits) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert [reference.of([edit])[0] for edit in edits] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_reference_is_of_the_model_as_it_is_whatever_was_scored_last():
    """Of the original, or of the edit that was applied."""
    engine = engine_for(families.build("llama"))
    engine.prepare(ablation_for(engine))
    original, other = Divergence().begin(engine, prompts()), Edit(None, EDIT.profiles)

    def taken():
        return torch.cat([logp_KV for _, logp_KV in sorted(Divergence().begin(engine, prompts()).reference_KV.items())])

    expected = taken()
    original.of([EDIT])
    assert torch.equal(taken(), expected)
    engine.apply(EDIT)
    edited = taken()
    assert not torch.allclose(edited, expected, atol=1e-2)
    engine.generate(prompts(), [other])
    assert torch.equal(taken(), edited)


def test_a_trial_edits_each_weight_once(monkeypatch):
    """Its answers are those of the weights that its divergence was taken on."""
    engine = engine_for(families.build("llama"))
    engine.prepare(ablation_for(engine))
    reference, edited = Divergence().begin(engine, prompts()), []
    engine.generate(prompts(), [None])
    edit_weight = WeightEditor._edit
    monkeypatch.setattr(WeightEditor, "_edit", lambda *given: edited.append(given[1].weight) or edit_weight(*given))
    reference.of([EDIT])
    engine.generate(prompts(), [EDIT])
    assert sorted(edited) == sorted({writer.weight for writer in engine.anatomy.writers})


def test_batches_may_hold_rows_of_as_many_trials_as_a_pass(monkeypatch):
    """Whatever was asked for first: the original model's answers and distributions, before any trial."""
    engine, trials, find = engine_for(families.build("llama"), batch_size=0), {}, Sizes.find

    def noted(sizes, rows, phase, work, count=1, *more, **named):
        trials[phase] = count
        find(sizes, rows, phase, work, count, *more, **named)

    monkeypatch.setattr(Sizes, "find", noted)
    engine.prepare(ablation_for(engine))
    engine.generate(prompts(), [None])
    Divergence().begin(engine, prompts())
    assert trials == {"generate": engine.max_edits_per_pass, "kl": engine.max_edits_per_pass}
    assert engine.max_edits_per_pass > 1


@torch.no_grad()
def greedy_alone(model, row, ends, new_tokens=NEW_TOKENS):
    """Greedy answer to one prompt by whole forward passes without padding or cache, with its smallest margin."""
    answer, margin = [], float("inf")
    while len(answer) < new_tokens:
        top = model(input_ids=torch.tensor([row + answer]), use_cache=False).logits[0, -1].topk(2)
        margin = min(margin, (top.values[0] - top.values[1]).item())
        if top.indices[0].item() in ends:
            break
        answer.append(top.indices[0].item())
    return answer, margin


def test_generated_answers_equal_uncached_unpadded_ones(family):
    name, model, _ = family
    engine = engine_for(model, batch_size=4)
    engine.prepare(ablation_for(engine))
    compared = 0
    for edit in (None, EDIT):
        answers = engine.generate(prompts(), [edit])[0]
        engine.apply(edit) if edit else engine.restore()
        for row, answer in zip(prompts(), answers, strict=True):
            expected, margin = greedy_alone(model, row, {families.EOS})
            if margin > 1e-4:
                assert answer == expected, name
                compared += 1
    engine.restore()
    assert compared >= len(LENGTHS)


def test_export_and_reload_gives_the_edited_model(family, tmp_path):
    name, model, _ = family
    engine = engine_for(model)
    engine.prepare(ablation_for(engine))
    engine.apply(EDIT)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    edited = model.state_dict()
    reloaded = again.state_dict()
    engine_tensors = {key: value.clone() for key, value in edited.items()}
    engine.restore()
    assert engine_tensors.keys() == reloaded.keys(), name
    assert all(torch.equal(tensor, reloaded[key]) for key, tensor in engine_tensors.items()), name


@pytest.mark.parametrize("name", families.REQUIRED)
def test_bfloat16_edits_stay_within_twice_the_rounding_of_the_product(name):
    """Outputs of every edited writer against the float32 result, compared with the plain product's own rounding."""
    model = families.build(name, dtype=torch.bfloat16)
    before = state(model)
    engine = engine_for(model)
    ablation = ablation_for(engine)
    engine.prepare(ablation)
    originals = {w.weight: w.weight_DK(model).clone() for w in engine.anatomy.writers}
    engine.apply(EDIT)
    for writer in engine.anatomy.writers:
        original_DK = originals[writer.weight]
        x_KB = torch.randn(original_DK.shape[-1], 256, generator=torch.Generator().manual_seed(0)).bfloat16()
        strength = EDIT.strength(writer.component, writer.block)
        v_D = ablation.writer_directions(writer.block, None, EDIT.direction_index)
        exact_DB = edit_weight(original_DK.float(), v_D, strength, "full") @ x_KB.float()
        rounding = ((original_DK @ x_KB).float() - original_DK.float() @ x_KB.float()).norm() / exact_DB.norm()
        error = ((writer.weight_DK(model) @ x_KB).float() - exact_DB).norm() / exact_DB.norm()
        assert error <= 2 * rounding + 1e-7, writer.weight
    engine.restore()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_batch_that_runs_out_of_memory_is_halved_and_the_numbers_stay():
    model = families.build("llama")
    whole = engine_for(model, batch_size=5)
    expected_LD, expected_answers = whole.capture(prompts()), whole.generate(prompts(), [None])

    def full(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > 2:
            raise torch.OutOfMemoryError("pretended")

    handle = model.get_submodule("model").register_forward_pre_hook(full, with_kwargs=True)
    starved = engine_for(model, batch_size=5)
    assert torch.allclose(starved.capture(prompts()), expected_LD, atol=1e-6)
    assert starved.generate(prompts(), [None]) == expected_answers
    assert starved.batch_sizes["capture"] == 2 and starved.batch_sizes["generate"] == 2
    handle.remove()


@pytest.mark.parametrize("batch_size", [4, 0])
def test_a_prompt_that_never_fits_is_a_clear_error(batch_size):
    model = families.build("llama")

    def full(module, args):
        raise torch.OutOfMemoryError("pretended")

    model.get_submodule("model").register_forward_pre_hook(full)
    with pytest.raises(UserError, match="a single prompt does not fit in memory while capture runs"):
        engine_for(model, batch_size=batch_size).capture(prompts())


def test_batch_sizes_are_measured_and_kept():
    model = families.build("llama")
    engine = engine_for(model, batch_size=0)
    engine.capture(prompts())
    engine.generate(prompts(), [None])
    assert set(engine.batch_sizes) == {"capture", "generate"}
    assert all(1 <= size <= len(LENGTHS) for size in engine.batch_sizes.values())
    resumed = engine_for(model, batch_size=0)
    resumed.batch_sizes.update(capture=2, generate=3)
    resumed.capture(prompts())
    assert resumed.batch_sizes == {"capture": 2, "generate": 3}


def test_memory_is_told_from_rows_as_they_end_and_speed_from_what_is_computed(monkeypatch):
    asked, measured = [], []

    def working_memory(run, most, device):
        run(2)
        return SimpleNamespace(of=lambda rows: 100 * rows, rows_within=lambda free: 3)

    def measure_batch_size(run, most, *more):
        run(most)
        measured.append(most)
        return most

    monkeypatch.setattr("heretic_ds.runner.sizing.sizes.working_memory", working_memory)
    monkeypatch.setattr("heretic_ds.runner.sizing.sizes.measure_batch_size", measure_batch_size)
    options = RunnerOptions(64, prefill_reuse=True)
    engine = Runner(model := families.build("llama"), find_anatomy(model), families.tokenizer(), options)

    def work(batch):
        asked.append([len(row) for row in batch])

    engine._batches.measured.find(rows_of(prompts()), "kl", work)
    engine._batches.measured.find(rows_of(prompts()), "generate", work, fitting=work)
    # Of an answer 2 tokens are decoded for the memory and 8 for the speed.
    assert asked == [[11, 9], [6, 4, 3], [11 + 62, 9 + 62], [1, 1, 1]]
    assert measured == [3, 3] and engine.batch_sizes == {"kl": 3, "generate": 3}
    assert engine.batch_bytes == {"kl": 300, "generate": 300}


def test_decided_rows_stop_early_and_the_others_are_untouched():
    model = families.build("llama")
    engine = engine_for(model, batch_size=5)
    plain = engine.generate(prompts(), [None])[0]
    stop = {tuple(plain[0][:4]), tuple(plain[3][:4])}
    stopped = engine.generate(prompts(), [None], lambda answers: [tuple(a[:4]) in stop for a in answers])[0]
    for full_answer, answer in zip(plain, stopped, strict=True):
        cut = tuple(full_answer[:4]) in stop
        assert answer == (full_answer[:4] if cut else full_answer)
    assert any(len(a) == 4 for a in stopped)
