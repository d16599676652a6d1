"""The training loop: step, save, evaluate, sample, log.

The step is a pure function of (state, batch, key), see `make_train_step`. The loop dispatches step n before it reads
the metrics of step n - 1, so that the device never waits for Python. What is dear is saved before anything is tried
that may fail or take long, and what takes long is given up when the run is told to stop.
"""

import contextlib
import dataclasses
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from transformer_lm import console, locks, models
from transformer_lm.checkpoints import store
from transformer_lm.checkpoints import workdir as run_folder
from transformer_lm.data import input_pipeline, preparation
from transformer_lm.generation import language_model
from transformer_lm.training import metrics, optimizers, sharding
from transformer_lm.training.config import Recipe
from transformer_lm.training.evaluation import evaluate_rows
from transformer_lm.training.flops import flops_per_token
from transformer_lm.training.reporter import Reporter
from transformer_lm.training.signals import Signals, Stopped, signals_caught
from transformer_lm.training.start import find_initial, restore_or_init
from transformer_lm.training.state import TrainState, zero_totals
from transformer_lm.training.step import make_eval_step, make_train_step


def train_and_evaluate(recipe: Recipe, data: preparation.PreparedData, workdir: str):
    """Runs a recipe to its last step, or until it is told to stop, going on from the workdir's newest checkpoint.

    Args:
      recipe: what to train, and how.
      data: what it trains and evaluates on.
      workdir: the folder of the run.

    Raises:
      UserError: another process uses the workdir, it holds another model, init_from names one that does not fit, a
        prompt is too long, the loss is not finite, or something cannot be read or written.
    """
    language_model.check_prompts(data.tokenizer, recipe.prompts, recipe.sampling)
    with locks.exclusive(epath.Path(workdir) / run_folder.LOCK_FILE, f"--workdir={workdir}"):
        run = _prepare_run(recipe, data, workdir)
        with (
            contextlib.closing(run.saved),
            console.training_progress(run.step, recipe.train.num_train_steps) as show,
            contextlib.closing(metrics.MetricWriter(workdir, run.step, show)) as writer,
            signals_caught() as signals,
        ):
            _Loop(run, writer, signals).run()


