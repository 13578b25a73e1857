"""What each step sees: order, tasks, prompts, layouts."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from starflow_core.errors import InputError
from starflow_core.jobs.context import later_factors
from starflow_core.jobs.prompts import wrap
from starflow_core.model.latent import to_flow_space
from starflow_core.training.data.buckets import Bucket, Sample
from starflow_core.training.data.cache import Cache
from starflow_core.training.data.dataset import PREFIX_DROP, Dataset, Identities, Practice
from starflow_core.training.data.folders import Item
from starflow_core.training.demo import batches
from starflow_core.training.demo.bank import Bank
from tests.core import models

CONFIG = models.config(window=10)
ALL = {"text": 2.0, "first_frame": 1.0, "extend": 1.0, "last_frame": 1.0, "edit": 1.0}
CLIP, SHORT, STILL = Bucket("1:1", 32, 32, 37), Bucket("16:9", 16, 48, 5), Bucket("1:1", 32, 32, 1)


def samples(bucket: Bucket, count: int, repeats: int = 1, paired: bool = False) -> list[Sample]:
    """Samples of files that aren't there."""
    names = [f"{bucket.aspect}-{bucket.frames}-{i}-{repeats}{paired}" for i in range(count)]
    return [
        Sample(Item(Path(name), f"caption of {name}", repeats, Path(f"{name}.source") if paired else None), bucket)
        for name in names
    ]


def dataset(found, held=0, shares=ALL, drop=0.1, folder=Path("none"), config=CONFIG) -> Dataset:
    paths = [path for sample in found for path in (sample.item.path, sample.item.source) if path]
    identities = Identities({path: f"hash of {path}" for path in paths}, "v", "e")
    return Dataset(found, held, Practice(config, 16.0, shares, drop), identities, Cache(folder))


MIXED = [*samples(CLIP, 7), *samples(STILL, 3, repeats=3), *samples(SHORT, 1), *samples(CLIP, 5, paired=True)]


