"""Sub-splits mean what they mean in TFDS."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_lm.data import corpora
from transformer_lm.data.corpora import splits
from transformer_lm.errors import UserError


def documents(split: str, size: int) -> list[int]:
    """The numbers of the documents that a split of a corpus of `size` documents names."""
    return [n for part in splits.parse(split) for n in range(size)[slice(*splits.resolve(part, lambda _: size))]]


@pytest.mark.parametrize(
    ("split", "size", "expected"),
    [
        ("train", 5, [0, 1, 2, 3, 4]),
        ("train[:2]", 5, [0, 1]),
        ("train[3:]", 5, [3, 4]),
        ("train[-2:]", 5, [3, 4]),
        ("train[:-4]", 5, [0]),
        ("train[1:3]", 5, [1, 2]),
        ("train[:100]", 5, [0, 1, 2, 3, 4]),
        ("train[:98%]", 100, list(range(98))),
        ("train[98%:]", 100, [98, 99]),
        ("train[25%:75%]", 10, list(range(2, 8))),  # 2.5 and 7.5 to the even neighbour, as Python and TFDS round
        ("train[-50%:]", 4, [2, 3]),
        ("train[:1%]", 10, []),
        ("train[:1]+train[-1:]", 5, [0, 4]),
    ],
)
def test_by_hand(split, size, expected):
    assert documents(split, size) == expected


@given(st.integers(0, 100), st.integers(0, 100_000))
def test_complements_share_nothing_and_miss_nothing(percent, size):
    parts = splits.parse(f"train[:{percent}%]") + splits.parse(f"train[{percent}%:]")
    (start, middle), (middle_again, stop) = (splits.resolve(part, lambda _: size) for part in parts)
    assert (start, stop) == (0, None)
    assert middle == middle_again


def test_whole_and_absolute_splits_do_not_count_the_corpus():
    def size(name):
        raise AssertionError(name)

    for split in ("train", "train[:100]", "train[5:10]"):
        splits.resolve(splits.parse(split)[0], size)


@pytest.mark.parametrize(
    "split", ["", "train[", "train[:98%", "train[98]", "train[:9.5%]", "train[a:b]", "train+", "[:3]"]
)
def test_unreadable_splits(split):
    with pytest.raises(UserError, match="cannot be read"):
        splits.parse(split)


@pytest.mark.parametrize(
    "split", ["train[:98.5%]", "train[:98 %]", "train [:98%]", "train[::2]", "train[5]", "train[:" + "9" * 5000 + "]",
              "train[:" + "9" * 400 + "%]", "train[:1e3]", "train[+1:]", "train[:-]", "train[:%]", "train[1:2][3:4]"]
)  # fmt: skip
def test_odd_bounds(split):
    with pytest.raises(UserError, match="cannot be read"):
        splits.parse(split)


@pytest.mark.parametrize(
    "split", ["train[20:10]", "train[5:5]", "train[:0]", "train[-5:-10]", "train[90%:10%]", "train[:0%]",
              "train[1000:]", "train[:5]+train[7:6]", "train[999999999999999999:]"]
)  # fmt: skip
def test_slices_of_nothing_are_named(tmp_path, split):
    (tmp_path / "a.txt").write_text("\n\n".join(map(str, range(30))))
    documents = corpora.open_documents(f"text:{tmp_path}/a.txt", split)
    with pytest.raises(UserError, match=r"no document is in 'train' from number"):
        list(documents)
