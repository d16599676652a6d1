"""The training loop: step, save, evaluate, sample, log.

The step is a pure function of (state, batch, key), see `make_train_step`. The loop dispatches step n before it reads
the metrics of step n - 1, so that the device never waits for Python. What is dear is saved before anything is tried
that may fail or take long, and what takes long is given up when the run is told to stop.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from transformer_lm import attention, axes, console, locks, models
from transformer_lm.checkpoints import store
from transformer_lm.checkpoints import workdir as run_folder
from transformer_lm.data import input_pipeline, preparation
from transformer_lm.dropout import KEYS
from transformer_lm.errors import stage
from transformer_lm.generation import language_model
from transformer_lm.tokenizer.turns import Turns
from transformer_lm.training import batching, distributed, instructions, metrics, optimizers, sharding
from transformer_lm.training.agreement import AnyProcess
from transformer_lm.training.config import Recipe
from transformer_lm.training.evaluation import evaluate_rows
from transformer_lm.training.flops import flops_per_token, peak_flops
from transformer_lm.training.preemption import preemption_watched
from transformer_lm.training.profile import Profile
from transformer_lm.training.reporter import Reporter
from transformer_lm.training.signals import Signals, Stopped, begun, signals_caught
from transformer_lm.training.start import find_initial, restore_or_init
from transformer_lm.training.state import TrainState, abstract_state, zero_totals
from transformer_lm.training.step import ROWS, abstract_arguments, jit_train_step, make_eval_step
from transformer_lm.training.stop import Stop


def train_and_evaluate(
    recipe: Recipe, data: preparation.PreparedData, workdir: str, *, profiled: tuple[int, int] | None = None
) -> bool:
    """Runs a recipe to its last step, or until it is told to stop, going on from the workdir's newest checkpoint.

    Args:
      recipe: what to train, and how.
      data: what it trains and evaluates on.
      workdir: the folder of the run.
      profiled: the steps of which a trace is written, from the first to before the second.

    Returns:
      whether it came to the last step.

    Raises:
      UserError: another process uses the workdir, it holds another model, init_from names one that does not fit, a
        prompt is too long, the loss is not finite, or something cannot be read or written.
    """
    turns = Turns.of(data.tokenizer) if recipe.data.conversations else None
    language_model.check_prompts(data.tokenizer, recipe.prompts, recipe.sampling, turns)
    with contextlib.ExitStack() as stack:
        if distributed.is_first():
            lock = epath.Path(workdir) / run_folder.LOCK_FILE
            stack.enter_context(locks.exclusive(lock, f"--workdir={workdir}"))
        signals = stack.enter_context(signals_caught())
        stack.enter_context(preemption_watched(signals.tell))
        prepare = functools.partial(_prepare_run, recipe, data, workdir, turns)
        try:  # where there are several processes none leaves the others alone
            run = signals.listening(prepare) if jax.process_count() == 1 else prepare()
        except Stopped:
            logging.info("Stopped by %s before the first step; run the same command to go on.", signals.caught)
            return False
        stack.enter_context(contextlib.closing(run.saved))
        if distributed.is_first():  # now that what the workdir holds was found to be this run's
            _write_config(workdir, run)
        writer = stack.enter_context(contextlib.closing(_make_writer(stack, workdir, run)))
        profile = stack.enter_context(contextlib.closing(Profile(workdir, profiled)))
        _Loop(run, writer, signals, profile).run()
    return run.step >= recipe.train.num_train_steps


def check_devices(recipe: Recipe, workdir: str):
    """Raises UserError where the devices cannot be the recipe's mesh or share its step, before data are prepared.

    Where the recipe leaves both to the devices at hand nothing can be wrong, and JAX does not take them yet. What the
    size of the tokenizer has to divide by is found later.
    """
    train, network = recipe.train, recipe.network
    if jax.config.jax_platforms:
        axes.check_devices()
    if network.attention != "auto":
        lengths = recipe.data.max_target_length, recipe.data.max_eval_target_length
        attention.check_rows(network.attention, network.head_size, lengths)
    if train.mesh_fsdp * train.mesh_tensor == 1 and not (train.global_batch_size or train.gradient_accumulation_steps):
        return
    layout = sharding.make_layout(train.mesh_fsdp, train.mesh_tensor)
    layout.check(dataclasses.replace(network, vocab_size=layout.mesh.size))
    batching.plan(train, layout, **run_folder.remembered_batch(epath.Path(workdir), recipe.fields))


def _make_writer(stack: contextlib.ExitStack, workdir: str, run: "_Run") -> metrics.MetricWriter | metrics.SilentWriter:
    if not distributed.is_first():
        return metrics.SilentWriter(workdir, run.step)
    show = stack.enter_context(console.training_progress(run.step, run.recipe.train.num_train_steps))
    return metrics.MetricWriter(workdir, run.step, show)


@dataclasses.dataclass
class _Run:
    """What stands ready before the first step.

    Attributes:
      recipe: what is trained.
      network: the network as it is.
      data: what it is trained on.
      turns: how it takes turns, where it is trained on conversations.
      layout: what lies where on the devices.
      batching: rows of a step.
      saved: the workdir's checkpoints.
      compiling: begins to compile the step when it is first called; what it returns will have it.
      key: of dropout.
      state: parameters and all else that a step changes.
      step: steps done.
      rows_read: training rows that were read in them.
      seconds: that it took to make all this.
    """

    recipe: Recipe
    network: models.TransformerConfig
    data: preparation.PreparedData
    turns: Turns | None
    layout: sharding.Layout
    batching: batching.Batching
    saved: store.Checkpoints
    compiling: Callable[[], concurrent.futures.Future[Callable]]
    key: jax.Array
    state: TrainState
    step: int
    rows_read: int
    seconds: float

    @property
    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps besides parameters and optimizer."""
        return {"step": self.state.step, "totals": self.state.totals, "rows": np.asarray(self.rows_read, np.int64)}


