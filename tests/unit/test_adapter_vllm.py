"""vLLM serves an adapter of ours beside the original, from the files that `peft` reads."""

from __future__ import annotations

import json
import os
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from heretic_ds.anatomy import find_anatomy
from heretic_ds.checkpoint.open import ModelChoice, load_weights, open_model
from heretic_ds.edits.adapters import make_adapter, worn
from heretic_ds.export.adapter import resident_writer, write_adapter
from tests import families
from tests.unit.test_adapter import EDIT, ablation_for

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(900)]
PROMPTS = [[1, 9, 40, 22, 71, 15, 33], [1, 50, 12, 12, 30, 8, 64], [1, 77, 41, 20, 9]]
TOKENS = 12

SERVE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

model, adapter, prompts, tokens = json.loads(sys.argv[1])
llm = LLM(model=model, dtype="float32", enforce_eager=True, enable_lora=True, max_lora_rank=8, max_model_len=64,
          kv_cache_memory_bytes=2**26, skip_tokenizer_init=True, disable_log_stats=True)
greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
rows = [{"prompt_token_ids": prompt} for prompt in prompts]
answers = {}
for name, request in (("original", None), ("edited", LoRARequest("edited", 1, adapter))):
    answers[name] = [list(each.outputs[0].token_ids) for each in llm.generate(rows, greedy, lora_request=request)]
print("ANSWERS" + json.dumps(answers))
"""


def greedy(model) -> list[list[int]]:
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        return [
            model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), **options)[
                0, len(prompt) :
            ].tolist()
            for prompt in PROMPTS
        ]


def test_vllm_serves_it_beside_the_original(vllm_python: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    families.build("llama", width=64, head_dim=32).save_pretrained(base)
    families.tokenizer().save_pretrained(base)
    loaded = load_weights(open_model(ModelChoice(path=str(base))))
    anatomy = find_anatomy(loaded.model)
    adapter = make_adapter(anatomy, ablation_for(anatomy, "pre"), EDIT, partial(resident_writer, loaded.model), 1)
    write_adapter(tmp_path / "adapter", adapter, loaded.model, "base")
    with worn(loaded.model, adapter):
        edited = greedy(loaded.model)
    original = greedy(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    given = json.dumps([str(base), str(tmp_path / "adapter"), PROMPTS, TOKENS])
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [vllm_python, "-c", SERVE, given],
        capture_output=True, text=True, env=environment, cwd=tmp_path, check=False, timeout=800,
    )  # fmt: skip
    [told] = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")] or [done.stderr[-4000:]]
    answers = json.loads(told.removeprefix("ANSWERS"))
    assert original != edited and answers == {"original": original, "edited": edited}
