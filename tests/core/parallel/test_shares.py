"""What each process has of the weights, what it reads for them, and what it needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from starflow_core.errors import InputError
from starflow_core.jobs.memory import forecast
from starflow_core.jobs.planner import MemoryOptions, choose
from starflow_core.jobs.tasks import Job, Means
from starflow_core.model.config import STARFLOW_V_7B
from starflow_core.model.lora import Lora, linear_names
from starflow_core.model.parallel import ALONE, Mesh, Team
from starflow_core.model.placement import Placement
from starflow_core.weights.flow import load_flow, save_flow
from starflow_core.weights.shares import own_lora
from starflow_core.weights.tensorfiles import StoredTensor, TensorFile
from tests.core import models

CPU = torch.device("cpu")
WIDTH, SHARES = 144, 3  # six heads of 24
LAYER = "blocks.2.attn_blocks.1"


def teams(count: int = SHARES) -> list[Team]:
    return [Team(Mesh(1, count), rank) for rank in range(count)]


@pytest.fixture(scope="module", params=["fp32", "int8"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "flow.safetensors"
    save_flow(models.flow(deep_width=WIDTH), path, request.param)
    return path


def test_shares_are_whole_heads_in_order(model):
    """Of queries, keys and values each; the columns of what follows them; a bias once."""
    whole, shares = load_flow(model), [load_flow(model, team=team) for team in teams()]
    for name, weight in whole.named_parameters():
        parts = [share.get_parameter(name) for share in shares]
        assert sum(parts[0].shape) <= sum(weight.shape)
        if not name.startswith("blocks.2.attn_blocks") or "norm" in name:
            assert all(torch.equal(part, weight) for part in parts)
        elif "qkv" in name:
            kinds = zip(*(part.chunk(3) for part in parts), strict=True)
            assert torch.equal(torch.cat([torch.cat(kind) for kind in kinds]), weight)
        elif "main.0" in name:
            assert torch.equal(torch.cat(parts), weight)
        elif name.endswith(".weight"):
            assert torch.equal(torch.cat(parts, 1), weight)
        elif name.endswith("scale"):
            assert all(torch.equal(part, weight) for part in parts)
        else:
            assert torch.equal(torch.stack(parts).sum(0), weight)
            assert not any(part.any() for part in parts[1:])


def test_weights_brought_to_8_bit_are_those_of_one_process(tmp_path):
    """Rounding a share by itself would make others: a column's scale is that of its whole row."""
    save_flow(models.flow(deep_width=WIDTH), tmp_path / "flow.safetensors", "fp32")
    whole = load_flow(tmp_path / "flow.safetensors", quantise=True)
    shares = [load_flow(tmp_path / "flow.safetensors", quantise=True, team=team) for team in teams()]
    for name in (f"{LAYER}.attention.proj", f"{LAYER}.mlp.main.2"):
        layers = [share.get_submodule(name) for share in shares]
        assert torch.equal(torch.cat([layer.weight for layer in layers], 1), whole.get_submodule(name).weight)
        assert all(torch.equal(layer.weight_scale, whole.get_submodule(name).weight_scale) for layer in layers)


def test_who_follows_has_nothing_but_its_share_of_the_deep_block(model, monkeypatch):
    """And reads nothing else."""
    read, tensor = [], TensorFile.tensor
    monkeypatch.setattr(TensorFile, "tensor", lambda file, name: (read.append(name), tensor(file, name))[1])
    flow = load_flow(model, device=Placement.following(CPU), team=Team(Mesh(1, 3), 2))
    assert read
    assert all(name.startswith("blocks.2.") for name in read)
    for name, weight in flow.named_parameters():
        assert weight.is_meta != name.startswith("blocks.2."), name
    assert flow.deep.heads == 2


def test_of_rows_no_others_are_read(model, monkeypatch):
    """Of a safetensors file, each row by one process."""
    read, rows = [], StoredTensor.rows

    def counted(stored: StoredTensor, ranges) -> StoredTensor:
        def part(these: slice):
            read.append((stored.shape, these.start, these.stop))
            return stored.part(these)

        return rows(replace(stored, part=part, read=lambda: pytest.fail("all of it was read")), ranges)

    monkeypatch.setattr(StoredTensor, "rows", counted)
    for team in teams():
        load_flow(model, device=Placement.following(CPU), team=team)
    heads = [(start, stop) for shape, start, stop in read if shape == (3 * WIDTH, WIDTH)]
    assert sorted(heads) == sorted([(i * 48, i * 48 + 48) for i in range(9)] * 2)  # in two layers


def test_rows_of_a_pickle_are_read(tmp_path):
    flow = models.flow(deep_width=WIDTH)
    torch.save(flow.state_dict(), tmp_path / "flow.pth")
    share = load_flow(tmp_path / "flow.pth", config=flow.config, team=Team(Mesh(1, 3), 1))
    name = f"{LAYER}.mlp.main.0.weight"
    assert torch.equal(share.get_parameter(name), flow.get_parameter(name)[192:384])


