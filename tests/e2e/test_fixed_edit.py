"""A fixed edit through the command line against the same edit made and measured with plain transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from string import ascii_lowercase

import pytest
from torch import Tensor

from tests.e2e import plain
from tests.e2e.conftest import NEW_TOKENS, Heretic, Material, read_results
from tests.e2e.plain import PlainModel

TENTS = {
    "attention": {
        "max_weight": 1.2,
        "max_weight_position": 2.4,
        "min_weight": 0.3,
        "min_weight_distance": 2.2,
    },
    "mlp": {"max_weight": 0.9, "max_weight_position": 1.0, "min_weight": 0.2, "min_weight_distance": 1.5},
}
EDIT = [f"ablation.profiles.{name}.{key}={value}" for name, numbers in TENTS.items() for key, value in numbers.items()]


class Original:
    """What is measured of one family's unedited model."""

    def __init__(self, folder: Path, prompts: dict[str, list[str]]) -> None:
        self.folder, self.prompts = folder, prompts
        self.model = PlainModel.load(folder)
        means = [self.model.mean_residuals(prompts[f"{kind}.train"]) for kind in ("target", "baseline")]
        self.directions_LD: Tensor = plain.directions(*means)
        self.answers = self.model.answers(prompts["target.eval"], NEW_TOKENS)
        self.logp = self.model.first_token_log_probabilities(prompts["baseline.eval"])


@pytest.fixture(scope="module")
def original(material: Material):
    return cache(lambda family: Original(material.model(family), material.prompts))


def telling_marker(before: list[str], after: list[str]) -> str:
    """The letter that tells the two lists of answers apart best, and is in some answers of each, not in all."""

    def difference(letter: str) -> int:
        counts = [plain.refusals(answers, letter) for answers in (before, after)]
        return abs(counts[0] - counts[1]) if all(0 < count < len(before) for count in counts) else -1

    best = max(ascii_lowercase, key=difference)
    assert difference(best) > 0
    return best


@pytest.mark.parametrize("index", [None, 1.3], ids=["per_layer", "interpolated"])
@pytest.mark.parametrize("row_norm", ["none", "pre", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_scores_are_those_of_a_plain_computation(
    family: str, row_norm: str, index: float | None, original, material: Material, heretic: Heretic, tmp_path: Path
) -> None:
    before: Original = original(family)
    after = before.model.edited(family, before.directions_LD, row_norm, index, TENTS)
    answers = after.answers(before.prompts["target.eval"], NEW_TOKENS)
    expected_kl = plain.kl(before.logp, after.first_token_log_probabilities(before.prompts["baseline.eval"]))
    marker = telling_marker(before.answers, answers)
    words = [
        "task=evaluate", "model.dtype=float32", f"scoring.markers=[{marker}]", f"ablation.row_norm={row_norm}", *EDIT,
        f"run.dir={tmp_path / 'run'}", *([] if index is None else [f"ablation.direction_index={index}"]),
    ]  # fmt: skip
    outcome = heretic(*material.words(before.folder, *words))
    assert outcome.status == 0, outcome.err
    results = read_results(tmp_path / "run")
    [trial] = results["trials"]
    assert results["baseline"]["refusals"] == plain.refusals(before.answers, marker)
    assert trial["refusals"] == results["verified"]["refusals"] == plain.refusals(answers, marker)
    assert trial["kl"] == pytest.approx(expected_kl, abs=1e-6 + 1e-4 * expected_kl, rel=0)
    assert expected_kl > 1e-3
    assert trial["direction_index"] == index and trial["profiles"] == TENTS
