"""Steps compiled for devices that are not at hand: CPU devices, and where libtpu is installed (make test-tpu) TPUs."""

import dataclasses
import importlib.util
import re
import sys
import types

import jax
import numpy as np
import pytest
from conftest import one_line_error
from jax.experimental import topologies
from processes import run_fork

from transformer_lm import attention, axes
from transformer_lm.errors import UserError
from transformer_lm.training import ahead, sharding

TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: make test-tpu")


def compiled_for(topology: str, config: str, *options: str):
    """What the command says, in a process of its own: JAX is asked for other devices there."""
    arguments = [sys.executable, "-m", "transformer_lm.train_compile", f"--config=configs/{config}.py"]
    return run_fork([*arguments, f"--topology={topology}", *options])


def needs(topology: str, config: str, *options: str) -> dict[str, str]:
    """The lines that it prints."""
    done = compiled_for(topology, config, *options)
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


def gibibytes(found: dict[str, str]) -> float:
    """Memory of a device, state and work."""
    return float(re.search(r"= ([\d.]+) GiB", found["memory of a device"])[1])


SMALL = [f"--config.{field}" for field in ("num_layers=2", "emb_dim=64", "qkv_dim=64", "mlp_dim=128", "num_heads=4",
                                           "vocab_size=512", "max_target_length=64", "num_train_steps=10")]  # fmt: skip


def test_on_cpu_devices():
    found = needs("cpu:8", "japanese_0.1b_v1", *SMALL, "--config.mesh_fsdp=4", "--config.mesh_tensor=2")
    assert found["devices"] == "8 device(s) (fsdp 4, tensor 2) of kind cpu"
    assert found["batch"] == "256 rows a step"
    assert "all-gather" in found["collectives in the program"]
    assert found["model"].endswith("10 steps")
    assert "time, if 40% of the makers' peak is reached" not in found  # which CPUs do not have


def test_on_the_devices_at_hand():
    assert needs("", "japanese_0.1b_v1", *SMALL)["devices"] == f"1 device(s) of kind {jax.devices()[0].device_kind}"


def test_memory_of_a_device():
    """Parameters and their two moments, of four bytes each: 12 for each of 36 million, or an eighth of that."""
    options = [*SMALL, "--config.vocab_size=32000", "--config.emb_dim=512"]
    for mesh, expected in (("", 0.38), ("--config.mesh_fsdp=8", 0.05)):
        found = needs("cpu:8", "japanese_0.1b_v1", *options, *filter(None, [mesh]))
        assert float(found["memory of a device"].split()[0]) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("topology", "options", "words"), [
    ("v5e", (), "--topology=v5e must be like v5e:2x4 or cpu:8"),
    ("cpu:2x2", (), "--topology=cpu:2x2 must be like"),
    ("h100:8", (), "--topology=h100:8 must be like v5e:2x4 or cpu:8: a kind of TPU"),
    ("cpu:0", (), "--topology=cpu:0 must be like"),
    ("cpu:2", ("--config.attention=tpu",), "attention='tpu' does not run on CPU; set attention='auto'."),
    ("cpu:2", ("--config.mesh_fsdp=4",), "2 device(s) do not divide by mesh_fsdp=4 x mesh_tensor=1"),
    ("cpu:2", ("--config.global_batch_size=3",), "A step of 3 rows does not divide by 2 device(s)"),
])  # fmt: skip
def test_what_cannot_be(topology, options, words):
    assert words in one_line_error(compiled_for(topology, "japanese_0.1b_v1", *SMALL, *options))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_tpus_compiler():
    assert "needs the package libtpu" in one_line_error(compiled_for("v5e:2x4", "japanese_0.1b_v1"))


