"""The page: facts and charts in a template, one file that is whole by itself."""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from heretic_ds.checkpoint import bnb
from heretic_ds.export.final import number_text as number_text_of_final
from heretic_ds.export.final import range_text
from heretic_ds.foreign.text import printable
from heretic_ds.report.geometry import COLUMNS, layer_name, number_text
from heretic_ds.report.html import figures
from heretic_ds.report.html.facts import Facts, read_facts
from heretic_ds.report.plans import duration
from heretic_ds.report.tables import REFUSALS, direction_text, kl_text, profile_text

_HERE = Path(__file__).parent


def visible(value: Any) -> Any:
    """A text, or markup, in which every character can be seen and does nothing."""
    if isinstance(value, Markup):
        return Markup(printable(str(value)))
    return printable(value) if isinstance(value, str) else value


def page(folder: Path, scorer: str, title: str) -> str:
    """The page about the run in a folder, as HTML.

    ``scorer`` is the name of the first scorer, ``title`` the model's. Whatever texts the run holds, the page loads
    nothing and runs no script but its own: texts are escaped, and its policy allows nothing else. Raises OSError,
    ValueError and KeyError where the folder lacks results or has damaged ones.
    """
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=visible,
    )
    environment.globals |= {
        "kl_text": kl_text,
        "duration": duration,
        "direction_text": direction_text,
        "profile_text": profile_text,
        "layer_name": layer_name,
        "number_text": number_text,
        "columns": COLUMNS,
        "final_number": number_text_of_final,
        "final_range": range_text,
    }
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    facts = read_facts(folder, scorer)
    return environment.get_template("report.html.j2").render(
        facts=facts,
        results=facts.results,
        title=title,
        counts=scorer == REFUSALS,
        packed=bnb.in_words(facts.results.get("quantization", bnb.NONE)),
        front=figures.front(facts),
        history=figures.history(facts),
        profiles=figures.profiles(facts),
        overrides=_overrides(facts),
        geometry=figures.geometry(facts),
        projections=figures.projections(facts),
        made=datetime.now().strftime("%Y-%m-%d %H:%M"),
        style=Markup(style),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def _overrides(facts: Facts) -> str:
    """The chosen edit as one would give it to ``task=evaluate``."""
    if facts.selected is None:
        return ""
    edit = facts.selected.edit
    words = [] if edit.direction_index is None else [f"ablation.direction_index={edit.direction_index!r}"]
    for component, profile in edit.profiles.items():
        words += [f"ablation.profiles.{component}.{name}={value!r}" for name, value in profile.to_dict().items()]
    return "\n".join(words)
