"""Generate text with a trained model.

python3 generate_text.py --workdir=logs/japanese_0.1b_v1 --config=configs/japanese_0.1b_v1.py \
    --config.sampling_temperature=0.6 --config.sampling_top_k=20 --config.seed=0 \
    --config.prompts="夏目漱石は、" --num_generated_texts=10

--workdir is a workdir of main.py, a folder with the original's checkpoint_N and sentencepiece_model, such a
checkpoint_N, a folder that export_huggingface.py wrote, or a model of the Hugging Face hub:
hf://fukugawa/transformer-lm-japanese-0.1b@v1. The network is the one that lies there; of the recipe only sampling_*,
max_predict_length, prompts (one a line), use_bfloat16 and seed count.
Without --config, the workdir's own recipe is taken.

With --stream, texts come on standard output while they are written, one after the other. With --interactive, each line
of standard input is a beginning, and is gone on from in the same way; Ctrl-D ends it. Both draw their random numbers by
the seed, too, but other texts than without them.

A model that was trained on conversations answers prompts. With --interactive it talks: all lines are one conversation,
which may fill the model's context, and max_predict_length counts the tokens of an answer.
"""

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Iterable

from absl import flags, logging
from ml_collections import ConfigDict

from transformer_lm import cli, recipe
from transformer_lm.errors import UserError, stage
from transformer_lm.generation import language_model
from transformer_lm.generation.choosing import Settings
from transformer_lm.generation.engine import Engine
from transformer_lm.generation.scheduler import Request, Scheduler
from transformer_lm.tokenizer.turns import Message, Turns
from transformer_lm.training.config import Recipe

_NUM_GENERATED_TEXTS = flags.DEFINE_integer(
    "num_generated_texts", 10, "Texts to generate for each prompt.", 1, language_model.MAX_SAMPLES
)
_OUTPUT = flags.DEFINE_enum(
    "output", "log", ["log", "jsonl"], "log: lines 'Sample: ...' in the log; jsonl: one JSON object a text on stdout."
)
_STREAM = flags.DEFINE_bool("stream", False, "Write texts to stdout while they come, one after the other.")
_INTERACTIVE = flags.DEFINE_bool("interactive", False, "Go on from each line of stdin, or answer it; Ctrl-D ends it.")


def main(config: ConfigDict, workdir: str):
    """Continues the recipe's prompts with the workdir's model."""
    chosen = recipe.read(config)
    streams = _STREAM.value or _INTERACTIVE.value
    if streams and _OUTPUT.value == "jsonl":
        raise UserError("--output=jsonl writes whole texts; leave out --stream and --interactive.")
    model = language_model.load(workdir, dtype=chosen.network.dtype)
    logging.info("Generating text with the model of step %d.", model.step)
    if streams:
        with stage("generating text", lower="max_predict_length"):
            (talk if model.turns and _INTERACTIVE.value else stream_texts)(model, chosen)
        return
    number = _NUM_GENERATED_TEXTS.value
    texts = model.continue_texts(chosen.prompts, chosen.sampling, seed=chosen.seed, num_samples=number)
    for text in texts:
        if _OUTPUT.value == "jsonl":
            print(json.dumps(text, ensure_ascii=False), flush=True)
        else:
            logging.info("Sample: %s", text["text"])


def stream_texts(model: language_model.LanguageModel, chosen: Recipe):
    """Writes texts to standard output as they come: of the recipe's prompts, or of lines that somebody types."""
    sampling = chosen.sampling
    scheduler, settings = _scheduler(model, chosen, sampling.max_length)
    prompts = chosen.prompts
    if _INTERACTIVE.value:
        prompts = typed_lines()
    else:
        language_model.check_prompts(model.tokenizer, prompts, sampling, model.turns)  # before the first is written
    for place, prompt in enumerate(prompts):
        try:
            [ids] = language_model.check_prompts(model.tokenizer, [prompt], sampling, model.turns)
        except UserError as error:
            logging.error("%s", error)
            continue
        for sample in range(1 if _INTERACTIVE.value else _NUM_GENERATED_TEXTS.value):
            number = _number(place, sample)
            request = Request(ids, settings, sampling.max_length - len(ids), number=number, echo=model.turns is None)
            if model.turns:
                print(prompt, flush=True)
            stream(scheduler, request, model.turns)


def talk(model: language_model.LanguageModel, chosen: Recipe):
    """A conversation with somebody who types; a message that does not fit into the model's context begins another."""
    context = model.network.context
    scheduler, settings = _scheduler(model, chosen, context)
    messages: list[Message] = []
    for place, text in enumerate(typed_lines()):
        asked = [Message("user", text)]
        ids, alone = (model.turns.encode(said, add_generation_prompt=True)[0] for said in (messages + asked, asked))
        if len(alone) >= context:
            logging.error("A message of %d tokens is too long for the model's context of %d.", len(alone), context)
            continue
        if len(ids) >= context:
            logging.warning("The model's context of %d tokens is full: a new conversation begins here.", context)
            ids, messages = alone, []
        messages += asked
        most = min(chosen.sampling.max_length, context - len(ids))
        request = Request(ids, settings, most, number=_number(place))
        messages.append(Message("assistant", stream(scheduler, request, model.turns)))


def _number(place: int, sample: int = 0) -> int:
    """Of a text of the prompt at a place; after so many that `Request` counts no further they come again."""
    return (place * language_model.MAX_SAMPLES + sample) % 2**31


def _scheduler(model: language_model.LanguageModel, chosen: Recipe, context: int) -> tuple[Scheduler, Settings]:
    engine = Engine(model.network, model.params, slots=1, context=context)
    sampling = chosen.sampling
    settings = Settings(sampling.temperature, sampling.top_k, sampling.top_p, seed=chosen.seed)
    return Scheduler(engine, model.tokenizer), settings


def stream(scheduler: Scheduler, request: Request, turns: Turns | None) -> str:
    """Writes a text, with turns an answer, to standard output as it comes; returns it."""
    if turns:
        request = dataclasses.replace(request, stop=turns.stop, end_ids=turns.end_ids)
    scheduler.submit(request)
    text = ""
    while not scheduler.is_idle:
        for _, part in scheduler.advance():
            more = turns.said(part.text) if turns and not text else part.text
            print(more, end="", flush=True)
            text += more
    print("\n", flush=True)
    return text


def typed_lines() -> Iterable[str]:
    """Lines of standard input; a terminal shows a mark where one is awaited, and lets a line be edited."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):  # somebody has read of it
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # what is no UTF-8 is read as U+FFFD
    edited = sys.stdin.isatty() and sys.stdout.isatty()
    if edited:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  without it a terminal cuts lines at 4,095 bytes
    while True:
        if sys.stdin.isatty() and not edited:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input("> ") if edited else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            return
        if line:
            yield line


if __name__ == "__main__":
    cli.run(main, needs_config=False)
