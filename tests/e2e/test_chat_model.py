"""The whole job on a model with the habits of real chat models: see ``tests/chat_model.py`` for what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.chat_model import LAYERS, TURN_END, build_chat_model
from tests.e2e import plain
from tests.e2e.conftest import Heretic, Material, read_results

SYSTEM = "You are a gardener."
CLOSED = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module", params=[True, False], ids=["template_opens_thinking", "model_is_asked_plainly"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_chat_model(tmp_path_factory.mktemp("chat") / "gardener", opens_thinking=request.param)
    (folder / "LICENSE").write_text("Free for all.\n")
    return folder


@torch.no_grad()
def first_token_logp(folder: Path, prompts: list[str], prefix: str, dtype: torch.dtype) -> torch.Tensor:
    """Log-probabilities [N, V] of the first answer token, the system prompt put before the user's message."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)
    rows = []
    for prompt in prompts:
        turn = [{"role": "user", "content": f"{SYSTEM}\n\n{prompt}"}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) + prefix
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        rows.append(model(ids).logits[0, -1].float().log_softmax(-1))
    return torch.stack(rows)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def test_the_whole_job(model: Path, heretic: Heretic, material: Material, tmp_path: Path) -> None:
    words = [
        "prompts.response_prefix=auto", f"prompts.system='{SYSTEM}'", "scoring.markers=[a,o]", "search.trials=5",
        "run.dir=run", "generation.batch_size=0",
    ]  # fmt: skip
    outcome = heretic(*material.words(model, *words))
    assert outcome.status == 0, outcome.err
    assert outcome.err == ""
    assert "takes no system prompt" in outcome.out and "no padding token" in outcome.out
    results = read_results("run")
    assert len(results["trials"]) == 5 and results["selected"] is not None

    prefix = json.loads((tmp_path / "run" / "measured.json").read_text())["response_prefix"]
    opens = "OPENS_THINKING = True" in (model / "chat_template.jinja").read_text()
    assert prefix == (CLOSED.removeprefix("<think>\n") if opens else "")

    exported = tmp_path / "run" / "model"
    before, after = tensors_of(model), tensors_of(exported)
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    writers = {
        f"model.layers.{i}.{name}.weight" for i in range(LAYERS) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert changed and changed <= writers
    for name in ("chat_template.jinja", "tokenizer.json", "generation_config.json", "LICENSE"):
        assert (exported / name).read_bytes() == (model / name).read_bytes(), name
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.eos_token == TURN_END and tokenizer.pad_token is None
    reloaded = AutoModelForCausalLM.from_pretrained(exported)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight

    prompts = material.prompts["baseline.eval"]
    logp = [first_token_logp(folder, prompts, prefix, torch.bfloat16) for folder in (model, exported)]
    expected = plain.kl(*logp)
    assert expected > 1e-3 and results["verified"]["kl"] == pytest.approx(expected, rel=0.1)

    alone = heretic(*material.words(exported, *words[:3], "task=evaluate", "run.dir=alone", "generation.batch_size=0"))
    assert alone.status == 0, alone.err
    evaluated = read_results("alone")["baseline"]["refusals"]
    # In bf16 a near-tie falls one way or the other with the batch.
    assert abs(evaluated - results["verified"]["refusals"]) <= 1
