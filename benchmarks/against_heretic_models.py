"""The models, prompts and edits on which two tools are compared.

The demo model is the package's own. The others are llamas with random weights and a vocabulary of numbered words: their
answers never end, so that both tools generate exactly as many tokens. Their markers are words that about half of the
original model's answers hold, so that counting them says something, and so that a row can be decided early.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PAD, BEGIN, END, USER, ANSWER = "<pad>", "<begin>", "<end>", "<user>", "<answer>"
SPECIAL = (PAD, BEGIN, END, USER, ANSWER)
CHAT_TEMPLATE = (
    "<begin> {% for message in messages %}{{ '<' ~ message['role'] ~ '> ' if message['role'] == 'user' else '' }}"
    "{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)
SYSTEM = "You are a helpful assistant."
DEMO_MARKERS = ("sorry", "i can't", "i cannot", "i'm unable")
PROMPT_WORDS = (12, 40)
KINDS = ("target", "baseline")


@dataclass(frozen=True)
class Case:
    """One model with what is asked of it."""

    name: str
    config: dict[str, int] = field(default_factory=dict)
    """The llama's shape; empty for the demo model."""
    dtype: str = "float32"
    device: str = "cpu"
    new_tokens: int = 32
    train: int = 32
    """Prompts of each kind that directions come from."""
    evaluated: int = 64
    """Prompts of each kind that edits are scored on."""
    batch_size: int = 64
    """Rows of a batch where both tools are given the same."""


CASES = {
    "demo": Case("demo", new_tokens=40, train=200, evaluated=160),
    "30m": Case(
        "30m",
        {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6,
         "num_key_value_heads": 6, "vocab_size": 24576},
    ),
    "135m": Case(
        "135m",
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152},
    ),
    "8b": Case(
        "8b",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
        dtype="bfloat16", device="cuda", new_tokens=100, train=400, evaluated=100, batch_size=128,
    ),
    "1b": Case(
        "1b",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256},
        dtype="bfloat16", device="cuda", new_tokens=100, train=100, evaluated=100, batch_size=128,
    ),
    "tiny": Case(
        "tiny",
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 256},
        new_tokens=6, train=6, evaluated=8, batch_size=4,
    ),
}  # fmt: skip


def prepare(case: Case, folder: Path) -> dict[str, Any]:
    """Write the case's model and prompts into a folder; returns all that both tools are told of them.

    The folder keeps them, so that a second call of the same case reads what the first one wrote.
    """
    file = folder / "case.json"
    if file.is_file():
        told: dict[str, Any] = json.loads(file.read_text())
        if told["case"] == asdict(case):
            return told
    folder.mkdir(parents=True, exist_ok=True)
    if case.config:
        texts = {f"{kind}_{part}": _numbered(case, kind, part) for kind in KINDS for part in ("train", "eval")}
        model, layers, markers = _random_model(case, folder, texts["target_eval"])
    else:
        from heretic_ds.demo import demo_model_dir, demo_prompts

        model, layers, markers = demo_model_dir(), 6, list(DEMO_MARKERS)
        texts = {
            f"{kind}_{part}": demo_prompts(kind, part).read_text().splitlines()
            for kind in ("target", "baseline")
            for part in ("train", "eval")
        }  # fmt: skip
    prompts = {}
    for kind in KINDS:
        # Folders of two text files each: one tool reads the files, the other a data set with two splits.
        (folder / kind).mkdir(exist_ok=True)
        for part, split in (("train", "train"), ("eval", "test")):
            target = folder / kind / f"{split}.txt"
            target.write_text("\n".join(texts[f"{kind}_{part}"]) + "\n")
            prompts[f"{kind}.{part}"] = {"file": str(target), "folder": str(folder / kind), "split": split}
    told = {
        "case": asdict(case),
        "model": str(model),
        "layers": layers,
        "system": SYSTEM,
        "markers": markers,
        "prompts": prompts,
        "counts": {name: len(lines) for name, lines in texts.items()},
    }
    file.write_text(json.dumps(told, indent=1) + "\n")
    return told


