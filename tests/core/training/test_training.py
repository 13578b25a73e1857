"""What training any model needs: the loop and its states, the optimizer, both objectives."""

from __future__ import annotations

import math
import os
import shutil

import pytest
import torch
from torch import nn

from starflow_core.errors import InputError, NonFiniteError
from starflow_core.model.flow import Flow
from starflow_core.model.transformer import causal
from starflow_core.solve.denoising import denoise, score_denoise
from starflow_core.training import loop as loop_module
from starflow_core.training.loop import Check, Loop, schedule
from starflow_core.training.objectives import denoiser_loss, with_fresh_weights, with_noise
from starflow_core.training.optimiser import Muon, orthogonalised, set_rates
from tests.core import models

CPU = torch.device("cpu")


# Optimizer


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


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (6, 2, 2)])
def test_matrices_follow_their_orthogonalised_momentum(shape):
    weight = nn.Parameter(models.randn(*shape))
    optimizer = Muon([weight], lr=0.1, momentum=0.9)
    expected = weight.detach().flatten(1).clone()
    momentum = torch.zeros_like(expected)
    for step in range(3):
        weight.grad = models.randn(*shape, seed=1 + step)
        gradient = weight.grad.flatten(1).clone()
        momentum = 0.9 * momentum + 0.1 * gradient
        direction = orthogonalised(0.1 * gradient + 0.9 * momentum)
        expected -= 0.1 * math.sqrt(max(1, shape[0] / expected.shape[1])) * direction
        optimizer.step()
    torch.testing.assert_close(weight.detach().flatten(1), expected)


def test_vectors_and_embeddings_are_updated_by_adam():
    found = [nn.Parameter(models.randn(*shape)) for shape in ((5,), (7, 3), (1, 1, 4))]
    wanted = [nn.Parameter(p.detach().clone()) for p in found]
    optimizers = Muon(found, adam_lr=0.01, vectors=[found[1]]), torch.optim.Adam(wanted, 0.01, (0.9, 0.99))
    for step in range(3):
        for ours, theirs in zip(found, wanted, strict=True):
            ours.grad = models.randn(*ours.shape, seed=step)
            theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(found, wanted)


def test_both_learning_rates_are_scaled():
    optimizer = Muon([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))], lr=0.4, adam_lr=0.2)
    for scale in (0.5, 0.25):
        set_rates(optimizer, scale)
        assert [group["lr"] for group in optimizer.param_groups] == [0.4 * scale, 0.2 * scale]


# Loop


def test_schedule_rises_stays_and_falls():
    scales = [schedule(i, 1000, 50) for i in range(1000)]
    assert scales[0] < 0.1
    assert scales[50:500] == [1.0] * 450
    assert scales[-1] == pytest.approx(0.02, abs=0.01)


class Descent(torch.optim.SGD):
    """Along the gradient, at the rate of the schedule."""

    def __init__(self, parameters, lr=1.0):
        super().__init__(parameters, lr)


def descend(folder, gradients, **options):
    """The average of weights that begin at 0, after a step along each of the gradients."""
    module = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(module.weight)

    def step(index, rng, generator):
        yield (module.weight * torch.tensor(gradients[index])).sum(), {}

    loop = Loop(folder, CPU, torch.float32)
    return loop.run("fit", module, Descent(module.parameters()), step, len(gradients), **options).weight[0].tolist()


def test_each_step_takes_its_own_gradient_clipped(tmp_path):
    weights = descend(tmp_path, [(30.0, 40.0), (0.0, 0.1)], warmup=1, ema=0.0)
    assert weights == pytest.approx([-0.6, -0.9], abs=1e-6)


def test_rates_follow_the_schedule(tmp_path):
    weights = descend(tmp_path, [(0.1, 0.0)] * 8, warmup=4, ema=0.0)
    assert weights[0] == pytest.approx(-0.1 * sum(schedule(i, 8, 4) for i in range(8)))


def test_the_average_forgets_its_beginning_sooner(tmp_path):
    """By min(decay, (n + 1) / (n + 10)), in step n."""
    average = descend(tmp_path, [(-0.4, -0.8), (-0.2, 0.0)], warmup=1, ema=0.15)
    first = [0.9 * 0.4, 0.9 * 0.8]
    assert average == pytest.approx([0.15 * first[0] + 0.85 * 0.6, 0.15 * first[1] + 0.85 * 0.8])


