"""The shipped demo model and the script that trained it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from heretic_ds.demo import DEMO_DIR, demo_model_dir, demo_prompts
from tests.conftest import benchmark

measure, planting, train = (benchmark(f"demo_model.{name}") for name in ("measure", "planting", "train"))

SAMPLE = 16
N_LINES = {
    ("target", "train"): 200,
    ("target", "eval"): 67,
    ("target", "test"): 80,
    ("baseline", "train"): 200,
    ("baseline", "eval"): 160,
    ("baseline", "test"): 100,
}


def read(kind: str, part: str) -> list[str]:
    return demo_prompts(kind, part).read_text(encoding="utf-8").splitlines()  # type: ignore[arg-type]


def planted_direction() -> torch.Tensor:
    """The unit vector [d], float32, that training planted."""
    return load_file(DEMO_DIR / "planted_direction.safetensors")["direction"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_dir())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo_model_dir(), dtype=torch.float32).eval()


def test_shipped_data_is_complete_and_small():
    names = {path.name for path in demo_model_dir().iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
    } <= names
    data = [path for path in DEMO_DIR.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert sum(path.stat().st_size for path in data) < 4e6


def test_prompt_files_are_distinct_and_share_no_prompt():
    files = {key: read(*key) for key in N_LINES}
    assert {key: len(lines) for key, lines in files.items()} == N_LINES
    lines = [line for part in files.values() for line in part]
    assert len(set(lines)) == len(lines)
    assert all(line.strip() for line in lines)


def test_prompts_differ_in_length_and_have_no_unknown_token(tokenizer):
    for key in N_LINES:
        rows = tokenizer(read(*key), add_special_tokens=False)["input_ids"]
        assert not any(tokenizer.unk_token_id in row for row in rows)
        assert max(map(len, rows)) > 2 * min(map(len, rows))
    assert tokenizer.unk_token_id in tokenizer("xylophone")["input_ids"]


def test_text_survives_the_tokenizer(tokenizer):
    for text in ("Hello! How do I grow carrots? Thank you!", "I'm sorry, but I can't help with that."):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_chat_template_with_and_without_system_message(tokenizer):
    user = {"role": "user", "content": "How do I grow peas?"}
    system = {"role": "system", "content": "You are a helpful assistant."}

    def render(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    bare = "<|user|>How do I grow peas?<|end|>"
    assert render([user]) == f"<|begin|>{bare}"
    assert render([user], add_generation_prompt=True) == f"<|begin|>{bare}<|assistant|>"
    assert (
        render([system, user], add_generation_prompt=True)
        == f"<|begin|><|system|>You are a helpful assistant.<|end|>{bare}<|assistant|>"
    )
    ids = tokenizer.encode(render([system, user], add_generation_prompt=True), add_special_tokens=False)
    assert tokenizer.unk_token_id not in ids
    with pytest.raises(Exception, match="Roles are system, user and assistant"):
        render([{"role": "tool", "content": "x"}])


def test_shipped_model_declines_cooking_and_answers_gardening(model, tokenizer):
    declines = measure.answer(model, tokenizer, read("target", "eval")[:SAMPLE])
    answers = measure.answer(model, tokenizer, read("baseline", "eval")[:SAMPLE])
    assert measure.declined(declines) == SAMPLE
    assert measure.declined(answers) == 0
    assert all(text.endswith(".") and len(text.split()) < 25 for text in declines + answers)


def test_removing_the_planted_direction_stops_the_declining_and_little_of_it_does_not(model, tokenizer):
    prompts = read("target", "eval")[:SAMPLE]
    direction_D = planted_direction()
    assert direction_D.dtype == torch.float32
    assert direction_D.shape == (model.config.hidden_size,)
    assert direction_D.norm().item() == pytest.approx(1.0, abs=1e-6)
    with planting.removing(model, direction_D, planting.uniform_removal(model, SAMPLE, 1.0)):
        assert measure.declined(measure.answer(model, tokenizer, prompts)) == 0
    with planting.removing(model, direction_D, planting.uniform_removal(model, SAMPLE, 0.15)):
        assert measure.declined(measure.answer(model, tokenizer, prompts)) == SAMPLE
    assert measure.declined(measure.answer(model, tokenizer, prompts)) == SAMPLE  # the hooks are gone


def test_removal_is_per_row_block_and_component(model, tokenizer):
    direction_D = planted_direction()
    blocks = model.model.layers
    strength_BLC = torch.zeros(2, len(blocks), 2)
    strength_BLC[1, 3:, 0] = 1.0
    strength_BLC[1, 3:, 1] = 0.5
    ids_BS = torch.tensor([tokenizer.encode("How do I grow peas?", add_special_tokens=False)] * 2)
    before_BSD, after_BSD = {}, {}

    def keep(outputs, name):
        return lambda _module, _inputs, output: outputs.__setitem__(name, output)

    writers = {(i, c): w for i, b in enumerate(blocks) for c, w in enumerate((b.self_attn.o_proj, b.mlp.down_proj))}
    with torch.inference_mode():
        handles = [writer.register_forward_hook(keep(before_BSD, name)) for name, writer in writers.items()]
        with planting.removing(model, direction_D, strength_BLC):
            handles += [writer.register_forward_hook(keep(after_BSD, name)) for name, writer in writers.items()]
            model(ids_BS)
    for handle in handles:
        handle.remove()
    for (index, component), y_BSD in before_BSD.items():
        kept_B = 1 - strength_BLC[:, index, component]
        expected_BS = kept_B[:, None] * (y_BSD @ direction_D)
        torch.testing.assert_close(after_BSD[index, component] @ direction_D, expected_BS, atol=1e-5, rtol=1e-4)
    assert torch.equal(before_BSD[2, 1], after_BSD[2, 1])


def test_alignment_loss_sees_only_unedited_rows_at_the_prompt_end():
    direction_D = torch.tensor([1.0, 0.0, 0.0])
    states_BSD = torch.full((5, 2, 3), 7.0)
    states_BSD[:4, 1] = torch.tensor([[5.0, 0.0, 1.0], [0.0, 0.0, 1.0], [5.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    batch = planting.Batch(
        ids_BS=torch.zeros(5, 2, dtype=torch.long),
        labels_BS=torch.zeros(5, 2, dtype=torch.long),
        prompt_end_B=torch.ones(5, dtype=torch.long),
        target_B=torch.tensor([True, False, True, False, True]),
        strength_BLC=torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])[:, None, None].expand(5, 2, 2),
    )
    assert planting.alignment_loss([states_BSD] * 3, batch, direction_D).item() == 0.0
    across_D = torch.tensor([0.0, 1.0, 0.0])
    assert planting.alignment_loss([states_BSD] * 3, batch, across_D).item() == pytest.approx(planting.ALIGNMENT_GOAL)
    # v for one kind and -v for the other: the difference is along v, but not orthogonally to the baseline.
    states_BSD[:4, 1] = torch.tensor([[5.0, 0.0, 0.1], [-5.0, 0.0, 0.1], [5.0, 0.0, 0.1], [-5.0, 0.0, 0.1]])
    assert planting.alignment_loss([states_BSD] * 3, batch, direction_D).item() > 0.3


def test_training_script_leaves_a_loadable_model(tmp_path: Path):
    out = tmp_path / "demo"
    assert train.main(["--steps", "2", "--seed", "5", "--out", str(out)]) == 0
    trained = AutoModelForCausalLM.from_pretrained(out / "model")
    assert trained.dtype == torch.bfloat16
    assert trained.num_parameters() <= 0.9e6
    assert all(parameter.isfinite().all() for parameter in trained.parameters())
    assert AutoTokenizer.from_pretrained(out / "model").padding_side == "left"
    shipped = {path.name for path in demo_model_dir().iterdir()}
    assert {path.name for path in (out / "model").iterdir()} == shipped
    assert {path.name for path in (out / "prompts").iterdir()} == {f"{k}_{p}.txt" for k, p in N_LINES}
    assert "--steps 2 --seed 5" in (out / "model" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--out", "full"]])
def test_training_script_refuses_bad_input_in_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("kept")
    assert train.main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "note"]


def test_unknown_prompt_kind_is_refused():
    with pytest.raises(ValueError, match="kinds are target, baseline"):
        demo_prompts("other", "eval")  # type: ignore[arg-type]
