"""The training loop: step, evaluate, sample, log, checkpoint.

The step is a pure function of (state, batch, key), see `make_train_step`. The loop dispatches step n before it reads
the metrics of step n - 1, so that the device never waits for Python.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from etils import epath

from transformer_lm import console, models
from transformer_lm.checkpoints import store as checkpoints
from transformer_lm.data import input_pipeline, preparation
from transformer_lm.errors import UserError
from transformer_lm.generation import language_model
from transformer_lm.tokenizer import Tokenizer
from transformer_lm.training import metrics, optimizers, sharding

LN2 = math.log(2)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run.

    Attributes:
      per_device_batch_size: training rows a device and step.
      eval_per_device_batch_size: evaluation rows a device and step; 0 for the same.
      num_train_steps: steps altogether.
      num_eval_steps: batches an evaluation reads at most; -1 for all.
      label_smoothing: probability mass spread evenly over the other tokens (Szegedy et al. 2016, section 7).
      log_every_steps: steps between two lines of training metrics.
      eval_every_steps: steps between two evaluations.
      checkpoint_every_steps: steps between two checkpoints.
      keep_checkpoints: how many of the latest are kept.
      save_checkpoints: whether to save at all.
      restore_checkpoints: whether to go on from the workdir's newest checkpoint.
    """

    per_device_batch_size: int
    eval_per_device_batch_size: int
    num_train_steps: int
    num_eval_steps: int
    label_smoothing: float
    log_every_steps: int
    eval_every_steps: int
    checkpoint_every_steps: int
    keep_checkpoints: int
    save_checkpoints: bool
    restore_checkpoints: bool

    def __post_init__(self):
        positive = ("per_device_batch_size", "num_train_steps", "log_every_steps", "eval_every_steps",
                    "checkpoint_every_steps", "keep_checkpoints")  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.eval_per_device_batch_size < 0:
            raise UserError(f"eval_per_device_batch_size={self.eval_per_device_batch_size} must not be negative.")
        if self.num_eval_steps < 1 and self.num_eval_steps != -1:
            raise UserError(f"num_eval_steps={self.num_eval_steps} must be at least 1, or -1 for all.")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing={self.label_smoothing} must lie in [0, 1).")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run is made of at one moment.

    Attributes:
      step: int32 scalar, steps done.
      params: the parameters.
      opt_state: the optimizer's state.
      totals: sums over the steps since training metrics were last logged: loss (nats), correct, tokens. They lie in
        the state so that a resumed run logs what an unbroken one would have.
    """

    step: jax.Array
    params: models.Params
    opt_state: Any
    totals: dict[str, jax.Array]


def zero_totals() -> dict[str, jax.Array]:
    """Nothing counted yet."""
    return {name: jnp.zeros((), jnp.float32) for name in ("loss", "correct", "tokens")}


def init_state(model: models.TransformerConfig, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """A fresh state; pure, so that it may be jitted straight into its shardings, or only looked at abstractly."""
    params = models.init(model, key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), zero_totals())


def loss_and_totals(logits, targets, weights, label_smoothing: float = 0.0):
    """Summed loss to minimise, and the sums to report.

    Args:
      logits: [B, T, V] float32.
      targets: [B, T] int32.
      weights: [B, T] float32, 0 where there is no token.
      label_smoothing: e; the target distribution is 1 - e on the target and e / (V - 1) on every other token.

    Returns:
      the smoothed loss less the entropy of the target distribution (so that its least value is 0), in nats summed
      over tokens; and {"loss": plain cross entropy, "correct": targets of the highest logit, "tokens": sum of weights}.
    """
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)  # [B, T]
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    cross_entropy = log_normalizer - target_logits
    loss = cross_entropy
    if label_smoothing:
        vocab_size = logits.shape[-1]
        low = label_smoothing / (vocab_size - 1)
        high = 1.0 - label_smoothing
        all_tokens = vocab_size * log_normalizer - logits.sum(axis=-1)
        loss = (high - low) * cross_entropy + low * all_tokens
        loss += high * math.log(high) + (vocab_size - 1) * low * math.log(low)
    best_logits = jax.lax.stop_gradient(logits).max(axis=-1)  # argmax is slow on CPU
    totals = {
        "loss": jnp.sum(cross_entropy * weights),
        "correct": jnp.sum((target_logits >= best_logits) * weights),
        "tokens": jnp.sum(weights),
    }
    return jnp.sum(loss * weights), totals


def apply_model(model: models.TransformerConfig, params: models.Params, batch, dropout_key=None):
    """Logits [B, T, V] and weights [B, T] of a batch."""
    network = models.bind(model, params)
    logits = network(batch["inputs"], batch["positions"], batch["segments"], dropout_key=dropout_key)
    return logits, (batch["segments"] > 0).astype(jnp.float32)


def make_train_step(
    model: models.TransformerConfig, optimizer: optax.GradientTransformation, label_smoothing: float
) -> Callable[[TrainState, Any, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """The step: (state, batch, key) -> the next state, and {"loss": mean nats a token, "grad_norm"}.

    `key` stays the same for a whole run; each step folds its number into it. The gradient is that of the mean over all
    tokens of the global batch, however they are spread over devices.
    """

    def train_step(state, batch, key):
        dropout_key = jax.random.fold_in(key, state.step)

        def mean_loss(params):
            logits, weights = apply_model(model, params, batch, dropout_key)
            loss, totals = loss_and_totals(logits, batch["targets"], weights, label_smoothing)
            return loss / jnp.maximum(totals["tokens"], 1.0), totals

        (_, totals), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            totals=jax.tree.map(jnp.add, state.totals, totals),
        )
        return new_state, {"loss": totals["loss"] / totals["tokens"], "grad_norm": optax.global_norm(grads)}

    return train_step


def make_eval_step(model: models.TransformerConfig) -> Callable:
    """(params, batch) -> the sums of `loss_and_totals`."""

    def eval_step(params, batch):
        logits, weights = apply_model(model, params, batch)
        return loss_and_totals(logits, batch["targets"], weights)[1]

    return eval_step


def evaluate(eval_step: Callable, params: models.Params, batches: Iterable, manifest: dict) -> dict[str, float]:
    """Evaluation metrics over batches: nats a token, and bits a character and byte by the corpus's own counts."""
    totals = dict.fromkeys(zero_totals(), 0.0)  # of Python's floats: many batches would outgrow float32
    for batch in batches:
        for name, value in eval_step(params, batch).items():
            totals[name] += float(value)
    loss = totals["loss"] / totals["tokens"]
    bits = loss / LN2 * manifest["tokens"]
    return {
        "eval_loss": loss,
        "eval_perplexity": metrics.perplexity(loss),
        "eval_accuracy": totals["correct"] / totals["tokens"],
        "eval_bits_per_char": bits / manifest["characters"],
        "eval_bits_per_byte": bits / manifest["bytes"],
    }


