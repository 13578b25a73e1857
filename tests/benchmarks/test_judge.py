"""The judge names what drawn clips show, blurred and noisy as a small VAE leaves them, and is not fooled by others."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from benchmarks.judge import calibrate, degrade, look, verdict
from starflow_core.errors import InputError
from starflow_core.training.demo.clips import BACKGROUNDS, COLOURS, DIAGONALS, DIRECTIONS, KINDS, Scene, render

SIZE = 96
SCENE = Scene("circle", "red", "grey", "right", x=24, y=48, radius=16, speed=1.2)
FRAMES = 9


def draw(scene, frames=FRAMES, height=SIZE, width=SIZE):
    return render([scene], frames, height, width)[0].transpose(0, 1)


def worn(pixels, blur=1.5):
    return degrade(pixels, blur, noise=0.06, shift=0.05, seed=1)


def beside(scene, other, frames=FRAMES):
    """A clip with one scene in its upper and another in its lower half."""
    half = SIZE // 2
    pair = [draw(replace(s, y=half / 2), frames, height=half) for s in (scene, other)]
    return torch.cat(pair, dim=2)


@pytest.mark.parametrize("blur", [0, 2.5])
def test_random_scenes_are_judged_right(blur):
    shares = calibrate(24, blur)
    assert set(shares) == {"colour", "direction", "kind", "connected", "background", "consistent"}
    assert shares == dict.fromkeys(shares, 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_colour_and_kind_on_every_background(kind, background):
    for colour in COLOURS:
        scene = Scene(kind, colour, background, None, x=50.3, y=44.6, radius=15)
        sight = look(worn(draw(scene, frames=1)))
        assert (sight.kind, sight.colour, sight.background, sight.connected) == (kind, colour, background, True)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_direction(direction):
    scene = replace(SCENE, direction=direction, x=48, y=48)
    assert look(worn(draw(scene))).direction == direction


def test_measures_are_in_pixels_and_shares():
    sight = look(draw(SCENE))
    expected = np.stack([24 + 1.2 * np.arange(FRAMES), np.full(FRAMES, 48.0)], axis=-1)
    np.testing.assert_allclose(sight.path, expected, atol=0.2)
    assert sight.area == pytest.approx(np.pi * 16**2 / SIZE**2, rel=0.05)
    np.testing.assert_allclose(sight.colours, np.tile(COLOURS["red"], (FRAMES, 1)), atol=0.01)
    assert sight.areas.shape == sight.whole.shape == (FRAMES,)
    assert sight.consistent


def test_a_still_has_no_direction():
    sight = look(draw(SCENE, frames=1))
    assert sight.direction is None
    assert sight.consistent
    assert all(verdict(sight, replace(SCENE, direction=None)).values())


def test_the_verdict_has_a_background_only_where_one_is_expected():
    sight = look(draw(SCENE))
    met = dict.fromkeys(("colour", "direction", "kind", "connected"), True)
    assert verdict(sight, SCENE) == met | {"background": True}
    assert verdict(sight, replace(SCENE, background=None)) == met


@pytest.mark.parametrize(
    ("fact", "value"), [("colour", "orange"), ("kind", "ring"), ("direction", "left"), ("background", "white")]
)
def test_only_the_fact_that_differs_is_judged_wrong(fact, value):
    met = verdict(look(worn(draw(SCENE))), replace(SCENE, **{fact: value}))
    assert [name for name, right in met.items() if not right] == [fact]


@pytest.mark.parametrize("drawn", [replace(SCENE, speed=0.0), replace(SCENE, x=48, speed=0.2)])
def test_a_clip_that_hardly_moves_has_no_direction(drawn):
    assert not verdict(look(worn(draw(drawn))), SCENE)["direction"]


@pytest.mark.parametrize("direction", DIAGONALS)
def test_diagonals(direction):
    scene = replace(SCENE, direction=direction, x=48, y=48)
    assert look(worn(draw(scene))).direction == direction


@pytest.mark.parametrize(("slope", "seen"), [(0.3, "right"), (0.7, "down and right")])
def test_what_is_nearly_level_has_the_level_direction(slope, seen):
    steps = zip(draw(SCENE, frames=17), range(17), strict=True)
    aslant = torch.stack([frame.roll(round(slope * 1.2 * step), dims=1) for frame, step in steps])
    assert look(aslant).direction == seen


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_crosses_of_every_colour(background):
    for colour, radius in product(COLOURS, (21, 26)):
        sight = look(worn(draw(Scene("cross", colour, background, None, x=50.3, y=44.6, radius=radius), frames=1)))
        assert (sight.kind, sight.colour, sight.connected) == ("cross", colour, True)


@pytest.mark.parametrize("colour", ["blue", "pink"])  # on white, pink stands out less than half as much as red
def test_two_shapes_are_not_connected(colour):
    red = Scene("circle", "red", "white", "right", x=24, y=24, radius=17, speed=1.0)
    both = worn(beside(red, replace(red, colour=colour, radius=15)))
    assert not verdict(look(both), red)["connected"]


def test_a_shape_split_by_a_gap_is_not_connected():
    split = draw(replace(SCENE, speed=0.0))
    split[..., 22:26] = split[:, :, :1, :1]
    assert not look(split).connected


def test_a_few_frames_that_fail_are_forgiven_and_more_are_not():
    clip = draw(SCENE, frames=20)
    ground = clip[:, :, :1, :1].expand_as(clip)
    some, more = clip.clone(), clip.clone()
    some[7:9], more[7:10] = ground[7:9], ground[7:10]
    assert all(verdict(look(some), SCENE).values())
    assert not look(more).connected
    assert np.isnan(look(more).path[7:10]).all()


def test_a_clip_of_nothing_shows_nothing():
    nothing = torch.zeros(FRAMES, 3, SIZE, SIZE)
    for clip in (nothing, worn(nothing), nothing * torch.nan):
        sight = look(clip)
        assert (sight.colour, sight.kind, sight.direction) == (None, None, None)
        assert not sight.connected
        assert not sight.consistent
        assert sight.area == 0


def test_noise_is_neither_connected_nor_of_a_kind():
    generator = torch.Generator().manual_seed(0)
    white = torch.rand(FRAMES, 3, SIZE, SIZE, generator=generator) * 2 - 1
    coarse = torch.nn.functional.interpolate(white[..., ::8, ::8], scale_factor=8, mode="bilinear")
    for clip in (white, coarse):
        sight = look(clip)
        assert not sight.connected
        assert sight.kind is None


@pytest.mark.parametrize("radius", [5, 40])
def test_implausible_areas_are_not_connected(radius):
    assert not look(draw(replace(SCENE, kind="square", radius=radius, x=48, speed=0))).connected


def test_grey_and_two_coloured_shapes_have_no_colour():
    still = draw(replace(SCENE, x=48, background="black"), frames=1)
    assert look(still).colour == "red"
    assert look(still.mean(1, keepdim=True).expand_as(still) * 0.5 + 0.2).colour is None
    still[..., 48:] = still[..., 48:].flip(1)
    assert look(still).colour is None


def test_a_square_with_a_hole_is_no_kind():
    still = draw(replace(SCENE, kind="square", x=48), frames=1)
    still[..., 42:54, 42:54] = still[..., :1, :1]
    assert look(still).kind is None


@pytest.mark.parametrize("change", [{}, {"colour": "orange"}, {"radius": 20}, {"background": "black"}])
def test_drift_of_colour_area_or_background_is_inconsistent(change):
    clip = draw(SCENE, frames=12)
    clip[6:] = draw(replace(SCENE, **change), frames=12)[6:]
    assert look(clip).consistent == (not change)


@pytest.mark.parametrize("shape", [(3, 96, 96), (3, 9, 96, 96), (0, 3, 96, 96), (9, 3, 8, 96)])
def test_other_shapes_of_tensor_are_refused(shape):
    with pytest.raises(InputError, match="frames, 3, height, width"):
        look(torch.zeros(shape))
