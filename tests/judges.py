"""Tiny classifiers whose verdict is known: a text that holds one sign anywhere counts, any other does not."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from tests import families

SIGN = "~"
"""What decides, unless another character is to."""
_CONSTANT, _SIGNED, _GAIN = 0, 1, 1e4


def save_judge(
    folder: Path,
    kind: str = "sequence",
    labels: tuple[str, ...] = ("ANSWER", "REFUSAL"),
    sign: str = SIGN,
    **config: object,
) -> Path:
    """A folder with a classifier of the kind ``sequence`` or ``causal``, and the tokenizer of single characters.

    The verdict is the last label, or ``Y`` against ``N`` as the next token. Its one block attends to all tokens alike,
    so the stream at the last one holds the share of signs among them.
    """
    fields = {
        "vocab_size": len(families.VOCABULARY), "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 256,
        "pad_token_id": families.PAD, "bos_token_id": families.BOS, "eos_token_id": families.EOS,
        "tie_word_embeddings": False, **config,
    }  # fmt: skip
    if kind == "sequence":
        fields |= {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
        fields["label2id"] = {label: at for at, label in enumerate(labels)}
    model = (LlamaForSequenceClassification if kind == "sequence" else LlamaForCausalLM)(LlamaConfig(**fields)).eval()
    _plant(model, kind, len(labels), sign)
    model.save_pretrained(folder)
    tokenizer = families.tokenizer()
    if kind == "sequence":
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def _plant(model: PreTrainedModel, kind: str, labels: int, sign: str) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.zero_()
    embedding_VD = model.get_input_embeddings().weight
    embedding_VD[:, _CONSTANT] = 1.0
    embedding_VD[families.VOCABULARY.index(sign), _SIGNED] = 1.0
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight[_SIGNED, _SIGNED] = attention.o_proj.weight[_SIGNED, _SIGNED] = 1.0
    head, against, counts = (
        (model.score, 0, labels - 1)
        if kind == "sequence"
        else (model.lm_head, *(families.VOCABULARY.index(reply) for reply in "NY"))
    )
    if against != counts:
        head.weight[against, _CONSTANT] = 1.0
    head.weight[counts, _SIGNED] = _GAIN
