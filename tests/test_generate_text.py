"""The command that generates: from a workdir of the original, as lines and as JSON."""

import json
import os
import subprocess
import sys

import pytest
from conftest import FIXTURE, run
from processes import run_fork

from transformer_lm import tokenizer


def generate(*arguments, workdir=FIXTURE, **options):
    recipe = ["--config=configs/japanese_0.1b_v1.py", "--config.use_bfloat16=false", "--config.max_predict_length=32"]
    command = [sys.executable, "-m", "transformer_lm.generate_text", f"--workdir={workdir}", *recipe, *arguments]
    return run(command, **options)


def test_jsonl_of_several_prompts():
    done = generate("--output=jsonl", "--num_generated_texts=2", "--config.prompts=夏目漱石は、\n日本の首都は")
    assert done.returncode == 0, done.stderr
    texts = [json.loads(line) for line in done.stdout.splitlines()]
    assert [text["prompt"] for text in texts] == ["夏目漱石は、"] * 2 + ["日本の首都は"] * 2
    spm = tokenizer.Tokenizer.load(FIXTURE / "sentencepiece_model")
    for text in texts:
        assert set(text) == {"prompt", "text", "tokens", "finished"}
        assert text["text"].startswith(text["prompt"])
        assert text["text"] == spm.decode(text["tokens"])
        assert len(text["tokens"]) == 32 or text["finished"]
    assert texts[0]["text"] != texts[1]["text"]


def test_greedy_lines_are_the_originals(original):
    done = generate(
        "--num_generated_texts=1", "--config.sampling_top_k=1", "--config.prompts=夏目漱石は、", workdir=original.path
    )
    assert done.returncode == 0, done.stderr
    spm = tokenizer.Tokenizer.load(original.path / "sentencepiece_model")
    expected = spm.decode(original.reference["greedy"][0])
    assert f"Sample: {expected}\n" in done.stderr
    assert done.stdout == ""


def test_streamed_greedy_texts_are_the_originals(original):
    """From the recipe's prompts, and from lines that are typed."""
    spm = tokenizer.Tokenizer.load(original.path / "sentencepiece_model")
    prompts = original.about["texts"][:2]
    expected = "".join(f"{spm.decode(tokens)}\n\n" for tokens in original.reference["greedy"][:2])
    greedy = ["--num_generated_texts=1", "--config.sampling_temperature=0"]
    done = generate("--stream", *greedy, "--config.prompts=" + "\n".join(prompts), workdir=original.path)
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
    done = generate("--interactive", *greedy, workdir=original.path, input="\n".join(["", *prompts, "長" * 99]))
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
    assert "leaves no room to write" in done.stderr


def test_typed_lines_that_are_no_utf_8(original):
    """Of a Shift_JIS file, say: they get an answer like others, and the next line, too."""
    command = [sys.executable, "-m", "transformer_lm.generate_text", "--interactive", f"--workdir={original.path}"]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, input=b"\x94\x4c\n" + "猫".encode(), capture_output=True, env=strict, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second, rest = done.stdout.decode().split("\n\n")
    assert ("L" in first, second[:1], rest) == (True, "猫", "")


NUMBERS = """
from transformer_lm import generate_text
from transformer_lm.generation.choosing import Settings
from transformer_lm.generation.scheduler import Request
for place in [*range(2**15 - 2, 2**15 + 2), 2**31, 2**47]:
    print(Request([1], Settings(), 1, number=generate_text._number(place)).number)
"""


def test_lines_without_end():
    """As many as the random numbers of texts are told apart by are no limit."""
    done = run_fork([sys.executable, "-c", NUMBERS])  # a command's flags are of its process
    numbers = done.stdout.split()
    assert len(numbers) == 6, done.stderr
    assert len(set(numbers[:2])) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num_generated_texts=0"], "error: flag --num_generated_texts=0"),
        (
            ["--config.max_predict_length=6", "--config.prompts=短い\n夏目漱石は、"],
            "error: The prompt '夏目漱石は、' of 11 tokens leaves no room to write: max_predict_length=6",
        ),
        (
            ["--config.max_predict_length=100000", "--num_generated_texts=60000"],
            "error: memory is exhausted while generating text; lower the number of texts for each prompt,",
        ),
        (["--workdir=/no/such/folder"], "No model at /no/such/folder"),
        (["--jax_platforms=abacus"], "Unable to initialize backend 'abacus'"),
        (["--stream", "--output=jsonl"], "error: --output=jsonl writes whole texts"),
    ],
)
def test_errors(arguments, words):
    done = generate(*arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