def _prepare_run(recipe: Recipe, data: preparation.PreparedData, workdir: str, turns: Turns | None) -> _Run:
    """Finds everything in order, or raises UserError."""
    began = time.monotonic()
    network = dataclasses.replace(recipe.network, vocab_size=data.tokenizer.vocab_size)
    layout = sharding.make_layout(recipe.train.mesh_fsdp, recipe.train.mesh_tensor)
    layout.check(network)
    attention.check_rows(network.attention, network.head_size, (data.train.row_length, data.eval.row_length))
    place = epath.Path(workdir)

    def claim() -> dict[str, int]:
        run_folder.check_workdir(place, recipe.fields, network, data.tokenizer, _names_of_rows(data))
        remembered = run_folder.remembered_batch(place, recipe.fields)
        return dataclasses.asdict(batching.plan(recipe.train, layout, **remembered))

    batches = batching.Batching(**distributed.agree("claim", claim))
    optimizer = optimizers.make_optimizer(recipe.optimizer)
    target = abstract_state(network, optimizer, layout)
    saved = store.Checkpoints(workdir, recipe.train.keep_checkpoints)

    def compile_step() -> Callable:
        step = jit_train_step(
            network, optimizer, recipe.train.label_smoothing, target, layout=layout, accumulation=batches.accumulation
        )
        if jax.config.jax_debug_nans or jax.config.jax_debug_infs or jax.config.jax_disable_jit:
            return step  # which these flags of JAX are for, as a compiled one is not
        return step.lower(*abstract_arguments(target, layout, batches.rows, data.train.row_length)).compile()

    compiling = functools.cache(lambda: begun(compile_step))
    if layout.device.platform != "gpu" and max(saved.steps, default=0) < recipe.train.num_train_steps:
        compiling()  # while the state is read or made; a GPU's compiler times kernels, and is better left alone
    init_key, dropout_key = _keys(recipe.seed, layout)
    state, rows_read = restore_or_init(
        saved, recipe, network, optimizer, layout, target,
        initial=find_initial(recipe, network, data.tokenizer, workdir), key=init_key, batch_size=batches.rows,
    )  # fmt: skip
    return _Run(recipe, network, data, turns, layout, batches, saved, compiling, dropout_key, state,
                step=int(state.step), rows_read=rows_read, seconds=time.monotonic() - began)  # fmt: skip


def _write_config(workdir: str, run: _Run):
    """Says in the workdir what it holds."""
    batch = {"rows": run.batching.rows, "eval_rows": run.batching.counted_eval_rows}
    described = run.recipe.fields, run.network, run.data.tokenizer, _names_of_rows(run.data)
    run_folder.write_config(epath.Path(workdir), *described, batch)


def _names_of_rows(data: preparation.PreparedData) -> list[str]:
    return [name for names in preparation.rows_named(data).values() for name in names]


def _keys(seed: int, layout: sharding.Layout) -> tuple[jax.Array, jax.Array]:
    """Of the parameters, and of dropout; on every device."""
    make = jax.jit(lambda: tuple(jax.random.split(jax.random.key(seed, impl=KEYS))), out_shardings=layout.sharding())
    return make()


