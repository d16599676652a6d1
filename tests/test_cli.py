"""The commands' edges: one line and exit status 1 for what a user can cause, before any long work."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, command, run

PACKAGE = ROOT / "transformer_lm"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_layer": 2}, ["num_layer", "Did you mean", "num_layers"]),
        ({"num_layers": "many"}, ["num_layers", "many"]),
        ({"num_heads": 3}, ["qkv_dim=16 does not divide by num_heads=3"]),
        ({"eval_split": "test"}, ["has no split 'test'", "train, validation"]),
        ({"per_device_batch_size": 0}, ["per_device_batch_size=0 must be at least 1"]),
        ({"seed": -1}, ["seed=-1"]),
    ],
)
def test_wrong_fields(tmp_path, fields, words):
    done = run(command("main", tmp_path / "workdir", **fields))
    assert_one_line(done, words)
    assert not (tmp_path / "workdir").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/lm1b_default.py"], ["--workdir is missing"]),
        (["--workdir=x"], ["--config is missing"]),
        (["--workdir=x", "--config=configs/no_such.py"], ["no_such.py"]),
        (["--workdir=x", "--config=configs/lm1b_default.py", "more"], ["Unexpected argument 'more'"]),
        (["--work=x"], ["work"]),
    ],
)
def test_wrong_arguments(tmp_path, arguments, words):
    assert_one_line(run([sys.executable, "-m", "transformer_lm.main", *arguments], cwd=tmp_path), words)
    assert not list(tmp_path.iterdir())


def assert_one_line(done: subprocess.CompletedProcess, words: list[str]):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1, done.stderr
    assert [line.startswith("error: ") for line in lines] == [True], done.stderr
    for word in words:
        assert word in lines[0]


def test_debug_shows_the_stack(tmp_path):
    done = run(command("main", tmp_path, "--debug", num_heads=3))
    assert "Traceback" in done.stderr


def test_the_originals_commands_from_inside_the_folder(tmp_path):
    """`python3 main.py` in transformer_lm/, as the original is run, then `generate_text.py`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    fields = {"num_train_steps": 4, "eval_every_steps": 4, "log_every_steps": 2, "num_eval_steps": 1}
    main = command("main", tmp_path, **fields)
    main[1:3] = ["main.py"]
    done = run(main, cwd=PACKAGE, env=environment)
    assert done.returncode == 0, done.stderr
    assert {"config.json", "sentencepiece_model", "checkpoints", "metrics.jsonl"} <= set(os.listdir(tmp_path))
    assert any(name.startswith("events.out.tfevents") for name in os.listdir(tmp_path))

    generate = command("generate_text", tmp_path, "--num_generated_texts=3")
    generate[1:3] = ["generate_text.py"]
    done = run(generate, cwd=PACKAGE, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Sample: 昔々あるところに") == 3