def evaluate_rows(eval_step: Callable, params: models.Params, rows, config: TrainConfig, mesh) -> dict[str, float]:
    """`evaluate` on prepared rows (a `PreparedCorpus` or `PreparedMixture`), spread over the mesh."""
    batch_size = (config.eval_per_device_batch_size or config.per_device_batch_size) * mesh.size
    batches = input_pipeline.eval_batches(rows, batch_size=batch_size, max_batches=config.num_eval_steps)
    placed = (jax.device_put(batch, sharding.batch_sharding(mesh)) for batch in batches)
    return evaluate(eval_step, params, placed, rows.manifest)


def flops_per_token(model: models.TransformerConfig, length: int) -> float:
    """Model FLOPs of forward and backward pass a token (Chowdhery et al. 2022, appendix B): 6 N + 12 L H K T.

    N counts the parameters that are multiplied: all but the embedding table, which is only looked up.
    """
    multiplied = models.count_params(model)
    if not model.logits_via_embedding:
        multiplied -= model.vocab_size * model.emb_dim
    return 6.0 * multiplied + 12.0 * model.num_layers * model.qkv_dim * length


@contextlib.contextmanager
def signals_caught() -> Iterator[list[str]]:
    """Gives a list to which the name of a first SIGTERM or Ctrl-C is added; a second one acts as ever."""
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number, frame):
        del frame
        caught.append(signal.Signals(number).name)
        restore()

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()


class Reporter:
    """Reads the metrics of finished steps, stops on a loss that is not finite, and hands lines to the writer."""

    def __init__(self, writer: metrics.MetricWriter, schedule: optax.Schedule, flops: float, devices: int):
        self._writer = writer
        self._schedule = schedule
        self._flops = flops
        peak = metrics.peak_flops(jax.devices()[0])
        self._peak = peak and peak * devices
        self.pending: tuple | None = None
        self._clock: float | None = None  # when the steps now counted began; None before the first is done
        self._timed_steps = 0
        self._tokens_per_second = 0.0

    def flush(self):
        """Reports the pending step, if there is one; waits for the device to finish it."""
        if self.pending is None:
            return
        (step, step_metrics, totals, steps_in_totals), self.pending = self.pending, None
        step_metrics = {name: float(value) for name, value in step_metrics.items()}
        if not all(map(math.isfinite, step_metrics.values())):
            raise UserError(
                f"Training diverged at step {step}: loss {step_metrics['loss']}, gradient norm "
                f"{step_metrics['grad_norm']}. The last good checkpoint is kept; start again with a lower "
                "learning_rate or more warmup_steps."
            )
        if self._clock is None:
            self._clock = time.perf_counter()
        else:
            self._timed_steps += 1
        if totals is not None:
            self._write(step, totals, steps_in_totals)
        self._writer.show(step, f"loss {step_metrics['loss']:.3f}  {self._tokens_per_second:,.0f} tokens/s")

    def restart_clock(self):
        """Leaves out of the speed whatever has happened since the last step (an evaluation, a checkpoint)."""
        self._clock, self._timed_steps = None, 0

    def _write(self, step: int, totals: dict, steps: int):
        totals = {name: float(total) for name, total in totals.items()}
        loss = totals["loss"] / totals["tokens"]
        values = {
            "train_loss": loss,
            "train_accuracy": totals["correct"] / totals["tokens"],
            "train_perplexity": metrics.perplexity(loss),
            "learning_rate": float(self._schedule(step - 1)),
        }
        if self._timed_steps:
            seconds = time.perf_counter() - self._clock
            self._tokens_per_second = totals["tokens"] / steps * self._timed_steps / seconds
            values["tokens_per_second"] = self._tokens_per_second
            if self._peak:
                values["mfu"] = self._tokens_per_second * self._flops / self._peak
            self._clock, self._timed_steps = time.perf_counter(), 0
        self._writer.write(step, values)


