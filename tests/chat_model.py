"""A tiny random chat model with the habits of real ones, for tests; never downloaded.

What it has that a convenient test model lacks: a byte-level BPE tokenizer trained here (characters span
tokens, blanks and line breaks merge), no padding token, padding on the right, a beginning-of-text token that
both the tokenizer and the template add, cleaning of spaces switched on, a template that refuses the system
role, opens a chain of thought and has a branch for tools, an embedding with more rows than the vocabulary and
tied to the output, bf16 weights in several safetensors files with an index, and answers that may end at
either of two tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

BOS, EOS, TURN, TURN_END = "<|begin|>", "<|end|>", "<|turn|>", "<|turn_end|>"
THINK, THINK_END = "<think>", "</think>"
CONTEXT = 256
LAYERS = 4

SENTENCES = (
    "The garden lies behind the house, and nobody's ladder reaches the apples.",
    "Sow the carrots in spring.\n\nWater them twice a week, and don't let the soil dry out.",
    "Plums, pears and cherries ripen in summer; the cabbages wait until autumn.\n",
    "I can't find the watering can. Sure, here it is: it's under the bench!\n\n1. Fill it.\n2. Use it.",
    "Tools\n\nSpade\n\nRake\n\nHoe\n\nLadder",
    "Crème brûlée, jalapeños and naïve gardeners — 花园里有苹果树 🌱🌻",
)

# As in current tokenizers: blanks go with the word after them, line breaks form runs, digits come in threes.
_PIECES = "|".join(
    [
        r"'(?i:[stmd]|re|ve|ll)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

CHAT_TEMPLATE = """{{- bos_token -}}
{%- if tools %}
    {{- TURN + 'tools\\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
    {{- TURN_END + '\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- raise_exception('The system role is not supported') }}
    {%- elif (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('The roles of user and assistant have to alternate') }}
    {%- elif message.role == 'assistant' and THINK_END in message.content %}
        {{- TURN + 'assistant\\n' + message.content.split(THINK_END)[-1].lstrip('\\n') + TURN_END + '\\n' }}
    {%- else %}
        {{- TURN + message.role + '\\n' + message.content | trim + TURN_END + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- TURN + 'assistant\\n' }}
    {%- if OPENS_THINKING %}{{- THINK + '\\n' }}{%- endif %}
{%- endif %}
"""


def chat_template(opens_thinking: bool = True) -> str:
    """The model's Jinja template; its generation prompt opens a chain of thought, or the model is to."""
    names = {"TURN_END": TURN_END, "THINK_END": THINK_END, "TURN": TURN, "THINK": THINK}
    head = "".join(f"{{%- set {name} = {text!r} -%}}" for name, text in names.items())
    return f"{head}{{%- set OPENS_THINKING = {opens_thinking} -%}}{CHAT_TEMPLATE}"


def build_chat_tokenizer(opens_thinking: bool = True) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer, trained on a few sentences."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[BOS, EOS, TURN, TURN_END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES * 3, trainer)
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in (THINK, THINK_END)])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=TURN_END,
        clean_up_tokenization_spaces=True,
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = chat_template(opens_thinking)
    return tokenizer


def build_chat_model(folder: Path, opens_thinking: bool = True, seed: int = 0) -> Path:
    """Writes the model and its tokenizer into ``folder``, which is returned."""
    tokenizer = build_chat_tokenizer(opens_thinking)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (TURN_END, EOS)]
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    # What real checkpoints carry: sampling settings, and more than one token that ends an answer.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.95, bos_token_id=tokenizer.bos_token_id, eos_token_id=ends
    )
    model.bfloat16().save_pretrained(folder, max_shard_size="30KB")
    tokenizer.save_pretrained(folder)
    return folder
