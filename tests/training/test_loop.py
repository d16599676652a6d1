"""A run that may be broken off, fail or be told to stop anywhere."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import signal
import threading
import time

import jax
import jax.numpy as jnp
import metadata_server
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import SMALL_RUN, command, run
from processes import Fork

from transformer_lm import locks, recipe
from transformer_lm.checkpoints import store
from transformer_lm.configs import base
from transformer_lm.data import input_pipeline, preparation
from transformer_lm.errors import UserError, one_line
from transformer_lm.training import loop, optimizers
from transformer_lm.training import step as training_step
from transformer_lm.training.config import Recipe
from transformer_lm.training.reporter import SPEEDS


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Tokenizer and rows of the small run."""
    folder = tmp_path_factory.mktemp("prepared")
    return preparation.prepare(small_recipe().data, str(folder))


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """What runs have in common is traced for the first of them; their schedule, rsqrt, reads no number of steps."""
    make = functools.cache(optimizers.make_optimizer)

    def make_optimizer(config):
        return make(dataclasses.replace(config, num_train_steps=1))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(optimizers, "make_optimizer", make_optimizer)
        for module, name in ((training_step, "make_train_step"), (loop, "make_eval_step")):
            patched.setattr(module, name, functools.cache(getattr(module, name)))
        yield


def small_recipe(**fields) -> Recipe:
    """A recipe whose steps take no time."""
    config = base.get_config()
    config.update(
        SMALL_RUN | {"num_layers": 1, "num_train_steps": 6, "log_every_steps": 1, "eval_every_steps": 4} | fields
    )
    return recipe.read(config)


def train(workdir, data, *, profiled=None, **fields):
    """Runs the small recipe in this process; whether it came to its end."""
    return loop.train_and_evaluate(small_recipe(**fields), data, str(workdir), profiled=profiled)


