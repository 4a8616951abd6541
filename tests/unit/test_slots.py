"""Rows in slots: they come, move and go on, and see what is theirs alone."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from heretic_ds.runner.forward import Begun, Forward
from heretic_ds.runner.grouped_attention import per_key_head
from heretic_ds.runner.rows import Row
from heretic_ds.runner.slots import Slots
from tests import families

ROWS = [[9, 30, 41, 17, 22], [12, 50], [33, 8, 19, 60, 71, 15, 44]]


@pytest.fixture(scope="module", params=["llama", "gemma2", "mistral", "gpt_oss", "qwen3_moe"])
def model(request):
    """Full attention, windows of four positions in some layers or all, additive masks, experts."""
    return families.build(request.param)


def slots_of(model, rows, columns):
    return Slots(Forward(model, families.PAD), rows, columns)


def join(model, slots, rows, at):
    forward = Forward(model, families.PAD)
    cache = forward.growing_cache()
    begun = forward([Row(row) for row in rows], cache)
    slots.join(begun, cache, begun.logits_BV.argmax(-1), at)


def whole(model, rows):
    """Last logits of each row by itself, without a cache."""
    return torch.cat([model(input_ids=torch.tensor([row]), use_cache=False).logits[:, -1] for row in rows])


def advance(model, slots, rows, held, columns):
    """One step, compared with whole passes; `held` is how many rows the step has."""
    found_BV = slots.logits(held, columns)
    for row, slot in rows:
        row.append(slots.token_R[slot].item())
        torch.testing.assert_close(found_BV[slot], whole(model, [row])[0], atol=2e-5, rtol=1e-4)
    slots.answer(held, columns)
    slots.advance(held)


@pytest.mark.parametrize("room", [(6, 16), (2, 8)])
@torch.inference_mode()
def test_rows_that_come_move_and_take_a_used_slot_go_on_as_if_alone(model, room):
    """Also where memory grows on the way."""
    slots = slots_of(model, *room)
    slots.reserve(5, 8)
    first, second, third = (list(row) for row in ROWS)
    join(model, slots, [third, first], at=[4, 1])
    slots.reserve(6, 12)
    for _ in range(2):
        advance(model, slots, [(third, 4), (first, 1)], held=6, columns=12)
    slots.move([4], [0], columns=10)
    join(model, slots, [second], at=[1])  # where another row was, of more columns
    slots.reserve(0, 16)
    for _ in range(3):
        advance(model, slots, [(third, 0), (second, 1)], held=2, columns=16)
    assert (slots.rows, slots.columns) == (6, 16)


@torch.inference_mode()
def test_padding_may_lie_anywhere_before_the_last_token():
    """As behind tokens that all rows share."""
    slots, columns = slots_of(families.build("llama"), 2, 4), torch.arange(5.0)
    cache = slots._forward.growing_cache()
    for layer in cache.layers:
        layer.update(columns.view(1, 1, 5, 1).expand(2, 2, 5, 8), columns.view(1, 1, 5, 1).expand(2, 2, 5, 8))
    mask_BS = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 1]])
    slots.join(Begun(columns, mask_BS, columns), cache, torch.tensor([7, 8]), [1, 0])
    for layer in slots._layers:
        for memory in (layer.keys, layer.values):
            assert memory[1, :, :3].tolist() == columns[[0, 1, 4]].view(1, 3, 1).expand(2, 3, 8).tolist()
            assert memory[0].tolist() == columns[1:].view(1, 4, 1).expand(2, 4, 8).tolist()
    assert slots.position_R.tolist() == [4, 3] and slots.token_R.tolist() == [8, 7]


@torch.inference_mode()
def test_a_step_that_is_taken_again_gives_the_same(model):
    slots = slots_of(model, 3, 10)
    join(model, slots, ROWS, at=[0, 1, 2])
    first = slots.logits(3, 10)
    assert torch.equal(slots.logits(3, 10), first)


@torch.inference_mode()
def test_a_row_past_its_columns_harms_no_other():
    """Rows that are done go on until they leave."""
    model = families.build("llama")
    slots = slots_of(model, 2, 8)
    join(model, slots, [ROWS[2], ROWS[1]], at=[0, 1])
    second = list(ROWS[1])
    for _ in range(4):
        advance(model, slots, [(second, 1)], held=2, columns=8)
    assert slots.position_R[0] == 11


@pytest.mark.parametrize("window", [4, 512])
def test_masks_are_of_one_kind_whatever_the_columns(window):
    """So that a model's first step shows whether it can take them, and not the first one past its window."""
    model = families.build("gemma2")
    model.config.sliding_window = window
    slots = slots_of(model, 1, 16)
    for columns in (3, 16):
        masks = slots._masks(torch.arange(columns), torch.tensor([[columns - 1]]))
        assert sorted(masks) == ["full_attention", "sliding_attention"]
        assert masks["full_attention"].sum() == columns
        assert masks["sliding_attention"].sum() == min(columns, window)


def test_memory_for_rows_comes_before_steps():
    model = families.build("llama")
    with pytest.raises(RuntimeError, match="before any prompt"), torch.inference_mode():
        slots_of(model, 2, 8).logits(2, 8)


def test_attention_per_key_head_is_that_of_transformers():
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.randn(3, heads, length, size, generator=generator)
        for heads, length, size in ((6, 1, 8), (2, 7, 8), (2, 7, 5))
    )
    mask = torch.rand(3, 1, 1, 7, generator=generator) > 0.4
    mask[..., 0] = True
    module = torch.nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    found, _ = per_key_head(module, query, key, value, mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert found.shape == expected.shape == (3, 1, 6, 5)
    torch.testing.assert_close(found, expected)