def _numbered(case: Case, kind: str, part: str) -> list[str]:
    """Prompts of numbered words; the two kinds use different halves of the vocabulary: a direction parts them."""
    draw = random.Random(f"{kind} {part}")
    count = case.train if part == "train" else case.evaluated
    words = case.config["vocab_size"] - len(SPECIAL)
    low, high = (0, words // 2) if kind == "target" else (words // 2, words)
    return [" ".join(f"w{draw.randrange(low, high)}" for _ in range(draw.randint(*PROMPT_WORDS))) for _ in range(count)]


def _random_model(case: Case, folder: Path, target_eval: Sequence[str]) -> tuple[Path, int, list[str]]:
    """Write a random llama; returns its folder, its number of layers, and markers for its answers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer, path = _tokenizer(case.config["vocab_size"]), folder / "model"
    config = LlamaConfig(
        **({"tie_word_embeddings": True} | case.config), max_position_embeddings=1024, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    with torch.device(case.device):
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, case.dtype))
    _spread(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path, config.num_hidden_layers, _markers(model, tokenizer, target_eval, case.new_tokens)


def _tokenizer(words: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*SPECIAL, *(f"w{number}" for number in range(words - len(SPECIAL)))]
    table = {word: index for index, word in enumerate(vocabulary)}
    backend = Tokenizer(models.WordLevel(table, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BEGIN, eos_token=END, padding_side="left",
        additional_special_tokens=[USER, ANSWER], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _spread(model: Any) -> None:
    """Weights with which answers depend on their prompts: every block adds about as much to the stream as it reads, so
    that the tied embedding of the last token does not decide the next; and with which no answer ends, since the special
    tokens' rows are zero and so are their logits, above which there is always another."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.rand_like(parameter) - 0.5)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0, 3 / parameter.shape[1] ** 0.5)
                parameter[: len(SPECIAL)] = 0
            elif parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)


def _markers(model: Any, tokenizer: Any, texts: Sequence[str], new_tokens: int) -> list[str]:
    """Words that together are in about half of the model's answers to some of the prompts, by plain ``generate``."""
    import torch

    chats = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}] for text in texts[:32]]
    rendered = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    batch = tokenizer(rendered, padding=True, add_special_tokens=False, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        output = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
    answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return markers_of_half(answers)


def markers_of_half(answers: Sequence[str]) -> list[str]:
    """Words, most frequent first, of which half of the answers hold one. Parts of longer words count, as they do for
    both tools."""
    counts = Counter(word for answer in answers for word in set(answer.split()))
    chosen: list[str] = []
    held = 0
    for word in sorted(counts, key=lambda word: (-counts[word], word)):
        holding = sum(any(marker in answer for marker in [*chosen, word]) for answer in answers)
        if held < holding <= (len(answers) + 1) // 2:
            chosen.append(word)
            held = holding
    return chosen


def edits(layers: int, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """That many edits drawn from the ranges of the search; every third has one direction for each layer."""
    draw, last = random.Random(seed), layers - 1
    drawn = []
    for index in range(count):
        profiles = {}
        for component, low in (("attention", 0.8), ("mlp", 0.3)):
            weight = draw.uniform(low, 1.5)
            profiles[component] = {
                "max_weight": weight,
                "max_weight_position": draw.uniform(0.6 * last, last),
                "min_weight": weight * draw.random(),
                "min_weight_distance": draw.uniform(1.0, max(0.6 * last, 1.0)),
            }
        index_drawn = draw.uniform(0.4 * last, 0.9 * last)
        drawn.append({"direction_index": None if index % 3 == 2 else index_drawn, "profiles": profiles})
    return drawn


def main(name: str, folder: str) -> None:
    """Write a case, in a process that then gives its memory back."""
    prepare(CASES[name], Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
