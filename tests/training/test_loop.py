"""Training: the loss by hand, and a run that may be broken off anywhere."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import batch_of, call, command, init, one_line_error, run

from transformer_lm import models
from transformer_lm.checkpoints import store
from transformer_lm.data import packing
from transformer_lm.errors import UserError
from transformer_lm.training import optimizers
from transformer_lm.training.config import TrainConfig
from transformer_lm.training.evaluation import evaluate
from transformer_lm.training.flops import flops_per_token
from transformer_lm.training.loss import loss_and_totals
from transformer_lm.training.start import restore_or_init
from transformer_lm.training.state import TrainState, init_state, zero_totals
from transformer_lm.training.step import make_eval_step, make_train_step

ADAM = optimizers.OptimizerConfig(learning_rate=0.01, warmup_steps=10, weight_decay=0.1)


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class TestLoss:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
    def test_against_explicit_distributions(self, smoothing):
        """Kullback-Leibler divergence from the smoothed target distribution, written out."""
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(2, 3, 7)).astype(np.float32) * 3
        targets = rng.integers(0, 7, (2, 3))
        weights = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
        wanted = np.full((2, 3, 7), smoothing / 6)
        np.put_along_axis(wanted, targets[..., None], 1 - smoothing, axis=-1)
        entropy = -np.sum(wanted * np.log(np.maximum(wanted, 1e-30)), axis=-1)
        smoothed = -np.sum(wanted * log_softmax(logits), axis=-1) - entropy
        plain = -np.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        loss, totals = loss_and_totals(jnp.asarray(logits), jnp.asarray(targets), weights, smoothing)
        assert float(loss) == pytest.approx(np.sum(smoothed * weights), rel=1e-5)
        assert float(totals["loss"]) == pytest.approx(np.sum(plain * weights), rel=1e-5)
        assert float(totals["correct"]) == np.sum((logits.argmax(axis=-1) == targets) * weights)
        assert float(totals["tokens"]) == 3


def first_step(model, params, batch, smoothing=0.0):
    """State and metrics after one step of plain gradient descent with rate 1: the change is the gradient."""
    optimizer = optax.sgd(1.0)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), zero_totals())
    return jax.jit(make_train_step(model, optimizer, smoothing))(state, batch, jax.random.key(0))


class TestTrainStep:
    @pytest.fixture
    def quiet(self, tiny):
        return dataclasses.replace(tiny, dropout_rate=0.0, attention_dropout_rate=0.0)

    def test_gradient_is_weighted_by_token(self, quiet):
        """A batch of a long and a short row has the gradient of all its tokens' mean, not of the rows' means."""
        params = init(quiet)
        rows = [batch_of([[5, 6, 7, 8, 9, 10, 11]], 8), batch_of([[12]], 8)]
        both = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        states = [first_step(quiet, params, batch)[0] for batch in (*rows, both)]
        long, short, mean = (jax.tree.map(lambda a, b: np.asarray(b - a), params, state.params) for state in states)
        expected = jax.tree.map(lambda a, b: (8 * a + 2 * b) / 10, long, short)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), mean, expected)

    def test_padding_changes_nothing(self, quiet):
        params = init(quiet)
        bare, padded = (first_step(quiet, params, batch_of([[5, 6, 7]], length)) for length in (4, 9))
        assert float(bare[1]["loss"]) == pytest.approx(float(padded[1]["loss"]), rel=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), bare[0].params, padded[0].params)

    def test_label_smoothing_is_applied(self, quiet):
        params, batch = init(quiet), batch_of([[5, 6, 7]], 4)
        plain, smoothed = (first_step(quiet, params, batch, smoothing) for smoothing in (0.0, 0.2))
        assert float(plain[1]["loss"]) == pytest.approx(float(smoothed[1]["loss"]))  # what is reported stays comparable
        kernels = [np.asarray(state.params["logits"]["kernel"]) for state, _ in (plain, smoothed)]
        assert np.max(np.abs(kernels[0] - kernels[1])) > 1e-3

    def test_learns_by_heart(self, tiny):
        batch = batch_of([[5, 6, 7, 8], [9, 8, 7]], 10)
        optimizer = optimizers.make_optimizer(ADAM)
        step = jax.jit(make_train_step(tiny, optimizer, 0.0))
        state = init_state(tiny, optimizer, jax.random.key(0))
        for _ in range(200):
            state, _ = step(state, batch, jax.random.key(1))
        assert int(state.step) == 200
        assert float(state.totals["tokens"]) == 200 * 9
        totals = make_eval_step(tiny)(state.params, batch)
        assert float(totals["loss"]) / 9 < 0.2


def test_evaluate_counts_by_hand(tiny):
    params = init(tiny)
    texts = [[5, 6, 7, 8], [9, 8, 7]]
    batches = [batch_of([text], 8) for text in texts]
    nats = []
    for text in texts:
        tokens = np.array([*text, 2])
        logits = np.asarray(call(tiny, params, batch_of([text], len(tokens))))[0]
        nats.extend(-log_softmax(logits)[np.arange(len(tokens)), tokens])
    manifest = {"tokens": 90, "characters": 120, "bytes": 360}
    found = evaluate(make_eval_step(tiny), params, batches, manifest)
    loss = np.mean(nats)
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert found["eval_bits_per_char"] == pytest.approx(loss / np.log(2) * 90 / 120, rel=1e-5)
    assert found["eval_bits_per_byte"] == pytest.approx(loss / np.log(2) * 90 / 360, rel=1e-5)


def test_beginning_again_beside_checkpoints_is_refused(tmp_path):
    saved = store.Checkpoints(tmp_path)
    saved.save(3, {"w": jnp.zeros(2)}, {"m": jnp.zeros(2)}, {"step": jnp.asarray(3)})
    saved.wait()
    config = TrainConfig(
        per_device_batch_size=1,
        eval_per_device_batch_size=1,
        num_train_steps=5,
        num_eval_steps=1,
        label_smoothing=0.0,
        log_every_steps=1,
        eval_every_steps=1,
        checkpoint_every_steps=1,
        keep_checkpoints=1,
        save_checkpoints=True,
        restore_checkpoints=False,
    )
    with pytest.raises(UserError, match=r"holds checkpoints \[3\], and restore_checkpoints=False"):
        restore_or_init(saved, config, None, None, None)


def test_flops_against_xla():
    """The formula, against what XLA counts in a compiled step without the scan's hiding of layers."""
    model = models.TransformerConfig(
        vocab_size=512, emb_dim=128, num_heads=4, num_layers=1, qkv_dim=128, mlp_dim=512, dropout_rate=0.0,
        attention_dropout_rate=0.0,
    )  # fmt: skip
    batch = packing.unpack(np.full((4, 64), 7, np.uint16))
    optimizer = optimizers.make_optimizer(ADAM)
    state = jax.eval_shape(lambda: init_state(model, optimizer, jax.random.key(0)))
    step = jax.jit(make_train_step(model, optimizer, 0.0))
    compiled = step.lower(state, batch, jax.eval_shape(lambda: jax.random.key(0))).compile()
    assert compiled.cost_analysis()["flops"] / (4 * 64) == pytest.approx(flops_per_token(model, 64), rel=0.15)


