"""Preparation: what is counted, what is left behind by an interruption, and what is found again."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from conftest import command
from etils import epath
from real_datasets import write_jsonl

from transformer_lm import tokenizer
from transformer_lm.data import corpora, packing, preparation, rows
from transformer_lm.data.corpora import mukashi
from transformer_lm.errors import UserError
from transformer_lm.tokenizer import EOS_ID


def data_config(**changes) -> preparation.DataConfig:
    fields = {
        "dataset_name": "mukashi",
        "train_split": "train[:400]",
        "eval_dataset_name": None,
        "eval_split": "validation[:50]",
        "text_field": "text",
        "conversations": False,
        "streaming": False,
        "preprocessor": None,
        "unicode_normalization": "",
        "cleaning_rules": "",
        "vocab_path": None,
        "vocab_size": 900,
        "max_corpus_chars": 100_000,
        "spm_train_options": "--character_coverage=1.0",
        "max_target_length": 64,
        "max_eval_target_length": 128,
        "prepared_dir": None,
        "prepare_processes": 1,
    }
    return preparation.DataConfig(**fields | changes)


def rows_of(corpus: rows.PreparedCorpus) -> np.ndarray:
    """All rows [N, T] of a prepared corpus, read without this package: a header, then the ids."""
    return np.stack(
        [
            np.frombuffer(record, corpus.dtype, offset=packing.HEADER.itemsize)
            for record in ArrayRecordDataSource(corpus.paths)
        ]
    )


def batch_of_all(corpus: rows.PreparedCorpus) -> dict[str, np.ndarray]:
    """All rows as one batch."""
    records = [np.frombuffer(record, np.uint8) for record in ArrayRecordDataSource(corpus.paths)]
    return packing.read_records(np.stack(records), corpus.dtype)


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("workdir")
    return workdir, preparation.prepare(data_config(), str(workdir))


def test_rows_hold_the_corpus(prepared):
    _, data = prepared
    for corpus, split, length in ((data.train, "train[:400]", 64), (data.eval, "validation[:50]", 128)):
        texts = list(corpora.open_documents("mukashi", split))
        rows = rows_of(corpus)
        assert rows.shape == (corpus.manifest["rows"], length)
        tokens = rows[rows != packing.padding_id(rows.dtype)]
        expected = np.concatenate(data.tokenizer.encode_texts(texts))
        np.testing.assert_array_equal(np.sort(tokens), np.sort(expected))
        assert corpus.manifest["documents"] == len(texts) == np.sum(tokens == EOS_ID)
        assert corpus.manifest["tokens"] == len(expected)
        assert corpus.manifest["characters"] == sum(map(len, texts))
        assert corpus.manifest["bytes"] == sum(len(text.encode()) for text in texts)
        assert corpus.manifest["padding"] == rows.size - len(tokens)
        batch = batch_of_all(corpus)  # the rows' own counts are those of the corpus
        assert [batch[name].sum() for name in ("characters", "bytes")] == [
            corpus.manifest[name] for name in ("characters", "bytes")
        ]


def test_found_again(prepared):
    workdir, data = prepared
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    again = preparation.prepare(data_config(), str(workdir))
    assert again.train.directory == data.train.directory
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


@pytest.mark.parametrize("changes", [{"max_target_length": 32}, {"train_split": "train[:300]"}])
def test_what_makes_rows_finds_them(prepared, changes):
    """Another row length or split lies in another folder."""
    workdir, data = prepared
    other = preparation.prepare(data_config(**changes), str(workdir))
    assert other.train.directory != data.train.directory
    assert other.eval.directory == data.eval.directory


def test_changed_tokenizer_never_meets_stale_rows(prepared, tmp_path):
    workdir, data = prepared
    config = data_config(vocab_path=str(tmp_path / "spm"), vocab_size=950)
    other = preparation.prepare(config, str(workdir))
    assert {other.train.directory, other.eval.directory}.isdisjoint({data.train.directory, data.eval.directory})


def test_changed_file_never_meets_stale_rows(tmp_path):
    source = tmp_path / "tales.jsonl"
    config = data_config(dataset_name=f"jsonl:{source}", train_split="train[:150]", eval_split="train[150:]")
    tales = list(corpora.open_documents("mukashi", "train[:200]"))
    source.write_text("".join(json.dumps({"text": tale}) + "\n" for tale in tales))
    before = preparation.prepare(config, str(tmp_path)).train
    source.write_text("".join(json.dumps({"text": tale}) + "\n" for tale in reversed(tales)))
    after = preparation.prepare(config, str(tmp_path)).train
    assert before.directory != after.directory
    assert before.manifest["characters"] != after.manifest["characters"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks of few documents, also in worker processes and commands."""
    monkeypatch.setattr(rows, "BLOCK_CHARS", 10_000)


