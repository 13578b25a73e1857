"""Properties that hold of every flow, on small random ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from starflow_core.solve.sampling import Sampler, sample
from starflow_core.solve.solvers import AUTOREGRESSIVE, PRESETS
from tests.core import models

from .case import Case

NEAR = {"atol": 1e-3, "rtol": 1e-3}


def cases(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    while True:
        check = rng.choice((inverse, jacobi, streamed, batched))
        yield Case(f"property: {check.__name__}", partial(_on_a_random_flow, check, rng.randrange(1 << 30)))


@torch.no_grad()
def _on_a_random_flow(check, seed: int, folder: Path) -> None:
    flow, latents = models.random_case(seed)
    check(flow, latents, models.text(flow, len(latents), seed))


def inverse(flow, x, text) -> None:
    noise = flow.encode(x, text).noise
    torch.testing.assert_close(sample(flow, noise, text, settings=PRESETS["exact"]).latents, x, **NEAR)


def jacobi(flow, z, text) -> None:
    exact = sample(flow, z, text, settings=AUTOREGRESSIVE).latents
    torch.testing.assert_close(sample(flow, z, text, settings=PRESETS["exact"]).latents, exact, **NEAR)


def streamed(flow, z, text) -> None:
    options = {"settings": PRESETS["exact"]}
    frames = torch.cat(list(Sampler(flow, z, text, **options).stream()), 1)
    torch.testing.assert_close(frames, sample(flow, z, text, **options).latents, **NEAR)


def batched(flow, z, text) -> None:
    together = sample(flow, z, text, settings=PRESETS["exact"]).latents
    for i in range(len(z)):
        alone = sample(flow, z[i : i + 1], text[i : i + 1], settings=PRESETS["exact"]).latents
        torch.testing.assert_close(together[i : i + 1], alone, **NEAR)
