"""`experiment=heretic` sets Heretic's defaults, and the table of docs/from_heretic.md is what is composed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from heretic_ds.settings import conf_dir, register_schemas
from tests.conftest import ROOT, ComposeSettings

PAGE = ROOT / "docs" / "from_heretic.md"
MARK = "| Heretic 1.4.0 | its default | here | our default | `experiment=heretic` |"


def composed(*overrides: str) -> dict[str, Any]:
    """Every setting by its key, lists whole."""
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", ["model.path=m", *overrides]), resolve=True)
    return dict(flat(config))


def flat(config: Any, prefix: str = "") -> Any:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def code(cell: str) -> Any:
    """What a cell gives as code, read as YAML; of a list how many entries it has."""
    if found := re.fullmatch(r"(\d+) entries", cell.strip()):
        return [None] * int(found[1])
    found = re.fullmatch(r"`([^`]*)`", cell.strip())
    assert found, f"{cell!r} is no code"
    return yaml.safe_load(found[1])


def shown(value: Any) -> Any:
    """As much of a value as a cell gives."""
    return [None] * len(value) if isinstance(value, list) else value


def rows() -> list[list[str]]:
    """The cells of the page's table of settings."""
    text = PAGE.read_text(encoding="utf-8").split(MARK)[1].split("\n\n")[0]
    return [line.strip("|").split("|") for line in text.splitlines()[2:]]


def test_the_table_is_what_is_composed() -> None:
    plain, experiment = composed(), composed("experiment=heretic")
    assert len(rows()) > 10
    for theirs, their_default, key, default, value in rows():
        name = code(key)
        assert code(default) == shown(plain[name]), f"our default of {name}"
        assert code(value) == shown(experiment[name]), f"{name} of experiment=heretic"
        assert code(value) == code(their_default), (
            f"experiment=heretic gives {name} another value than {theirs.strip()}"
        )


def test_the_experiment_sets_what_differs_and_nothing_else() -> None:
    plain, experiment = composed(), composed("experiment=heretic")
    changed = {name for name, value in experiment.items() if plain[name] != value}
    told = {code(key) for _, _, key, default, value in rows() if code(default) != code(value)}
    assert changed == told != set()
    given = OmegaConf.load(conf_dir() / "experiment" / "heretic.yaml")
    assert {name for name, _ in flat(OmegaConf.to_container(given))} == changed, "a value that is the default already"


def test_other_settings_go_with_it(compose_settings: ComposeSettings) -> None:
    settings = compose_settings("experiment=heretic", "ablation.row_norm=pre")
    assert settings.ablation.row_norm == "pre"
    assert settings.search.trials_per_pass == "1" and len(settings.prompts.thinking) == 4
    assert settings.prompts.system == "You are a helpful assistant."


OPTIONS = """
    model model-commit evaluate-model collect-reproducibles reproduce dtypes quantization device-map max-memory
    offload-outputs-to-cpu batch-size max-batch-size max-response-length response-prefix chain-of-thought-skips
    print-responses print-residual-geometry plot-residuals residual-plot-path residual-plot-title residual-plot-style
    kl-divergence-scale kl-divergence-target orthogonalize-direction row-normalization full-normalization-lora-rank
    winsorization-quantile n-trials n-startup-trials seed study-checkpoint-dir benchmarks export-strategy max-shard-size
    refusal-markers system-prompt good-prompts bad-prompts good-evaluation-prompts bad-evaluation-prompts
"""
"""What `heretic --help` of version 1.4.0 lists."""


def test_every_setting_of_heretic_is_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for option in OPTIONS.split():
        key = option.replace("-", "_")
        assert re.search(rf"`{key}(?:\.\w+)?`|`--{option}`|--{option} ", page), f"docs/from_heretic.md lacks {key}"


@pytest.mark.parametrize("file", [PAGE, conf_dir() / "experiment" / "heretic.yaml"])
def test_a_version_is_named(file: Path) -> None:
    assert "Heretic 1.4.0" in file.read_text(encoding="utf-8")
    assert "heretic-llm==1.4.0" in (ROOT / "benchmarks" / "heretic_requirements.txt").read_text(encoding="utf-8")
