"""Blocks in stages: which blocks a stage gets, and which models' blocks can lie on different ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from heretic_ds.anatomy import find_anatomy
from heretic_ds.checkpoint import parameters_on_meta
from heretic_ds.placements.pipeline.partition import balanced
from heretic_ds.placements.pipeline.structure import CannotStage, outputs_are_tuples
from tests import families


@pytest.mark.parametrize("seed", range(40))
def test_the_heaviest_stage_is_as_light_as_can_be(seed):
    generator = torch.Generator().manual_seed(seed)
    items = int(torch.randint(1, 9, (), generator=generator))
    count = int(torch.randint(1, items + 1, (), generator=generator))
    weights = torch.randint(0, 20, (items,), generator=generator).tolist()
    groups = balanced(weights, count)
    assert list(itertools.chain(*groups)) == list(range(items))
    assert len(groups) == count and all(groups)
    cuts = itertools.combinations(range(1, items), count - 1)
    best = min(max(sum(weights[a:b]) for a, b in itertools.pairwise((0, *cut, items))) for cut in cuts)
    assert max(sum(weights[at] for at in group) for group in groups) == best


def test_a_heavy_head_leaves_the_last_stage_fewer_blocks():
    assert balanced([1, 1, 1, 1, 5], 2) == [range(4), range(4, 5)]
    assert balanced([5, 1, 1, 1, 1], 2) == [range(1), range(1, 5)]


def empty(family):
    """A model without weights, and its anatomy."""
    config = (families.REQUIRED | families.EXTRA)[family](layers=4, width=32)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with parameters_on_meta():
        model = auto.from_config(config).eval()
    return model, find_anatomy(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral", "gpt_oss", "gemma4_moe", "qwen2_vl"])
def test_blocks_that_hand_on_the_stream_alone(family):
    assert outputs_are_tuples(*empty(family)) is False


@pytest.mark.parametrize("family", ["falcon", "bloom", "mpt", "gptj"])
def test_blocks_that_hand_it_on_in_a_tuple(family):
    assert outputs_are_tuples(*empty(family)) is True


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("gemma4", "more of the stream than what the block before gave"),
        ("qwen3_5", "layers with a state of their own"),
        ("jamba", "layers with a state of their own"),
        ("llama4", "does not run without them .*NoEmbedding"),
    ],
)
def test_blocks_that_need_each_other(family, said):
    with pytest.raises(CannotStage, match=said):
        outputs_are_tuples(*empty(family))


def test_a_decoder_that_does_something_between_blocks():
    model, anatomy = empty("llama")

    block = model.get_submodule(f"{anatomy.blocks}.1")
    block.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
    with pytest.raises(
        CannotStage, match=r"does more between blocks than to hand on the stream|does not run without them"
    ):
        outputs_are_tuples(model, anatomy)
