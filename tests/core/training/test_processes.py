"""Shares of a batch, states on a full disk, and what a run tells."""

from __future__ import annotations

import errno
import json
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from starflow_core.errors import InputError
from starflow_core.training.processes import Processes, shard
from starflow_core.training.states import States
from starflow_core.training.watch import watching
from starflow_core.weights.flow import load_flow
from starflow_core.weights.tensorfiles import TensorFile
from tests.core import models, tiny


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_shares_add_up_to_the_mean_over_the_batch(count):
    """Every process has as many rows; each row of the batch counts once, whatever is taken twice."""
    for batch in range(1, 12):
        shares = [Processes(rank, count).share(batch) for rank in range(count)]
        assert len({len(share.rows) for share in shares}) == 1
        weights = torch.zeros(batch)
        for share in shares:
            weights.index_add_(0, torch.tensor(share.rows), torch.tensor(share.weights) / count)
        torch.testing.assert_close(weights, torch.full((batch,), 1 / batch))


def test_pieces_are_the_share_in_order():
    share = Processes(1, 2).share(10)
    for size in (None, 1, 2, 3, 9):
        pieces = list(share.pieces(size))
        assert [row for piece in pieces for row in piece.rows] == share.rows
        assert [weight for piece in pieces for weight in piece.weights] == share.weights
        assert all(len(piece.rows) <= (size or 10) for piece in pieces)


@pytest.fixture
def group():
    """This process as the only one of its group."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_weights_in_8_bit_are_the_same_when_they_are_spread(group, tmp_path):
    """Also where products are in bfloat16: nothing of them is rounded."""
    path = tmp_path / "flow.safetensors"
    tiny.write_flow(path)
    flow = load_flow(TensorFile.open(path), torch.bfloat16, quantise=True)
    latents = models.randn(1, 3, tiny.CHANNELS, 4, 4, seed=1)
    text = models.randn(1, flow.config.prompt.tokens, tiny.TEXT_DIM, seed=2)
    wanted = flow(latents, text)
    shard(flow, torch.bfloat16)
    found = flow(latents, text)
    assert torch.equal(found.noise, wanted.noise)
    assert torch.equal(found.log_likelihood, wanted.log_likelihood)


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 2), value), "b": torch.tensor(value)}


def test_a_full_disk_keeps_the_last_state(tmp_path, monkeypatch):
    states = States(tmp_path, "fit", Processes())
    assert states.begin({}) == 0
    states.save(tensors(1.0), {}, 1)
    states.finish()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
        states.save(tensors(2.0), {}, 2)
        with pytest.raises(
            InputError, match=r"step 2 can't be written .*No space left.*; the last good one is of step 1"
        ):
            states.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["fit-0000001"]
    again = States(tmp_path, "fit", Processes())
    assert again.begin({}) == 1
    found = tensors(0.0)
    again.load(1, found)
    assert {name: tensor.mean().item() for name, tensor in found.items()} == {"a": 1.0, "b": 1.0}


def test_what_is_being_written_is_what_was_there(tmp_path):
    """Training goes on meanwhile, in place."""
    states, changing = States(tmp_path, "fit", Processes()), {"a": torch.zeros(1 << 20)}
    states.begin({})
    states.save(changing, {}, 1)
    changing["a"] += 1
    states.finish()
    found = {"a": torch.ones(1 << 20)}
    states.load(1, found)
    assert not found["a"].any()


def test_two_states_are_kept(tmp_path):
    states = States(tmp_path, "fit", Processes())
    states.begin({})
    for step in (1, 2, 3):
        states.save(tensors(step), {}, step)
    states.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit-0000002", "fit-0000003"]


def test_figures_go_on_where_a_state_was(tmp_path):
    def note(first, last, value):
        with watching(tmp_path, lambda line: None) as watch:
            for step in range(first, last):
                watch.note(step, {"loss": value})

    note(1, 6, 1.0)
    with open(tmp_path / "figures.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')  # cut off
    note(4, 8, 2.0)
    lines = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (7, 2)]


def test_figures_are_in_tensorboard_files(tmp_path):
    with watching(tmp_path, pytest.fail) as watch:
        watch.note(1, {"held out bits/dim": 0.5})
        watch.note(2, {"held out bits/dim": 0.25})
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("held_out_bits/dim")
    assert [(event.step, event.value) for event in found] == [(1, 0.5), (2, 0.25)]


def test_without_tensorboard_it_says_so(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with watching(tmp_path, lines.append) as watch:
        watch.note(1, {"loss": 1.0})
    assert lines == ["no TensorBoard files: the package tensorboard is missing"]