def steps_in(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def evaluated(workdir) -> list[int]:
    """The steps of which metrics.jsonl has an evaluation."""
    return [line["step"] for line in metrics_of(workdir) if "eval_loss" in line]


def fail(*_, **__):
    raise MemoryError("no room for logits")


@pytest.mark.parametrize(
    ("what", "lower"), [("evaluate_rows", "eval_per_device_batch_size"), ("language_model.generate_texts", "prompts")]
)
def test_saved_before_what_may_fail(tmp_path, prepared, monkeypatch, what, lower):
    """The step is not lost with its evaluation or its sample, which the next start makes up for."""
    with monkeypatch.context() as patched:
        patched.setattr(f"transformer_lm.training.loop.{what}", fail)
        with pytest.raises(MemoryError) as caught:
            train(tmp_path, prepared, checkpoint_every_steps=4)
    assert lower in one_line(caught.value)
    assert steps_in(tmp_path) == [4]
    assert evaluated(tmp_path) == []
    train(tmp_path, prepared, checkpoint_every_steps=4)
    assert evaluated(tmp_path) == [4, 6]
    assert [line["step"] for line in metrics_of(tmp_path) if "train_loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_prompt_too_long_is_refused_before_the_first_step(tmp_path, prepared):
    with pytest.raises(UserError, match="max_predict_length=16"):
        train(tmp_path, prepared, prompts="昔々あるところにおじいさんとおばあさんが" * 3)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("what", ["evaluate_rows", "language_model.generate_texts"])
def test_told_to_stop_while_it_evaluates(tmp_path, prepared, monkeypatch, what):
    """Saved and gone, though no checkpoint was due and the evaluation would have taken long; made up for later."""

    def take_long(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    with monkeypatch.context() as patched:
        patched.setattr(f"transformer_lm.training.loop.{what}", take_long)
        assert not train(tmp_path, prepared)
    assert steps_in(tmp_path) == [4]
    assert train(tmp_path, prepared)
    assert evaluated(tmp_path) == [4, 6]


def test_preempted(tmp_path, prepared, monkeypatch, caplog):
    """Google Cloud's notice stops a run as SIGTERM does, here in the middle of an evaluation."""

    def take_long(*_, **__):
        server.preempted.set()
        time.sleep(600)

    with metadata_server.serving() as server, monkeypatch.context() as patched:
        patched.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
        patched.setattr("transformer_lm.training.preemption.PAUSE_SECONDS", 0.01)
        patched.setattr("transformer_lm.training.loop.evaluate_rows", take_long)
        with caplog.at_level("INFO", logger="absl"):
            train(tmp_path, prepared)
    assert "Stopped by Google Cloud's preemption notice at step 4: a checkpoint is saved" in caplog.text
    assert steps_in(tmp_path) == [4]


def test_told_to_stop_while_it_compiles(tmp_path, prepared, monkeypatch, caplog):
    """Nothing has been done yet, and nothing is saved."""

    def slow_step(*_, **__):
        def step(state, batch, key):
            jax.debug.callback(lambda: None)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)

        return step

    monkeypatch.setattr(training_step, "make_train_step", slow_step)
    with caplog.at_level("INFO", logger="absl"):
        train(tmp_path, prepared)
    assert steps_in(tmp_path) == []
    assert "a checkpoint is saved" not in caplog.text


def test_told_to_stop_while_it_restores(tmp_path, prepared, monkeypatch, caplog):
    def never(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    monkeypatch.setattr(loop, "restore_or_init", never)
    with caplog.at_level("INFO", logger="absl"):
        assert not train(tmp_path, prepared)
    assert not (tmp_path / "config.json").exists()
    assert "Stopped by SIGTERM before the first step" in caplog.text


def test_the_step_is_compiled_while_the_state_is_read(tmp_path, prepared, monkeypatch):
    begun, jit, restore = threading.Event(), loop.jit_train_step, loop.restore_or_init

    def tell(*arguments, **options):
        begun.set()
        return jit(*arguments, **options)

    def wait(*arguments, **options):
        assert begun.wait(60)
        return restore(*arguments, **options)

    monkeypatch.setattr(loop, "jit_train_step", tell)
    monkeypatch.setattr(loop, "restore_or_init", wait)
    assert train(tmp_path, prepared, num_train_steps=1)


def test_what_makes_a_nan_is_named(tmp_path, prepared, monkeypatch):
    """With JAX's own flag for it, as without a step that is compiled ahead."""

    def broken_step(*_, **__):
        return lambda state, batch, key: (state, {"loss": jnp.log(-1.0 - state.step), "grad_norm": jnp.ones(())})

    monkeypatch.setattr(training_step, "make_train_step", broken_step)
    jax.config.update("jax_debug_nans", True)
    try:
        with pytest.raises(FloatingPointError, match=r"invalid value \(nan\) encountered in"):
            train(tmp_path, prepared)
    finally:
        jax.config.update("jax_debug_nans", False)


def test_without_jit(tmp_path, prepared, monkeypatch):
    """With JAX's own flag for that."""
    called = []

    def step(state, batch, key):
        called.append(batch)
        return dataclasses.replace(state, step=state.step + 1), {"loss": jnp.ones(()), "grad_norm": jnp.ones(())}

    monkeypatch.setattr(training_step, "make_train_step", lambda *_, **__: step)
    monkeypatch.setattr(loop.language_model, "generate_texts", lambda *_, **__: [])
    jax.config.update("jax_disable_jit", True)
    try:
        train(tmp_path, prepared, num_train_steps=2, log_every_steps=10, num_eval_steps=1)
    finally:
        jax.config.update("jax_disable_jit", False)
    assert len(called) == 2


def test_any_kind_of_random_numbers(tmp_path, prepared):
    """JAX's default may be another, as on TPUs it often is; dropout takes keys of its own kind."""
    jax.config.update("jax_default_prng_impl", "rbg")
    try:
        assert train(tmp_path, prepared, num_train_steps=1, dropout_rate=0.1, attention_dropout_rate=0.1)
    finally:
        jax.config.update("jax_default_prng_impl", "threefry2x32")


def test_checkpoints_by_the_clock(tmp_path, prepared):
    train(tmp_path, prepared, checkpoint_every_minutes=1e-9, keep_checkpoints=10)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_done(tmp_path, prepared, caplog, monkeypatch):
    train(tmp_path, prepared, num_train_steps=1)
    compiled = []
    monkeypatch.setattr(loop, "begun", compiled.append)
    with caplog.at_level("INFO", logger="absl"):
        train(tmp_path, prepared, num_train_steps=1)
    assert not compiled
    assert "Already trained to step 1 of num_train_steps=1" in caplog.text
    assert steps_in(tmp_path) == [1]


def test_a_trace_of_some_steps(tmp_path, prepared):
    """Where TensorBoard looks for it, and with the steps that were asked for."""
    train(tmp_path, prepared, profiled=(2, 4), save_checkpoints=False, eval_every_steps=100)
    [path] = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    trace = jax.profiler.ProfileData.from_file(str(path))
    events = [event for plane in trace.planes for line in plane.lines for event in line.events]
    assert [dict(event.stats)["step_num"] for event in events if event.name == "train"] == [2, 3]
    assert any("train_step" in event.name for event in events)


def test_a_trace_of_a_run_that_ends_before_it(tmp_path, prepared):
    train(tmp_path, prepared, profiled=(1, 100), save_checkpoints=False, eval_every_steps=100, num_train_steps=3)
    assert len(list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))) == 1


def test_second_run_on_a_workdir_is_refused(tmp_path, prepared):
    with (
        locks.exclusive(tmp_path / "run.lock", "it"),
        pytest.raises(UserError, match=rf"--workdir=.* is in use by process {os.getpid()}"),
    ):
        train(tmp_path, prepared)


def test_another_batch_size_goes_on_at_the_same_row(tmp_path, prepared, monkeypatch):
    """Whatever the batch sizes, the run reads the rows of the stream one after the other, each once."""
    read = []
    whole = input_pipeline.train_batches

    def recorded(*arguments, **options):
        for batch in whole(*arguments, **options):
            read.extend(map(bytes, batch["targets"]))
            yield batch

    monkeypatch.setattr(input_pipeline, "train_batches", recorded)
    train(tmp_path, prepared, num_train_steps=3)
    train(tmp_path, prepared, num_train_steps=5, per_device_batch_size=5)
    expected = whole(prepared.train, batch_size=1, seed=0)
    assert read == [bytes(next(expected)["targets"][0]) for _ in range(3 * 2 + 2 * 5)]


def test_what_has_changed_is_said(tmp_path, prepared, caplog):
    mixture = {"dataset_name": [("mukashi", 1.0)]}
    train(tmp_path, prepared, num_train_steps=1, **mixture)
    caplog.clear()
    with caplog.at_level("INFO", logger="absl"):
        train(tmp_path, prepared, **mixture, num_train_steps=2, learning_rate=0.5, seed=3, log_every_steps=2)
    assert "learning_rate was 0.0016 before and is 0.5 now." in caplog.text
    assert "With another seed the data have another order" in caplog.text
    assert "log_every_steps was" not in caplog.text
    assert "dataset_name was" not in caplog.text
    with pytest.raises(UserError, match="vocab_size=800 cannot be meant"):
        train(tmp_path, prepared, num_train_steps=3, vocab_size=800)


@pytest.mark.parametrize("saves", [True, False])
def test_beginning_again_beside_checkpoints_is_refused(tmp_path, prepared, saves):
    """Set aside ones, too: the metrics of what was trained would go."""
    train(tmp_path, prepared, num_train_steps=1)
    again = {"num_train_steps": 2, "save_checkpoints": saves, "restore_checkpoints": False}
    with pytest.raises(UserError, match=r"holds checkpoints \(1\), and restore_checkpoints=False"):
        train(tmp_path, prepared, **again)
    (tmp_path / "checkpoints").rename(tmp_path / "damaged_checkpoints")
    with pytest.raises(UserError, match=r"holds checkpoints \(1\), and restore_checkpoints=False"):
        train(tmp_path, prepared, **again)
    assert evaluated(tmp_path) == [1]


def test_another_run_after_a_lost_config_spoils_nothing(tmp_path, prepared):
    """What is refused leaves no config.json of its own, by which the right one would be refused next."""
    train(tmp_path, prepared, num_train_steps=1)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="is of another network"):
        train(tmp_path, prepared, num_train_steps=2, mlp_dim=48)
    assert not (tmp_path / "config.json").exists()
    assert train(tmp_path, prepared, num_train_steps=2)
    assert evaluated(tmp_path) == [1, 2]


