"""Models by their address on the hub, from a cache as the hub's own library lays it out; nothing asks for a network."""

import json
import os
import sys

import pytest
from conftest import FIXTURE, one_line_error, run
from processes import run_fork
from real_datasets import make_hub_cache

from transformer_lm import tokenizer
from transformer_lm.checkpoints import hub
from transformer_lm.errors import UserError

pytest.importorskip("huggingface_hub")
REPOSITORY = "fukugawa/transformer-lm-japanese-0.1b"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The published repository's layout, revision v1, with the small checkpoint; and files that are none of ours."""
    home = tmp_path_factory.mktemp("hf")
    files = {name: (FIXTURE / name).read_bytes() for name in ("checkpoint_499999", "sentencepiece_model")}
    files["modeling_transformer_lm.py"] = b"raise SystemExit('code from a model folder was executed')"
    make_hub_cache(home, REPOSITORY, files, kind="models", revision="v1")
    return os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}


def generate(environment, workdir, *arguments):
    command = [sys.executable, "-m", "transformer_lm.generate_text", f"--workdir={workdir}", "--output=jsonl"]
    return run([*command, "--num_generated_texts=1", *arguments, "--config.max_predict_length=32"], env=environment)


def test_generates_as_from_the_folder(environment):
    arguments = ["--config.prompts=夏目漱石は、", "--config.sampling_temperature=0", "--config.use_bfloat16=False"]
    done = generate(environment, f"hf://{REPOSITORY}@v1", *arguments)
    assert done.returncode == 0, done.stderr
    [text] = [json.loads(line)["text"] for line in done.stdout.splitlines()]
    spm = tokenizer.Tokenizer.load(FIXTURE / "sentencepiece_model")
    import numpy as np

    assert text == spm.decode(np.load(FIXTURE / "reference.npz")["greedy"][0])
    assert done.stdout == generate(environment, FIXTURE, *arguments).stdout


def test_the_originals_readme_step_by_step(environment, tmp_path):
    """hf_hub_download into ./logs/japanese_0.1b_v1, then generate_text.py --workdir."""
    folder = tmp_path / "logs" / "japanese_0.1b_v1"
    code = (
        "import shutil, sys\n"
        "from huggingface_hub import hf_hub_download\n"
        "for name in ('sentencepiece_model', 'checkpoint_499999'):\n"
        f"    shutil.copy(hf_hub_download(repo_id='{REPOSITORY}', filename=name, revision='v1'), sys.argv[1])\n"
    )
    folder.mkdir(parents=True)
    done = run_fork([sys.executable, "-c", code, str(folder)], env=environment)
    assert done.returncode == 0, done.stderr
    arguments = [
        "--config=configs/japanese_0.1b_v1.py", "--config.sampling_temperature=0.6", "--config.sampling_top_k=20",
        "--config.seed=0", "--config.prompts=夏目漱石は、",
    ]  # fmt: skip
    done = generate(environment, folder, *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"].startswith("夏目漱石は、")


@pytest.mark.parametrize(
    "address", ["hf://nobody/nothing", f"hf://{REPOSITORY}@v2", "hf://", "hf://a b/c", "hf://x/y/z"]
)
def test_what_is_not_there(environment, address):
    assert f"{address} cannot be fetched" in one_line_error(generate(environment, address))


def test_a_run_is_not_written_there(environment):
    command = [
        sys.executable,
        "-m",
        "transformer_lm.main",
        f"--workdir=hf://{REPOSITORY}",
        "--config=configs/mukashi.py",
    ]
    done = run(command, env=environment)
    assert done.returncode == 1
    assert "cannot be written to the hub" in done.stderr


def test_nothing_but_the_models_own_files(monkeypatch, tmp_path):
    """Not what lies in folders of a repository, as other systems' checkpoints do."""
    import huggingface_hub

    asked = []

    def fetch(repository, **options):
        asked.append(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(UserError, match="is no model of this project"):
        hub.fetch("hf://a/b")
    names = ["checkpoint_5", "sentencepiece_model", "checkpoint_1000000/target/0.0", "old/sentencepiece_model"]
    [options] = asked
    patterns = {name: options[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(huggingface_hub.utils.filter_repo_objects(names, **patterns)) == names[:2]


def test_whatever_a_network_makes_of_it(monkeypatch):
    """Libraries' errors of proxies, say, are of no common kind."""
    import huggingface_hub

    def fail(*_, **__):
        raise type("ProxyError", (Exception,), {})("407 Proxy Authentication Required")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"hf://a/b cannot be fetched: 407 .* HF_HUB_OFFLINE=1"):
        hub.fetch("hf://a/b")
