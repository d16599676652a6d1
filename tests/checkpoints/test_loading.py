"""From an address to a model, where today's Flax has been at work: its checkpoints are folders."""

import pytest
from conftest import FIXTURE

from transformer_lm.checkpoints import loading
from transformer_lm.errors import UserError


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
