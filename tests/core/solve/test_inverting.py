"""The exact inverse of sampling: over random flows, with guidance, windows, given frames, batches and caches."""

from __future__ import annotations

import random

import pytest
import torch

from starflow_core.control import Control
from starflow_core.errors import Cancelled, InputError, NonFiniteError
from starflow_core.model.cache import CacheSettings
from starflow_core.solve.inverting import invert
from starflow_core.solve.sampling import sample
from starflow_core.solve.solvers import AUTOREGRESSIVE, PRESETS
from tests.core import models
from tests.core.models import random_case, relative_error


@pytest.mark.parametrize("seed", range(24))
def test_sampling_what_was_inverted_gives_it_back(seed):
    flow, latents = random_case(seed)
    rng, frames = random.Random(seed), latents.shape[1]
    window = rng.randint(2, frames) if frames > 1 else None
    given = rng.randint(0, min(window, frames - 1)) if window else 0
    options = {
        "guidance": rng.choice((0.0, 1.5)),
        "window": window,
        "keep": rng.randint(1, window - 1) if window else None,
    }
    text, uncond = models.text(flow, len(latents)), models.text(flow, seed=3)
    found = invert(flow, latents, text, uncond, given=given, **options)
    context = latents[:, :given] if given else None
    solver = rng.choice((AUTOREGRESSIVE, PRESETS["exact"]))
    again = sample(flow, found.noise, text, uncond, context=context, settings=solver, **options).latents
    assert relative_error(again, latents) < 1e-6
    assert found.surprise.shape == flow.tokens(latents).shape[:3]
    assert (found.surprise[:, :given] == 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_within_a_window_it_is_the_flows_own(seed):
    flow, latents = random_case(seed)
    text = models.text(flow, len(latents))
    exact = flow.encode(latents, text)
    found = invert(flow, latents, text, window=latents.shape[1])
    assert relative_error(found.noise, exact.noise) < 1e-9
    torch.testing.assert_close(found.log_likelihood, exact.log_likelihood)


def test_likelihoods_of_windows_and_given_frames_add_up():
    """Chain rule: all frames, or the first ones and then the others given these."""
    flow, latents = models.flow(), models.randn(2, 4, 4, 2, 3, seed=4)
    text = models.text(flow, 2)
    whole = invert(flow, latents, text)
    start = invert(flow, latents[:, :2], text)
    rest = invert(flow, latents, text, given=2)
    torch.testing.assert_close(start.log_likelihood + rest.log_likelihood, whole.log_likelihood)
    torch.testing.assert_close(whole.surprise[:, 2:], rest.surprise[:, 2:])


def test_a_change_surprises_where_it_is():
    flow, latents = models.flow(), models.randn(1, 4, 4, 3, 3, seed=4) * 0.5
    changed = latents.clone()
    changed[0, 2, :, 1, 2] += 6
    more = (invert(flow, changed, models.text(flow)).surprise - invert(flow, latents, models.text(flow)).surprise)[0]
    assert divmod(int(more.argmax()), 9) == (2, 5)
    assert (more[:2].abs() < 1e-4).all()


@pytest.mark.parametrize("cache", [CacheSettings(True), CacheSettings(True, True)])
def test_other_caches_are_near(cache):
    flow, latents = models.flow(), models.randn(1, 5, 4, 12, 12, seed=4)
    text = models.text(flow)
    exact, found = invert(flow, latents, text), invert(flow, latents, text, cache=cache)
    assert 0 < relative_error(found.noise, exact.noise) < 1e-3


def test_what_cannot_be_inverted():
    flow, latents = models.flow(), models.randn(1, 2, 4, 2, 2)
    with pytest.raises(InputError, match="guidance needs the unconditional text"):
        invert(flow, latents, models.text(flow), guidance=1.0)
    flow.deep.proj_out.bias.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="block 2: batch element 0, latent frame 0, token 0"):
        invert(flow, latents, models.text(flow))


def test_progress_and_cancel():
    flow, latents, seen = models.flow(), models.randn(1, 7, 4, 2, 2), []
    invert(flow, latents, models.text(flow), control=Control(seen.append))
    deep = [(p.step, p.total) for p in seen if p.phase == "deep"]
    assert deep == [(20, 28), (24, 28), (28, 28)]  # windows of 5 frames that keep 4
    for moment in range(len(seen)):
        left = iter([False] * moment + [True])
        with pytest.raises(Cancelled):
            invert(flow, latents, models.text(flow), control=Control(cancelled=lambda left=left: next(left)))