SHARDED = """
import sys
import jax, numpy as np
from transformer_lm import models
from transformer_lm.training import optimizers, sharding
from transformer_lm.training.state import init_state
from transformer_lm.training.step import make_train_step

model = models.TransformerConfig(vocab_size=50, emb_dim=16, num_heads=2, num_layers=2, qkv_dim=16, mlp_dim=32)
optimizer = optimizers.make_optimizer(optimizers.OptimizerConfig(0.01, 2, 0.1))
mesh = sharding.make_mesh()
assert mesh.size == int(sys.argv[1]), mesh
state = init_state(model, optimizer, jax.random.key(0))
state = jax.device_put(state, sharding.replicated(mesh))
tokens = np.random.default_rng(0).integers(3, 50, (16, 12), np.int32)
segments = np.ones_like(tokens)
segments[:5, 4:] = 0  # rows of unequal numbers of tokens, unevenly spread over the devices
batch = {"inputs": tokens, "targets": tokens, "segments": segments,
         "positions": np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)}
batch = jax.device_put(batch, sharding.batch_sharding(mesh))
step = jax.jit(make_train_step(model, optimizer, 0.1), donate_argnums=0)
for _ in range(5):
    state, metrics = step(state, batch, jax.random.key(1))
np.savez(sys.argv[2], *jax.tree.leaves((state.params, state.totals, metrics)))
"""