def test_same_bytes_whatever_the_number_of_processes(tmp_path, small_blocks):
    folders = []
    for processes in (1, 3):
        config = data_config(prepare_processes=processes, vocab_path=str(tmp_path / "spm"))
        data = preparation.prepare(config, str(tmp_path / str(processes)))
        assert len(data.train.paths) > 5
        folders.append(files_of(data.train.directory))
    assert folders[0] == folders[1]


def test_killed_and_started_again(tmp_path):
    """A preparation killed with SIGKILL leaves nothing that counts as whole, and ends with the same bytes."""
    code = (
        "import json, sys\n"
        "from transformer_lm.data import preparation, rows\n"
        "rows.BLOCK_CHARS = 10_000\n"
        "preparation.prepare(preparation.DataConfig(**json.loads(sys.argv[1])), sys.argv[2])\n"
    )
    config = data_config(train_split="train[:800]", vocab_path=str(tmp_path / "spm"), prepare_processes=2)

    def start(workdir):
        arguments = [sys.executable, "-c", code, json.dumps(dataclasses.asdict(config)), str(workdir)]
        return subprocess.Popen(arguments, start_new_session=True)

    assert start(tmp_path / "unbroken").wait() == 0
    workdir, blocks_seen = tmp_path / "broken", 0
    for blocks in (1, 6):
        process = start(workdir)
        while process.poll() is None and len(list(workdir.glob("prepared/*/*.json"))) < blocks:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        blocks_seen = max(blocks_seen, len(list(workdir.glob("prepared/*/rows-*.json"))))
        assert not list(workdir.glob("prepared/*/manifest.json"))
    assert blocks_seen >= 6
    assert start(workdir).wait() == 0
    folders = [sorted((tmp_path / name / "prepared").iterdir()) for name in ("unbroken", "broken")]
    assert [folder.name for folder in folders[0]] == [folder.name for folder in folders[1]]
    for unbroken, broken in zip(*folders, strict=True):
        assert files_of(unbroken) == files_of(broken)


