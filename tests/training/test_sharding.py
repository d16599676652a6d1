"""What a run computes does not depend on the devices that it runs on; and what they tell each other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from transformer_lm import models
from transformer_lm.errors import UserError
from transformer_lm.training import sharding


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """What on_eight_devices.py finds on each mesh."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    script = Path(__file__).with_name("on_eight_devices.py")
    arguments = [sys.executable, script, tmp_path_factory.mktemp("workdir")]
    done = subprocess.run(arguments, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rematerialization" not in done.stderr  # XLA's warning of an array that it gathers for want of a better way
    return json.loads(done.stdout)


MESHES = ["data", "fsdp", "tensor", "mixed in parts"]


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_are_those_of_one_device(results, mesh):
    """Over twenty steps with dropout, label smoothing and rows of unequal length."""
    np.testing.assert_allclose(results[mesh]["losses"], results["single"]["losses"], rtol=1e-5)
    for name, value in results["single"]["eval"].items():
        assert results[mesh]["eval"][name] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("mesh", ["single", *MESHES])
def test_a_checkpoint_goes_on_on_any_mesh(results, mesh):
    """What fsdp on eight devices has saved comes back bit for bit, and goes on to the losses of the unbroken run."""
    assert results[mesh]["restored"]["same bits"]
    np.testing.assert_allclose(results[mesh]["restored"]["losses"], results["unbroken"], rtol=1e-6)


@pytest.mark.parametrize(
    ("mesh", "share"), [("data", 1), ("fsdp", 1 / 8), ("tensor", 1 / 4), ("mixed in parts", 1 / 4)]
)
def test_each_device_holds_its_part(results, mesh, share):
    assert results[mesh]["share"] == share


def test_collectives(results):
    """Data alone sum up gradients; fsdp gathers parameters; tensor gathers nothing, least of all logits."""
    assert results["single"]["collectives"] == {}
    assert results["data"]["collectives"].keys() == {"all-reduce"}
    assert "all-gather" in results["fsdp"]["collectives"]
    assert results["tensor"]["collectives"].keys() == {"all-reduce"}


def test_the_largest_recipe_fits_eight_devices_of_16_gb(results):
    """With its batch of 128 rows of 1,024 tokens, AdamW and remat: what the compiler says, which runs nothing."""
    assert results["bytes"] < 16e9


def test_impossible_mesh():
    with pytest.raises(UserError, match=r"1 device\(s\) do not divide by mesh_fsdp=2 x mesh_tensor=1"):
        sharding.make_layout(2, 1)


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
