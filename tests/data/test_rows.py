"""Blocks of rows: what is counted."""

import json

import numpy as np
from etils import epath

from transformer_lm.data import rows
from transformer_lm.data.dataset_preprocessor import Preprocessing


def test_characters_sum_to_the_text_whatever_is_left_of_it():
    sizes = np.array([[1, 3], [0, 0], [0, 0], [2, 6]], np.int32)
    for ids in ([2], [3, 2], [3, 0, 3, 2]):
        assert rows._with_sizes(np.array(ids), "\u200bあa", sizes)[:, 1:].sum(axis=0).tolist() == [3, 7]


def test_lost_characters_are_counted(tmp_path, tales_tokenizer):
    (tmp_path / "spm").write_bytes(tales_tokenizer.model)
    block = ["昔々あるところに", "昔々\u200b"]
    counts = rows.write_block(str(tmp_path), str(tmp_path / "spm"), 32, Preprocessing(), "rows-000000", block)
    assert (counts["lost_characters"], counts["decoded_characters"]) == (1, 11)
    assert json.loads((tmp_path / "rows-000000.json").read_text())["counts"] == counts
    assert rows.read_block(epath.Path(tmp_path), "rows-000000")["counts"] == counts
