"""Models cut over real ranks by FSDP2 say what the same models say whole, edited or not, in the memory they promise."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from heretic_ds.errors import UserError
from heretic_ds.placements import fsdp
from heretic_ds.placements.fsdp.units import _dim
from heretic_ds.world import World
from tests import families
from tests.distributed import fsdp_ranks as work
from tests.distributed import output_edits_ranks

pytestmark = pytest.mark.distributed

FAMILIES = (
    "llama", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3_moe", "gpt2", "gpt_neox", "phi3", "olmo2", "deepseek_v3",
    "gpt_oss", "qwen3_next", "lfm2",
)  # fmt: skip
SILENT = ("opt_post_norm",)
"""Families whose tiny model ends every answer at once: distributions and means are what is compared."""
OTHERS = sorted({*families.REQUIRED, *families.EXTRA} - set(FAMILIES))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """`folder_of("llama")`: the folder of a tiny model."""
    known: dict[str, Path] = {}

    def of_family(family: str) -> Path:
        if family not in known:
            known[family] = families.save(family, tmp_path_factory.mktemp(family))
        return known[family]

    return of_family


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    error_L = (found["means"] - expected["means"]).norm(dim=-1) / expected["means"].norm(dim=-1)
    assert error_L.max() < 1e-5
    assert found["answers"] == expected["answers"]
    for row_norm, kl in expected["kl"].items():
        assert abs(found["kl"][row_norm] - kl) <= 1e-6 + 1e-4 * kl and kl > 1e-4, row_norm
    for row_norm, weights in expected["weights"].items():
        for name, weight in weights.items():
            torch.testing.assert_close(found["weights"][row_norm][name], weight, rtol=1e-6, atol=1e-6)
    assert found["restored"] and found["alive"] == 0


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.thorough) for name in OTHERS)])
def test_two_ranks_say_what_one_says(ranks, folder_of, family):
    folder = folder_of(family)
    expected = work.measure_replicated(folder)
    lengths = {len(answer) for answer in expected["answers"]["original"]}
    assert len(lengths) > 1 or family in SILENT, "answers of one length show no waiting"
    for found in ranks(2).run(work.measure, folder=str(folder)):
        assert_same(found, expected)
        assert found["held"] == pytest.approx(0.5, rel=0.01) and found["degree"] == 2


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_fewer_prompts_than_ranks(ranks, folder_of, family):
    folder = folder_of(family)
    expected = work.measure_replicated(folder, count=1)
    for found in ranks(2).run(work.measure, folder=str(folder), count=1):
        assert_same(found, expected)


@pytest.fixture(scope="module")
def scored(folder_of):
    """`scored("llama")`: the scores of several edits, one after another in the weights of the whole model."""
    known: dict[str, Any] = {}

    def of_family(family: str) -> Any:
        if family not in known:
            known[family] = output_edits_ranks.score_one_by_one(folder_of(family))
        return known[family]

    return of_family


def assert_same_scores(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["answers"] == expected["answers"]
    for row_norm, kls in expected["kl"].items():
        for kl, other in zip(kls, found["kl"][row_norm], strict=True):
            assert abs(other - kl) <= 1e-6 + 1e-4 * kl, row_norm
        assert sum(kl > 1e-3 for kl in kls) >= 2, "edits that do nothing show nothing"


@pytest.mark.parametrize(
    "family",
    ["llama", "gemma3", "gpt2", "mixtral", "gpt_oss"]
    + [pytest.param(name, marks=pytest.mark.thorough) for name in ("qwen3_moe", "deepseek_v3", "olmo2", "lfm2")],
)
def test_trials_of_one_pass_have_their_own_edits(ranks, folder_of, scored, family):
    for found in ranks(2).run(work.scores, folder=str(folder_of(family))):
        assert_same_scores(found, scored(family))


def test_trials_of_one_pass_without_tables(ranks, folder_of, scored):
    for found in ranks(2).run(work.scores, folder=str(folder_of("gpt_oss")), tables=False):
        assert_same_scores(found, scored("gpt_oss"))
        assert found["without tables"] == "full"


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral", "opt", "deepseek_v3"])
def test_loaded_weights_are_those_of_the_file(ranks, folder_of, family):
    assert ranks(2).run(work.weights_unlike_the_file, folder=str(folder_of(family))) == [[], []]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_bfloat16_stays_bfloat16_beside_what_is_kept_in_float32(ranks, folder_of, family):
    folder = str(folder_of(family))
    assert ranks(2).run(work.weights_unlike_the_file, folder=folder, dtype="bfloat16") == [[], []]
    expected = work.measure_replicated(Path(folder))
    for found in ranks(2).run(work.captured_and_answered, folder=folder, dtype="bfloat16"):
        error_L = (found["means"] - expected["means"]).norm(dim=-1) / expected["means"].norm(dim=-1)
        assert error_L.max() < 0.05 and found["dtype"] == "torch.bfloat16"


def test_ranks_measure_one_batch_size_for_each_phase(ranks, folder_of):
    folder = folder_of("llama")
    expected = work.measure_replicated(folder)
    both = ranks(2).run(work.captured_and_answered, folder=str(folder), batch_size=0)
    assert both[0]["batch_sizes"] == both[1]["batch_sizes"] and set(both[0]["batch_sizes"]) == {
        "capture", "kl", "generate",
    }  # fmt: skip
    for found in both:
        torch.testing.assert_close(found["means"], expected["means"], rtol=1e-5, atol=1e-5)
        assert found["answers"] == expected["answers"]["original"]


def test_a_rank_whose_answers_are_decided_waits_for_the_others(ranks, folder_of):
    for lengths in ranks(2).run(work.answers_decided_unequally, folder=str(folder_of("llama"))):
        assert lengths == [4, 6, 4, 6, 4, 6, 4]


def test_tied_parameters_are_held_once(ranks, folder_of):
    for found in ranks(2).run(work.parts, folder=str(folder_of("gemma2"))):
        embedding, head = found["model.embed_tokens.weight"], found["lm_head.weight"]
        assert embedding == head and embedding[0] == (len(families.VOCABULARY) // 2, 32)


@pytest.mark.parametrize(
    ("shape", "number", "dim"),
    [((32, 5), 2, 0), ((7,), 2, 0), ((4, 30, 16), 3, 1), ((4, 32, 48), 3, 2), ((2, 8, 5), 4, 1), ((1000, 4), 3, 0)],
)
def test_a_parameter_is_cut_where_little_is_padding(shape, number, dim):
    assert _dim(shape, number) == dim


def test_tables_that_do_not_fit_on_one_rank_are_told_by_both(ranks, folder_of):
    folder = folder_of("llama")
    expected = work.measure_replicated(folder)["means"]
    for said, means in ranks(2).run(work.tables_that_do_not_fit, folder=str(folder)):
        assert said.endswith("set search.trials_per_pass below 2")
        torch.testing.assert_close(means, expected, rtol=1e-5, atol=1e-5)


def test_tables_may_take_a_share_of_a_ranks_own_weights(ranks, folder_of):
    """Not of the whole model's, though its parameters count as whole."""
    for budget, own, whole in ranks(2).run(work.table_budget_and_own_bytes, folder=str(folder_of("mixtral"))):
        assert budget == pytest.approx(own, rel=0.02) and budget == whole // 2


