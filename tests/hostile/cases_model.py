"""Hostile models: configurations, weights, tokenizers, chat templates."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.hostile.harness import Case, Place, Spoil

CONFIG, WEIGHTS, INDEX = "model/config.json", "model/model.safetensors", "model/model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "model/tokenizer.json", "model/tokenizer_config.json"
DEEP = "[" * 100_000
DIGITS = "1" * 6000


def written(name: str, content: str | bytes) -> Spoil:
    """A file with this content."""

    def spoil(place: Place) -> None:
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        (place.root / name).write_bytes(data)

    return spoil


def changed(name: str, **changes: Any) -> Spoil:
    """A JSON file with other values; ``...`` removes one."""
    return lambda place: place.edit(name, **changes)


def instead(name: str, make: Callable[[Path], object]) -> Spoil:
    """Something else where a file was."""

    def spoil(place: Place) -> None:
        (place.root / name).unlink(missing_ok=True)
        make(place.root / name)

    return spoil


def all_of(*spoils: Spoil) -> Spoil:
    def spoil(place: Place) -> None:
        for each in spoils:
            each(place)

    return spoil


# --- configurations -------------------------------------------------------------------------------

_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 100_000}, "num_hidden_layers is 100000; expected a whole number from 0 to 10000"),
    ({"num_hidden_layers": 5000}, "asks for 5000 blocks (num_hidden_layers), but its weights hold 4"),
    ({"num_hidden_layers": 5}, "asks for 5 blocks"),
    ({"num_hidden_layers": "4"}, 'num_hidden_layers is "4"; expected a whole number'),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    ({"num_hidden_layers": 4.5}, "num_hidden_layers is 4.5"),
    ({"num_hidden_layers": True}, "num_hidden_layers is true"),
    ({"num_hidden_layers": float("inf")}, "num_hidden_layers is Infinity"),
    ({"num_hidden_layers": float("nan")}, "num_hidden_layers is NaN"),
    ({"num_hidden_layers": {"a": 1}}, "config.json"),
    ({"num_hidden_layers": [4] * 10_001}, "num_hidden_layers is [4"),
    ({"num_hidden_layers": 0}, ""),
    ({"hidden_size": 64}, "hidden_size=64, but no tensor of its weights is as wide"),
    ({"hidden_size": "32"}, 'hidden_size is "32"'),
    ({"hidden_size": 0}, "hidden_size=0"),
    ({"hidden_size": 10**30}, "hidden_size is 1000"),
    ({"hidden_size": -32}, "hidden_size is -32"),
    ({"hidden_size": float("inf")}, "hidden_size is Infinity"),
    ({"intermediate_size": 49}, "model.layers.0.mlp."),
    ({"intermediate_size": 2**23}, "model.layers.0.mlp."),
    ({"intermediate_size": 2**40}, "intermediate_size is"),
    ({"intermediate_size": "48"}, "intermediate_size is"),
    ({"vocab_size": 100}, "lm_head.weight"),
    ({"vocab_size": 2**27}, "lm_head.weight"),
    ({"vocab_size": 2**40}, "vocab_size is"),
    ({"vocab_size": -1}, "vocab_size is -1"),
    ({"vocab_size": [102]}, "config.json"),
    ({"num_attention_heads": 0}, "config.json"),
    ({"num_attention_heads": 3}, "config.json"),
    ({"num_attention_heads": 64, "num_key_value_heads": 64}, ""),
    ({"num_attention_heads": 2**30}, "num_attention_heads is"),
    ({"num_attention_heads": "4"}, "num_attention_heads is"),
    ({"num_key_value_heads": 0}, ""),
    ({"num_key_value_heads": 1}, "k_proj"),
    ({"num_key_value_heads": "2"}, "num_key_value_heads is"),
    ({"head_dim": 0}, ""),
    ({"head_dim": 7}, ""),
    ({"head_dim": "8"}, "head_dim is"),
    ({"head_dim": 2**50}, "head_dim is"),
    ({"max_position_embeddings": "256"}, "max_position_embeddings is"),
    ({"max_position_embeddings": -5}, "max_position_embeddings is -5"),
    ({"hidden_act": "nonsense"}, "config.json"),
    ({"hidden_act": 3}, "config.json"),
    ({"hidden_act": None}, "config.json"),
    ({"rms_norm_eps": "x"}, ""),
    ({"rope_parameters": [1]}, "config.json"),
    ({"rope_parameters": "x"}, "config.json"),
    ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}}, "config.json"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "config.json"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 0}}, ""),
    ({"model_type": ["llama"]}, 'model_type is ["llama"]'),
    ({"model_type": 3}, "model_type is 3"),
    ({"model_type": {"a": "b"}}, "model_type is"),
    ({"model_type": None}, "model_type=None"),
    ({"model_type": ...}, "model_type=None"),
    ({"model_type": "nonsense"}, "model_type='nonsense'"),
    ({"model_type": "nonsense\x1b[31m\u202e"}, "does not know"),
    ({"model_type": "t5"}, ""),
    ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "expected a causal language model"),
    ({"model_type": "own", "auto_map": {"AutoConfig": "evil.Config"}}, "model.trust_remote_code=true"),
    ({"architectures": "LlamaForCausalLM"}, "architectures is"),
    ({"architectures": [3]}, "architectures[0] is 3"),
    ({"architectures": {"a": 1}}, "architectures is"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "expected a causal language model"),
    ({"auto_map": ["a"]}, "auto_map is"),
    ({"auto_map": 3}, "auto_map is 3"),
    ({"text_config": [1]}, "text_config is"),
    ({"text_config": "x"}, "text_config is"),
    ({"text_config": {"num_hidden_layers": 9000}}, "asks for 9000 blocks"),
    ({"quantization_config": [1]}, "quantization_config is"),
    ({"quantization_config": "x"}, "quantization_config is"),
    ({"quantization_config": {"quant_method": "gptq"}}, "is quantised with gptq"),
    ({"quantization_config": {"quant_method": ["x"]}}, ""),
    ({"dtype": 5}, "dtype is 5"),
    ({"dtype": ["x"]}, "dtype is"),
    ({"dtype": "nonsense"}, ""),
    ({"attn_implementation": "evil/kernel"}, "code on the hub"),
    ({"_attn_implementation": "evil/kernel"}, "code on the hub"),
    ({"_attn_implementation_internal": "evil/kernel"}, "code on the hub"),
    ({"eos_token_id": "x"}, "eos_token_id"),
    ({"eos_token_id": [[1]]}, "eos_token_id"),
    ({"eos_token_id": -7}, "eos_token_id"),
    ({"eos_token_id": 2**40}, "eos_token_id"),
    ({"eos_token_id": {"a": 1}}, "eos_token_id"),
    ({"pad_token_id": 10**9}, "config.json"),
    ({"pad_token_id": "x"}, ""),
    ({"is_encoder_decoder": True}, "expected a causal language model"),
    ({"anything": 2**70}, "out of all bounds"),
]

_TEXTS: list[tuple[str, str | bytes, str]] = [
    ("empty", "", "cannot be read as JSON"),
    ("null", "null", "holds a JSON NoneType"),
    ("list", "[]", "holds a JSON list"),
    ("number", "3", "holds a JSON int"),
    ("text", '"x"', "holds a JSON str"),
    ("cut", '{"model_type": "lla', "cannot be read as JSON"),
    ("latin", b'{"model_type": "\xff"}', "not UTF-8"),
    ("utf16", '{"model_type": "llama"}'.encode("utf-16"), "not UTF-8"),
    ("deep", DEEP, "nested too deeply"),
    ("deep_object", '{"a":' * 100_000, "nested too deeply"),
    ("deep_closed", '{"model_type":"llama","a":' + "[" * 400 + "]" * 400 + "}", "nested too deeply"),
    ("digits", '{"model_type": "llama", "hidden_size": ' + DIGITS + "}", "thousands of digits"),
    ("huge", '{"a": "' + "x" * (2**24 + 9) + '"}', "larger than 16 MiB"),
    ("zeros", b"\0" * 100, "cannot be read as JSON"),
]


def config_cases() -> list[Case]:
    alone = instead("model/generation_config.json", lambda file: None)
    cases = [
        Case(f"config_{'_'.join(changes)}_{number}", all_of(alone, changed(CONFIG, **changes)), said)
        for number, (changes, said) in enumerate(_FIELDS)
    ]
    cases += [Case(f"config_is_{name}", written(CONFIG, text), said) for name, text, said in _TEXTS]
    cases += [
        Case("config_is_a_folder", instead(CONFIG, Path.mkdir), "has no config.json"),
        Case("config_is_a_pipe", instead(CONFIG, os.mkfifo), "has no config.json"),
        Case("config_is_endless", instead(CONFIG, lambda file: file.symlink_to("/dev/zero")), "has no config.json"),
        Case("config_leads_nowhere", instead(CONFIG, lambda file: file.symlink_to("nowhere")), "has no config.json"),
        Case("config_leads_to_itself", instead(CONFIG, lambda file: file.symlink_to("config.json")), "config.json"),
    ]
    return cases


# --- weights --------------------------------------------------------------------------------------


def _header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def _with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(place: Place) -> None:
        tensors = load_file(place.root / WEIGHTS)
        change(tensors)
        save_file(tensors, place.root / WEIGHTS, metadata={"format": "pt"})

    return spoil


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch was_run",)


def _pickled(data: bytes | None = None) -> Spoil:
    def spoil(place: Place) -> None:
        tensors = load_file(place.root / WEIGHTS)
        (place.root / WEIGHTS).unlink()
        file = place.model / "pytorch_model.bin"
        if data is None:
            torch.save(tensors, file)
        else:
            file.write_bytes(data)

    return spoil


def _indexed(content: Any) -> Spoil:
    """Weights under an index."""

    def spoil(place: Place) -> None:
        (place.root / WEIGHTS).rename(place.model / "one.safetensors")
        text = content if isinstance(content, str) else json.dumps(content)
        (place.root / INDEX).write_text(text)

    return spoil


_NORM = "model.norm.weight"
_PROJECTION = "model.layers.2.self_attn.o_proj.weight"


def weight_cases() -> list[Case]:
    def cut(place: Place) -> None:
        file = place.root / WEIGHTS
        file.write_bytes(file.read_bytes()[:-1000])

    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    files: list[tuple[str, bytes, str]] = [
        ("empty", b"", "is truncated or corrupt"),
        ("zeros", b"\0" * 8, "is truncated or corrupt"),
        ("no_header", struct.pack("<Q", 2**63) + b"{}", "is truncated or corrupt"),
        ("no_json", struct.pack("<Q", 8) + b"x" * 8, "is truncated or corrupt"),
        ("deep", struct.pack("<Q", 4000) + b"[" * 4000, "is truncated or corrupt"),
        ("list", struct.pack("<Q", 2) + b"[]", "is truncated or corrupt"),
        ("latin", struct.pack("<Q", 8) + b'{"\xff":1}', "is truncated or corrupt"),
        ("beyond", _header(a=whole | {"data_offsets": [0, 2**40]}), "is truncated or corrupt"),
        ("backwards", _header(a=whole | {"data_offsets": [8, 0]}) + b"\0" * 8, "is truncated or corrupt"),
        ("overlap", _header(a=whole, b=whole) + b"\0" * 8, "is truncated or corrupt"),
        ("other_shape", _header(a=whole | {"shape": [3]}) + b"\0" * 8, "is truncated or corrupt"),
        ("negative", _header(a=whole | {"shape": [-2]}) + b"\0" * 8, "is truncated or corrupt"),
        ("no_dtype", _header(a=whole | {"dtype": "F4X"}) + b"\0" * 8, "is truncated or corrupt"),
        ("huge_shape", _header(a=whole | {"shape": [2**62, 2**62]}) + b"\0" * 8, "is truncated or corrupt"),
        ("nothing", _header(), ""),
        ("other_names", _header(**{"a\x1b[31m": whole}) + b"\0" * 8, ""),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ("html", b"<!DOCTYPE html><html>Not Found</html>", "is truncated or corrupt"),
    ]
    tensors: list[tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = [
        ("lacking", lambda found: found.pop(_NORM), f"lack {_NORM}"),
        ("renamed", lambda found: found.update({"other": found.pop(_PROJECTION)}), f"lack {_PROJECTION}"),
        ("wide", lambda found: found.update({_PROJECTION: torch.zeros(32, 33)}), f"{_PROJECTION} [32, 33]"),
        ("flat", lambda found: found.update({_PROJECTION: torch.zeros(32 * 32)}), f"{_PROJECTION} [1024]"),
        ("turned", lambda found: found.update({"lm_head.weight": torch.zeros(32, 102)}), "lm_head.weight [32, 102]"),
        ("empty_one", lambda found: found.update({_NORM: torch.zeros(0)}), f"{_NORM} [0]"),
        ("nan", lambda found: found[_PROJECTION].fill_(torch.nan), "NaN"),
        ("infinite", lambda found: found[_NORM].fill_(torch.inf), "infinite"),
    ]  # fmt: skip
    other = "one.safetensors"
    indexes: list[tuple[str, Any, str]] = [
        ("empty", "", "cannot be read as JSON"),
        ("list", "[]", "holds a JSON list"),
        ("null", "null", "holds a JSON NoneType"),
        ("deep", DEEP, "nested too deeply"),
        ("no_map", {}, "lists no tensors"),
        ("empty_map", {"weight_map": {}}, "lists no tensors"),
        ("list_map", {"weight_map": [other]}, "lists no tensors"),
        ("null_map", {"weight_map": None}, "lists no tensors"),
        ("list_file", {"weight_map": {_NORM: [other]}}, "expected the name of a file beside it"),
        ("number_file", {"weight_map": {_NORM: 3}}, "expected the name of a file beside it"),
        ("null_file", {"weight_map": {_NORM: None}}, "expected the name of a file beside it"),
        ("object_file", {"weight_map": {_NORM: {}}}, "expected the name of a file beside it"),
        ("empty_file", {"weight_map": {_NORM: ""}}, "expected the name of a file beside it"),
        ("file_elsewhere", {"weight_map": {_NORM: "../one.safetensors"}}, "expected the name of a file beside it"),
        ("file_at_root", {"weight_map": {_NORM: "/etc/passwd"}}, "expected the name of a file beside it"),
        ("hidden_file", {"weight_map": {_NORM: ".."}}, "expected the name of a file beside it"),
        ("long_file", {"weight_map": {_NORM: "a" * 300}}, "expected the name of a file beside it"),
        ("odd_file", {"weight_map": {_NORM: "a\x1b[31m"}}, "expected the name of a file beside it"),
        ("zero_file", {"weight_map": {_NORM: "a\0"}}, "expected the name of a file beside it"),
        ("missing_file", {"weight_map": {_NORM: "two.safetensors"}}, "two.safetensors is missing"),
        ("other_names", {"weight_map": {"other": other}}, "has no tensor other"),
        ("config_as_file", {"weight_map": {_NORM: "config.json"}}, "is truncated or corrupt"),
    ]
    evil = pickle.dumps(_Evil())
    allowed = {"model.allow_pickle": True}
    return [
        Case("weights_are_cut", cut, "is truncated or corrupt"),
        *(Case(f"weights_{name}", written(WEIGHTS, data), said) for name, data, said in files),
        *(Case(f"tensors_{name}", _with_tensors(change), said) for name, change, said in tensors),
        *(Case(f"index_{name}", _indexed(content), said) for name, content, said in indexes),
        Case("no_weights", instead(WEIGHTS, lambda file: None), "has no weights"),
        Case("weights_are_a_folder", instead(WEIGHTS, Path.mkdir), "has no weights"),
        Case("weights_are_a_pipe", instead(WEIGHTS, os.mkfifo), "has no weights"),
        Case("pickle", _pickled(), "has only pickled weights (pytorch_model.bin)"),
        Case("evil_pickle", _pickled(evil), "model.allow_pickle=true"),
        Case("evil_pickle_allowed", _pickled(evil), "cannot be loaded", allowed),
        Case("garbage_pickle_allowed", _pickled(b"x" * 100), "cannot be loaded", allowed),
        Case("empty_pickle_allowed", _pickled(b""), "cannot be loaded", allowed),
        Case(
            "gguf",
            all_of(instead(CONFIG, lambda file: None), written("model/model.gguf", "GGUF")),
            "holds GGUF files",
        ),
        Case(
            "adapter",
            all_of(instead(CONFIG, lambda file: None), written("model/adapter_config.json", "{}")),
            "holds an adapter",
        ),
    ]


# --- tokenizers -----------------------------------------------------------------------------------


def tokenizer_cases() -> list[Case]:
    texts = [("empty", ""), ("null", "null"), ("object", "{}"), ("list", "[]"), ("deep", DEEP), ("digits", DIGITS)]
    fields: list[dict[str, Any]] = [
        {"model": None}, {"model": {"type": "BPE"}}, {"model": {"type": "nonsense"}}, {"added_tokens": 3},
        {"decoder": {"type": "nonsense"}}, {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}},
        {"normalizer": [1]}, {"truncation": "x"},
    ]  # fmt: skip
    generation = "model/generation_config.json"
    return [
        Case(
            "no_tokenizer", all_of(*(instead(f"model/{name}", lambda file: None) for name in _TOKENIZERS)), "tokenizer"
        ),
        *(Case(f"tokenizer_{name}", written(TOKENIZER, text), "tokenizer") for name, text in texts),
        *(
            Case(f"tokenizer_{'_'.join(change)}_{number}", changed(TOKENIZER, **change), "tokenizer")
            for number, change in enumerate(fields)
        ),
        Case("tokenizer_config_list", written(TOKENIZER_CONFIG, "[]"), "tokenizer"),
        Case("tokenizer_config_cut", written(TOKENIZER_CONFIG, "{"), "tokenizer"),
        Case("tokenizer_config_deep", written(TOKENIZER_CONFIG, '{"a":' + DEEP), "tokenizer"),
        Case("tokenizer_class", changed(TOKENIZER_CONFIG, tokenizer_class=["x"]), "tokenizer"),
        *(
            Case(f"tokenizer_code_{number}", all_of(_CODE, changed(TOKENIZER_CONFIG, **change)), "trust_remote_code")
            for number, change in enumerate(
                (
                    {"auto_map": {"AutoTokenizer": ["evil.Own", None]}, "tokenizer_class": "Own"},
                    {"auto_map": {"AutoTokenizer": [None, "evil.Own"]}, "tokenizer_class": "Own"},
                )
            )
        ),
        Case("eos_token", changed(TOKENIZER_CONFIG, eos_token={"a": 1}), ""),
        *(
            Case(f"generation_config_{name}", written(generation, text), "generation_config.json")
            for name, text in [*texts, ("eos", '{"eos_token_id": "x"}'), ("eos_list", '{"eos_token_id": [[2]]}')]
            if name != "object"
        ),
    ]


_CODE = written("model/evil.py", "open('was_run', 'w')\nclass Own: pass\nclass Config: pass\nclass Model: pass\n")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

# --- chat templates -------------------------------------------------------------------------------

_ASK = "{{ messages[0]['content'] }}"
_TEMPLATES: list[tuple[str, str, str]] = [
    (
        "endless",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        " s); set prompts.template",
    ),
    ("power", "{{ 9 ** 9 ** 9 }}", "cannot render a prompt"),
    ("long_text", "{{ 'a' * 10 ** 11 }}", "MiB of memory"),
    ("long_list", "{{ ([0] * 10 ** 12) | length }}", "MiB of memory"),
    (
        "doubling",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "memory",
    ),
    (
        "much",
        _ASK + "{% for i in range(90000) %}{{ 'aaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
        "characters of a conversation",
    ),
    ("format", "{{ '%99999999999d' % 1 }}", "cannot render a prompt"),
    ("format_method", "{{ '{:>99999999999}'.format(1) }}", "cannot render a prompt"),
    ("wide_range", "{{ range(10 ** 9) | length }}", "Range too big"),
    ("recursion", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deeply"),
    ("division", "{{ 1 // 0 }}", "ZeroDivisionError"),
    ("overflow", "{{ (2.0 ** 5000) | string }}", "OverflowError"),
    ("lookup", "{{ 'x'.encode('nonsense') }}", "LookupError"),
    ("index", "{{ [1, 2].index(7) }}", "cannot render a prompt"),
    ("raised", "{{ raise_exception('no\x1b[31m way') }}", "no␛[31m way"),
    ("syntax", "{% for %}", "cannot render a prompt"),
    ("unknown_call", "{{ nonsense() }}", "'nonsense' is undefined"),
    ("unknown_filter", "{{ 'x' | nonsense }}", "nonsense"),
    ("escape", "{{ ''.__class__.__mro__ }}", ""),
    ("escape_call", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot render a prompt"),
    ("include", "{% include '/etc/passwd' %}", "cannot render a prompt"),
    ("import", "{% import 'os' as os %}", "cannot render a prompt"),
    ("drops", "nothing of it", "leaves out the user's message"),
    ("types", "{{ messages + 3 }}", "cannot render a prompt"),
    ("deep", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot render a prompt"),
]


def template_cases() -> list[Case]:
    return [
        *(
            Case(f"template_{name}", written("model/chat_template.jinja", text), said)
            for name, text, said in _TEMPLATES
        ),
        Case("template_setting", None, "cannot render a prompt", {"prompts.template": "{{ 1 // 0 }}"}),
        Case("template_nowhere", None, "neither a Jinja template nor a file", {"prompts.template": "nowhere.jinja"}),
        Case("template_folder", None, "neither a Jinja template nor a file", {"prompts.template": "model"}),
        Case("template_no_user", None, "is no path", {"prompts.template": "~nosuchuser/a.jinja"}),
        Case("template_long_name", None, "is no path", {"prompts.template": "a" * 300}),
        Case("template_latin", written("t.jinja", b"\xff{{"), "not UTF-8", {"prompts.template": "t.jinja"}),
        Case("template_huge", written("t.jinja", "x" * 2**21), "larger than 1 MiB", {"prompts.template": "t.jinja"}),
        Case(
            "template_of_no_type",
            all_of(instead("model/chat_template.jinja", lambda file: None), changed(TOKENIZER_CONFIG, chat_template=3)),
            "",
        ),
    ]
