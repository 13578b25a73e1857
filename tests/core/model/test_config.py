"""Configurations: presets, sizes, the dictionary form, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from starflow_core.errors import CheckpointError, InputError, OutOfMemoryForecast
from starflow_core.jobs.memory import forecast, readable, require
from starflow_core.jobs.tasks import Job
from starflow_core.model.config import ASPECTS, KNOWN_MODELS, STARFLOW_3B, STARFLOW_V_7B, FlowConfig, parse_aspect
from starflow_core.model.flow import Flow
from starflow_core.model.latent import LatentFormat
from starflow_core.weights.flow import weight_bytes
from tests.core import models


@pytest.mark.parametrize(("config", "deep", "shallow", "total"), [
    (STARFLOW_3B, 2.725e9, 0.227e9, 3.858e9), (STARFLOW_V_7B, 4.842e9, 0.227e9, 6.890e9),
])  # fmt: skip
def test_released_models_have_the_published_sizes(config, deep, shallow, total):
    with torch.device("meta"):
        flow = Flow(config)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(flow.deep) == pytest.approx(deep, rel=1e-3)
    assert count(flow.shallow[0]) == pytest.approx(shallow, rel=3e-3)
    assert count(flow) == pytest.approx(total, rel=1e-3)
    assert weight_bytes(config, torch.bfloat16) == 2 * count(flow)


@pytest.mark.parametrize("seed", range(4))
def test_parameters_follow_from_the_shapes(seed):
    flow, _ = models.random_case(seed)
    assert weight_bytes(flow.config, torch.float32) == 4 * sum(p.numel() for p in flow.parameters())


@pytest.mark.parametrize(("config", "aspect", "side", "expected"), [
    (STARFLOW_V_7B, "16:9", 640, (480, 848)), (STARFLOW_3B, "16:9", 256, (192, 344)),
    (STARFLOW_3B, "1:1", 256, (256, 256)),
    (STARFLOW_V_7B, "9:16", 640, (848, 480)), (STARFLOW_V_7B, None, None, (480, 848)),
])  # fmt: skip
def test_sizes(config, aspect, side, expected):
    assert config.size(aspect, side) == expected


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("config", KNOWN_MODELS.values(), ids=KNOWN_MODELS)
def test_every_trained_ratio_has_a_valid_size_and_is_found_again(config, aspect):
    height, width = config.size(aspect)
    config.check_size(height, width)
    assert config.nearest_aspect(height, width) == aspect


@pytest.mark.parametrize("text", ["16x9", "1:0", "a:b", "", "1:99", "16:9:4"])
def test_impossible_ratios(text):
    with pytest.raises(InputError, match="aspect ratio"):
        parse_aspect(text)


def test_frames():
    latent = LatentFormat(48, 16, 4)
    assert [latent.latent_frames(n) for n in (1, 5, 81)] == [1, 2, 21]
    assert latent.frames(21) == 81
    with pytest.raises(InputError, match="nearest are 77 and 81"):
        latent.latent_frames(80)


@pytest.mark.parametrize(
    "config", [*KNOWN_MODELS.values(), models.config(), models.config("image")], ids=lambda c: c.name
)
def test_dictionary_form_is_reversible(config):
    assert FlowConfig.from_dict(config.to_dict()) == config


def test_other_dictionaries_are_refused():
    values = STARFLOW_3B.to_dict()
    with pytest.raises(CheckpointError, match="schema 2"):
        FlowConfig.from_dict({**values, "schema": 2})
    with pytest.raises(CheckpointError, match=r"unknown fields \['wings'\]"):
        FlowConfig.from_dict({**values, "wings": 2})
    del values["layers"]
    with pytest.raises(CheckpointError, match="layers"):
        FlowConfig.from_dict(values)


@pytest.mark.parametrize(("field", "value"), [
    ("kind", "audio"), ("seq_order", "up"), ("rounding", "half"), ("head_dim", 30), ("layers", (2,)), ("width", 100),
    ("tasks", ("dream",)), ("window", 0), ("soft_clip", 0),
])  # fmt: skip
def test_impossible_configurations_are_refused(field, value):
    with pytest.raises(CheckpointError):
        replace(STARFLOW_V_7B, **{field: value})


ARGUMENTS = {
    "in_channels": 4, "img_size": 8, "patch_size": 1, "channels": 64, "layers_per_block": [1, 2], "head_dim": 32,
    "txt_size": 6, "txt_dim": 24, "soft_clip": 4,
}  # fmt: skip
WRONG = ["12", [1], {}, None, math.nan, math.inf, -1, 1e300, 10**400, True]
NUMBERS = {
    "": ("width", "deep_width", "text_dim", "rope_length", "noise_std", "head_dim", "patch_size", "soft_clip"),
    "latent": ("channels", "spatial", "temporal", "later_factor"),
    "prompt": ("tokens",),
    "defaults": ("guidance", "size", "frames", "fps"),
    "denoiser": ("width", "layers", "window", "look_ahead"),
}


@pytest.mark.parametrize("value", WRONG, ids=lambda value: str(value)[:9])
@pytest.mark.parametrize("name", [f"{part}.{name}" for part, names in NUMBERS.items() for name in names])
def test_a_field_of_another_kind_is_refused(name, value):
    part, _, field = name.partition(".")
    values = json.loads(json.dumps(STARFLOW_V_7B.to_dict()))
    (values[part] if part else values)[field] = value
    with pytest.raises(CheckpointError, match=f"{field} is "):
        FlowConfig.from_dict(values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers", "24"), ("layers", [2, "2"]), ("layers", [2, 10**9]), ("layers", [[2], [2]]), ("latent", [4]),
        ("name", "a" * 10_000), ("name", 7), ("tasks", "text"), ("aspects", ["wide"]), ("aspects", []),
        ("prompt", None), ("latent", {"channels": 48, "spatial": 16, "mean": [0, 1]}), ("denoiser", 3),
        ("kind", ["video"]),
        ("defaults", {"guidance": 1, "size": 64, "aspect": "round"}),
        ("latent", {"channels": 48, "spatial": 16, "std": [0]}),
    ],
)  # fmt: skip
def test_a_part_of_another_kind_is_refused(name, value):
    with pytest.raises(CheckpointError):
        FlowConfig.from_dict({**STARFLOW_V_7B.to_dict(), name: value})


@pytest.mark.parametrize("value", WRONG[:-1], ids=lambda value: str(value)[:9])
@pytest.mark.parametrize("name", ["in_channels", "patch_size", "channels", "head_dim", "txt_size", "txt_dim"])
def test_an_argument_of_another_kind_is_refused(name, value):
    with pytest.raises(CheckpointError, match=f"{name} is "):
        FlowConfig.from_reference({**ARGUMENTS, name: value})


@pytest.mark.parametrize("option", ["use_qk_norm", "use_swiglu", "use_post_norm", "hf_style_rope", "use_rms_norm"])
def test_unsupported_options_are_named(option):
    assert FlowConfig.from_reference(ARGUMENTS).rope_length == 8
    with pytest.raises(CheckpointError, match=option):
        FlowConfig.from_reference({**ARGUMENTS, option: 1})


def test_forecast_of_the_released_video_model():
    """The cache that the specification computes: 384 KiB a token and element in bfloat16."""
    job = Job(480, 848, frames=81, guidance=3.5)
    need = forecast(STARFLOW_V_7B, job, torch.bfloat16)
    assert need.cache == pytest.approx(2 * (33390 + 256) * 384 * 1024, rel=1e-6)
    assert need.weights == pytest.approx(2 * 6.890e9, rel=1e-3)
    assert forecast(STARFLOW_V_7B, replace(job, frames=481), torch.bfloat16).cache == need.cache
    assert forecast(STARFLOW_V_7B, replace(job, guidance=0.0), torch.bfloat16).cache == need.cache // 2


def test_too_little_memory_is_said_before(monkeypatch):
    monkeypatch.setattr("starflow_core.jobs.memory.free", lambda device: 2 * 10**9)
    require(10**9, torch.device("cpu"), "this job")
    with pytest.raises(OutOfMemoryForecast, match=r"this job needs about 5\.0 GB, but 2\.0 GB are free on cpu"):
        require(5 * 10**9, torch.device("cpu"), "this job")
    assert readable(1_500_000) == "1.5 MB"
