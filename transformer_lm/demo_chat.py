"""The demo of conversations: trains the recipe `mukashi_chat` in logs/chat, talks, and says how often it obeys.

python -m transformer_lm.demo_chat

It begins with the model that the demo leaves in logs/demo, which is trained first where it is missing. One that was
interrupted goes on; one that came to its end begins afresh.
"""

import json
import shutil
import sys
import time
from pathlib import Path

from transformer_lm import cli, demo, recipe
from transformer_lm.checkpoints.workdir import TOKENIZER_FILE
from transformer_lm.configs import mukashi, mukashi_chat
from transformer_lm.data import preparation
from transformer_lm.data.corpora import mukashi_chat as grammar
from transformer_lm.errors import UserError
from transformer_lm.files import json_bytes, write_atomically
from transformer_lm.generation import language_model
from transformer_lm.training import loop, metrics
from transformer_lm.training.config import Recipe

WORKDIR = Path("logs/chat")
ANIMALS = ("猿", "狐")  # asked for first, and in its place


def main(chat: Recipe, base: Recipe, workdir: Path):
    """Trains what is missing, prints a conversation and scores, and leaves them in the workdir's summary."""
    base_workdir = Path(chat.init_from)
    if not (base_workdir / demo.SUMMARY_FILE).exists() and not demo.main(base, base_workdir):
        return
    if (workdir / demo.SUMMARY_FILE).exists():
        shutil.rmtree(workdir)
    start = time.perf_counter()
    data = preparation.prepare(chat.data, str(workdir), tokenizer_source=base_workdir / TOKENIZER_FILE)
    if not loop.train_and_evaluate(chat, data, str(workdir)):
        return
    seconds = time.perf_counter() - start

    messages = talk(language_model.load(workdir))
    summary = {
        "instruction_accuracy": metrics.read_last(workdir, "instruction_accuracy"),
        "base_train_seconds": json.loads((base_workdir / demo.SUMMARY_FILE).read_text())["train_seconds"],
        "train_seconds": seconds,
        "conversation": messages,
    }
    write_atomically(workdir / demo.SUMMARY_FILE, json_bytes(summary))
    print()
    for message in messages:
        print(f"{'>' if message['role'] == 'user' else ' '} {message['content']}\n")
    print(
        f"Instructions never seen that it follows: {100 * summary['instruction_accuracy']:.1f} %. Trained for "
        f"{summary['base_train_seconds']:.0f} s on tales and {seconds:.0f} s on conversations.\n"
        f"To talk to it: {sys.executable} -m transformer_lm.generate_text --workdir={workdir} --interactive"
    )


def talk(model: language_model.LanguageModel) -> list[dict[str, str]]:
    """A conversation of instructions that were not trained on, the later ones about the tale that was told.

    It ends early where a model that rambles leaves no room for more.
    """

    def question(slot: str) -> dict:
        return grammar.QUESTION | next(kind for kind in grammar.QUESTION["kinds"] if slot in kind["slots"])

    first, other = ANIMALS
    instructions = [
        (grammar.REQUEST, {"word": first}),
        (question("男の名"), {}),
        (grammar.RETELLING, {"old": first, "word": other}),
        (question("宝物"), {}),
    ]
    messages: list[dict[str, str]] = []
    for kind, fields in instructions:
        asked = {"role": "user", "content": grammar.wordings("validation", kind, **fields)[0]}
        try:
            answer = model.chat([*messages, asked], temperature=0)
        except UserError:
            break
        messages += [asked, {"role": "assistant", "content": answer}]
    return messages


if __name__ == "__main__":
    fields = mukashi_chat.get_config()
    fields.init_from = str(demo.WORKDIR)
    cli.run_without_flags(__doc__, lambda: main(recipe.read(fields), recipe.read(mukashi.get_config()), WORKDIR))
