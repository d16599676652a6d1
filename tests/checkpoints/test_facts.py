"""What the model card is told: the data that the run read, and its scores."""

import json

import pytest
from conftest import FIXTURE

from transformer_lm.checkpoints.facts import read_facts
from transformer_lm.data.corpora import mukashi
from transformer_lm.huggingface import model_card
from transformer_lm.tokenizer import Tokenizer

RECIPE = {"train_split": "train", "eval_split": "validation", "num_layers": 2, "prompts": "昔々\nむかし"}
COUNTED = ("row_length", "documents", "texts", "characters", "bytes", "tokens", "rows", "padding")
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.fixture
def write(tmp_path, tales_tokenizer):
    """Writes a workdir whose prepared_dir is shared: rows of its own, and of another corpus with the same splits."""

    def write(**config):
        for name, corpus in (("aa", "mine"), ("bb", "mine"), ("cc", "foreign"), ("dd", "foreign")):
            manifest = {
                "dataset_name": corpus,
                "split": "train" if name in ("aa", "cc") else "validation",
                "tokenizer_sha256": tales_tokenizer.fingerprint,
                "dtype": "uint16",
                **dict.fromkeys(COUNTED, 5),
            }
            (tmp_path / "shared" / name).mkdir(parents=True)
            (tmp_path / "shared" / name / "manifest.json").write_text(json.dumps(manifest))
        workdir = tmp_path / "run"
        workdir.mkdir()
        recipe = RECIPE | {"prepared_dir": str(tmp_path / "shared")}
        (workdir / "config.json").write_text(json.dumps({"recipe": recipe, **config}))
        return workdir

    return write


def data(workdir, tokenizer) -> list[tuple[str, str]]:
    found = read_facts(str(workdir), 10, tokenizer)["data"]
    return [(manifest["dataset_name"], manifest["split"]) for manifest in found]


@pytest.mark.parametrize("rows", [5, [1], ["../elsewhere"], ["..", ""], {}])
def test_what_a_strangers_workdir_calls_rows(write, tales_tokenizer, rows):
    """Nothing is read by what is no name of a folder."""
    found = data(write(rows=rows), tales_tokenizer)
    assert not found if isinstance(rows, list) else len(found) == 4  # as in a workdir that names none


def test_names_the_rows_that_were_read(write, tales_tokenizer):
    assert data(write(rows=["aa", "bb"]), tales_tokenizer) == [("mine", "train"), ("mine", "validation")]


def test_each_once(write, tales_tokenizer):
    """Trained and evaluated on the same documents."""
    assert data(write(rows=["aa", "aa"]), tales_tokenizer) == [("mine", "train")]


def test_rows_that_are_gone(write, tales_tokenizer):
    assert data(write(rows=["aa", "zz"]), tales_tokenizer) == [("mine", "train")]


@pytest.mark.parametrize(
    "content",
    ["", "[]", DEEP, '{"checksums": {}}', json.dumps(dict.fromkeys((*COUNTED, "dataset_name", "split", "dtype"), "a"))],
)
def test_damaged_manifests_are_as_good_as_gone(write, tales_tokenizer, tiny, content):
    workdir = write(rows=["aa", "bb"])
    (workdir.parent / "shared" / "bb" / "manifest.json").write_text(content)
    facts = read_facts(str(workdir), 10, tales_tokenizer)
    assert [manifest["split"] for manifest in facts["data"]] == ["train"]
    assert "| mine | train | 5 |" in model_card.write("a", tiny, 10, facts)


def test_old_workdirs_name_no_rows(write, tales_tokenizer):
    """There all that fit are named, which may be too many."""
    assert sorted(set(data(write(), tales_tokenizer))) == [
        ("foreign", "train"), ("foreign", "validation"), ("mine", "train"), ("mine", "validation"),
    ]  # fmt: skip


def test_scores_of_the_step(write, tales_tokenizer, tiny):
    """Not of later ones; a half-written line is none, and no score is one that could not be computed."""
    workdir = write(rows=[])
    lines = [{"step": step, "eval_loss": 10.0 - step, "eval_bits_per_char": None} for step in (5, 10, 15)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "eval_lo')
    facts = read_facts(str(workdir), 10, tales_tokenizer)
    assert facts["scores"] == {"step": 10, "eval_loss": 0.0}
    assert facts["recipe"] == {"num_layers": 2}
    assert "| eval_loss | 0 |" in model_card.write("a", tiny, 10, facts)
    assert facts["prompt"] == "昔々"


@pytest.mark.parametrize(
    "line",
    [
        '{"eval_loss": 1.0}', '{"step": "9", "eval_loss": 1.0}', '{"step": null, "eval_loss": 1.0}', '"eval_loss"', "5",
        '["eval_loss", "step"]', "\udcff", DEEP.replace('"a"', '"eval_loss"'),
    ],
)  # fmt: skip
def test_damaged_lines_of_metrics(write, tales_tokenizer, line):
    """They count as none, wherever they stand."""
    workdir = write(rows=[])
    content = f'{line}\n{{"step": 5, "eval_loss": 3.0}}\n{line}\n'
    (workdir / "metrics.jsonl").write_bytes(content.encode(errors="surrogateescape"))
    assert read_facts(str(workdir), 10, tales_tokenizer)["scores"] == {"step": 5, "eval_loss": 3.0}


def test_scores_that_are_no_numbers(write, tales_tokenizer, tiny):
    workdir = write(rows=[])
    (workdir / "metrics.jsonl").write_text('{"step": 5, "eval_loss": 3.0, "eval_accuracy": "good"}')
    facts = read_facts(str(workdir), 10, tales_tokenizer)
    assert facts["scores"] == {"step": 5, "eval_loss": 3.0}
    assert "| eval_loss | 3 |" in model_card.write("a", tiny, 10, facts)


def test_texts_are_the_corpus_s(trained):
    """Of training and evaluation; none where the tokenizer is another."""
    spm = Tokenizer.load(trained / "sentencepiece_model")
    tales = "".join(mukashi.tale(number) for split in mukashi.SPLITS.values() for number in split[:300])
    known = [text for text in read_facts(str(trained), 6, spm)["texts"] if " ⁇ " not in text]
    assert len(known) > 100
    assert all(text in tales for text in known)


def test_no_texts_of_another_tokenizer(trained):
    facts = read_facts(str(trained), 6, Tokenizer.load(FIXTURE / "sentencepiece_model"))
    assert (len(facts["data"]), facts["texts"]) == (2, [])
