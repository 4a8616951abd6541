"""Parts of parameters as data, edits of parts against edits of wholes, and families' plans on empty models."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from heretic_ds.ablation import ROW_NORMS, edit_weight, edit_weight_, row_norms, row_overlaps
from heretic_ds.anatomy import find_anatomy
from heretic_ds.checkpoint import Shard, parameters_on_meta, split
from heretic_ds.checkpoint.shards import share
from heretic_ds.errors import UserError
from heretic_ds.placements.tensor_parallel import sharding
from tests import families

DEGREE = 3


class Ranks:
    """Ranks as threads of this process: their sums are those of real ones, without processes or a network."""

    def __init__(self, degree: int) -> None:
        self.degree = degree
        self.sums = 0
        self._parts: dict[int, torch.Tensor] = {}
        self._barrier = threading.Barrier(degree)

    def reduce(self, member: int, part: torch.Tensor) -> torch.Tensor:
        self._parts[member] = part
        self._barrier.wait(10)
        total = sum(self._parts[i] for i in range(self.degree))
        self._barrier.wait(10)
        if member == 0:
            self.sums += 1
        return total

    def run(self, work: Callable[[int, Callable[[torch.Tensor], torch.Tensor]], object]) -> list[object]:
        results: list[object] = [None] * self.degree

        def one(member: int) -> None:
            results[member] = work(member, lambda part: self.reduce(member, part))

        threads = [threading.Thread(target=one, args=(member,)) for member in range(self.degree)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def weight_and_direction(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, dtype=torch.float64, generator=generator)
    weight *= 0.05 + 3 * torch.rand((*shape[:-1], 1), dtype=torch.float64, generator=generator)
    weight[..., 2, :] = 0.0
    direction_D = torch.randn(shape[-2], dtype=torch.float64, generator=generator)
    return weight, direction_D / direction_D.norm()


@pytest.mark.parametrize("row_norm", ROW_NORMS)
@pytest.mark.parametrize("shape", [(12, 20), (5, 12, 20)], ids=["matrix", "experts"])
@pytest.mark.parametrize("strength", [1.0, 0.7, -0.3, 1.5])
def test_edited_parts_are_parts_of_the_edited_whole(row_norm, shape, strength):
    weight, direction_D = weight_and_direction(shape)
    expected = edit_weight(weight, direction_D, strength, row_norm)
    ranks = Ranks(DEGREE)
    shards = [split(shape, -1, member, DEGREE) for member in range(DEGREE)]

    def work(member, reduce):
        part, inplace = shards[member].take(weight), shards[member].take(weight)
        edit_weight_(inplace, direction_D, strength, row_norm, reduce)
        return edit_weight(part, direction_D, strength, row_norm, reduce), inplace

    for member, (edited, inplace) in enumerate(ranks.run(work)):
        wanted = shards[member].take(expected)
        assert (edited - wanted).abs().max() < 1e-12
        assert (inplace - wanted).abs().max() < 1e-12
    # A matrix and all experts alike: one sum for the norms, one for the overlaps, nothing for a plain projection.
    assert ranks.sums == {"none": 0, "pre": 2, "full": 4}[row_norm]


def test_norms_and_overlaps_of_parts_add_up():
    weight, direction_D = weight_and_direction((12, 20))
    norms_D = row_norms(weight, "full")
    overlaps_2D = row_overlaps(weight, norms_D, torch.stack([direction_D, -direction_D]))

    # b is a sum over columns of parts of a that each rank has for itself.
    def work(member, reduce):
        part = split(weight.shape, -1, member, DEGREE).take(weight)
        own_D = row_norms(part, "full", reduce)
        return own_D, row_overlaps(part, own_D, torch.stack([direction_D, -direction_D]), reduce)

    for own_D, own_2D in Ranks(DEGREE).run(work):
        assert torch.allclose(own_D, norms_D, atol=1e-13)
        assert torch.allclose(own_2D, overlaps_2D, atol=1e-13)


@pytest.mark.parametrize("size", [1, 7, 12])
def test_shares_cover_everything_once_and_are_even(size):
    bounds = [share(size, member, DEGREE) for member in range(DEGREE)]
    assert [bound for start, stop in bounds for bound in range(start, stop)] == list(range(size))
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1


def test_packed_halves_are_split_each_and_pairs_stay_together():
    rows = torch.arange(12)
    packed = [split((12,), 0, member, 2, packed=2).take(rows).tolist() for member in range(2)]
    assert packed == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    pairs = [split((10,), 0, member, 2, grain=2).take(rows[:10]).tolist() for member in range(2)]
    assert pairs == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]
    assert Shard((3,), zeroed=True).take(rows[:3]).tolist() == [0, 0, 0]


def empty(family: str):
    config = (families.REQUIRED | families.EXTRA)[family]()
    model_class = type(families.build(family))
    with parameters_on_meta():
        return model_class._from_config(config)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_every_parameter_of_experts_is_split_and_outputs_add_up(family):
    model = families.build(family, dtype=torch.float64)
    anatomy = find_anatomy(model)
    writer = next(writer for writer in anatomy.writers if writer.experts is not None)
    experts = model.get_submodule(writer.module)
    generator = torch.Generator().manual_seed(0)
    width = anatomy.width
    hidden = torch.randn(6, width, dtype=torch.float64, generator=generator)
    index = torch.randint(writer.experts, (6, 2), generator=generator)
    weights = torch.rand(6, 2, dtype=torch.float64, generator=generator)
    state = {name: tensor.clone() for name, tensor in experts.named_parameters()}
    with torch.no_grad():
        expected = experts(hidden, index, weights)
        total = torch.zeros_like(expected)
        for member in range(2):
            shards = sharding.expert_shards(model, anatomy, member, 2)
            for name, whole in state.items():
                shard = shards[f"{writer.module}.{name}"]
                assert shard.zeroed or shard.ranges is not None or name == "down_proj_bias"
                experts._parameters[name] = torch.nn.Parameter(shard.take(whole))
            total += experts(hidden, index, weights)
            for name, whole in state.items():
                experts._parameters[name] = torch.nn.Parameter(whole.clone())
    assert (total - expected).abs().max() < 1e-12


def test_experts_without_a_dispatched_forward_are_refused():
    model = empty("llama4")
    with pytest.raises(UserError, match="cannot be split over ranks"):
        sharding.expert_shards(model, find_anatomy(model), 0, 2)


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "phi3", "olmo2", "qwen3_next", "qwen3_5", "gpt_oss", "lfm2", "mixtral"]
)
def test_plans_split_every_writer_by_its_inputs(family):
    model = empty(family)
    anatomy = find_anatomy(model)
    layout = sharding.read_plan(model, anatomy, sharding.plan_of(model, model.config.model_type))
    for writer in anatomy.writers:
        assert writer.experts is not None or layout.linears[writer.module].by_inputs, writer.module


def test_writers_that_a_plan_leaves_whole_are_split_by_their_inputs():
    model = empty("llama")
    anatomy = find_anatomy(model)
    layout = sharding.read_plan(model, anatomy, {"lm_head": "colwise_gather_output"})
    assert all(layout.linears[writer.module].whole_input for writer in anatomy.writers)
    assert not sharding.splits_heads(anatomy, layout)
    with pytest.raises(UserError, match="no parallel plan"):
        sharding.read_plan(model, anatomy, {})


def test_an_unknown_style_of_a_plan_is_refused():
    model = empty("llama")
    with pytest.raises(UserError, match="diagonal"):
        sharding.read_plan(model, find_anatomy(model), {"model.layers.*.mlp.up_proj": "diagonal"})


def test_backends_are_chosen_by_table_and_unserved_families_refused():
    assert sharding.choose_backend(empty("llama"), "llama", "auto") == "autotp"
    assert sharding.choose_backend(empty("phi3"), "phi3", "auto") == "hf_plan"
    assert sharding.choose_backend(empty("starcoder2"), "starcoder2", "auto") == "hf_plan"
    with pytest.raises(UserError, match="how to split a gpt2 model"):
        sharding.choose_backend(empty("gpt2"), "gpt2", "auto")


def test_a_degree_that_does_not_divide_the_heads_is_refused():
    with pytest.raises(UserError, match=r"evaluate.degree=3 .* 4 num_attention_heads"):
        sharding.check_heads("llama", empty("llama").config, 3, "evaluate.degree")
    sharding.check_heads("llama", empty("llama").config, 2, "evaluate.degree")


def test_a_writer_left_whole_is_refused():
    model = empty("llama")
    anatomy = find_anatomy(model)
    shards = {w.weight: split(model.get_parameter(w.weight).shape, 1, 0, 2) for w in anatomy.writers}
    widths = [model.get_parameter(w.weight).shape[1] // 2 for w in anatomy.writers]
    sharding.check_degree(anatomy, shards, 2, [widths, widths])
    with pytest.raises(UserError, match="could not be split over the 2 ranks"):
        sharding.check_degree(anatomy, shards, 2, [widths, [2 * width for width in widths]])
    shards.pop(anatomy.writers[1].weight)
    with pytest.raises(UserError, match="could not be split over the 2 ranks"):
        sharding.check_degree(anatomy, shards, 2, [widths, widths])


@pytest.mark.parametrize(
    "config", [MixtralConfig(), Qwen3MoeConfig(num_key_value_heads=8)], ids=["mixtral", "qwen3_moe"]
)
@pytest.mark.parametrize("degree", [2, 4, 8])
def test_a_rank_holds_its_share_of_models_of_real_shapes(config, degree):
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config)
    anatomy = find_anatomy(model)
    layout = sharding.read_plan(model, anatomy, sharding.plan_of(model, config.model_type))
    shards = sharding.expert_shards(model, anatomy, 0, degree)
    for path, how in layout.linears.items():
        shards |= sharding.linear_shards(path, model.get_submodule(path), how, 0, degree)
    embedding = f"{anatomy.embedding}.weight"
    shards[embedding] = split(model.get_parameter(embedding).shape, 0, 0, degree)
    whole = {name: parameter.numel() for name, parameter in model.named_parameters()}
    held = sum(math.prod(shards[name].local_shape) if name in shards else size for name, size in whole.items())
    assert held * degree <= 1.02 * sum(whole.values())
