"""From an address to a model, where today's Flax has been at work: its checkpoints are folders."""

import dataclasses
import json
import os

import pytest
from conftest import FIXTURE

from transformer_lm.checkpoints import loading
from transformer_lm.errors import UserError
from transformer_lm.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path):
    """With a checkpoint that is a folder."""
    (tmp_path / "checkpoint_700000" / "default").mkdir(parents=True)
    (tmp_path / "checkpoint_700000" / "_METADATA").write_text("{}")
    return tmp_path


def test_a_file_beside_it_is_read(folder):
    (folder / "checkpoint_499999").write_bytes((FIXTURE / "checkpoint_499999").read_bytes())
    assert loading.load_model(folder).step == 499_999


@pytest.mark.parametrize("name", ["", "checkpoint_700000"])
def test_a_folder_alone(folder, name):
    """Given by its parent's name or by its own."""
    with pytest.raises(UserError, match=r"checkpoint_700000 is a folder, .* only single files checkpoint_N are read"):
        loading.find_model(folder / name)


@pytest.mark.parametrize("init_from", [None, "elsewhere"])
def test_a_run_does_not_begin_beside_the_originals_weights(tiny, tmp_path, init_from):
    """It would hide them, since a workdir's own checkpoints come first."""
    (tmp_path / "checkpoint_499999").write_bytes((FIXTURE / "checkpoint_499999").read_bytes())
    with pytest.raises(UserError, match=r"holds checkpoint_499999 of the original system, .* --config.init_from="):
        loading.find_initial(init_from, tiny, str(tmp_path))


@pytest.mark.parametrize("content", ['{"architectures": ["LlamaForCausalLM"]}', '{"my": "settings"}'])
def test_a_run_does_not_begin_in_somebody_elses_folder(tiny, tmp_path, content):
    """It would write over what is there, an exported model, say."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"holds a config\.json that is no run's, .* --config\.init_from="):
        loading.find_initial(None, tiny, str(tmp_path))


def test_a_run_of_another_network_is_refused_at_once(tiny, tmp_path):
    """Before data are prepared; how many pieces its tokenizer has is not known by then."""
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    config = {"model": dataclasses.asdict(tiny), "tokenizer_sha256": "0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert loading.find_initial(None, dataclasses.replace(tiny, vocab_size=7), str(tmp_path)) is None
    with pytest.raises(UserError, match="holds a model with mlp_dim="):
        loading.find_initial(None, dataclasses.replace(tiny, mlp_dim=tiny.mlp_dim + 8), str(tmp_path))


def test_pipes_are_no_files(folder):
    """A reader would wait for who writes."""
    os.mkfifo(folder / "checkpoint_900000")
    for address in (folder, folder / "checkpoint_900000"):
        with pytest.raises(UserError):
            loading.load_model(address)


@pytest.mark.parametrize("address", ["file:///home/me/model", "HF://a/b", "ftp://there/model"])
def test_addresses_that_nobody_knows(address):
    with pytest.raises(UserError, match=rf"{address}: '\w+://' is not known here; name a folder"):
        loading.find_model(address)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="of Linux and the like")
def test_devices_are_no_files(tmp_path):
    """Of size 0, and without end."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"config\.json is not a JSON object"):
        loading.find_model(tmp_path)
    (tmp_path / "sentencepiece_model").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="sentencepiece_model is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "sentencepiece_model")