def test_a_run_that_has_saved_nothing_holds_no_model(tmp_path, prepared, monkeypatch):
    """After one for which there was no memory a smaller one may begin."""
    with monkeypatch.context() as patched:
        patched.setattr(loop, "restore_or_init", fail)
        with pytest.raises(MemoryError):
            train(tmp_path, prepared, num_train_steps=1, mlp_dim=48)
    assert train(tmp_path, prepared, num_train_steps=1)


def test_a_checkpoint_that_does_not_count_rows(tmp_path, prepared):
    """As those of earlier versions: the rows are reckoned with the batch size."""
    train(tmp_path, prepared, num_train_steps=3)
    with contextlib.closing(store.Checkpoints(tmp_path)) as saved:
        params, opt_state, progress = map(ocp.StandardCheckpointer().restore, [
            tmp_path / "checkpoints" / "3" / item for item in store.ITEMS
        ])  # fmt: skip
        assert int(progress.pop("rows")) == 6
        saved._manager.delete(3)
        saved.save(3, params, opt_state, progress)
    train(tmp_path, prepared, num_train_steps=4)
    assert int(ocp.StandardCheckpointer().restore(tmp_path / "checkpoints" / "4" / "progress")["rows"]) == 8


RUN = {
    "num_layers": 1,
    "eval_split": "validation[:4]",
    "num_train_steps": 100,
    "log_every_steps": 7,
    "eval_every_steps": 25,
    "checkpoint_every_steps": 12,
    "learning_rate": 0.01,
    "warmup_steps": 25,
    "sampling_temperature": 0,
}