def test_shares_of_an_adapter_add_up_to_it():
    """Summed over inputs, in a row over outputs."""
    flow = models.flow(deep_width=WIDTH)
    for layer in linear_names(flow):
        whole = flow.get_submodule(layer)
        lora = Lora(models.randn(2, whole.in_features), models.randn(whole.out_features, 2, seed=1), 3.0, strength=0.5)
        parts = [own_lora(lora, layer, flow.config, team) for team in teams()]
        assert {(part.alpha, part.strength) for part in parts} == {(3.0, 0.5)}
        deltas = [part.delta() for part in parts]
        if "qkv" in layer:
            found = torch.cat([torch.cat(kind) for kind in zip(*(d.chunk(3) for d in deltas), strict=True)])
        else:
            found = torch.cat(deltas, 0 if layer.endswith("main.0") else 1)
        torch.testing.assert_close(found, lora.delta())
    assert own_lora(lora, "blocks.0.attn_blocks.0.attention.qkv", flow.config, teams()[1]) is lora


@pytest.mark.parametrize(("names", "count", "mesh"), [
    ("guidance", 2, Mesh(2, 1)), ("tensor", 6, Mesh(1, 6)), ("guidance,tensor", 6, Mesh(2, 3)),
])  # fmt: skip
def test_sizes_follow_from_the_processes(names, count, mesh):
    assert Mesh.of(names, count) == mesh
    assert mesh.count == count


@pytest.mark.parametrize(("names", "count", "message"), [
    ("tensor", 1, "--parallel tensor is for several processes; start them by torchrun"),
    ("guidance", 3, "--parallel guidance takes 2 processes, not 3"),
    ("guidance,tensor", 3, "--parallel guidance,tensor takes an even number of processes, not 3"),
])  # fmt: skip
def test_processes_that_do_not_fill_a_mesh(names, count, message):
    with pytest.raises(InputError, match=message):
        Mesh.of(names, count)


def test_heads_that_cannot_be_shared_out():
    config = models.config(deep_width=WIDTH)
    Mesh(2, 3).check(config, 1.0)
    with pytest.raises(InputError, match=r"has 6 heads .* which 4 processes can't .*; start 1, 2, 3, 6 for them"):
        Mesh(1, 4).check(config, 1.0)
    with pytest.raises(InputError, match="guidance is 0, so that there are no halves"):
        Mesh(2, 3).check(config, 0.0)


def test_a_process_that_is_alone_does_nothing():
    a, b = models.randn(1, 2, 3), models.randn(1, 2, 3, seed=1)
    assert ALONE.leads
    assert ALONE.sum(a) is a
    assert ALONE.gather(a, b) == (a, b)
    assert ALONE.agree(3, 5, 0.5) == (3, 5, 0.5)
    assert ALONE.tell("a") == "a"


@pytest.mark.parametrize("int8", [False, True])
def test_a_forecast_has_the_weights_that_are_loaded(tmp_path, int8):
    config = save(tmp_path)
    job, means = Job(32, 48, frames=9, guidance=1.0), Means(int8, mesh=Mesh(2, 3))
    need = forecast(config, job, torch.float32, means)
    for place, weights in ((Placement.on(CPU), need.weights), (Placement.following(CPU), None)):
        flow = load_flow(tmp_path / "flow.safetensors", device=place, quantise=int8, team=Team(Mesh(2, 3), 1))
        held = sum(p.nbytes for p in flow.parameters() if not p.is_meta)
        assert held == (forecast(config, job, torch.float32, means, ("deep",)).weights if weights is None else weights)


def save(folder):
    flow = models.flow(deep_width=WIDTH)
    save_flow(flow, folder / "flow.safetensors", "fp32")
    return flow.config


def test_what_each_process_of_a_mesh_needs():
    """Half of the rows and a quarter of the heads; the leader alone has the other parts."""
    job = Job(480, 848, frames=81, guidance=1.0)
    one = forecast(STARFLOW_V_7B, job, torch.bfloat16)
    need = forecast(STARFLOW_V_7B, job, torch.bfloat16, Means(mesh=Mesh(2, 4)))
    assert one.others == 0
    assert need.cache * 8 == one.cache
    assert need.total < one.total / 2
    assert need.cache < need.others < need.total
    half = forecast(STARFLOW_V_7B, job, torch.bfloat16, Means(mesh=Mesh(2, 1)))
    assert half.cache * 2 == one.cache
    assert half.weights == one.weights


def test_a_plan_says_what_the_others_need():
    job, options = Job(32, 48, frames=9, guidance=1.0), MemoryOptions(mesh=Mesh(2, 3))
    config = models.config(deep_width=WIDTH)
    plan = choose(job, CPU, options, (False,), lambda job, means: forecast(config, job, torch.float32, means))
    assert plan.means.mesh == Mesh(2, 3)
    assert "guidance over 2 processes, heads over 3 processes. Needs " in str(plan)
    assert str(plan).endswith(" on each other device")
    with pytest.raises(InputError, match="offload is 'all', but over several processes all stays on their devices"):
        MemoryOptions(offload="all", mesh=Mesh(2, 3))
