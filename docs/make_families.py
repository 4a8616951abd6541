"""Writes the table of docs/families.md from what the tests run; see `make docs`. Reads their text, imports nothing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "families.md"
MARKS = ("<!-- families, by docs/make_families.py -->\n", "<!-- end of families -->\n")

ALWAYS, THOROUGH, STAND_IN, IN_PART, REFUSED, UNTRIED = "yes", "thorough", "stand-in", "in part", "no", "-"
PLACEMENTS = (
    "fsdp", "tensor_parallel", "pipeline", "tensor_pipeline", "expert_parallel", "zero3", "vllm", "kernel_inject",
)  # fmt: skip


def render() -> str:
    """The table: a row for each model type, with the placements that it was tested under."""
    tested = _tested()
    rows = {}
    for name, kind in sorted(_model_types().items(), key=lambda item: (item[1], item[0])):
        rows.setdefault(kind, []).append(name)
    lines = [f"| `model_type` | {' | '.join(f'`{name}`' for name in PLACEMENTS)} |"]
    lines.append("|---|" + "---|" * len(PLACEMENTS))
    for kind, names in rows.items():
        cells = [_cell([tested[placement].get(name) for name in names]) for placement in PLACEMENTS]
        lines.append(f"| `{kind}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(found: list[str | None]) -> str:
    """What the variants of one model type have in common: the best test, unless others of them are refused."""
    best = next((state for state in (ALWAYS, STAND_IN, THOROUGH, REFUSED) if state in found), UNTRIED)
    return IN_PART if REFUSED in found and best != REFUSED else best


def _model_types() -> dict[str, str]:
    """Name of each family in ``tests/families.py``, and the ``model_type`` that its configuration has."""
    kinds = {}
    for group in ("REQUIRED", "EXTRA"):
        table = _constant("families.py", group)
        assert isinstance(table, ast.Dict)
        for name, made in zip(table.keys, table.values, strict=True):
            assert isinstance(made, ast.Call)
            kinds[ast.literal_eval(name)] = ast.literal_eval(made.args[0])  # type: ignore[arg-type]
    return kinds


def _tested() -> dict[str, dict[str, str]]:
    """What the lists of families in the tests of each placement say: [placement][family]."""

    def of(file: str, **lists: str) -> dict[str, str]:
        names = {state: _names(file, constant) for constant, state in lists.items()}
        return {name: state for state in (REFUSED, THOROUGH, STAND_IN, ALWAYS) for name in names.get(state, ())}

    pipelines = "distributed/test_pipeline.py"
    tested = {
        "fsdp": dict.fromkeys(_model_types(), THOROUGH) | of("distributed/test_fsdp.py", FAMILIES=ALWAYS),
        "tensor_parallel": {
            **of("distributed/test_tensor_parallel.py", AUTOTP=ALWAYS),
            **of("distributed/test_tensor_parallel.py", HF_PLAN=ALWAYS),
        },
        "pipeline": of(pipelines, SERVED=ALWAYS, OTHERS=THOROUGH),
        "tensor_pipeline": of(pipelines, SPLIT=ALWAYS, SPLIT_TOO=THOROUGH),
        "expert_parallel": of("distributed/test_expert_parallel.py", FAMILIES=ALWAYS),
        "zero3": of("distributed/test_zero3.py", FAMILIES=ALWAYS),
        "vllm": dict.fromkeys(("llama", "mixtral"), ALWAYS) | of("distributed/test_vllm.py", LONG=THOROUGH),
        "kernel_inject": of("unit/test_kernel_inject.py", CONFIGS=STAND_IN),
    }
    for family, backend in _literal("distributed/test_tensor_parallel.py", "UNSERVED").items():
        if backend == "auto":
            tested["tensor_parallel"][family] = REFUSED
    for family, placement in _literal(pipelines, "UNSERVED"):
        tested[placement][family] = REFUSED
    for family in _refused_by_structure():
        tested["pipeline"][family] = REFUSED
    return tested


def _refused_by_structure() -> Iterator[str]:
    """Families that ``test_blocks_that_need_each_other`` sees refused."""
    tree = _tree("unit/test_model_stages.py")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "test_blocks_that_need_each_other":
            [decorator] = node.decorator_list
            assert isinstance(decorator, ast.Call)
            yield from (family for family, _ in ast.literal_eval(decorator.args[1]))


def _names(file: str, constant: str) -> list[str]:
    """The names in a list of families, or the keys of a table."""
    node = _constant(file, constant)
    if isinstance(node, ast.Dict):
        return [ast.literal_eval(key) for key in node.keys if key is not None]
    return list(ast.literal_eval(node))


def _literal(file: str, constant: str) -> Any:
    return ast.literal_eval(_constant(file, constant))


def _constant(file: str, name: str) -> ast.expr:
    """What a module of the tests assigns to a name."""
    for node in _tree(file).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = getattr(node, "value", None)
            assert isinstance(value, ast.expr)
            return value
    raise LookupError(f"tests/{file} has no {name}")


def _tree(file: str) -> ast.Module:
    return ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))


def main() -> None:
    begin, end = (re.escape(mark) for mark in MARKS)
    page = TARGET.read_text(encoding="utf-8")
    told = f"{MARKS[0]}\n{render()}\n{MARKS[1]}"
    TARGET.write_text(re.sub(f"{begin}.*?{end}", lambda _: told, page, flags=re.DOTALL), encoding="utf-8")
    print(f"written {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
