"""Drawn clips in which something happens that no clip of the demo's world shows: ten kinds of change."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from starflow_core.training.demo import clips
from starflow_core.training.demo.clips import Scene

SIDE, FRAMES = 96, 33
EARLIEST, LATEST = 5, 24  # frames in which something may happen
TEXTURE, BURST, BURST_FRAMES = 0.12, 0.5, 3  # deviation of pixels in [-1, 1], and for how long


@dataclass(frozen=True)
class Changed:
    """A clip (F, 3, H, W), and the first frame that isn't as it should be; None if all are."""

    pixels: Tensor
    frame: int | None


def normal(rng: random.Random) -> Changed:
    """As the demo was trained on."""
    return Changed(_drawn(clips.random_scene(rng, SIDE, SIDE)), None)


def jump(rng: random.Random) -> Changed:
    """The shape is elsewhere, at right angles to its way."""
    scene, at = _scene(rng)
    along = "y" if clips.DIRECTIONS[scene.direction][0] else "x"
    reach = scene.radius + clips.MARGIN
    there = max((reach, SIDE - reach), key=lambda place: abs(place - getattr(scene, along)))
    return _cut(scene, replace(scene, **{along: there}), at)


def colour(rng: random.Random) -> Changed:
    scene, at = _scene(rng)
    return _cut(scene, scene.recoloured(_other(rng, clips.COLOURS, scene.colour)), at)


def kind(rng: random.Random) -> Changed:
    scene, at = _scene(rng)
    return _cut(scene, replace(scene, kind=_other(rng, clips.KINDS, scene.kind)), at)


def background(rng: random.Random) -> Changed:
    scene, at = _scene(rng)
    return _cut(scene, replace(scene, background=_other(rng, clips.BACKGROUNDS, scene.background)), at)


def reversal(rng: random.Random) -> Changed:
    """The shape turns round and goes back."""
    scene, at = _scene(rng)
    drawn = _drawn(scene)
    return Changed(torch.cat((drawn[:at], _mirrored(drawn, at)[: FRAMES - at])), at)


def vanishing(rng: random.Random) -> Changed:
    scene, at = _scene(rng)
    drawn = _drawn(scene)
    drawn[at:] = _ground(scene)
    return Changed(drawn, at)


def burst(rng: random.Random) -> Changed:
    """Some frames are full of noise."""
    scene, at = _scene(rng)
    drawn = _drawn(scene)
    some = slice(at, at + BURST_FRAMES)
    drawn[some] += BURST * _noise(rng, drawn[some].shape)
    return Changed(drawn.clamp(-1, 1), at)


def second_shape(rng: random.Random) -> Changed:
    """A still shape comes to stand beside the moving one, at least partly visible."""
    scene, at = _scene(rng)
    other = replace(scene, direction=None, speed=0.0, radius=15.0, colour=_other(rng, clips.COLOURS, scene.colour))
    reach, middle = other.radius + clips.MARGIN, clips.centres(scene, torch.tensor([float(at)]), SIDE, SIDE)[0]
    corners = [(x, y) for x in (reach, SIDE - reach) for y in (reach, SIDE - reach)]
    x, y = max(corners, key=lambda corner: float((middle - torch.tensor(corner)).norm()))
    alone, beside = _drawn(scene), _drawn(replace(other, x=x, y=y))
    seen = (beside - _ground(scene)).abs().amax(1, keepdim=True) > 0.05
    alone[at:] = torch.where(seen, beside, alone)[at:]
    return Changed(alone, at)


def freeze(rng: random.Random) -> Changed:
    """The shape stops on its way, as only the border may make it."""
    scene, at = _scene(rng)
    drawn = _drawn(scene)
    drawn[at:] = drawn[at - 1]
    return Changed(drawn, at)


def texture(rng: random.Random) -> Changed:
    """A background that isn't plain, from the first frame on."""
    scene, _ = _scene(rng)
    drawn = _drawn(scene)
    cloth = TEXTURE * _noise(rng, (1, 3, SIDE, SIDE))
    plain = (drawn - _ground(scene)).abs().amax(1, keepdim=True) < 0.05
    return Changed(torch.where(plain, drawn + cloth, drawn).clamp(-1, 1), 0)


KINDS: dict[str, Callable[[random.Random], Changed]] = {
    "jump": jump, "colour": colour, "kind": kind, "background": background, "reversal": reversal,
    "vanishing": vanishing, "burst of noise": burst, "second shape": second_shape, "freeze": freeze,
    "textured background": texture,
}  # fmt: skip


def _scene(rng: random.Random) -> tuple[Scene, int]:
    """A scene that moves from the first frame on, and a frame in which it still does."""
    while True:
        scene = clips.random_scene(rng, SIDE, SIDE, late=0)
        at = rng.randint(EARLIEST, LATEST)
        before, after = clips.centres(scene, torch.tensor([at - 1.0, at + 4.0]), SIDE, SIDE)
        if float((after - before).norm()) > 4.9 * scene.speed:
            return scene, at


def _drawn(scene: Scene) -> Tensor:
    return clips.render([scene], FRAMES, SIDE, SIDE)[0].transpose(0, 1)


def _cut(before: Scene, after: Scene, at: int) -> Changed:
    """One scene up to frame `at`, another from there on."""
    return Changed(torch.cat((_drawn(before)[:at], _drawn(after)[at:])), at)


def _mirrored(drawn: Tensor, at: int) -> Tensor:
    """What a clip shows from frame `at` on, if time runs back from the frame before; it ends where it began."""
    back = drawn[: at - 1].flip(0)
    return torch.cat((back, back[-1:].expand(FRAMES, -1, -1, -1)))


def _ground(scene: Scene) -> Tensor:
    return torch.tensor(clips.BACKGROUNDS[scene.background]).view(3, 1, 1) * 2 - 1


def _other(rng: random.Random, names, but: str) -> str:
    return rng.choice([name for name in names if name != but])


def _noise(rng: random.Random, shape) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(rng.randrange(2**31)))
