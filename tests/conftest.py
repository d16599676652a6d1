"""What several tests share; processes.py says what keeps their processor time low."""

import dataclasses
import fcntl
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Before JAX is imported, which reads the environment that is set there.
from processes import collect_seldom, run, run_fork

# isort: split
import jax
import numpy as np
import pytest

from transformer_lm import models, tokenizer
from transformer_lm.configs import v2
from transformer_lm.data import packing, tokenizer_training

sys.path += [str(folder) for folder in Path(__file__).parent.rglob("*") if any(folder.glob("*.py"))]  # for one another

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests" / "fixtures" / "original"
SHARED = ROOT.parent / "shared"


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="try all of many inputs that are alike, not a tenth")
    parser.addoption("--picture", help="workdir of a model whose page becomes docs/page.png (tests/test_page.py)")


# Half of the time is theirs: first, that no process waits for another at the end.
LONGEST = (
    "test_distributed.py", "test_sharding.py", "test_loop.py", "test_launcher.py", "test_preparation.py",
    "test_export_huggingface.py", "test_original_recipes.py", "test_harness.py", "test_page.py", "test_cli.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish():
    collect_seldom()


@pytest.fixture(scope="session")
def tenth(request):
    """Takes a tenth of many inputs that are alike, or all with --exhaustive."""
    return (lambda inputs: inputs) if request.config.getoption("exhaustive") else (lambda inputs: inputs[::10])


class Original:
    """A folder with what the original wrote and computed."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoint = path / "checkpoint_499999"
        self.reference = dict(np.load(path / "reference.npz"))
        self.about = json.loads((path / "about.json").read_text())
        self.every = round(self.about["vocab_size"] / self.reference["logits"].shape[-1])  # logits kept: every nth


@pytest.fixture(scope="session")
def original() -> Original:
    """The original's files: the whole ones where they lie beside this repository, or else the small copy in it."""
    whole = SHARED / "original" / "tiny_checkpoint"
    return Original(whole if whole.exists() else FIXTURE)


@pytest.fixture(scope="session")
def literature() -> Path:
    """The folder with the corpus of literature."""
    path = SHARED / "data"
    if not path.exists():
        pytest.skip("the corpus of literature is not on this machine")
    return path


def made_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first of the tests' processes that needs it makes for all of them."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with open(root / f"{name}.made", "a+") as made:
        fcntl.flock(made, fcntl.LOCK_EX)
        if not made.tell():
            make(root / name)
            made.write("yes")
    return root / name


def train(arguments: list[str]):
    done = run(arguments)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The workdir, to be read only, of a run of six steps with a checkpoint and an evaluation at the third, too."""
    fields = {"num_train_steps": 6, "eval_every_steps": 3, "checkpoint_every_steps": 3}
    return made_once(tmp_path_factory, "trained", lambda folder: train(command("main", folder, **fields)))


@pytest.fixture(scope="session")
def trained_chat(tmp_path_factory) -> Path:
    """The workdir, to be read only, of some steps on conversations, of a network and a tokenizer of today."""
    fields = SMALL_RUN | {
        "dataset_name": "mukashi_chat", "eval_dataset_name": "mukashi_chat", "eval_split": "validation[:2]",
        "vocab_size": 1500, "spm_train_options": v2.SPM_OPTIONS,
        "max_eval_target_length": 384, "init_from": "", "prompts": "猿の話をしてください。",
        "max_predict_length": 64, "num_train_steps": 30, "num_layers": 1,
    }  # fmt: skip
    recipe = ["--config=configs/mukashi_chat.py", *(f"--config.{field}={value}" for field, value in fields.items())]
    line = [sys.executable, "-m", "transformer_lm.main", *recipe]
    return made_once(tmp_path_factory, "trained_chat", lambda folder: train([*line, f"--workdir={folder}"]))


@pytest.fixture
def tiny() -> models.TransformerConfig:
    """A network that compiles in a moment."""
    return models.TransformerConfig(
        vocab_size=50, emb_dim=16, num_heads=2, num_layers=2, qkv_dim=16, mlp_dim=32, max_len=32
    )


@pytest.fixture(scope="session")
def tales_tokenizer() -> tokenizer.Tokenizer:
    """A tokenizer of 600 pieces for the tales."""
    from transformer_lm.data.corpora import mukashi

    texts = [mukashi.tale(number) for number in range(300)]
    return tokenizer.Tokenizer(
        tokenizer_training.train(
            [(texts, 1.0)], vocab_size=900, max_corpus_chars=100_000, options="--character_coverage=1.0"
        )
    )


def init(config: models.TransformerConfig) -> models.Params:
    """Parameters from seed 0."""
    return _init(dataclasses.replace(config, dropout_rate=0, attention_dropout_rate=0, dtype="float32", remat="none"))


@functools.cache
def _init(config: models.TransformerConfig) -> models.Params:
    return jax.jit(models.init, static_argnums=0)(config, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def call(config: models.TransformerConfig, params: models.Params, batch, dropout_keys=None) -> jax.Array:
    """Logits [B, T, V] of a batch."""
    network = models.bind(config, params)
    return network(batch["inputs"], batch["positions"], batch["segments"], dropout_keys=dropout_keys)


def batch_of(texts: list[list[int]], row_length: int) -> dict[str, np.ndarray]:
    """A batch with one row of packed texts; EOS closes each."""
    tokens = [token for text in texts for token in [*text, tokenizer.EOS_ID]]
    row = np.full((1, row_length), packing.padding_id(np.dtype(np.uint16)), np.uint16)
    row[0, : len(tokens)] = tokens
    counts = {"characters": np.array([len(tokens)]), "bytes": np.array([3 * len(tokens)])}
    return packing.unpack(row) | counts


SMALL_RUN = {
    "dataset_name": "mukashi",
    "eval_dataset_name": "mukashi",
    "train_split": "train[:300]",
    "eval_split": "validation[:20]",
    "vocab_size": 900,
    "max_target_length": 32,
    "max_eval_target_length": 64,
    "per_device_batch_size": 2,
    "eval_per_device_batch_size": 8,
    "num_layers": 2,
    "emb_dim": 16,
    "qkv_dim": 16,
    "mlp_dim": 32,
    "num_heads": 2,
    "use_bfloat16": False,
    "prompts": "昔々あるところに",
    "max_predict_length": 16,
    "prepare_processes": 1,
}


def command(name: str, workdir, *arguments: str, **fields) -> list[str]:
    """The command line of a module, with a small recipe and the recipe's fields changed."""
    overrides = [f"--config.{field}={value}" for field, value in (SMALL_RUN | fields).items()]
    module = f"transformer_lm.{name}"
    return [
        sys.executable, "-m", module, f"--workdir={workdir}", "--config=configs/lm1b_default.py", *overrides, *arguments
    ]  # fmt: skip


def events_in(content: bytes) -> list:
    """The events of a file of TensorBoard's, read from its records: length, CRC, content, CRC."""
    from transformer_lm.training.board import Event  # here: few tests need TensorBoard's

    found, at = [], 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        found.append(Event.FromString(content[at + 12 : at + 12 + length]))
        at += length + 16
    return found


def one_line_error(done: subprocess.CompletedProcess) -> str:
    """The error of a command that failed as it should: exit status 1, and one such line, perhaps after others."""
    assert done.returncode == 1, done.stderr
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return error


MEMORY = """
import json, re, sys
from transformer_lm import models
from transformer_lm.checkpoints import loading

def peak():  # not resource's ru_maxrss, which a process inherits
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

models.count_params(models.TransformerConfig(vocab_size=8))  # what JAX takes at its first use
before = peak()
loaded = loading.load_model(sys.argv[1])
print(json.dumps([peak() - before, 4 * models.count_params(loaded.config)]))
"""


def memory_of_loading(folder: Path) -> tuple[int, int]:
    """Bytes that loading a model takes at its peak, in a process of its own, and bytes of its parameters."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    done = run_fork([sys.executable, "-c", MEMORY, str(folder)])
    assert done.returncode == 0, done.stderr
    used, parameters = json.loads(done.stdout)
    return used, parameters