def restore_or_init(
    saved: checkpoints.Checkpoints,
    config: TrainConfig,
    make_state: Callable[[jax.Array], TrainState],
    key,
    placement,
    params: models.Params | None = None,
) -> TrainState:
    """The newest checkpoint of the workdir; where there is none or it is not wanted a fresh state, of `params` if any.

    The optimizer's state does not depend on the parameters' values, so that those of a fresh state may be replaced.
    """
    if config.restore_checkpoints:
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), jax.eval_shape(make_state, key)
        )
        restored = saved.restore(target.params, target.opt_state, {"step": target.step, "totals": target.totals})
        if restored is not None:
            params, opt_state, progress = restored
            return TrainState(progress["step"], params, opt_state, progress["totals"])
    elif config.save_checkpoints and saved.steps:
        raise UserError(
            f"The workdir holds checkpoints {saved.steps}, and restore_checkpoints=False would begin again beside "
            "them; use another --workdir."
        )
    state = jax.jit(make_state, out_shardings=placement)(key)
    return state if params is None else dataclasses.replace(state, params=jax.device_put(params, placement))


def initial_params(
    address: str | None, model: models.TransformerConfig, tokenizer: Tokenizer, workdir: str
) -> models.Params | None:
    """The parameters that a run begins with, if not with random ones; raises UserError if they are of another model."""
    initial = checkpoints.load_initial(address, model, workdir)
    if initial is None:
        return None
    if Tokenizer.load(initial.tokenizer_path).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"The tokenizer at {tokenizer.source} is not that of init_from={address}; use another --workdir and leave "
            "vocab_path alone."
        )
    return initial.params


def train_and_evaluate(recipe, data: preparation.PreparedData, workdir: str):
    """Runs a recipe to its last step, or until it is told to stop, going on from the workdir's newest checkpoint.

    Args:
      recipe: a `recipe.Recipe`.
      data: what it trains and evaluates on.
      workdir: the folder of the run.

    Raises:
      UserError: the workdir holds another model, init_from names one that does not fit, the loss is not finite, or a
        checkpoint cannot be read or written.
    """
    config: TrainConfig = recipe.train
    model = dataclasses.replace(recipe.model, vocab_size=data.tokenizer.vocab_size)
    checkpoints.claim_workdir(epath.Path(workdir), recipe.fields, model, data.tokenizer)
    mesh = sharding.make_mesh()
    placement = sharding.replicated(mesh)
    optimizer = optimizers.make_optimizer(recipe.optimizer)
    init_key, dropout_key = jax.random.split(jax.random.key(recipe.seed))
    saved = checkpoints.Checkpoints(workdir, config.keep_checkpoints)
    params = initial_params(recipe.init_from, model, data.tokenizer, workdir)
    state = restore_or_init(saved, config, lambda key: init_state(model, optimizer, key), init_key, placement, params)
    del params
    start = int(state.step)
    if start >= config.num_train_steps:
        logging.info("Already trained to step %d of num_train_steps=%d.", start, config.num_train_steps)
        return
    logging.info("%s at step %d of %d: %d parameters, %d device(s) of kind %s.",
                 "Resuming" if start else "Starting", start, config.num_train_steps, models.count_params(model),
                 mesh.size, jax.devices()[0].device_kind)  # fmt: skip

    train_step = jax.jit(make_train_step(model, optimizer, config.label_smoothing), donate_argnums=0)
    eval_step = jax.jit(make_eval_step(model))
    batch_size = config.per_device_batch_size * mesh.size
    batches = input_pipeline.train_batches(data.train, batch_size=batch_size, seed=recipe.seed, start_step=start)

    def place(batch):
        return jax.device_put(batch, sharding.batch_sharding(mesh))

    def run_evaluation():
        writer.write(step, evaluate_rows(eval_step, state.params, data.eval, config, mesh))
        texts = language_model.generate_texts(
            model, state.params, data.tokenizer, recipe.prompts, recipe.sampling, seed=recipe.seed
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
        reporter = Reporter(writer, schedule, flops_per_token(model, length), mesh.size)
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
