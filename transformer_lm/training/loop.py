"""The training loop: step, evaluate, sample, log, checkpoint.

The step is a pure function of (state, batch, key), see `make_train_step`. The loop dispatches step n before it reads
the metrics of step n - 1, so that the device never waits for Python.
"""

import contextlib
import dataclasses

import jax
from absl import logging
from etils import epath

from transformer_lm import console, models
from transformer_lm.checkpoints import store
from transformer_lm.checkpoints import workdir as run_folder
from transformer_lm.data import input_pipeline, preparation
from transformer_lm.generation import language_model
from transformer_lm.training import metrics, optimizers, sharding
from transformer_lm.training.config import Recipe
from transformer_lm.training.evaluation import evaluate_rows
from transformer_lm.training.flops import flops_per_token
from transformer_lm.training.reporter import Reporter
from transformer_lm.training.signals import signals_caught
from transformer_lm.training.start import initial_params, restore_or_init
from transformer_lm.training.state import init_state, zero_totals
from transformer_lm.training.step import make_eval_step, make_train_step


def train_and_evaluate(recipe: Recipe, data: preparation.PreparedData, workdir: str):
    """Runs a recipe to its last step, or until it is told to stop, going on from the workdir's newest checkpoint.

    Args:
      recipe: what to train, and how.
      data: what it trains and evaluates on.
      workdir: the folder of the run.

    Raises:
      UserError: the workdir holds another model, init_from names one that does not fit, the loss is not finite, or a
        checkpoint cannot be read or written.
    """
    config = recipe.train
    network = dataclasses.replace(recipe.network, vocab_size=data.tokenizer.vocab_size)
    rows = [part.directory.name for corpus in (data.train, data.eval) for part in corpus.parts]
    run_folder.claim_workdir(epath.Path(workdir), recipe.fields, network, data.tokenizer, rows)
    mesh = sharding.make_mesh()
    placement = sharding.replicated(mesh)
    optimizer = optimizers.make_optimizer(recipe.optimizer)
    init_key, dropout_key = jax.random.split(jax.random.key(recipe.seed))
    saved = store.Checkpoints(workdir, config.keep_checkpoints)
    params = initial_params(recipe.init_from, network, data.tokenizer, workdir)
    state = restore_or_init(saved, config, lambda key: init_state(network, optimizer, key), init_key, placement, params)
    del params
    start = int(state.step)
    if start >= config.num_train_steps:
        logging.info("Already trained to step %d of num_train_steps=%d.", start, config.num_train_steps)
        return
    logging.info("%s at step %d of %d: %d parameters, %d device(s) of kind %s.",
                 "Resuming" if start else "Starting", start, config.num_train_steps, models.count_params(network),
                 mesh.size, jax.devices()[0].device_kind)  # fmt: skip

    train_step = jax.jit(make_train_step(network, optimizer, config.label_smoothing), donate_argnums=0)
    eval_step = jax.jit(make_eval_step(network))
    batch_size = config.per_device_batch_size * mesh.size
    batches = input_pipeline.train_batches(data.train, batch_size=batch_size, seed=recipe.seed, start_step=start)

    def place(batch):
        return jax.device_put(batch, sharding.batch_sharding(mesh))

    def run_evaluation():
        writer.write(step, evaluate_rows(eval_step, state.params, data.eval, config, mesh))
        texts = language_model.generate_texts(
            network, state.params, data.tokenizer, recipe.prompts, recipe.sampling, seed=recipe.seed
        )
        writer.write_samples(step, [text["text"] for text in texts])

    def save():
        progress = {"step": state.step, "totals": state.totals}
        saved.save(step, state.params, state.opt_state, progress)

    with (
        console.training_progress(start, config.num_train_steps) as show,
        contextlib.closing(metrics.MetricWriter(workdir, start, show)) as writer,
        contextlib.closing(saved),
        signals_caught() as signals,
    ):
        if not start:
            writer.write_recipe(recipe.fields)
        schedule = optimizers.learning_rate_schedule(recipe.optimizer)
        length = data.train.row_length
        reporter = Reporter(writer, schedule, flops_per_token(network, length), mesh.size)
        for step in range(start + 1, config.num_train_steps + 1):
            state, step_metrics = train_step(state, place(next(batches)), dropout_key)
            reporter.flush()
            stopping = bool(signals)
            last = stopping or step == config.num_train_steps
            evaluating = step % config.eval_every_steps == 0 or step == config.num_train_steps
            saving = config.save_checkpoints and (step % config.checkpoint_every_steps == 0 or last)
            totals = None
            if step % config.log_every_steps == 0:
                totals = state.totals
                state = dataclasses.replace(state, totals=jax.device_put(zero_totals(), placement))
            reporter.pending = (step, step_metrics, totals, config.log_every_steps)
            if evaluating or saving or last:
                reporter.flush()
            if evaluating:
                run_evaluation()
            if saving:
                save()
            if evaluating or saving:
                reporter.restart_clock()
            if stopping:
                break
    if stopping and step < config.num_train_steps:
        kept = "a checkpoint is saved; run the same command to go on" if config.save_checkpoints else "nothing is saved"
        logging.info("Stopped by %s at step %d: %s.", signals[0], step, kept)