@pytest.mark.parametrize("batch", [1, 2, 4, 9])
def test_every_sample_is_seen_as_often_as_its_folder_says(batch):
    """However few of them fit in one batch, and wherever one stops."""
    data, total = dataset(MIXED), 22
    assert data.steps(batch) == -(-total // batch)
    groups = {(sample.bucket, bool(sample.item.source)): 0 for sample in MIXED}
    for sample in MIXED:
        groups[sample.bucket, bool(sample.item.source)] += sample.item.repeats
    seen, orders = Counter(), set()
    for index in range(5 * total):
        plan = data.plan(index, 5, batch)
        assert len(plan.picks) == len(plan.prompts) == plan.count == batch
        [group] = {(MIXED[pick].bucket, bool(MIXED[pick].item.source)) for pick in plan.picks}
        assert group == (plan.bucket, plan.task == "edit")
        seen.update(plan.picks)
        orders.add(plan.picks)
        for number, sample in enumerate(MIXED):
            due = (index + 1) * batch * sample.item.repeats / total
            length = groups[sample.bucket, bool(sample.item.source)]
            assert abs(seen[number] - due) <= sample.item.repeats * (1 + batch / length)
    if batch == 1:
        assert seen == {number: 5 * sample.item.repeats for number, sample in enumerate(MIXED)}
    else:
        assert len(orders) > total  # shuffled anew in each round


def test_plans_depend_on_seed_and_step_alone():
    one, other, order = dataset(MIXED), dataset(MIXED), list(range(30))
    wanted = {index: one.plan(index, 3, 4) for index in order}
    random.Random(0).shuffle(order)
    assert {index: other.plan(index, 3, 4) for index in order} == wanted
    assert [one.plan(index, 4, 4) for index in range(30)] != [wanted[index] for index in range(30)]


def test_a_batch_goes_on_where_the_one_before_ended():
    data = dataset(samples(CLIP, 5))
    picks = [pick for index in range(5) for pick in data.plan(index, 1, 4).picks]
    rounds = [picks[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(one) == list(range(5)) for one in rounds)
    assert len({*map(tuple, rounds)}) > 1
    assert sorted(dataset(samples(CLIP, 2)).plan(0, 1, 4).picks) == [0, 0, 1, 1]


def test_tasks_follow_their_shares_and_what_suits():
    data, seen = dataset(MIXED), {}
    for index in range(2000):
        plan = data.plan(index, 0, 1)
        key = plan.bucket, bool(MIXED[plan.picks[0]].item.source)
        seen.setdefault(key, Counter())[plan.task] += 1
    assert set(seen[STILL, False]) == {"text"}
    assert set(seen[CLIP, True]) == {"edit"}
    counts = seen[CLIP, False]
    assert set(counts) == {"text", "first_frame", "extend", "last_frame"}
    assert counts["text"] / counts.total() == pytest.approx(0.4, abs=0.05)
    shares = data.shares()
    assert shares["edit"] == pytest.approx(5 / 22)
    assert sum(shares.values()) == pytest.approx(1)


def test_a_share_of_zero_is_never_drawn():
    data = dataset(samples(CLIP, 3), shares={"text": 0.0, "extend": 1.0})
    assert {data.plan(index, 0, 1).task for index in range(50)} == {"extend"}


def test_prompts():
    """The task's wrapping; the empty caption has no prefix, and some continuations have none."""
    found = [*samples(CLIP, 3), *samples(STILL, 3), *samples(CLIP, 3, paired=True)]
    data, seen, everything = dataset(found), Counter(), set(dataset(found).prompts())
    for index in range(3000):
        plan = data.plan(index, 1, 1)
        caption, fps = found[plan.picks[0]].item.caption, 16 if plan.bucket.frames > 1 else 0
        around = {"fps": fps, "aspect": plan.bucket.aspect}
        wraps = {wrap(caption, CONFIG, **around, task=plan.task): "task", wrap("", CONFIG, **around): "empty"}
        wraps.setdefault(wrap(caption, CONFIG, **around), "plain")
        seen[plan.task, wraps[plan.prompts[0]]] += 1
        assert plan.prompts[0] in everything
    empty = sum(count for (_, kind), count in seen.items() if kind == "empty") / 3000
    assert empty == pytest.approx(0.1, abs=0.02)
    plain = seen["extend", "plain"] / (seen["extend", "plain"] + seen["extend", "task"])
    assert plain == pytest.approx(PREFIX_DROP, abs=0.08)
    assert {task for task, kind in seen if kind == "plain"} == {"extend"}
    assert batches.PREFIX_DROP == PREFIX_DROP


def test_no_caption_is_dropped_that_should_not_be():
    data = dataset(samples(CLIP, 3), drop=0.0)
    assert all("caption of" in data.plan(index, 0, 2).prompts[0] for index in range(100))
    assert all("caption of" in prompt for prompt in data.prompts())


def test_held_out_samples_are_only_measured_on():
    found = [*samples(CLIP, 4), *samples(STILL, 2), *samples(CLIP, 3, 2), *samples(CLIP, 1, paired=True)]
    data = dataset(found, held=6)
    assert len(data) == 4
    assert data.buckets == {CLIP: 4}
    assert {pick for index in range(50) for pick in data.plan(index, 0, 3).picks} == set(range(4))
    plans = data.held_out(2)
    assert plans == data.held_out(2)
    assert [(plan.bucket, plan.task, plan.picks, plan.count, plan.given) for plan in plans] == [
        (STILL, "text", (4, 5), 2, 0),
        (CLIP, "text", (6, 7), 2, 0),
        (CLIP, "text", (8, 6), 1, 0),
        (CLIP, "edit", (9, 9), 1, 5),
    ]
    assert all("caption of" in prompt for plan in plans for prompt in plan.prompts)
    assert {prompt for plan in plans for prompt in plan.prompts} <= set(data.prompts())
    assert dataset(found).held_out(2) == []


def test_held_out_prompts_are_those_of_plain_text():
    found = samples(CLIP, 4)
    data = dataset(found, held=2, shares={"extend": 1.0})
    assert {prompt for plan in data.held_out(2) for prompt in plan.prompts} <= set(data.prompts())


# Layouts


@pytest.fixture
def encoded(tmp_path):
    """A data set whose cache holds random latents, and the same ones as the demo's bank."""
    found = [*samples(CLIP, 3), *samples(Bucket("1:1", 32, 32, 17), 3, paired=True)]
    data = dataset(found, folder=tmp_path)
    clips, edits, lasts = models.randn(3, 4, 11, 2, 2, seed=1), models.randn(3, 4, 5, 2, 2, seed=2), models.randn(
        3, 4, 8, 2, 2, seed=3
    )  # fmt: skip
    for i, sample in enumerate(found[:3]):
        data.cache.put(data.window(sample), clips[i, :, :10])
        data.cache.put(data.window(sample, "last"), lasts[i, :, 7:])
    for i, sample in enumerate(found[3:]):
        data.cache.put(data.window(sample, "source"), clips[i, :, :5])
        data.cache.put(data.window(sample), edits[i])
    for number, prompt in enumerate(data.prompts()):
        data.cache.put(data.text(prompt), models.randn(2 + number % 3, 12, seed=number))
    return data, Bank("1:1", [None] * 3, [""] * 3, clips, edits, lasts)


@pytest.mark.parametrize("task", ["text", "extend", "last_frame", "edit"])
def test_layouts_are_those_of_the_demo(encoded, monkeypatch, task):
    data, bank = encoded
    monkeypatch.setattr(batches, "_captions", lambda *_: None)
    monkeypatch.setattr(batches.clips, "edit_caption", lambda *_: "")
    monkeypatch.setattr(batches, "LONGEST_SHARE", 1)
    build, frames = {
        "text": (batches._texts, 10), "extend": (batches._extensions, 9), "last_frame": (batches._lasts, 10),
        "edit": (batches._edits, 5),
    }[task]  # fmt: skip
    plan = next(plan for plan in (data.plan(i, 0, 3) for i in range(200)) if plan.task == task)
    latents, _ = build(bank, [pick % 3 for pick in plan.picks], frames, random.Random(0))
    assert plan.given == {"edit": 5, "last_frame": 1}.get(task, 0)
    wanted = to_flow_space(CONFIG.latent, latents, later_factors(CONFIG, task, plan.given, latents.shape[2]))
    found, text = data.load(plan)
    assert torch.equal(found, wanted)
    assert text.shape == (3, CONFIG.prompt.tokens, 12)
    rows, words = data.load(plan, [1, 2])
    assert torch.equal(rows, found[1:])
    assert torch.equal(words, text[1:])


def test_a_first_frame_is_given(encoded):
    data, bank = encoded
    plan = next(plan for plan in (data.plan(i, 0, 3) for i in range(200)) if plan.task == "first_frame")
    found, _ = data.load(plan)
    assert plan.given == 1
    wanted = to_flow_space(CONFIG.latent, bank.clips[list(plan.picks), :, :10], later_factors(CONFIG, "text", 0, 10))
    assert torch.equal(found, wanted)


def test_embeddings_are_zero_after_their_end(encoded):
    data, _ = encoded
    prompt = data.prompts()[1]
    found = data.embedding(prompt)
    assert torch.equal(found[:3], models.randn(3, 12, seed=1))
    assert not found[3:].any()
    assert found.dtype == torch.float32


def test_the_last_frame_is_that_of_the_clip_that_fits(encoded):
    """Beside it there is room for one frame less than the window."""
    data, _ = encoded
    last = data.window(data.samples[0], "last")
    assert (last.start, last.frames) == (32, 1)
    short = dataset(samples(SHORT, 1))
    assert short.window(short.samples[0], "last").start == 4


def test_what_steps_can_see_has_an_identity():
    """It doesn't depend on where files are."""
    found = [*samples(CLIP, 3), *samples(CLIP, 2, paired=True)]
    one, more = dataset(found), samples(CLIP, 2, repeats=2)
    moved = [replace(s, item=replace(s.item, path=Path("x") / s.item.path)) for s in found]
    other = dataset(moved)
    other.identities.files.update(
        {s.item.path: one.identities.files[t.item.path] for s, t in zip(moved, found, strict=True)}
    )
    assert other.identity == one.identity == dataset(found).identity
    source = dataset(found)
    source.identities.files[found[3].item.source] = "another source"
    changed = [dataset(found, held=1), dataset(found[:2]), dataset([*found[:3], *more]), source]
    assert len({data.identity for data in [one, *changed]}) == 5


def test_parts_that_are_needed():
    found = [*samples(CLIP, 1), *samples(STILL, 1), *samples(CLIP, 1, paired=True)]
    data = dataset(found)
    assert [list(data.windows(sample).values()) for sample in found] == [["clip", "last"], ["clip"], ["clip", "source"]]
    assert list(dataset(found, shares={"text": 1.0}).windows(found[0]).values()) == ["clip"]


def test_what_is_missing_is_named(encoded):
    data, _ = encoded
    plan = data.plan(0, 0, 2)
    data.cache.path(data.text(plan.prompts[0])).unlink()
    with pytest.raises(InputError, match=r"encoded from the prompt '.*run `prepare`"):
        data.load(plan)
    data.cache.path(data.window(data.samples[plan.picks[0]])).unlink()
    with pytest.raises(InputError, match=rf"encoded from {data.samples[plan.picks[0]].item.path}, can't be used"):
        data.load(plan)


def test_rates_are_exact():
    other = dataset(samples(CLIP, 1))
    other.practice = Practice(CONFIG, float(Fraction(24000, 1001)), ALL, 0.1)
    near = dataset(samples(CLIP, 1))
    near.practice = Practice(CONFIG, 23.976, ALL, 0.1)
    assert other.window(other.samples[0]) != near.window(near.samples[0])