def test_passes_leave_no_notes(ranks, folder_of):
    assert ranks(2).run(work.noted_after_passes, folder=str(folder_of("llama"))) == [0, 0]


def test_what_cannot_be_served_is_refused_on_every_rank(ranks, folder_of):
    folder = str(folder_of("llama"))
    for phase in ("capture", "evaluate"):
        cases = {
            f"{phase}.degree=1 with {phase}=fsdp and 2 ranks: fsdp cuts the model over all ranks": {"degree": 1},
            f"{phase}.offload=cpu keeps weights in host memory, where they lie anyway": {"offload": "cpu"},
            f"{phase}.offload is 'disk'; choose one of none, cpu": {"offload": "disk"},
        }
        for part, options in cases.items():
            found = ranks(2).run(work.refusal, folder=folder, phase=phase, **options)
            assert found[0] == found[1] and part in found[0] and "\n" not in found[0]


def test_a_model_that_uses_weights_elsewhere_is_refused_with_one_line(ranks, folder_of):
    found = ranks(2).run(work.refusal_of_a_model_that_uses_weights_elsewhere, folder=str(folder_of("llama")))
    assert found[0] == found[1] and "\n" not in found[0]
    assert found[0].startswith("evaluate=fsdp gathers weights for the module that has them, but others of this llama")