def test_checks_see_the_average_and_leave_the_weights(tmp_path):
    module, seen = nn.Linear(2, 1, bias=False), []
    nn.init.zeros_(module.weight)

    def step(index, rng, generator):
        yield -0.4 * module.weight[0, 0], {}

    def look(done):
        seen.append((done, module.weight[0, 0].item(), module.training))
        return {"seen": 1.0}

    checks = [Check(2, look)]
    loop = Loop(tmp_path, CPU, torch.float32)
    loop.run("fit", module, Descent(module.parameters()), step, 3, warmup=1, fall=0.0, ema=0.5, checks=checks)
    average, weights = 0.0, 0.0
    expected = {}
    for index in range(3):
        weights += 0.4
        decay = min(0.5, (index + 1) / (index + 10))
        average = decay * average + (1 - decay) * weights
        expected[index + 1] = average
    assert [done for done, _, _ in seen] == [2, 3]
    assert [value for _, value, _ in seen] == pytest.approx([expected[2], expected[3]])
    assert not any(training for _, _, training in seen)


def test_draws_depend_on_stage_seed_and_step(tmp_path):
    def draws(folder, name, seed):
        module, drawn = nn.Linear(2, 1), []

        def step(index, rng, generator):
            drawn.extend((rng.random(), torch.rand((), generator=generator).item()))
            yield module.weight.sum(), {}

        Loop(tmp_path / folder, CPU, torch.float32, seed).run(name, module, Descent(module.parameters()), step, 3)
        return drawn

    runs = [draws("a", "fit", 0), draws("b", "fit", 1), draws("c", "other", 0)]
    assert draws("d", "fit", 0) == runs[0]
    assert len({number for run in runs for number in run}) == 18


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matrix_products_are_in_the_loops_type(tmp_path, dtype):
    module, seen = nn.Linear(2, 1), []

    def step(index, rng, generator):
        output = module(torch.ones(1, 2))
        seen.append(output.dtype)
        yield output.float().sum(), {}

    Loop(tmp_path, CPU, dtype).run("fit", module, Descent(module.parameters()), step, 1)
    assert seen == [dtype]
    assert module.weight.dtype == torch.float32


def test_shortened_schedules_keep_a_step():
    loop = Loop(None, CPU, scale=0.01)
    assert [loop.scaled(steps) for steps in (1000, 149, 10)] == [10, 1, 1]


def test_progress_is_logged(tmp_path):
    lines = []
    module = nn.Linear(2, 1)
    loop = Loop(tmp_path, CPU, torch.float32, log=lines.append)
    loop.run(
        "fit", module, Descent(module.parameters()), lambda index, *_: iter([(module.bias.sum(), {"x": index / 8})]), 23
    )
    shown = [line.partition("  ")[0::2] for line in lines]
    assert [head for head, _ in shown] == ["fit 1/23", "fit 20/23", "fit 23/23"]
    assert [rest.split("  ")[0] for _, rest in shown] == ["x 0", "x 2.375", "x 2.75"]


def regression(folder, stop_at=None):
    """A small fit that may be interrupted; gives the averaged weights."""
    torch.manual_seed(0)
    module = nn.Linear(6, 4)

    def step(index, rng, generator):
        if index == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 6, generator=generator)
        yield (module(x) - x[:, :4]).square().mean(), {"draw": rng.random()}

    loop = Loop(folder, CPU, torch.float32, save_every=3)
    return loop.run("fit", module, Muon(module.parameters()), step, total=10)


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    whole = regression(tmp_path / "a").state_dict()
    with pytest.raises(KeyboardInterrupt):
        regression(tmp_path / "b", stop_at=8)
    resumed = regression(tmp_path / "b").state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value)
    assert not list((tmp_path / "b").glob("*.part"))


def test_what_is_done_is_not_done_again(tmp_path):
    """States are saved every third step, and at the end."""
    for stop_at, done in ((5, 3), (8, 6), (None, 10)):
        if stop_at is None:
            regression(tmp_path)
        else:
            with pytest.raises(KeyboardInterrupt):
                regression(tmp_path, stop_at)
        assert sorted(path.name for path in tmp_path.iterdir())[-1] == f"fit-{done:07d}"
    regression(tmp_path, stop_at=9)  # nothing is left to interrupt