def test_sharded_equals_single(tmp_path):
    """Eight devices and one end with the same parameters, dropout and token weights included."""
    results = []
    for devices in (1, 8):
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        path = tmp_path / f"{devices}.npz"
        subprocess.run([sys.executable, "-c", SHARDED, str(devices), path], env=environment, check=True)
        results.append(np.load(path))
    for name in results[0]:
        np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-3, atol=1e-5)


RUN = {
    "num_train_steps": 400,
    "log_every_steps": 7,
    "eval_every_steps": 100,
    "checkpoint_every_steps": 20,
    "learning_rate": 0.01,
    "warmup_steps": 50,
}


def metrics_of(workdir) -> list[dict]:
    """Lines of metrics.jsonl, without the speeds."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("tokens_per_second", "mfu")} for line in lines]


def state_of(workdir, step) -> list[np.ndarray]:
    """All arrays of a checkpoint."""
    checkpointer = ocp.StandardCheckpointer()
    folder = workdir / "checkpoints" / str(step)
    return jax.tree.leaves([checkpointer.restore(folder / item) for item in ("params", "opt_state", "progress")])


def last_step(workdir) -> int:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def interrupt(workdir, number: signal.Signals, beyond_step: int, **fields) -> tuple[int, str]:
    """Starts a run, sends it a signal some time after a step; returns exit status and standard error."""
    process = subprocess.Popen(command("main", workdir, **RUN | fields), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while process.poll() is None and last_step(workdir) < beyond_step and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.1))
    process.send_signal(number)
    errors = process.communicate(timeout=200)[1]
    return process.returncode, errors


def test_a_broken_run_equals_an_unbroken_one(tmp_path):
    """Killed, interrupted and terminated, it ends with the same bits: parameters, optimizer, metrics."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    done = run(command("main", unbroken, **RUN))
    assert done.returncode == 0, done.stderr

    status, errors = interrupt(broken, signal.SIGKILL, 40 + random.randrange(30))
    assert status == -signal.SIGKILL, errors
    for number in (signal.SIGTERM, signal.SIGINT):
        status, errors = interrupt(broken, number, last_step(broken) + 20 + random.randrange(20))
        assert status == 0, errors
        assert f"Stopped by {number.name} at step" in errors
        assert "a checkpoint is saved" in errors
    status, errors = interrupt(broken, signal.SIGKILL, 230 + random.randrange(60))
    assert status == -signal.SIGKILL, errors
    done = run(command("main", broken, **RUN))
    assert done.returncode == 0, done.stderr
    assert "Resuming at step" in done.stderr

    assert metrics_of(broken) == metrics_of(unbroken)
    for one, other in zip(state_of(unbroken, 400), state_of(broken, 400), strict=True):
        np.testing.assert_array_equal(one, other)
    done = run(command("main", broken, **RUN))
    assert "Already trained to step 400" in done.stderr


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    fields = RUN | {"learning_rate": 1e30, "warmup_steps": 1, "checkpoint_every_steps": 1, "eval_every_steps": 1000}
    done = run(command("main", tmp_path, **fields))
    error = one_line_error(done)
    assert "Training diverged" in error
    step = int(error.split("at step ")[1].split(":")[0])
    kept = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert kept
    assert max(kept) < step
    assert all(np.all(np.isfinite(x)) for x in state_of(tmp_path, min(kept)))
