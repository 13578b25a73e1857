"""Sampling around known cells, on random models: what is known comes back, and what isn't is sampled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from starflow_core.control import Control
from starflow_core.errors import Cancelled, InputError, NonFiniteError
from starflow_core.solve import noise as draws
from starflow_core.solve.filling import OPENING, Particles, fill_in
from starflow_core.solve.sampling import sample
from starflow_core.solve.solvers import AUTOREGRESSIVE, PRESETS
from tests.core import models

EXACT = PRESETS["exact"]


def case(seed: int):
    """A random flow with one clip's latents, and some of its cells, at random."""
    flow, latents = models.random_case(seed)
    latents = latents[:1]
    grid = flow.grid(latents)
    known = models.randn(grid.frames, grid.height, grid.width, seed=seed + 50) > 0
    return flow, latents, known, models.text(flow, seed=seed)


def cells(flow, latents):
    """Latents as tokens (T, h, w, c)."""
    grid = flow.grid(latents)
    return flow.tokens(latents)[0].unflatten(1, (grid.height, grid.width))


@pytest.mark.parametrize("seed", range(12))
def test_known_cells_come_back_to_the_bit(seed):
    flow, latents, known, text = case(seed)
    found = fill_in(flow, latents, known, text, models.text(flow, seed=9), guidance=0.7, particles=3, seed=seed)
    assert torch.equal(cells(flow, found.latents)[known], cells(flow, latents.float())[known])
    assert found.latents.shape == latents.shape
    assert torch.isfinite(found.latents).all()
    assert len(found.effective) == latents.shape[1]
    assert all(0.99 < n <= 3 * OPENING + 1e-3 for n in found.effective)


@pytest.mark.parametrize("seed", range(6))
def test_with_everything_known_the_clip_comes_back(seed):
    flow, latents, known, text = case(seed)
    found = fill_in(flow, latents, torch.ones_like(known), text, particles=2)
    assert torch.equal(found.latents, latents.float())


@pytest.mark.parametrize("seed", range(8))
def test_with_nothing_known_it_is_plain_sampling(seed):
    flow, latents, known, text = case(seed)
    uncond = models.text(flow, seed=9)
    z = draws.draw(seed, 1, *latents.shape[1:2], tuple(latents.shape[2:]))
    plain = sample(flow, z, text, uncond, guidance=1.2, settings=AUTOREGRESSIVE).latents
    found = fill_in(
        flow, latents, torch.zeros_like(known), text, uncond, guidance=1.2, particles=2, seed=seed, settings=EXACT
    )  # fmt: skip
    assert models.relative_error(found.latents, plain) < 1e-9


def test_beyond_the_window_it_is_plain_sampling_too():
    flow = models.flow(3)
    z = draws.draw(4, 1, 9, (4, 2, 3))
    text = models.text(flow)
    plain = sample(flow, z, text, window=3, keep=2, settings=AUTOREGRESSIVE).latents
    known = torch.zeros(9, 2, 3, dtype=torch.bool)
    found = fill_in(flow, z, known, text, particles=2, seed=4, window=3, keep=2, settings=EXACT)
    assert models.relative_error(found.latents, plain) < 1e-9


def missing_frames(flow, particles, seed, only=None):
    """A sampled clip of 5 frames, of which the third is missing, filled with all particles or with `only` one."""
    z = draws.draw(11, 1, 5, (4, 2, 3))
    text = models.text(flow)
    clip = sample(flow, z, text, settings=AUTOREGRESSIVE).latents
    known = torch.ones(5, 2, 3, dtype=torch.bool)
    known[2] = False
    state = Particles(flow, clip, known, text, particles=particles, seed=seed, settings=EXACT)
    if only is not None:
        noise, state = state.noise, Particles(flow, clip, known, text, particles=1, settings=EXACT)
        state.noise, state.first_noise = noise[only : only + 1], noise[only : only + 1, :1]
    return clip, state.run()


def test_a_missing_frame_is_that_of_one_of_the_particles():
    """Nothing in it is known, so each particle samples it as it would alone; the frames after it choose one."""
    flow = models.flow(5)
    _, found = missing_frames(flow, 4, seed=20)
    frames = [missing_frames(flow, 4, seed=20, only=i)[1].latents[:, 2] for i in range(4)]
    assert min(models.relative_error(found.latents[:, 2], frame) for frame in frames) < 1e-9


def test_the_frames_after_a_missing_one_choose_the_likeliest():
    """With the weights of whole frames exact, the particle that lives on is one that the known frames are likely after:
    the clip is likelier than the mean of those of single ones."""
    flow = models.flow(5)
    text = models.text(flow)
    gains = []
    for seed in range(0, 40, 8):
        _, found = missing_frames(flow, 8, seed=seed)
        alone = [missing_frames(flow, 8, seed=seed, only=i)[1].latents for i in range(8)]
        clips = [found.latents, *alone]
        _, *later = zip(*(_later(flow, clip, text) for clip in clips), strict=True)
        gains.append(later[0][0] - sum(later[0][1:]) / 8)
    assert sum(gains) > 0, gains
    assert sum(gain > 0 for gain in gains) >= 4, gains


def _later(flow, clip, text):
    """Log-likelihoods of the frames before the missing one and after it."""
    encoding = flow.encode(clip, text)
    nats = flow.tokens(-0.5 * encoding.noise.square()).sum(-1) + sum(d.sum(-1) for d in encoding.logdets)
    return float(nats[0, :2].sum()), float(nats[0, 3:].sum())