@pytest.mark.parametrize(
    ("pattern", "content"),
    [
        ("manifest.json", b""),
        ("manifest.json", b'{"files": ["rows-0000'),
        ("manifest.json", b'{"checksums": {}}'),
        ("manifest.json", b'{"files": [], "checksums": {}, "dtype": "uint16", "row_length": 32}'),
        ("manifest.json", b'{"checksums":' * 100_000),
        ("rows-000001.json", b'{"counts":' * 100_000),
        ("rows-000001.json", b'{"counts": {"rows": 0}}'),
        ("rows-000001.json", b'{"counts": []}'),
        ("rows-000001.json", b""),
        ("rows-000001.json", b'{"counts": {"rows": 3}}'),
        ("rows-000001.arrayrecord", b""),
        ("rows-000001.arrayrecord", b"half"),
        ("rows-000001.arrayrecord", None),
    ],
)
def test_damaged_files_are_made_again(tmp_path, small_blocks, tales_tokenizer, caplog, pattern, content):
    """Whatever a power cut has left: the same bytes as before, a line in the log, and no other block is touched."""
    config = data_config(vocab_path=str(saved(tales_tokenizer, tmp_path)))
    folder = Path(preparation.prepare(config, str(tmp_path)).train.directory)
    before, times = files_of(folder), {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    path = folder / pattern
    path.write_bytes(flipped(path.read_bytes()) if content is None else content)
    if pattern != "manifest.json" and content != b"half":
        (folder / "manifest.json").unlink()  # the cut came before there was one
    preparation.prepare(config, str(tmp_path))
    assert files_of(folder) == before
    assert "made again" in caplog.text
    assert times["rows-000000.arrayrecord"] == (folder / "rows-000000.arrayrecord").stat().st_mtime_ns


def flipped(content: bytes) -> bytes:
    """The same length, other bytes in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 255 for byte in content[middle : middle + 8]) + content[middle + 8 :]


def saved(spm, folder) -> Path:
    (folder / "spm").write_bytes(spm.model)
    return folder / "spm"


def test_rows_damaged_later_are_found_before_training(tmp_path, tales_tokenizer, caplog):
    config = data_config(vocab_path=str(saved(tales_tokenizer, tmp_path)))
    [path] = preparation.prepare(config, str(tmp_path)).train.paths
    whole = Path(path).read_bytes()
    Path(path).write_bytes(flipped(whole))
    preparation.prepare(config, str(tmp_path))
    assert Path(path).read_bytes() == whole
    assert "damaged, and is made again" in caplog.text


def test_no_jax_where_data_are_prepared(tmp_path):
    """Neither in the command nor in its workers, which do not import the program's main module either."""
    code = (
        "import sys, transformer_lm.prepare_data\n"
        "print(sorted({'jax', 'flax', 'optax', 'orbax', 'torch', 'tensorflow'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    code = (
        "import sys, wave\n"  # the main module: without a guard, and with what workers need not have
        "from transformer_lm.data import workers\n"
        "with workers._pool(1) as pool, workers._without_main_module():\n"
        "    modules = pool.submit(eval, 'sorted(__import__(\"sys\").modules)').result()\n"
        "print(sorted({'wave', 'jax', 'flax', 'optax', 'orbax'} & set(modules)))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc, which is Linux's")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_command(tmp_path, number):
    """Also when the one who started them is killed."""
    code = (
        "import time\n"
        "from transformer_lm.data import workers\n"
        "with workers._pool(2) as pool, workers._without_main_module():\n"
        "    list(pool.map(time.sleep, [0.1, 0.1, 60, 60]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while len(workers := workers_of(process)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    process.wait()
    deadline = time.monotonic() + 10
    while any(is_running(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(worker) for worker in workers)


def is_running(number: int) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{number}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("train", "evaluation", "told"),
    [
        ("train[:100]", "train[100:]", False),
        ("train[:100]", "train[50:120]", True),
        ("train", "train", True),
        ("train[:98%]", "train[98%:]", False),
        ("train[:98%]+validation", "validation[:5]", True),
        ("train", "validation", False),
    ],
)
def test_evaluating_on_what_is_trained_on_is_said(train, evaluation, told, caplog):
    opened = {}
    parts = [preparation.open_corpora("mukashi", split, data_config(), opened) for split in (train, evaluation)]
    assert parts[0][0].documents.source is parts[1][0].documents.source  # counted once
    preparation._warn_of_overlaps(*parts)
    assert ("scores will be too good" in caplog.text) == told


@pytest.mark.parametrize(
    ("train", "evaluation", "told"),
    [
        ("cl/*.txt train", "cl/0.txt train", True),
        ("cl/*.txt train", "cl/2.txt train", True),
        ("cl/*.txt train[3:]", "cl/2.txt train", True),
        ("cl/*.txt train", "{here}/cl/*.txt train", True),
        ("cl/1.txt train", "cl/../cl/[12].txt train", True),
        ("cl/2.txt train", "link.txt train", True),
        ("cl/0.txt train", "cl/[12].txt train", False),
        ("cl/*.txt train[:4]", "./cl/*.txt train[4:]", False),
        ("cl/*.txt train[:50%]", "./cl/*.txt train[1:2]", True),
        ("cl/*.txt train[:4]", "cl/2.txt train", False),
        ("cl/*.txt train[5:]", "cl/2.txt train[:1]", False),
        ("cl/*.txt train[5:]", "cl/2.txt train[1:]", True),
        ("cl/*.txt train[:1]+train[3:4]", "cl/1.txt train[-1:]", True),
    ],
)
def test_evaluating_on_the_same_files_is_said(tmp_path, train, evaluation, told, caplog, monkeypatch):
    """Under whatever names; each of three has two documents."""
    monkeypatch.chdir(tmp_path)
    Path("cl").mkdir()
    for number in range(3):
        Path(f"cl/{number}.txt").write_text(f"{number}\n\n昔々\n")
    Path("link.txt").symlink_to("cl/2.txt")
    opened, parts = {}, []
    for named in (train, evaluation):
        name, split = named.format(here=tmp_path).split()
        parts.append(preparation.open_corpora(f"text:{name}", split, data_config(), opened))
    preparation._warn_of_overlaps(*parts)
    assert ("scores will be too good" in caplog.text) == told


def test_whole_files_are_compared_by_their_names_alone(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("昔々")
    monkeypatch.setattr(corpora.files, "read_file", None)
    names = f"text:{tmp_path}/a.txt", f"text:{tmp_path}/*.txt"
    one, other = (corpora.open_documents(name, "train") for name in names)
    assert one.overlaps(other)


def test_what_is_prepared_is_not_read_again(tmp_path, monkeypatch):
    """Nor to count what a percentage is of, or to see whether training and evaluation overlap."""
    write_jsonl(tmp_path / "a.jsonl", [mukashi.tale(number) for number in range(100)])
    splits = {"train_split": "train[:90%]", "eval_split": "train[90%:]"}
    config = data_config(dataset_name=f"jsonl:{tmp_path}/a.jsonl", **splits)
    preparation.prepare(config, str(tmp_path / "w"))
    monkeypatch.setattr(corpora.files, "read_file", None)
    assert preparation.prepare(config, str(tmp_path / "w")).train.manifest["documents"] == 90


@pytest.mark.parametrize("rules", ["", "language"])
def test_a_run_keeps_the_rows_that_it_began_with(tmp_path, caplog, rules):
    """Though a file, or a data set of the hub, has changed since; whoever begins anew has what is there then."""
    tales = [mukashi.tale(number) for number in range(60)]
    write_jsonl(tmp_path / "a.jsonl", tales)
    splits = {"train_split": "train[:40]", "eval_split": "train[40:]", "cleaning_rules": rules}
    config = data_config(dataset_name=f"jsonl:{tmp_path}/a.jsonl", **splits)
    begun = preparation.prepare(config, str(tmp_path / "w"))
    names = preparation.rows_named(begun)
    write_jsonl(tmp_path / "a.jsonl", tales + tales[:1])
    again = preparation.prepare(config, str(tmp_path / "w"), kept=[*names["train"], *names["eval"]])
    assert preparation.rows_named(again) == names
    assert caplog.text.count("is not what it was when this run began") == 2
    assert preparation.rows_named(preparation.find_named(config, str(tmp_path / "w"), names)) == names
    anew = preparation.prepare(config, str(tmp_path / "w"))
    assert set(preparation.rows_named(anew)["train"]).isdisjoint(names["train"])
    assert anew.eval.manifest["documents"] == begun.eval.manifest["documents"] + 1
    changed = dataclasses.replace(config, max_target_length=32)
    assert preparation.prepare(changed, str(tmp_path / "w"), kept=names["train"]).train.row_length == 32


@pytest.mark.parametrize("rules", ["", "language"])
def test_a_run_needs_its_sources_no_more(tmp_path, caplog, rules):
    """Once its rows are there: whoever has no room deletes the texts, and a hub may be down."""
    write_jsonl(tmp_path / "a.jsonl", [mukashi.tale(number) for number in range(60)])
    splits = {"train_split": "train[:40]", "eval_split": "train[40:]", "cleaning_rules": rules}
    config = data_config(dataset_name=f"jsonl:{tmp_path}/a.jsonl", **splits)
    names = preparation.rows_named(preparation.prepare(config, str(tmp_path / "w")))
    kept = [*names["train"], *names["eval"]]
    (tmp_path / "a.jsonl").unlink()
    assert preparation.rows_named(preparation.prepare(config, str(tmp_path / "w"), kept=kept)) == names
    assert caplog.text.count("The run goes on with the rows of") == 2
    spm = tokenizer.Tokenizer.load(tmp_path / "w" / "sentencepiece_model")
    found = preparation.find_evaluation(config, spm, epath.Path(tmp_path / "w" / "prepared"), kept)
    assert [found.directory.name] == names["eval"]
    assert preparation.find_evaluation(config, spm, epath.Path(tmp_path / "elsewhere"), kept) is None
    other = dataclasses.replace(config, eval_dataset_name="nosuch:x")
    for wanted, rows_kept, words in (
        (config, [], "No file matches"),
        (dataclasses.replace(config, max_target_length=32), kept, "No file matches"),
        (other, kept, "^eval_dataset_name='nosuch:x' must be"),
    ):
        with pytest.raises(UserError, match=words):
            preparation.prepare(wanted, str(tmp_path / "w"), kept=rows_kept)
    (tmp_path / "w" / "sentencepiece_model").unlink()
    with pytest.raises(UserError, match="No file matches"):
        preparation.prepare(config, str(tmp_path / "w"), kept=kept)


def test_an_error_names_the_field(tmp_path):
    for field in ("dataset_name", "eval_dataset_name"):
        with pytest.raises(UserError, match=rf"^{field}='nosuch:x' must be"):
            preparation.prepare(data_config(**{field: "nosuch:x"}), str(tmp_path))


def test_a_refused_tokenizer_does_not_stay(tmp_path):
    """The mended command works, and the refusal comes before the corpus is read."""
    options = {"spm_train_options": "--unk_id=3 --pad_id=0", "dataset_name": "text:/dev/null/nothing"}
    with pytest.raises(UserError):
        preparation.prepare(data_config(**options), str(tmp_path))
    with pytest.raises(UserError, match="ids"):
        preparation.prepare(data_config(spm_train_options="--unk_id=3 --pad_id=0"), str(tmp_path))
    assert not (tmp_path / "sentencepiece_model").exists()
    preparation.prepare(data_config(train_split="train[:300]"), str(tmp_path))


def workers_of(process: subprocess.Popen) -> list[int]:
    """Its worker processes, found in Linux's /proc."""
    folder = Path("/proc") / str(process.pid) / "task" / str(process.pid)
    try:
        children = map(int, (folder / "children").read_text().split())
        return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except OSError:
        return []


SMALL_BLOCKS = """
import runpy
from transformer_lm.data import rows
rows.BLOCK_CHARS = 10_000
runpy.run_module("transformer_lm.prepare_data", run_name="__main__")
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc, which is Linux's")
def test_a_killed_worker_is_an_error_in_one_line(tmp_path, tales_tokenizer):
    """As when the system runs out of memory; the same command goes on."""
    (tmp_path / "spm").write_bytes(tales_tokenizer.model)
    tales = "\n\n".join(corpora.mukashi.tale(number) for number in range(400)) + "\n\n"
    (tmp_path / "tales.txt").write_text(tales, encoding="utf-8")
    name = f"text:{tmp_path}/tales.txt"
    fields = {"dataset_name": name, "train_split": "train", "eval_dataset_name": name, "eval_split": "train[:9]"}
    arguments = command("prepare_data", tmp_path, **fields, vocab_path=tmp_path / "spm", prepare_processes=2)
    arguments[1:3] = ["-c", SMALL_BLOCKS]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(workers := workers_of(process)) < 2:
        time.sleep(0.01)
    os.kill(workers[1], signal.SIGKILL)
    errors = process.communicate()[1]
    assert process.returncode == 1
    assert [line for line in errors.splitlines() if line.startswith("error: A process that prepares rows was killed")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_padding_of_literature_is_below_3_percent(literature, tmp_path):
    config = data_config(
        dataset_name=f"jsonl:{literature}/aozora_validation.jsonl.gz",
        train_split="train[:8%]",
        eval_split="train[:3]",
        vocab_size=4000,
        max_corpus_chars=200_000,
        spm_train_options="--character_coverage=0.9995 --byte_fallback=true",
        max_target_length=256,
    )
    corpus = preparation.prepare(config, str(tmp_path)).train
    rows = rows_of(corpus)
    assert np.mean(rows == packing.padding_id(rows.dtype)) < 0.03


def test_empty_documents_are_counted_and_left_out(tmp_path, tales_tokenizer):
    (tmp_path / "spm").write_bytes(tales_tokenizer.model)
    texts = ["昔々あるところに", "", " \n", "川が流れていました。"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = data_config(
        dataset_name=f"jsonl:{tmp_path}/x.jsonl", train_split="train", eval_split="train[:1]",
        vocab_path=str(tmp_path / "spm"),
    )  # fmt: skip
    manifest = preparation.prepare(config, str(tmp_path)).train.manifest
    assert (manifest["documents"], manifest["empty_documents"], manifest["texts"]) == (4, 2, 2)
    with pytest.raises(UserError, match="holds no text"):
        preparation.prepare(dataclasses.replace(config, eval_split="train[1:3]"), str(tmp_path))


def test_errors_come_before_long_work(tmp_path):
    for changes in ({"eval_split": "test"}, {"dataset_name": "text:/no/such"}, {"eval_dataset_name": "jsonl:/none"}):
        with pytest.raises(UserError):
            preparation.prepare(data_config(**changes), str(tmp_path))
    assert not list(tmp_path.iterdir())


def prepare_files(tmp_path, spm, **changes):
    """Prepares jsonl or text files in tmp_path with a given tokenizer; the manifest of the training rows."""
    (tmp_path / "spm").write_bytes(spm.model)
    fields = {"train_split": "train", "eval_split": "train[:1]", "vocab_path": str(tmp_path / "spm")} | changes
    return preparation.prepare(data_config(**fields), str(tmp_path)).train


def test_nul_bytes_are_counted_and_removed(tmp_path, tales_tokenizer):
    (tmp_path / "x.txt").write_text("昔々\0あるところに\n\n\0\0\n\n川", encoding="utf-8")
    manifest = prepare_files(tmp_path, tales_tokenizer, dataset_name=f"text:{tmp_path}/x.txt").manifest
    assert (manifest["nul_characters"], manifest["empty_documents"], manifest["texts"]) == (3, 1, 2)
    assert manifest["characters"] == len("昔々あるところに川")


def test_empty_files_and_corpora(tmp_path, tales_tokenizer):
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(UserError, match="holds no text"):
        prepare_files(tmp_path, tales_tokenizer, dataset_name=f"text:{tmp_path}/*.txt")
    (tmp_path / "b.txt").write_text("川が流れていました。", encoding="utf-8")
    corpus = prepare_files(tmp_path, tales_tokenizer, dataset_name=f"text:{tmp_path}/*.txt")
    assert corpus.manifest["rows"] == len(rows_of(corpus)) == 1  # a corpus smaller than a row


def test_a_huge_document(tmp_path, tales_tokenizer, monkeypatch):
    """More than is encoded at once in one document: whole, and cut into parts only where its ids stay the same."""
    monkeypatch.setattr(tokenizer, "ENCODE_CHARS", 50_000)
    lines = [corpora.mukashi.tale(number) for number in range(100)]
    text = "\n".join(lines * 6)
    assert len(text) > 1.2 * tokenizer.ENCODE_CHARS
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    corpus = prepare_files(tmp_path, tales_tokenizer, dataset_name=f"text:{tmp_path}/x.txt", max_target_length=1024)
    manifest = corpus.manifest
    assert (manifest["documents"], manifest["characters"]) == (1, len(text))
    expected = sum(len(tales_tokenizer.encode(line)) for line in lines) * (len(text) + 1) // (len("\n".join(lines)) + 1)
    assert manifest["tokens"] == expected + 1  # EOS


def test_manifest_says_where_the_rows_come_from(prepared):
    manifest = prepared[1].train.manifest
    assert (manifest["dataset_name"], manifest["split"], manifest["preprocessor"]) == (
        "mukashi",
        "train[:400]",
        "plain",
    )
    for name in ("source_fingerprint", "tokenizer_sha256", "transformer_lm_version", "unicode_normalization"):
        assert name in manifest
    assert manifest["characters_per_token"] == pytest.approx(manifest["characters"] / manifest["tokens"], abs=1e-4)
    assert manifest["dtype"] == "uint16"


def test_normalization_and_cleaning_by_config(tmp_path, tales_tokenizer):
    pytest.importorskip("hojichar")
    tales = [corpora.mukashi.tale(number) for number in range(30)]
    (tmp_path / "x.txt").write_text("\n\n".join([*tales, "ＡＤ．短い。"]), encoding="utf-8")
    dataset = f"text:{tmp_path}/x.txt"
    before = prepare_files(tmp_path, tales_tokenizer, dataset_name=dataset)
    after = prepare_files(
        tmp_path, tales_tokenizer, dataset_name=dataset, cleaning_rules="language,length", unicode_normalization="NFKC"
    )
    assert before.manifest["texts"] == 31
    assert after.manifest["texts"] == 30
    assert after.directory != before.directory
    assert after.manifest["dataset_name"] == dataset
    assert (after.manifest["unicode_normalization"], after.manifest["cleaning_rules"]) == ("NFKC", "language,length")
    assert after.manifest["cleaning_counts"]["removed"] == {"language": 0, "length": 1}


def test_rows_are_not_made_through_a_link(tmp_path, tales_tokenizer):
    """A stranger's workdir could lead to the user's files, and all but rows is removed where they are made."""
    (tmp_path / "x.txt").write_text("昔々あるところに\n川", encoding="utf-8")
    train = prepare_files(tmp_path, tales_tokenizer, dataset_name=f"text:{tmp_path}/x.txt")
    home = tmp_path / "home"
    (home / "thesis").mkdir(parents=True)
    (home / "key").write_text("precious")
    for path in train.directory.iterdir():
        path.unlink()
    train.directory.rmdir()
    os.symlink(home, train.directory)
    with pytest.raises(UserError, match="is a link, but has to be a folder of its own"):
        prepare_files(tmp_path, tales_tokenizer, dataset_name=f"text:{tmp_path}/x.txt")
    assert sorted(path.name for path in home.iterdir()) == ["key", "thesis"]
