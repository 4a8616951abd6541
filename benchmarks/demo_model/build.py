"""The demo model's untrained parts: a word-level tokenizer with a chat template, and a small random Llama."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, END, UNKNOWN = "<|pad|>", "<|begin|>", "<|end|>", "<|unknown|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Roles are system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# A word or a sign with the blank before it, so that joining tokens gives the text back exactly.
_WORD_PATTERN = r" ?[\w']+| ?[^\w\s]|\s"

CONTEXT_LENGTH = 256
_VOCABULARY_MULTIPLE = 16  # so that the output layer splits evenly over ranks


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is the special tokens and every word of `texts`; it pads on the left."""
    splitter = pre_tokenizers.Split(Regex(_WORD_PATTERN), behavior="isolated")
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(text)}
    special = [PAD, BOS, END, UNKNOWN, *ROLES]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(words | {" ", "\n"})])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, n_layers: int = 6, width: int = 128) -> LlamaForCausalLM:
    """A random float32 Llama for the tokenizer, below 0.9 million parameters at the default size."""
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE,
        hidden_size=width,
        intermediate_size=width * 11 // 8,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=False,
        **ids,
    )
    model = LlamaForCausalLM(config).float()
    model.generation_config = GenerationConfig(max_new_tokens=40, do_sample=False, **ids)
    return model
