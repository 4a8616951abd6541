"""What went wrong while a configuration was composed, said in one line that names the override to change."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import yaml
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from heretic_ds.conf_files import option_owners
from heretic_ds.foreign.text import in_one_line
from heretic_ds.settings import FREE_GROUPS, Settings
from heretic_ds.settings.checks import type_name


def explain(error: BaseException) -> str:
    """One line for an error of Hydra, OmegaConf or the YAML parser."""
    if isinstance(error, OverrideParseException):
        return _explain_grammar(error)
    if isinstance(error, MissingConfigException):
        return _explain_choice(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}"
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        return _explain_value(str(error), cause)
    return _explain_composition(str(error))


def unknown_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """A message for each key of a composed configuration that the schema lacks (`+key=value` adds such)."""
    for name in map(str, config):
        hint = setting_types().get(prefix + name)
        if hint is None:
            yield _unknown_key(prefix + name)
        elif is_dataclass(hint):
            yield from unknown_keys(config[name], f"{prefix}{name}.")


@functools.cache
def setting_types(section: Any = Settings, prefix: str = "") -> dict[str, Any]:
    """Types by key of the configuration, groups of settings included: `search`, `search.trials`, ..."""
    types = {}
    for name, hint in get_type_hints(section).items():
        types[prefix + name] = hint
        if is_dataclass(hint):
            types |= setting_types(hint, f"{prefix}{name}.")  # type: ignore[arg-type]  # a class
        elif name in FREE_GROUPS:
            types |= dict.fromkeys((f"{name}.{option}" for option in option_owners(name)), Any)
    return types


def _explain_grammar(error: OverrideParseException) -> str:
    override = str(error.override)
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override!r} is not an override; write key=value"
    advice = (
        "if the value holds brackets, braces, commas or signs, quote it for Hydra inside the shell's quotes: "
        f"\"{key}='{value}'\""
    )
    rows = re.fullmatch(r".*\[(\d*:\d*)\]", value)
    if key.endswith(".split") and rows:
        advice += f", or choose the rows with {key.removesuffix('split')}slice={rows[1]}"
    return f"cannot read the override {in_one_line(override)}; {in_one_line(advice)}"


def _explain_choice(error: MissingConfigException) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    if group and error.options:
        choices = [name for name in error.options if not name.startswith("_")]
        return f"there is no {group}={choice}; choose one of {', '.join(choices)}"
    return _first_lines(str(error))


def _explain_value(context: str, cause: OmegaConfBaseException) -> str:
    overridden = re.search(r"(?:override '?|merging override )([^'=\s]+)", context)
    key = max(overridden[1] if overridden else "", str(cause.full_key or ""), key=len)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _unknown_key(key)
    hint = setting_types().get(str(cause.full_key))
    if isinstance(cause, ValidationError) and hint is not None:
        value = re.search(r"[Vv]alue:? '?(.*?)'?(?: of type| is not|$)", str(cause).splitlines()[0])
        found = re.search(r"merging override [^=]+=(.*)", context)
        shown = found[1] if found else value[1] if value else ""
        wanted = type_name(hint)
        if is_dataclass(hint):
            wanted += f" ({', '.join(f'{cause.full_key}.{entry.name}' for entry in fields(hint))})"
        return f"{cause.full_key}={shown} does not fit: {cause.full_key} takes {wanted}"
    return f"{key}: {str(cause).splitlines()[0]}"


def _explain_composition(text: str) -> str:
    listed = re.match(r"Ambiguous value for argument '(.*)'", text)
    if listed:
        return f"{listed[1]} gives several values; add --multirun to run each, or write a list as key=[a,b]"
    in_file = re.match(r"In '(.*)': (\w+) raised while composing config:\n(.*)\n\s+full_key: (\S+)", text)
    if in_file:
        file, kind, found, key = in_file.groups()
        unknown = kind in (ConfigAttributeError.__name__, ConfigKeyError.__name__)
        return f"in {file}.yaml: {_unknown_key(key) if unknown else f'{key}: {found}'}"
    doubled = re.match(r"Multiple values for (\S+)\. To override a value use 'override (.*): (.*)'", text)
    if doubled:
        return f"+{doubled[1]}= adds a second choice of {doubled[1]}; write {doubled[2]}={doubled[3]}"
    return _first_lines(text)


def _first_lines(text: str) -> str:
    """A message without Hydra's listing of search paths and links, as one line."""
    lines = text.split("Config search path:")[0].splitlines()
    return " ".join(line.strip() for line in lines if line.strip() and "https://hydra.cc" not in line)


def _unknown_key(key: str) -> str:
    known = setting_types()
    section, _, last = key.rpartition(".")
    group: Any = known.get(section)
    siblings = [entry.name for entry in fields(group)] if is_dataclass(group) else []
    meant = difflib.get_close_matches(last, siblings, n=1, cutoff=0.8)
    near = [f"{section}.{name}" for name in meant] or [name for name in known if name.rpartition(".")[2] == last]
    if not near and siblings:
        near = [f"{section}.{name}" for name in difflib.get_close_matches(last, siblings, n=1)]
    elif not near:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if near:
        advice = f"did you mean {' or '.join(near[:3])}?"
    elif siblings:
        advice = f"{section} has {', '.join(siblings)}"
    else:
        advice = "heretic-ds --cfg job lists the keys"
    return f"there is no setting {key}; {advice}"
