"""What a run computes does not depend on the devices that it runs on; and what they tell each other."""

import itertools
import json
import os
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import run_fork

from transformer_lm import models
from transformer_lm.errors import UserError
from transformer_lm.training import sharding


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """What on_eight_devices.py finds, by family of networks and mesh."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    arguments = [sys.executable, "-m", "on_eight_devices", tmp_path_factory.mktemp("workdir")]
    done = run_fork(arguments, env=os.environ | {"XLA_FLAGS": flags}, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert "rematerialization" not in done.stderr  # XLA's warning of an array that it gathers for want of a better way
    return json.loads(done.stdout)


CASES = [
    *(("the original's", mesh) for mesh in ("single", "data", "fsdp", "tensor", "mixed in parts")),
    *(("modern", mesh) for mesh in ("single", "fsdp", "mixed in parts", "kernels for GPUs")),
]


@pytest.mark.parametrize(("family", "mesh"), [case for case in CASES if case[1] != "single"])
def test_losses_are_those_of_one_device(results, family, mesh):
    """Over twenty steps with dropout, label smoothing and rows of unequal length."""
    found, single = results[family][mesh], results[family]["single"]
    np.testing.assert_allclose(found["losses"], single["losses"], rtol=1e-5)
    for name, value in single["eval"].items():
        assert found["eval"][name] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(("family", "mesh"), CASES)
def test_a_checkpoint_goes_on_on_any_mesh(results, family, mesh):
    """What fsdp on eight devices has saved comes back bit for bit, and goes on to the losses of the unbroken run."""
    restored = results[family][mesh]["restored"]
    assert restored["same bits"]
    np.testing.assert_allclose(restored["losses"], results[family]["unbroken"], rtol=1e-6)


@pytest.mark.parametrize(
    ("family", "mesh", "share"),
    [
        ("the original's", "data", 1),
        ("the original's", "fsdp", 1 / 8),
        ("the original's", "tensor", 1 / 4),
        ("the original's", "mixed in parts", 1 / 4),
        ("modern", "fsdp", 1 / 8),
    ],
)
def test_each_device_holds_its_part(results, family, mesh, share):
    assert results[family][mesh]["share"] == share


def test_collectives(results):
    """Data alone sum up gradients; fsdp gathers parameters; tensor gathers nothing, least of all logits."""
    found = {mesh: result["collectives"] for mesh, result in results["the original's"].items() if mesh != "unbroken"}
    assert found["single"] == {}
    assert found["data"].keys() == {"all-reduce"}
    assert "all-gather" in found["fsdp"]
    assert found["tensor"].keys() == {"all-reduce"}


def test_muon_gathers_one_layer_at_a_time(results):
    """The largest array that is gathered is one layer's matrix of the MLP, 16 x 96, and not those of both layers."""
    assert results["modern"]["fsdp"]["collectives"]["all-gather"] == 16 * 96


def test_the_largest_recipe_fits_eight_devices_of_16_gb(results):
    """With its batch of 128 rows of 1,024 tokens, AdamW and remat: what the compiler says, which runs nothing."""
    assert results["bytes"] < 16e9


def test_tpus_take_their_kernels(results):
    """In bfloat16, with heads that share keys: forward, and backward for queries and for keys and values."""
    assert results["kernels"]["tpu"] >= 3


def test_gpus_take_theirs(results):
    """On a mesh, with dropout."""
    if results["kernels"]["gpu"] is None:
        pytest.skip(
            "this JAX translates kernels for GPUs on a mesh where there are some; test_attention.py has one GPU's"
        )
    assert results["kernels"]["gpu"] >= 3  # JAX 0.10 has a fourth, whose results nobody reads; XLA leaves it out


def test_impossible_mesh():
    with pytest.raises(UserError, match=r"1 device\(s\) do not divide by mesh_fsdp=2 x mesh_tensor=1"):
        sharding.make_layout(2, 1)


def test_a_size_that_does_not_divide_is_called_by_its_field():
    layout = sharding.Layout(jax.sharding.AbstractMesh((1, 1, 2), ("data", "fsdp", "tensor")))
    with pytest.raises(UserError, match=r"^num_kv_heads=1 does not divide by mesh_tensor=2"):
        layout.check(models.TransformerConfig(vocab_size=8, num_kv_heads=1))


def tpus(kind: str, *sides: int, slices: int = 1, cores: int = 1) -> list:
    """What stands for the chips of a pod: JAX asks them for their places alone."""
    places = itertools.product(range(slices), range(sides[2]), range(sides[1]), range(sides[0]), range(cores))
    return [
        types.SimpleNamespace(id=number, platform="tpu", device_kind=kind, process_index=number // 4, slice_index=part,
                              coords=[x, y, z], core_on_chip=core)
        for number, (part, z, y, x, core) in enumerate(places)
    ]  # fmt: skip


def gpus(nodes: int) -> list:
    """Eight a node, in no order; JAX takes each node for a slice."""
    numbers = np.random.default_rng(0).permutation(8 * nodes)
    return [types.SimpleNamespace(id=i, platform="gpu", device_kind="H100", slice_index=i // 8) for i in numbers]


def of_one_slice(devices: list) -> list:
    """As libtpu has them: those of a single slice need not say its number."""
    for device in devices:
        del device.slice_index
    return devices


@pytest.mark.parametrize(
    ("devices", "shape"),
    [
        (tpus("TPU v3", 2, 2, 1, cores=2), (8, 1, 1)),
        (of_one_slice(tpus("TPU v4", 4, 4, 4)), (8, 8, 1)),
        (tpus("TPU v4", 2, 2, 4), (2, 2, 4)),
        (tpus("TPU v5 lite", 4, 4, 1), (2, 8, 1)),
        (tpus("TPU v6 lite", 4, 4, 1), (2, 8, 1)),
        (tpus("TPU v6 lite", 4, 4, 1, slices=2), (2, 8, 2)),
        (gpus(2), (2, 8, 1)),
        (gpus(2), (4, 2, 2)),
    ],
)
def test_devices_of_pods_and_nodes(devices, shape):
    """Each has one place; what talks most lies within one slice or node."""
    arranged = sharding.arrange(devices, shape)
    assert arranged.shape == shape
    assert sorted(device.id for device in arranged.flat) == list(range(len(devices)))
    for part in arranged:
        assert len({getattr(device, "slice_index", 0) for device in part.flat}) == 1


def test_a_mesh_that_slices_do_not_allow():
    with pytest.raises(UserError, match="cannot be a mesh of data 1 x mesh_fsdp=32 x mesh_tensor=1; choose others"):
        sharding.make_layout(32, 1, tpus("TPU v6 lite", 4, 4, 1, slices=2))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"emb_dim": 20}, "emb_dim=20 does not divide by mesh_fsdp=8"),
        ({"vocab_size": 50}, "vocab_size=50 does not divide by mesh_tensor=4"),
    ],
)
def test_sizes_that_do_not_divide(fields, words):
    mesh = jax.sharding.AbstractMesh((1, 8, 4), ("data", "fsdp", "tensor"))
    network = models.TransformerConfig(**{"vocab_size": 64, "emb_dim": 16} | fields)
    with pytest.raises(UserError, match=words):
        sharding.Layout(mesh).check(network)