def test_a_damaged_file_is_told_on_every_rank(ranks, folder_of, tmp_path):
    folder = families.save("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] = float("nan")  # in the part of the second rank
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = ranks(2).run(work.refusal, folder=str(folder))
    assert found[0] == found[1] and "model.layers.1.mlp.down_proj.weight" in found[0]
    assert ranks(2).run(work.refusal, folder=str(folder_of("llama"))) == ["accepted"] * 2


@pytest.mark.slow
def test_a_rank_reads_its_share_and_gives_all_of_it_back(ranks, folder_of, tmp_path):
    large = families.save("llama", tmp_path, width=1024, layers=6)
    tiny = str(folder_of("llama"))
    for found in ranks(2).run(work.memory_of_an_engine, timeout=280, folder=str(large), tiny=tiny, rounds=2):
        for each in found:
            assert each["held"] == pytest.approx(each["whole"] / 2, rel=0.01) and each["held"] > 80e6
            assert each["peak"] < each["held"] + each["largest"] + 30e6, each
            assert each["read"] < 1.02 * each["held"] + 2e6, "what lies around a rank's part is not read"
            block = each["whole"] / 6
            assert each["at most"] < each["held"] + 3.5 * block + 60e6 + each["originals"], each
        assert found[0]["left"] < 16e6 and found[1]["left"] < 8e6


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "mixtral"])
def test_three_ranks_cut_rows_unevenly(ranks, folder_of, family):
    folder = folder_of(family)
    assert ranks(3).run(work.weights_unlike_the_file, folder=str(folder)) == [[], [], []]
    expected = work.measure_replicated(folder)
    for found in ranks(3).run(work.measure, folder=str(folder)):
        assert_same(found, expected)


def test_trials_of_one_pass_on_three_ranks(ranks, folder_of, scored):
    for found in ranks(3).run(work.scores, folder=str(folder_of("gpt_oss"))):
        assert_same_scores(found, scored("gpt_oss"))


def test_one_rank_is_refused(ranks, folder_of):
    [said] = ranks(1).run(work.refusal, folder=str(folder_of("llama")), phase="capture")
    assert said.startswith("capture=fsdp cuts the model over ranks, but there is only one") and "\n" not in said
    assert said.endswith("set capture=replicated")


@pytest.mark.parametrize("error", [UserError("a file is at fault"), MemoryError("no room"), KeyboardInterrupt()])
def test_what_was_laid_out_is_released_whatever_breaks_off_loading(error, monkeypatch):
    done = []

    class Breaking:
        def __init__(self, *what):
            done.append("laid out")

        def read(self):
            raise error

        def release(self):
            done.append("released")

    monkeypatch.setattr(fsdp, "Units", Breaking)
    opened = SimpleNamespace(device=torch.device("cpu"), empty_model=lambda dtype: (None, None))
    opened.in_some_dtype = lambda load: load(torch.float32)
    with pytest.raises(type(error)):
        fsdp.Fsdp("capture", fsdp.Fsdp.Options()).build(SimpleNamespace(world=World(), opened=opened, anatomy=None))
    assert done == ["laid out", "released"]