def metrics_of(workdir) -> list[dict]:
    """Lines of metrics.jsonl, without the speeds."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in SPEEDS} for line in lines]


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
    process = Fork(command("main", workdir, **RUN | fields))
    deadline = time.monotonic() + 200
    while process.poll() is None and last_step(workdir) < beyond_step and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.1))
    process.send_signal(number)
    _, errors = process.communicate(timeout=200)
    return process.returncode, errors


def test_a_broken_run_equals_an_unbroken_one(tmp_path):
    """Killed, interrupted and terminated, it ends with the same bits: parameters, optimizer, metrics."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    done = run(command("main", unbroken, **RUN))
    assert done.returncode == 0, done.stderr

    for number in (signal.SIGTERM, signal.SIGINT):
        status, errors = interrupt(broken, number, last_step(broken) + 8 + random.randrange(8))
        assert status == 0, errors
        assert f"Stopped by {number.name} at step" in errors
        assert "a checkpoint is saved" in errors
    status, errors = interrupt(broken, signal.SIGKILL, 62 + random.randrange(15))
    assert status == -signal.SIGKILL, errors
    done = run(command("main", broken, **RUN))
    assert done.returncode == 0, done.stderr
    assert "Resuming at step" in done.stderr

    assert metrics_of(broken) == metrics_of(unbroken)
    for one, other in zip(state_of(unbroken, 100), state_of(broken, 100), strict=True):
        np.testing.assert_array_equal(one, other)


def test_loss_that_is_not_finite_stops_the_run(tmp_path, prepared):
    fields = RUN | {"learning_rate": 1e30, "warmup_steps": 1, "checkpoint_every_steps": 1, "eval_every_steps": 1000}
    with pytest.raises(UserError, match="Training diverged") as error:
        train(tmp_path, prepared, **fields)
    step = int(str(error.value).split("at step ")[1].split(":")[0])
    kept = steps_in(tmp_path)
    assert kept
    assert max(kept) < step
    assert all(np.all(np.isfinite(x)) for x in state_of(tmp_path, min(kept)))
