"""Writes docs/configuration.md from the settings: docstrings, types, composed defaults; see `make docs`."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig, OmegaConf

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout's own settings, whatever is installed

from heretic_ds.placements.costs import Machine  # noqa: E402
from heretic_ds.scoring import SCORERS, Scorer  # noqa: E402
from heretic_ds.settings import PHASES, Settings, conf_dir, register_schemas  # noqa: E402
from heretic_ds.settings.checks import limits_in_words, type_name  # noqa: E402

TARGET = ROOT / "docs" / "configuration.md"

INTRODUCTION = """# Configuration

Generated from `heretic_ds/settings/` and `conf/` by `make docs`: change those, not this page.

Every key can be given on the command line as `key=value`: `heretic-ds <model> search.trials=50`. A group's
choice is given the same way, `task=evaluate`, and is a file under `conf/` that sets several keys. The first
of these that gives a value counts: the command line, `conf/local/default.yaml` (personal defaults, not in
git), the experiment, the files of the groups, the schema. `heretic-ds <model> --cfg job` prints the
outcome.

Values are read by [Hydra's grammar](https://hydra.cc/docs/advanced/override_grammar/basic/): quote what holds
brackets, braces, commas or equals signs, inside quotes for the shell, as in
`"prompts.target.train.split='train[:400]'"`. `null` stands for no value, a list is written `[a,b]`.
"""


def render() -> str:
    """The whole page."""
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config")
    parts = [INTRODUCTION, "## Groups\n", _groups_table()]
    texts = _field_docstrings(Settings)
    for name, hint in get_type_hints(Settings).items():
        parts.append(f"\n## {name}\n")
        if name in PHASES:
            parts += [f"{texts[name]}\n", *_placements(name)]
        elif name == "hardware":
            given = OmegaConf.merge(dict.fromkeys(get_type_hints(Machine)), config[name])
            assert isinstance(given, DictConfig)
            parts += [f"{texts[name]}\n", _keys_table(Machine, given, name)]
        else:
            parts += [f"{_markdown(inspect.getdoc(hint) or '')}\n", _keys_table(hint, config[name], name)]
        if name == "scoring":
            parts += ["", *_scorers()]
    return "\n".join(parts)


def _placements(phase: str) -> Iterator[str]:
    """A section for each placement of a phase: what it is, and its options."""
    for choice in sorted((conf_dir() / phase).glob("*.yaml")):
        given = OmegaConf.load(choice)
        assert isinstance(given, DictConfig)
        kind = get_class(given._target_)
        yield f"### {phase}={choice.stem}\n\n{_markdown(inspect.getdoc(kind) or '')}\n"
        yield _keys_table(kind.Options, given, phase) + "\n"


def _scorers() -> Iterator[str]:
    """A section for each scorer: its own settings, and those that all have."""
    shared = [entry.name for entry in fields(Scorer.Options)]
    yield "### Settings of every scorer\n\nAs in `{_target_: refusals, name: apologies}`; [scorers](scorers.md).\n"
    yield _options_table(Scorer.Options, shared) + "\n"
    for name, kind in SCORERS.items():
        own = [entry.name for entry in fields(kind.Options) if entry.name not in shared]
        if own:
            yield f"### Settings of the scorer {name}\n\n{_options_table(kind.Options, own)}\n"


def _options_table(section: Any, names: Sequence[str]) -> str:
    """The settings of these names, which stand by themselves in a node."""
    return "\n".join(
        line.replace("`options.", "`", 1)
        for line in _keys_table(section, OmegaConf.structured(section), "options").splitlines()
        if not line.startswith("| `") or line.split("`")[1].removeprefix("options.") in names
    )


def _groups_table() -> str:
    rows = []
    for folder in sorted(
        path for path in conf_dir().iterdir() if path.is_dir() and path.name not in ("hydra", "local")
    ):
        for choice in sorted(folder.glob("[!_]*.yaml")):
            comments = [line.removeprefix("#").strip() for line in _first_comment(choice) if "@package" not in line]
            rows.append(f"| `{folder.name}={choice.stem}` | {' '.join(comments)} |")
    return "\n".join(["| choice | what it is |", "|---|---|", *rows])


def _first_comment(file: Path) -> Iterator[str]:
    """Lines of the first comment: later ones are about single keys."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return takewhile(lambda line: line.startswith("#"), dropwhile(lambda line: not line.startswith("#"), lines))


def _keys_table(section: type, config: DictConfig, prefix: str) -> str:
    rows = [
        f"| `{key}` | {takes} | {_default(parent, key.rpartition('.')[2])} | {text} |"
        for key, takes, parent, text in _keys(section, config, prefix)
    ]
    return "\n".join(["| key | takes | default | meaning |", "|---|---|---|---|", *rows])


def _keys(section: Any, config: DictConfig, prefix: str) -> Iterator[tuple[str, str, DictConfig, str]]:
    """Key, what it takes, the node that holds it, and meaning of every setting in a section, nested ones included."""
    texts, limits = _field_docstrings(section), {entry.name: entry.metadata for entry in fields(section)}
    for name, hint in get_type_hints(section).items():
        if is_dataclass(hint) and isinstance(hint, type):
            yield from _keys(hint, config[name], f"{prefix}.{name}")
        else:
            own = limits_in_words({**limits[name], "words": ""})
            takes = own if "choices" in limits[name] else type_name(hint) + (f" ({own})" if own else "")
            yield f"{prefix}.{name}", takes, config, texts[name]


def _field_docstrings(section: type) -> dict[str, str]:
    """The string below each field of a dataclass, inherited ones included, as one line."""
    texts: dict[str, str] = {}
    for parent in section.__bases__:
        if is_dataclass(parent):
            texts |= _field_docstrings(parent)
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    for field, after in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            texts[field.target.id] = _markdown(ast.literal_eval(after.value)).replace("|", "\\|")
    return texts


def _markdown(text: str) -> str:
    return " ".join(text.split()).replace("``", "`")


def _default(parent: DictConfig, name: str) -> str:
    if OmegaConf.is_missing(parent, name):
        return "required"
    value = parent[name]
    if value is None:
        return "`null`"
    if isinstance(value, ListConfig):
        short = len(value) <= 3 and all(isinstance(item, str) for item in value)
        return f"`[{','.join(value)}]`" if short else f"{len(value)} entries"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value != "" else "empty"


if __name__ == "__main__":
    TARGET.write_text(render() + "\n", encoding="utf-8")
    print(f"written {TARGET.relative_to(ROOT)}")