@dataclasses.dataclass
class _Run:
    """What stands ready before the first step.

    Attributes:
      recipe: what is trained.
      network: the network as it is.
      data: what it is trained on.
      mesh: the devices.
      saved: the workdir's checkpoints.
      optimizer: what makes updates of gradients.
      key: of dropout.
      state: parameters and all else that a step changes.
      step: steps done.
      rows_read: training rows that were read in them.
    """

    recipe: Recipe
    network: models.TransformerConfig
    data: preparation.PreparedData
    mesh: Mesh
    saved: store.Checkpoints
    optimizer: Any
    key: jax.Array
    state: TrainState
    step: int
    rows_read: int

    @property
    def batch_size(self) -> int:
        """Training rows a step, over all devices."""
        return self.recipe.train.per_device_batch_size * self.mesh.size

    @property
    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps besides parameters and optimizer."""
        return {"step": self.state.step, "totals": self.state.totals, "rows": np.asarray(self.rows_read, np.int64)}


def _prepare_run(recipe: Recipe, data: preparation.PreparedData, workdir: str) -> _Run:
    """Finds everything in order, or raises UserError."""
    network = dataclasses.replace(recipe.network, vocab_size=data.tokenizer.vocab_size)
    rows = [part.directory.name for corpus in (data.train, data.eval) for part in corpus.parts]
    run_folder.claim_workdir(epath.Path(workdir), recipe.fields, network, data.tokenizer, rows)
    mesh = sharding.make_mesh()
    optimizer = optimizers.make_optimizer(recipe.optimizer)
    init_key, dropout_key = jax.random.split(jax.random.key(recipe.seed))
    saved = store.Checkpoints(workdir, recipe.train.keep_checkpoints)
    state, rows_read = restore_or_init(
        saved, recipe, network, optimizer, sharding.replicated(mesh),
        initial=find_initial(recipe, network, data.tokenizer, workdir), key=init_key,
        batch_size=recipe.train.per_device_batch_size * mesh.size,
    )  # fmt: skip
    return _Run(
        recipe, network, data, mesh, saved, optimizer, dropout_key, state, step=int(state.step), rows_read=rows_read
    )


class _Loop:
    """The steps of a run, and what is done between them."""

    def __init__(self, run: _Run, writer: metrics.MetricWriter, signals: Signals):
        self._run, self._writer, self._signals = run, writer, signals
        self._config = run.recipe.train
        self._saved_step = run.step
        self._saved_at = time.monotonic()
        self._train_step = jax.jit(
            make_train_step(run.network, run.optimizer, self._config.label_smoothing), donate_argnums=0
        )
        self._eval_step = jax.jit(make_eval_step(run.network))
        self._reporter = Reporter(
            writer,
            optimizers.learning_rate_schedule(run.recipe.optimizer),
            flops_per_token(run.network, run.data.train.row_length),
            run.mesh.size,
        )

    def run(self):
        """Does all steps that are left, unless a signal comes."""
        run, config = self._run, self._config
        devices = f"{run.mesh.size} device(s) of kind {jax.devices()[0].device_kind}"
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
        if self._signals.caught:
            if config.save_checkpoints and run.step > self._saved_step:
                self._save()
            kept = "a checkpoint is saved" if config.save_checkpoints else "nothing is saved"
            logging.info("Stopped by %s at step %d: %s; run the same command to go on.",
                         self._signals.caught, run.step, kept)  # fmt: skip

    def _steps(self):
        run, config = self._run, self._config
        batches = input_pipeline.train_batches(
            run.data.train, batch_size=run.batch_size, seed=run.recipe.seed, first_row=run.rows_read
        )
        first = True
        while run.step < config.num_train_steps and not self._signals.caught:
            batch = jax.device_put(next(batches), sharding.batch_sharding(run.mesh))
            step = self._compiling_step if first else self._train_step
            run.state, step_metrics = step(run.state, batch, run.key)
            first = False
            run.step, run.rows_read = run.step + 1, run.rows_read + run.batch_size
            self._reporter.flush()
            self._reporter.pending = (run.step, step_metrics, self._totals_to_log(), config.log_every_steps)
            saving, evaluating = self._saves(run.step), self._evaluates(run.step)
            if saving or evaluating:
                self._reporter.flush()
                if saving:
                    self._save()
                if evaluating:
                    self._evaluate()
                self._reporter.restart_clock()

    def _compiling_step(self, *arguments: Any) -> Any:
        """The first step, which compiles: nothing is lost when it is given up."""
        return self._signals.listening(lambda: self._train_step(*arguments))

    def _totals_to_log(self) -> dict[str, jax.Array] | None:
        """The sums since they were last logged, when they are due; they begin anew."""
        run = self._run
        if run.step % self._config.log_every_steps:
            return None
        totals = run.state.totals
        placement = sharding.replicated(run.mesh)
        run.state = dataclasses.replace(run.state, totals=jax.device_put(zero_totals(), placement))
        return totals

    def _saves(self, step: int) -> bool:
        config = self._config
        minutes = (time.monotonic() - self._saved_at) / 60
        due = config.checkpoint_every_minutes and minutes >= config.checkpoint_every_minutes
        return config.save_checkpoints and bool(
            due or step % config.checkpoint_every_steps == 0 or step == config.num_train_steps
        )

    def _evaluates(self, step: int) -> bool:
        return step % self._config.eval_every_steps == 0 or step == self._config.num_train_steps

    def _save(self):
        run = self._run
        self._writer.sync()
        run.saved.save(run.step, run.state.params, run.state.opt_state, run.progress)
        self._saved_step, self._saved_at = run.step, time.monotonic()

    def _evaluate(self):
        """Evaluates and samples, in vain when a signal comes."""
        run = self._run
        step, params = run.step, run.state.params
        values = self._signals.listening(
            lambda: evaluate_rows(
                self._eval_step, params, run.data.eval, self._config, run.mesh, stopped=self._was_stopped
            )
        )
        texts = self._signals.listening(
            lambda: language_model.generate_texts(
                run.network, params, run.data.tokenizer, run.recipe.prompts, run.recipe.sampling, seed=run.recipe.seed
            )
        )
        self._writer.write(step, values)
        self._writer.write_samples(step, [text["text"] for text in texts])

    def _was_stopped(self) -> bool:
        return self._signals.caught is not None