@TPU
@pytest.mark.parametrize(
    ("topology", "config", "options", "memory", "kernels"),
    [
        ("v3:2x2", "japanese_0.1b_v1", (), 15.48, 0),
        ("v3:2x2", "japanese_0.1b_v2", (), 15.48, 0),
        ("v3:2x2", "japanese_1.0b_v1", ("--config.mesh_fsdp=8", "--config.remat=block"), 15.48, 0),
        ("v5e:1x2", "japanese_0.1b_v2", (), 15.75, 3),
        ("v5e:2x4", "japanese_0.1b_v2", (), 15.75, 3),
        ("v5e:2x4", "japanese_0.4b_v2", ("--config.mesh_fsdp=8",), 15.75, 3),
        ("v5e:2x4", "japanese_1.0b_v2", ("--config.mesh_fsdp=8",), 15.75, 3),
        ("v5e:2x4", "japanese_0.1b_v2", ("--config.mesh_fsdp=2", "--config.mesh_tensor=2"), 15.75, 3),
    ],
)
def test_recipes_fit_tpus_of_16_gb(topology, config, options, memory, kernels):
    """With all their rows; forward, and backward for queries and for keys and values, each layer's kernel runs once."""
    found = needs(topology, config, *options)
    assert gibibytes(found) < memory
    assert int(found["fused kernels in the program"]) == kernels
    assert ("all-gather" in found["collectives in the program"]) == bool(options)


@TPU
def test_what_does_not_fit_a_tpu():
    line = one_line_error(compiled_for("v5e:2x4", "japanese_0.1b_v2", "--config.per_device_batch_size=64"))
    assert "memory is exhausted while compiling; lower per_device_batch_size" in line


def test_state_takes_room_besides_work():
    device = types.SimpleNamespace(device_kind="TPU v5 lite")
    layout = types.SimpleNamespace(device=device)
    needs = ahead.Needs(layout, None, 4 * ahead.GIB, 11 * ahead.GIB, {}, 0, 1.0, 1)
    needs.check()
    more = dataclasses.replace(needs, work=12 * ahead.GIB)
    with pytest.raises(
        UserError, match=r"4.00 GiB of state \+ 12.00 GiB of work = 16.00 GiB of each device, and a TPU"
    ):
        more.check()
    device.device_kind = "cpu"
    more.check()


@TPU
def test_no_such_tpu():
    assert "--topology=v9:2x2: libtpu does not compile for it" in one_line_error(
        compiled_for("v9:2x2", "japanese_0.1b_v1")
    )


@TPU
@pytest.mark.parametrize(("topology", "options", "fsdp", "tensor"), [
    ("v2:2x2", {}, 1, 1), ("v3:4x4", {}, 8, 1), ("v4:4x4x4", {"chip_config_name": "megacore"}, 8, 1),
    ("v5p:2x2x4", {}, 2, 4), ("v5e:8x16", {}, 8, 4), ("v5e:4x4", {"num_slices": 2}, 8, 2), ("v6e:16x16", {}, 16, 1),
])  # fmt: skip
def test_meshes_of_real_topologies(topology, options, fsdp, tensor):
    ahead.set_up_libtpu()
    devices = topologies.get_topology_desc(topology, "tpu", **options).devices
    layout = sharding.make_layout(fsdp, tensor, devices)
    assert (layout.ways("emb_dim"), layout.ways("num_heads")) == (fsdp, tensor)
    assert set(layout.mesh.devices.flat) == set(devices)


@TPU
@pytest.mark.parametrize(("dtype", "length", "heads", "size"), [
    ("float32", 128, 4, 64), ("bfloat16", 384, 2, 32), ("bfloat16", 640, 1, 96), ("bfloat16", 8192, 4, 128),
    ("float32", 2048, 4, 256),
])  # fmt: skip
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2"])
def test_the_kernel_that_is_chosen_compiles(topology, dtype, length, heads, size):
    """Forward and backward, of other types, heads and rows than the recipes'."""
    ahead.set_up_libtpu()
    layout = sharding.make_layout(1, 1, topologies.get_topology_desc(topology, "tpu").devices[:1])
    query, key = (
        jax.ShapeDtypeStruct((2, number, length, size), dtype, sharding=layout.sharding()) for number in (4, heads)
    )
    segments = jax.ShapeDtypeStruct((2, length), np.int32, sharding=layout.sharding())

    def loss(*arrays):
        return attention.attend_in_rows(*arrays).astype(np.float32).sum()

    with axes.laid_out(layout):
        assert attention.choose(query, 0.0) == "tpu"
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(query, key, key, segments).compile()
    assert compiled.as_text().count("tpu_custom_call") == 3
