"""Blocks of rows: what is counted."""

import json

from etils import epath

from transformer_lm.data import rows
from transformer_lm.data.dataset_preprocessor import Preprocessing


def test_lost_characters_are_counted(tmp_path, tales_tokenizer):
    (tmp_path / "spm").write_bytes(tales_tokenizer.model)
    block = ["昔々あるところに", "昔々\u200b"]
    counts = rows.write_block(str(tmp_path), str(tmp_path / "spm"), 32, Preprocessing(), "rows-000000", block)
    assert (counts["lost_characters"], counts["decoded_characters"]) == (1, 11)
    assert json.loads((tmp_path / "rows-000000.json").read_text())["counts"] == counts
    assert rows.read_block(epath.Path(tmp_path), "rows-000000")["counts"] == counts


def test_files_are_compared_by_what_is_known_of_them(tmp_path):
    """Of those that were written to an object store, and copied since, the lengths alone."""
    (tmp_path / "a").write_bytes(b"abc")
    folder, checksum = epath.Path(tmp_path), rows.checksum_of(tmp_path / "a")
    assert rows.are_whole(folder, {"a": (3, checksum)})
    assert rows.are_whole(folder, {"a": (3, None)})
    assert not rows.are_whole(folder, {"a": (3, checksum ^ 1)})
    assert not rows.are_whole(folder, {"a": (2, None)})
    assert not rows.are_whole(folder, {"a": (3, None), "b": (0, None)})
    assert not rows.are_whole(folder / "gone", {"a": (3, None)})