def test_the_first_frame_takes_more_particles_where_it_has_a_seam():
    flow, text = models.flow(1), models.text(models.flow(1))
    latents, known = models.randn(1, 3, 4, 2, 3), torch.ones(3, 2, 3, dtype=torch.bool)
    known[:, :, 0] = False
    state = Particles(flow, latents, known, text, particles=3)
    assert state.rows == 3 * OPENING
    state.run()
    assert state.rows == 3
    known[0] = True
    assert Particles(flow, latents, known, text, particles=3).rows == 3


@pytest.mark.parametrize(("particles", "frames"), [(4, 1), (4, 2), (1, 1)])
def test_effective_counts_what_is_known_at_the_end_of_the_last_frame(particles, frames):
    """The weights of tokens after the last one that was sampled count there, with nothing left to branch for."""
    flow = models.flow(5)
    latents, known = models.randn(1, frames, 4, 2, 3) * 3, torch.zeros(frames, 2, 3, dtype=torch.bool)
    known[-1] = True
    first = flow.deep.ordered(torch.arange(6.0).view(1, 6, 1))[0, 0, 0].int()
    known[-1].view(-1)[first] = False  # all but the first in the block's order
    state = Particles(flow, latents, known, models.text(flow), particles=particles, settings=EXACT)
    found = state.run()
    assert len(found.effective) == frames
    if particles > 1:
        assert found.effective[-1] < state.rows * 0.999
        assert found.effective[-1] == pytest.approx(float(1 / state.weights.softmax(0).square().sum()))


def test_resampled_particles_keep_their_own_past():
    """Rows of the cache move with the particles: evaluating again from the tokens alone gives the same."""
    flow, latents = models.flow(2), models.randn(1, 4, 4, 3, 3, seed=2) * 3
    known = torch.ones(4, 3, 3, dtype=torch.bool)
    known[:, :, 1] = False
    state = Particles(flow, latents, known, models.text(flow), models.text(flow, seed=3), guidance=0.5, particles=4)
    state._begin(1)
    state._frame(0)
    state._choose(4)
    state._begin(4)
    for index in (1, 2):
        state._slide(index)
        state._frame(index)
    before = torch.cat((state.deep[:, -1, -1:], state.deep[:, 0]), 1)
    seen = state._surprise(before, 27)
    state._begin(4)
    assert models.relative_error(state._surprise(before, 27), seen) < 1e-8


def test_the_same_seed_gives_the_same():
    flow, latents, known, text = case(3)
    options = {"particles": 4, "settings": EXACT}
    one, two, other = (fill_in(flow, latents, known, text, seed=s, **options).latents for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_seeds_share_no_noise():
    """Nor do the particles of one; the first one's is that of the seed, and a first frame's more have one frame."""
    flow, text = models.flow(1), models.text(models.flow(1))
    latents, known = models.randn(1, 3, 4, 2, 3), torch.ones(3, 2, 3, dtype=torch.bool)
    known[:, :, 0] = False
    states = [Particles(flow, latents, known, text, particles=3, seed=seed) for seed in (0, 1, 2, 2**64 - 1)]
    firsts = [tuple(row.flatten().tolist()) for state in states for row in state.first_noise]
    assert len(set(firsts)) == len(firsts) == 4 * 3 * OPENING
    for state in states:
        assert torch.equal(state.noise[:1], draws.draw(state.seed, 1, 3, (4, 2, 3)))
        assert torch.equal(state.first_noise[:3], state.noise[:, :1])
        assert state.noise.shape == (3, 3, 4, 2, 3)
        assert state.first_noise.shape == (3 * OPENING, 1, 4, 2, 3)


def test_cancelled_at_any_token():
    flow, latents, known, text = models.flow(1), models.randn(1, 3, 4, 2, 3), torch.zeros(3, 2, 3) > 0, None
    known[:, 0] = True
    text, steps = models.text(flow), []
    fill_in(flow, latents, known, text, control=Control(steps.append))
    deep = [step.settled for step in steps if step.phase == "deep"]
    assert deep == sorted(deep)
    assert {step.tokens for step in steps if step.phase == "deep"} == {18}
    for stop in (1, len(steps) // 2, len(steps) - 1):
        left = iter(range(stop))
        with pytest.raises(Cancelled):
            fill_in(flow, latents, known, text, control=Control(cancelled=lambda left=left: next(left, None) is None))


@pytest.mark.parametrize(("change", "message"), [
    ({"particles": 0}, "particles is 0; the minimum is 1"),
    ({"guidance": 1.0}, "guidance needs the unconditional text"),
    ({"known": torch.ones(2, 2, 3) > 0}, r"known cells of shape \(2, 2, 3\), the tokens are \(3, 2, 3\)"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change, message):
    flow = models.flow(1)
    given = {"latents": models.randn(1, 3, 4, 2, 3), "known": torch.ones(3, 2, 3) > 0, "text": models.text(flow)}
    with pytest.raises(InputError, match=message):
        fill_in(flow, **{**given, **change})


def test_infinities_are_named():
    flow = models.flow(1)
    flow.blocks[0].proj_out.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="block 0"):
        fill_in(flow, models.randn(1, 3, 4, 2, 3), torch.rand(3, 2, 3) > 0.5, models.text(flow))


def test_settings_of_the_solver_reach_the_shallow_blocks():
    flow, latents, known, text = case(3)
    rough = replace(PRESETS["fast"], shallow_tolerance=0.9, max_sweeps=1)
    one, two = (fill_in(flow, latents, known, text, settings=settings).latents for settings in (EXACT, rough))
    assert not torch.equal(one, two)
