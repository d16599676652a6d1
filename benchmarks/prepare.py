"""Preparation against bare SentencePiece encoding on as many cores, and its memory by the size of the corpus.

python benchmarks/prepare.py [--corpus=FILE.jsonl.gz] [--sizes_mb=100,1000]

Without a corpus, of tales. The ways take turns; the table shows the median of the rounds. SentencePiece gives its ids
as lists unless it is asked for NumPy arrays, as the preparation does; both are shown. Memory is what this
process and its workers occupy together at the most (proportional set size, which counts shared pages once), beyond
what they occupy before the first document.
"""

import gzip
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import psutil
import rich.console
import sentencepiece
from absl import app, flags
from rich.table import Table

from transformer_lm import console, files, tokenizer
from transformer_lm.data import corpora, dataset_preprocessor, preparation, rows, tokenizer_training
from transformer_lm.data.corpora import mukashi

_CORPUS = flags.DEFINE_string("corpus", None, "JSON lines with a field text, gzipped; unset for tales.")
_SIZES = flags.DEFINE_list("sizes_mb", ["100", "1000"], "Megabytes of text whose memory is measured.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of the throughput.")
CORES = os.cpu_count() or 1
THROUGHPUT_CHARS = 60_000_000
VOCAB_SIZE, ROW_LENGTH = 8000, 256


def texts():
    """Endless texts: the corpus again and again."""
    tales = [] if _CORPUS.value else [mukashi.tale(number) for number in range(10_000)]
    while True:
        if _CORPUS.value:
            with gzip.open(_CORPUS.value, "rt", encoding="utf-8") as lines:
                yield from (json.loads(line)["text"] for line in lines)
        else:
            yield from tales


def write_corpus(path: Path, *, max_chars: float = float("inf"), max_bytes: float = float("inf")) -> list[str]:
    """Writes texts up to a size into a file; gives them back where that is a number of characters."""
    chars, size, kept = 0, 0, []
    with path.open("w", encoding="utf-8") as file:
        for text in texts():
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            chars, size = chars + len(text), size + len(text.encode())
            if max_chars < float("inf"):
                kept.append(text)
            if chars >= max_chars or size >= max_bytes:
                break
    return kept


def prepare(corpus: Path, spm_path: Path, folder: Path):
    """Prepares a corpus, from a file to rows."""
    shutil.rmtree(folder, ignore_errors=True)
    source = rows.Corpus.open(corpora.open_documents(f"jsonl:{corpus}", "train"), dataset_preprocessor.Preprocessing())
    spm = tokenizer.Tokenizer.load(spm_path)
    plan = rows.RowsPlan(source, spm, ROW_LENGTH, files.absolute(folder))
    preparation.prepare_rows(plan, CORES)


def throughput(folder: Path, spm_path: Path, table: Table):
    """Adds the rows of the ways."""
    documents = write_corpus(folder / "corpus.jsonl", max_chars=THROUGHPUT_CHARS)
    chars = sum(map(len, documents))
    bare = sentencepiece.SentencePieceProcessor(model_file=str(spm_path))
    ways = {
        "SentencePiece alone": lambda: bare.encode(documents, num_threads=CORES),
        "SentencePiece alone, NumPy arrays": lambda: bare.encode(documents, num_threads=CORES, return_type="numpy"),
        "preparation, start-up included": lambda: prepare(folder / "corpus.jsonl", spm_path, folder / "rows"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_ROUNDS.value):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    first = seconds["SentencePiece alone"]
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(first, times, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(name, f"{statistics.median(times):.2f}", f"{chars / statistics.median(times) / 1e6:.2f}", ratio)


def peak_memory(work) -> float:
    """Megabytes of this process and its children at the most, while work() runs, beyond this process's at its start."""
    me, peak, done = psutil.Process(), 0.0, threading.Event()

    def total() -> float:
        sizes = []
        for process in [me, *me.children(recursive=True)]:
            try:
                sizes.append(process.memory_full_info().pss)
            except psutil.Error:
                continue
        return sum(sizes) / 1e6

    before = total()

    def watch():
        nonlocal peak
        while not done.wait(0.2):
            peak = max(peak, total())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return peak - before


def main(argv):
    """Prints the tables."""
    del argv
    console.set_up(debug=False)
    folder = Path(tempfile.mkdtemp())
    sample = write_corpus(folder / "corpus.jsonl", max_chars=2_000_000)
    spm_path = folder / "sentencepiece_model"
    options = "--character_coverage=0.9995 --byte_fallback=true"
    vocab_size = VOCAB_SIZE if _CORPUS.value else 3000
    model = tokenizer_training.train(
        [(sample, 1.0)], vocab_size=vocab_size, max_corpus_chars=2_000_000, options=options
    )
    spm_path.write_bytes(model)
    speed = Table(
        "way", "seconds", "million characters/s", "ratio", title=f"{THROUGHPUT_CHARS:,} characters, {CORES} cores"
    )
    throughput(folder, spm_path, speed)
    memory = Table("corpus, MB", "peak memory, MB", title="memory")
    for size in _SIZES.value:
        write_corpus(folder / "corpus.jsonl", max_bytes=int(size) * 1e6)
        used = peak_memory(lambda: prepare(folder / "corpus.jsonl", spm_path, folder / "rows"))
        memory.add_row(size, f"{used:.0f}")
    for table in (speed, memory):
        rich.console.Console(width=120).print(table)
    shutil.rmtree(folder)


if __name__ == "__main__":
    app.run(main)
