"""Nodes of the configuration that name a class by ``_target_`` and give it options of its own."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf, ValidationError

from heretic_ds.errors import UserError
from heretic_ds.foreign.text import in_one_line
from heretic_ds.settings.checks import check_fields, refuse, type_name

T = TypeVar("T")
TARGET = "_target_"


def options_of(
    kind: type[T], given: Mapping[str, Any], place: str, unknown: Callable[[str, Any], str] | None = None
) -> T:
    """The options of a node, typed and within their bounds: an instance of the dataclass ``kind``.

    ``place`` is what messages call the node; ``unknown`` says, if there is more to say of it than that, what is wrong
    with a key that there is not, with its value. Raises UserError for the first mistake.
    """
    hints, options = get_type_hints(kind), OmegaConf.structured(kind)
    for name, value in given.items():
        if name == TARGET:
            continue
        if name not in hints:
            raise UserError(unknown(name, value) if unknown else _unknown(name, list(hints), place))
        try:
            options[name] = value
        except ValidationError as error:
            shown, takes = "null" if value is None else value, type_name(hints[name])
            raise UserError(f"{place}.{name}={shown} does not fit: {place}.{name} takes {takes}") from error
    missing = next((name for name in hints if OmegaConf.is_missing(options, name)), None)
    if missing is not None:
        raise UserError(f"{place}.{missing} is not set, and has to be")
    made: Any = OmegaConf.to_object(options)
    refuse(check_fields(made, f"{place}."))
    return made


def _unknown(name: str, known: list[str], place: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
    return f"{place} has no setting {in_one_line(name, 60)}; {advice}"
