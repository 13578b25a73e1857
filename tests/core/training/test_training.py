"""Training: clips, optimizer, resuming, and that both objectives learn."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from starflow_core.errors import InputError
from starflow_core.model.config import Denoiser
from starflow_core.model.transformer import causal
from starflow_core.training.demo import clips, flow
from starflow_core.training.demo.bank import EDIT_FRAMES, FRAMES, Bank
from starflow_core.training.demo.tokenizer import build_tokenizer
from starflow_core.training.loop import Loop, schedule
from starflow_core.training.optimiser import Muon, orthogonalised
from tests.core import models


@pytest.mark.parametrize("direction", clips.DIRECTIONS)
def test_shapes_move_as_named_and_halt(direction):
    rng = random.Random(1)
    scene = clips.random_scene(rng, 96, 96, late=0)
    while scene.direction != direction:
        scene = clips.random_scene(rng, 96, 96, late=0)
    path = clips._path(scene, torch.arange(200.0), 96, 96)
    moved, (dx, dy) = path[30] - path[0], clips.DIRECTIONS[direction]
    assert moved[0] * dx + moved[1] * dy > 15
    assert abs(moved[0] * dy) + abs(moved[1] * dx) < 1e-3
    assert torch.equal(path[-1], path[-50])
    reach = scene.radius + clips.MARGIN
    assert ((path >= reach - 1e-3) & (path <= 96 - reach + 1e-3)).all()


def test_captions_say_what_is_drawn():
    rng = random.Random(2)
    for _ in range(50):
        scene = clips.random_scene(rng, 96, 96)
        text = clips.caption(scene, rng)
        assert {scene.kind, scene.colour, scene.direction} <= set(text.split())
        still = clips.caption(replace(scene, direction=None), rng)
        assert not set(clips.DIRECTIONS) & set(still.split())


def test_recolouring_changes_only_the_colour():
    scene = replace(clips.random_scene(random.Random(3), 64, 64), colour="red", background="black")
    red, blue = clips.render([scene, scene.recoloured("blue")], 5, 64, 64)
    outside = (red == red[:, :1, :1, :1]).all(0)
    assert torch.equal(red[:, outside], blue[:, outside])
    assert not torch.allclose(red, blue)
    assert torch.equal(clips.render([scene.later(2)], 3, 64, 64)[0], red[:, 2:])


def test_orthogonalised_evens_out_singular_values():
    values = torch.linalg.svdvals(orthogonalised(models.randn(24, 40)))
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_matrices_of_one_shape_are_updated_as_each_alone():
    def trained(*weights):
        optimizer = Muon(weights)
        for step in range(3):
            for i, weight in enumerate(weights):
                weight.grad = models.randn(*weight.shape, seed=i + 10 * step)
            optimizer.step()

    together = [nn.Parameter(models.randn(6, 4, seed=i)) for i in range(2)]
    alone = nn.Parameter(together[0].detach().clone())
    trained(*together)
    trained(alone)
    torch.testing.assert_close(together[0], alone)


def test_what_is_given_is_not_learned():
    model = models.flow()
    x, text = models.randn(2, 4, 4, 2, 3), models.text(model, 2)
    whole, given, rest = model.loss(x, text), model.loss(x[:, :1], text), model.loss(x, text, given=1)
    torch.testing.assert_close(4 * whole, given + 3 * rest)


@pytest.mark.parametrize("slots", [5, 36])
def test_half_precision_gradient_of_attention_is_that_of_float32(slots):
    inputs = [models.randn(2, 3, slots, 24, seed=i) for i in range(3)]

    def gradients(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            output = causal(*leaves)
        assert output.dtype == dtype
        return torch.autograd.grad(output.float().square().sum(), leaves)

    for half, full in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert models.relative_error(half.float(), full) < 1e-3


def test_schedule_rises_stays_and_falls():
    scales = [schedule(i, 1000, 50) for i in range(1000)]
    assert scales[0] < 0.1
    assert scales[50:500] == [1.0] * 450
    assert scales[-1] == pytest.approx(0.02, abs=0.01)


def regression(folder, stop_at=None):
    """A small fit that may be interrupted; gives the averaged weights."""
    torch.manual_seed(0)
    module = nn.Linear(6, 4)

    def step(index, rng, generator):
        if index == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 6, generator=generator)
        return (module(x) - x[:, :4]).square().mean(), {"draw": rng.random()}

    loop = Loop(folder, torch.device("cpu"), torch.float32, save_every=3)
    return loop.run("fit", module, Muon(module.parameters()), step, total=10)


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    whole = regression(tmp_path / "a").state_dict()
    with pytest.raises(KeyboardInterrupt):
        regression(tmp_path / "b", stop_at=8)
    resumed = regression(tmp_path / "b").state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value)
    assert not list((tmp_path / "b").glob("*.part"))


def test_the_state_of_another_run_is_refused(tmp_path):
    regression(tmp_path)
    loop = Loop(tmp_path, torch.device("cpu"), torch.float32, seed=1)
    module = nn.Linear(4, 2)
    with pytest.raises(InputError, match=r"fit\.state\.pt is of a run with .*'seed': 0"):
        loop.run("fit", module, Muon(module.parameters()), None, total=10)


def test_a_loss_that_is_not_finite_stops(tmp_path):
    module = nn.Linear(2, 2)
    loop = Loop(tmp_path, torch.device("cpu"), torch.float32)
    with pytest.raises(FloatingPointError, match="step 0"):
        loop.run("fit", module, Muon(module.parameters()), lambda *_: (module.weight.sum() * float("nan"), {}), 3)


@pytest.fixture(scope="module")
def banks():
    rng = random.Random(4)
    scenes = [clips.random_scene(rng, 96, 96) for _ in range(16)]
    colours = [rng.choice(list(clips.COLOURS)) for _ in scenes]
    frames, edits = (FRAMES - 1) // 4 + 1, (EDIT_FRAMES - 1) // 4 + 1
    latents = models.randn(16, 4, frames, 1, 1) * torch.ones(1, 1, 1, 3, 3)  # flat: easily predicted
    return [Bank("1:1", scenes, colours, latents, latents[:, :, :edits] + 1, latents[:, :, :1])]


CONFIG = models.config(window=10, denoiser=Denoiser(48, 2, 3), text_dim=128)


def test_batches_of_every_task(banks):
    seen = set()
    for seed in range(60):
        batch = flow.draw(CONFIG, banks, random.Random(seed), progress=1.0)
        assert len(batch.prompts) == len(batch.latents)
        assert batch.latents.shape[1] <= CONFIG.window
        for mark in ("(extend)", "(v2v)", "(last)", "An image:", "A video with 16 fps:"):
            if any(mark in text for text in batch.prompts):
                seen.add((mark, batch.latents.shape[1] == 1))
    assert {"(extend)", "(v2v)", "(last)", "A video with 16 fps:"} <= {mark for mark, still in seen if not still}
    assert ("An image:", True) in seen


def test_flow_and_denoiser_learn(banks, tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "FLOW_STEPS", 60)
    monkeypatch.setattr(flow, "DENOISER_STEPS", 60)
    lines = []
    loop = Loop(tmp_path, torch.device("cpu"), torch.float32, log=lines.append)
    model = flow.train_flow(loop, CONFIG, banks, build_tokenizer(tmp_path))
    flow.train_denoiser(loop, model, banks)

    def figures(name, key):
        found = [line.split() for line in lines if line.startswith(name)]
        return [float(words[words.index(key) + 1]) for words in found]

    losses = figures("flow", "loss")
    assert losses[-1] < losses[0] - 0.2
    errors = figures("denoiser", "error")
    assert errors[-1] < 0.7 * errors[0]