def test_the_state_of_another_run_is_refused(tmp_path):
    regression(tmp_path)
    loop = Loop(tmp_path, CPU, torch.float32, seed=1)
    module = nn.Linear(4, 2)
    with pytest.raises(InputError, match=r"fit-0000010 belongs to a run with seed 0 \(this one: 1\)"):
        loop.run("fit", module, Muon(module.parameters()), None, total=10)


def test_how_long_is_left_follows_the_last_steps(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(loop_module.time, "monotonic", lambda: clock[0])
    pace = loop_module._Pace(200)
    for step in range(100):
        clock[0] += 10 if step < 50 else 3
        pace.step()
    assert pace.seconds == 3
    assert str(pace) == "3.00 s/step, 5.0 min left"


def test_a_damaged_state_is_named(tmp_path):
    evil = b"cposix\nsystem\n(S'touch executed'\ntR."
    for name, damage in (
        (".metadata", lambda data: data[:300]),
        (".metadata", lambda data: b""),
        (".metadata", lambda data: evil),
        ("__0_0.distcp", lambda data: data[:500]),
        ("run.json", lambda data: data[:-1]),
    ):
        with pytest.raises(KeyboardInterrupt):
            regression(tmp_path, stop_at=4)
        state = tmp_path / "fit-0000003"
        path = state / name
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(InputError, match=r"fit-0000003 is damaged \(.+\); remove it"):
            regression(tmp_path)
        shutil.rmtree(state)
    assert not os.path.exists("executed")


def test_a_loss_that_is_not_finite_stops(tmp_path):
    module = nn.Linear(2, 2)
    loop = Loop(tmp_path, CPU, torch.float32)

    def step(index, rng, generator):
        yield module.weight.sum() * float("nan"), {}

    with pytest.raises(NonFiniteError, match=r"step 1 \(first in weight\)"):
        loop.run("fit", module, Muon(module.parameters()), step, 3)


# Objectives


def test_what_is_given_is_not_learned():
    model = models.flow()
    x, text = models.randn(2, 4, 4, 2, 3), models.text(model, 2)
    whole, given, rest = model.loss(x, text), model.loss(x[:, :1], text), model.loss(x, text, given=1)
    torch.testing.assert_close(4 * whole, given + 3 * rest)


def test_a_fresh_flow_adds_nothing():
    """It is the identity, and every layer hands on what it gets."""
    torch.manual_seed(0)
    flow = with_fresh_weights(Flow(models.config()))
    x = models.randn(2, 3, 4, 2, 2)
    encoding = flow.encode(x, models.text(flow, 2))
    torch.testing.assert_close(encoding.noise, x)
    assert max(logdet.abs().max() for logdet in encoding.logdets) < 1e-6
    hidden = models.randn(2, 4, 48)
    for layer in flow.shallow[0].attn_blocks:
        assert torch.equal(layer(hidden, flow.frame_rotary(flow.grid(x), None), causal), hidden)
    assert flow.shallow[0].proj_in.weight.detach().std() == pytest.approx(4**-0.5, rel=0.2)


def test_noise_has_its_level_and_generator():
    latents = models.randn(2, 3, 4, 8, 8)
    noisy, again, other = (
        with_noise(latents, 0.3, torch.Generator().manual_seed(seed), CPU) - latents for seed in (0, 0, 1)
    )
    assert noisy.std() == pytest.approx(0.3, rel=0.05)
    assert torch.equal(noisy, again)
    assert not torch.equal(noisy, other)


def test_the_denoiser_learns_the_score_step():
    model = models.flow()
    clean, text = models.randn(2, 3, 4, 2, 2), models.text(model, 2)
    noisy = clean + 0.3 * models.randn(*clean.shape, seed=1)
    loss, figures = denoiser_loss(model, model.learnable_self_denoiser, clean, noisy, text)
    learned, exact = denoise(model, noisy, text), score_denoise(model, noisy, text)

    def error(found, wanted):
        return pytest.approx((found - wanted).square().mean().item() / 0.3**2, rel=1e-4)

    assert figures == {
        "error": error(learned, exact), "noise left": error(learned, clean), "by score": error(exact, clean)
    }  # fmt: skip
    assert loss.item() == figures["error"]


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