class _Loop:
    """The steps of a run, and what is done between them."""

    def __init__(self, run: _Run, writer: metrics.MetricWriter, signals: Signals, profile: Profile):
        self._run, self._writer, self._signals, self._profile = run, writer, signals, profile
        self._config = run.recipe.train
        self._saved_step = run.step
        self._saved_at = time.monotonic()
        self._eval_step = jax.jit(make_eval_step(run.network, run.layout), out_shardings=run.layout.sharding())
        self._stop = Stop(signals, run.layout)
        self._save_is_due = AnyProcess(self._is_old, run.layout)
        self._reporter = Reporter(
            writer,
            optimizers.learning_rate_schedule(run.recipe.optimizer),
            flops_per_token(run.network, run.data.train.row_length),
            run.batching.rows * run.data.train.row_length,
            seconds=run.seconds,
        )

    def _tells(self) -> bool:
        """Whether this process will log metrics of training."""
        every = self._config.log_every_steps
        return distributed.is_first() and self._config.num_train_steps // every > self._run.step // every

    def run(self):
        """Does all steps that are left, unless a signal comes."""
        run, config = self._run, self._config
        devices = f"{run.layout} of kind {jax.devices()[0].device_kind}, {run.batching}"
        if run.step >= config.num_train_steps:
            logging.info("Already trained to step %d of num_train_steps=%d.", run.step, config.num_train_steps)
        else:
            logging.info("%s at step %d of %d: %d parameters, %s.", "Resuming" if run.step else "Starting", run.step,
                         config.num_train_steps, models.count_params(run.network), devices)  # fmt: skip
        try:
            if not run.step:
                self._writer.write_recipe(run.recipe.fields)
            elif self._evaluates(run.step) and not self._writer.has(run.step, "eval_loss"):
                self._evaluate()  # the run was stopped in the middle of it
            self._steps()
        except Stopped:
            pass
        self._reporter.flush()
        if self._stop.agreed or self._signals.caught:
            if self._stop.agreed and config.save_checkpoints and run.step > self._saved_step:
                self._save()
            kept = "a checkpoint is saved" if config.save_checkpoints and run.step else "nothing is saved"
            logging.info("Stopped by %s at step %d: %s; run the same command to go on.",
                         self._signals.caught or "another process", run.step, kept)  # fmt: skip

    def _steps(self):
        run, config = self._run, self._config
        if run.step >= config.num_train_steps:
            return
        rows = run.batching.rows
        batches = input_pipeline.train_batches(
            run.data.train, batch_size=rows, seed=run.recipe.seed, first_row=run.rows_read,
            only=batching.rows_here(run.layout, rows),
        )  # fmt: skip
        train_step = self._compiled()
        while run.step < config.num_train_steps and not self._stop():
            with self._profile.step(run.step):
                with self._reporter.waiting_for_data():
                    batch = next(batches)
                    batch = batching.place(run.layout, rows, {name: batch[name] for name in ROWS})
                run.state, step_metrics = train_step(run.state, batch, run.key)
            run.step, run.rows_read = run.step + 1, run.rows_read + rows
            self._profile.after(run.step, step_metrics)
            self._reporter.flush()
            self._reporter.pending = (run.step, step_metrics, self._totals_to_log())
            saving, evaluating = self._saves(run.step), self._evaluates(run.step)
            if saving or evaluating:
                self._reporter.flush()
                if saving:
                    self._save()
                if evaluating:
                    self._evaluate()
                self._reporter.restart_clock()

    def _compiled(self) -> Callable:
        """The step, when it is compiled; nothing is lost where that is given up."""
        step = self._stop.unless(self._run.compiling().result)
        if self._tells():  # now that nothing else is computed
            self._reporter.peak = peak_flops(jax.devices()[0], self._run.layout.mesh.size)
        return step

    def _totals_to_log(self) -> dict[str, jax.Array] | None:
        """The sums since they were last logged, when they are due; they begin anew."""
        run = self._run
        if run.step % self._config.log_every_steps:
            return None
        totals = run.state.totals
        run.state = dataclasses.replace(run.state, totals=run.layout.spread(zero_totals()))
        return totals

    def _is_old(self) -> bool:
        """Whether the last checkpoint is, by this process's clock."""
        minutes = (time.monotonic() - self._saved_at) / 60
        return 0 < self._config.checkpoint_every_minutes <= minutes

    def _saves(self, step: int) -> bool:
        """The same in all processes, whose saves wait for one another."""
        config = self._config
        due = config.checkpoint_every_minutes > 0 and self._save_is_due()
        due = due or step % config.checkpoint_every_steps == 0 or step == config.num_train_steps
        return config.save_checkpoints and due

    def _evaluates(self, step: int) -> bool:
        return step % self._config.eval_every_steps == 0 or step == self._config.num_train_steps

    def _save(self):
        run = self._run
        self._writer.sync()
        run.saved.save(run.step, run.state.params, run.state.opt_state, run.progress)
        self._saved_step, self._saved_at = run.step, time.monotonic()
        self._save_is_due.forget()

    def _evaluate(self):
        """Evaluates and samples, in vain when a signal comes."""
        run = self._run
        step, params, batches = run.step, run.state.params, run.batching
        with stage("evaluating", lower="eval_per_device_batch_size or max_eval_target_length"):
            values = self._stop.unless(
                lambda: evaluate_rows(
                    self._eval_step, params, run.data.eval, run.layout,
                    batch_size=batches.eval_rows, max_rows=batches.max_eval_rows, stopped=self._stop,
                )
            )  # fmt: skip
        with stage("writing samples", lower="max_predict_length or the number of prompts"):
            if run.data.judged:
                judged = run.data.judged
                values |= self._stop.unless(lambda: instructions.measure(run.network, params, run.turns, judged))
            texts = self._stop.unless(
                lambda: list(
                    language_model.generate_texts(
                        run.network, params, run.data.tokenizer, run.recipe.prompts, run.recipe.sampling,
                        seed=run.recipe.seed, turns=run.turns,
                    )
                )
            )  # fmt: skip
        self._writer.write(step, values)
        self._writer.write_samples(step, [text["text"] for text in texts])
