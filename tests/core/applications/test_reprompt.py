"""Another prompt for a clip's noise, on the demo by the pixel judge; `benchmarks/flow_features.py` has more cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import flow_features
from benchmarks.flow_features import FRAMES, reprompted
from starflow_core.applications import reprompt as module
from starflow_core.applications.inversion import decode_from_noise
from starflow_core.applications.reprompt import Wish, reprompt, structure_likeness
from starflow_core.bundled import FLOW_FILE, TEXT_FILE, VAE_FILE
from starflow_core.control import Control
from starflow_core.errors import Cancelled, InputError
from starflow_core.pipeline import load_pipeline
from starflow_core.solve.solvers import PRESETS
from starflow_core.training.demo import clips
from tests.core import models, tiny


@pytest.fixture(scope="module")
def demo():
    return load_pipeline(device="cpu")


@pytest.mark.parametrize(("attribute", "options", "least"), [
    ("kind", {}, 2),
    ("background", {}, 2),
    ("direction", {"hold": "first-frame"}, 2),
])  # fmt: skip
def test_one_attribute_changes_and_the_rest_stays(demo, attribute, options, least):
    met = [row["met"] for row in reprompted(demo, attribute, 3, seed=3, **options)]
    assert sum(met) >= least, met


def test_the_same_prompt_gives_the_clip_back(demo):
    """But for what the VAE loses."""
    source = flow_features.drawn(flow_features.scenes(1, 3))[0]
    caption = flow_features.prompt(flow_features.scenes(1, 3)[0])
    same = reprompt(demo, source, Wish(caption, caption))
    latents = demo.encode_clip(source)
    assert models.relative_error(same.best.latents, latents) < 1e-2
    assert same.scores[0] > 0.95
    assert len(same.scores) == 1
    weaker = reprompt(demo, source, Wish(caption, caption, strength=0.3))
    assert weaker.scores[0] < same.scores[0]


def test_candidates_differ_and_the_best_is_kept(demo):
    source = flow_features.drawn(flow_features.scenes(1, 3))[0][:5]
    edited = reprompt(demo, source, Wish("a red circle", "a blue ring", candidates=3))
    assert len(set(edited.scores)) == 3
    gains = [score < 0 for score in edited.scores]
    likeness = structure_likeness(source, edited.pixels)
    assert likeness - gains[edited.kept] == pytest.approx(max(edited.scores))


def test_likeness_is_of_outlines_not_colours():
    scene = flow_features.scenes(4, 3)[0]
    drawn = clips.render([scene, scene.recoloured("green"), replace(scene, y=96 - scene.y, x=20)], FRAMES, 96, 96)
    same, recoloured, moved = drawn.transpose(1, 2)
    assert structure_likeness(same, same) == pytest.approx(1)
    assert structure_likeness(same, recoloured) > 0.95
    assert structure_likeness(same, moved) < 0.19  # hardly any overlap


@pytest.mark.parametrize(("options", "message"), [
    ({"prompt": " "}, "the prompt is empty"),
    ({"hold": "all"}, "hold is 'all'; choose one of clip, first-frame"),
    ({"strength": 1.5}, "from 0 to 1"),
    ({"candidates": 0}, "candidates is 0; the minimum is 1"),
])  # fmt: skip
def test_wishes_that_are_none(options, message):
    with pytest.raises(InputError, match=message):
        Wish(**{"was": "a", "prompt": "b", **options})


def test_a_picture_has_no_later_frames(demo):
    with pytest.raises(InputError, match="a picture has no frames after its first"):
        reprompt(demo, torch.zeros(1, 3, 96, 96), Wish("a", "b", hold="first-frame"))


def test_cancel(demo):
    with pytest.raises(Cancelled):
        reprompt(demo, torch.zeros(5, 3, 96, 96), Wish("a", "b"), control=Control(cancelled=lambda: True))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A random image model, as the 3B is one."""
    folder = tiny.write_model(tmp_path_factory.mktemp("image"), "image")
    return load_pipeline(*(folder / file for file in (FLOW_FILE, TEXT_FILE, VAE_FILE)), device="cpu")


def test_pictures_of_an_image_model(pictures):
    source = models.randn(1, 3, 32, 32, seed=5).clamp(-1, 1)
    same = reprompt(pictures, source, Wish("a cat", "a cat"), solver=PRESETS["exact"])
    assert models.relative_error(same.best.latents, pictures.encode_clip(source)) < 1e-4
    edited = reprompt(pictures, source, Wish("a cat", "a dog", candidates=3))
    assert edited.pixels.shape == source.shape
    assert len(set(edited.scores)) == 3
    assert models.relative_error(edited.best.latents, same.best.latents) > 1e-3


def test_a_kept_candidate_is_made_again_from_its_noise(demo):
    """What the metadata say of its noise is all that it takes."""
    source = flow_features.drawn(flow_features.scenes(1, 3))[0][:9]
    edited = reprompt(demo, source, Wish("a red circle", "a blue ring", candidates=3, seed=7))
    noise = edited.best.noise
    again = decode_from_noise(demo, noise, PRESETS["balanced"], prompt="a blue ring").run()
    assert models.relative_error(again, edited.best.latents) < 1e-6


@pytest.mark.parametrize("candidates", [2, 3])
def test_beginnings_that_come_nearest_are_gone_on_from(demo, monkeypatch, candidates):
    source = flow_features.drawn(flow_features.scenes(1, 3))[0][:9]
    seen = {1: 0, 9: 0}

    def likeness(one, other):
        """The fifth beginning and the last candidate are likest."""
        assert len(one) == len(other)
        seen[len(one)] += 1
        return float(seen[1] == 5) if len(one) == 1 else float(seen[9])

    monkeypatch.setattr(module, "structure_likeness", likeness)
    found = reprompt(demo, source, Wish("a red circle", "a blue ring", candidates=candidates, seed=30))
    assert seen == {1: 4 * candidates, 9: candidates}
    clip = "from a clip, with the model's own noise of seed 30"
    assert found.best.noise.made == (
        (clip, "varied by 0, seed 30, 1 latent frames kept", f"begun as: {clip}; varied by 0.5, seed 34")
        if candidates == 2
        else (clip, "varied by 0.4, seed 31, 1 latent frames kept", f"begun as: {clip}")
    )


def test_of_equal_scores_the_first_is_kept(demo, monkeypatch):
    monkeypatch.setattr(module.Reprompting, "_score", lambda self, latents, pixels: 0.5)
    found = reprompt(demo, torch.zeros(5, 3, 96, 96), Wish("a red circle", "a blue ring", candidates=3))
    assert found.kept == 0
    assert found.best.noise.clean


def test_a_direction_that_is_followed_is_likelier_than_the_old_one(demo):
    scene = flow_features.scenes(8, 3)[4]
    wanted = replace(scene, direction={"left": "up", "right": "up", "up": "right", "down": "right"}[scene.direction])
    source = flow_features.drawn([scene])[0][:17]
    wish = Wish(*map(flow_features.prompt, (scene, wanted)), hold="first-frame", candidates=2)
    assert max(reprompt(demo, source, wish).scores) > 0
