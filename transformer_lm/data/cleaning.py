"""Cleaning web text: rules that a text must pass, by HojiChar's and datatrove's filters, and near-duplicate removal.

A cleaned corpus is a folder with texts-*/*.jsonl.gz and report.json, which says how many texts each rule removed, with
examples, and how long each file is and its checksum: one that was damaged later is found, and all is cleaned again. It
is made by stages of datatrove tasks, on this machine or many (`launcher.py`). To add a rule, write a line
in RULES; one that no filter of HojiChar's knows also needs a step in `_filters`.
"""

import dataclasses
import functools
import glob
import json
import os
from collections import Counter, defaultdict

from absl import logging
from etils import epath

from transformer_lm.data import corpora
from transformer_lm.data.dataset_preprocessor import Preprocessing
from transformer_lm.data.launcher import Launcher
from transformer_lm.data.rows import are_whole, checksum_of
from transformer_lm.data.workers import cores
from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import
from transformer_lm.files import (
    allow_open_files,
    children,
    is_remote,
    json_bytes,
    make_own_folder,
    read_json,
    remove,
    sizes_in,
    write_atomically,
)

VERSION = 1  # to be raised when a rule comes to mean something else
REPORT = "report.json"
LOCAL_TASKS = 16  # on one machine; the same whatever its cores, since the duplicate that is kept depends on it

NGRAM = 5  # characters
NUM_BUCKETS, HASHES_PER_BUCKET = 14, 8  # near 0.75 similarity of 5-grams is found (datatrove's and FineWeb's values)

MINHASH = "minhash"
OTHER_FILES = 100  # that a process has open besides those of minhash, at most
# Rule: the filters of HojiChar's that a text must pass, and their arguments.
RULES = {
    "language": {"AcceptJapanese": {"lookup_size": 200}},  # Japanese: kana among the first characters
    "length": {"DocumentLengthFilter": {"min_doc_len": 100, "max_doc_len": 1_000_000}},
    "sentences": {"DiscardRareKuten": {"max_average_sentence_length": 100}},  # a 。 for every hundred characters
    "symbols": {"DiscardTooManySpecialToken": {"threshold": 0.4}},  # not mostly symbols, white space and emoji
    "repetition": {  # of a character, of 5-grams of characters (BigScience); `_filters` adds that of lines
        "SingleCharacterRepetitionFilter": {"threshold": 200},
        "CharRepetitionRatioFilter": {"threshold": 0.33, "ngram_size": NGRAM},
    },
}


def parse_rules(rules: str) -> list[str]:
    """ "language,minhash" -> ["language", "minhash"]; raises UserError on an unknown rule."""
    names = [name.strip() for name in rules.split(",") if name.strip()]
    for name in names:
        if name not in (*RULES, MINHASH):
            raise UserError(f"cleaning_rules={rules!r}: {name!r} must be one of {', '.join((*RULES, MINHASH))}.")
    if MINHASH in names[:-1]:
        raise UserError(f"cleaning_rules={rules!r}: {MINHASH} compares what is left, and must be the last rule.")
    return names


def fingerprint(rules: str) -> list:
    """What changes when the texts that rules keep may, for an identity: VERSION, and the numbers of these rules."""
    numbers = RULES | {MINHASH: [NGRAM, NUM_BUCKETS, HASHES_PER_BUCKET]}
    return [VERSION, *(numbers[name] for name in parse_rules(rules))]


def find(folder: epath.Path) -> dict | None:
    """The report of a cleaned corpus; None unless all of its texts are as they were written, see `rows.are_whole`."""
    try:
        report = read_json(folder / REPORT) if (folder / REPORT).exists() else {}
        whole = are_whole(folder / report["texts"], report.get("checksums", {}))  # older reports have none
    except (UserError, ValueError, TypeError, KeyError, AttributeError):  # a report that is cut or empty
        return None
    return report if whole else None


def clean(
    documents: corpora.Documents, preprocessing: Preprocessing, rules: list[str], folder: epath.Path, launcher: Launcher
) -> dict:
    """Writes the texts that pass all rules to folder/texts-*/, and then the report.

    Args:
      documents: the corpus.
      preprocessing: from its documents to texts.
      rules: as `parse_rules` gives them.
      folder: that of the cleaned corpus; interrupted work in it is gone on with, finished work is done again.
      launcher: where the tasks run.

    Returns:
      the report.
    """
    for module in ("datatrove", "hojichar", "emoji"):
        optional_import(module, "prep", "cleaning_rules")
    from datatrove.pipeline.writers import JsonlWriter

    from transformer_lm.data.datatrove_steps import ReadDocuments, ToTexts

    if MINHASH in rules and launcher.tasks > (most := allow_open_files() - OTHER_FILES):
        raise UserError(
            f"--tasks={launcher.tasks}: minhash opens a file of each task at once, and a process may have {most:.0f} "
            "open here (ulimit -Hn); use fewer tasks."
        )
    make_own_folder(folder)
    _discard_finished(folder)
    work = _Work(folder, launcher)
    texts, examples = work.folder("texts"), work.folder("examples")
    filtered = work.folder("filtered") if MINHASH in rules else texts
    filters = [step for rule in rules if rule != MINHASH for step in _filters(rule, examples)]
    documents.count()  # once here, not in every task
    read = [ReadDocuments(documents), ToTexts(preprocessing)]
    work.run("filter", [*read, *filters, JsonlWriter(str(filtered))])
    if not list(filtered.glob("*")):
        raise UserError(
            f"cleaning_rules={','.join(rules)!r} removed every text of {documents.name}, {documents.split}: "
            f"look at {examples}, and at the numbers in cleaning.py."
        )
    if MINHASH in rules:
        _deduplicate(filtered, texts, work)
    report = {"texts": texts.name, "checksums": _checksums(texts), **_report(rules, work)}
    write_atomically(folder / REPORT, json_bytes(report))
    for child in children(folder):
        if child not in (texts, examples, work.folder("logs"), folder / REPORT):
            remove(child)
    counts = report["counts"]
    logging.info("Cleaned %s %s: %d documents, %d texts, %d kept.",
                 documents.name, documents.split, counts["documents"], counts["texts"], counts["kept"])  # fmt: skip
    for rule, count in counts["removed"].items():
        logging.info("  %s removed %d (%.1f %%)%s", rule, count, 100 * count / max(counts["texts"], 1),
                     "".join(f"\n    {text[:60]!r}" for text in report["examples"].get(rule, [])))  # fmt: skip
    return report


def _checksums(folder: epath.Path) -> dict[str, tuple[int, int | None]]:
    """Length and checksum of each file, for `rows.are_whole`; files in an object store are not fetched for that."""
    sizes = sorted(sizes_in(folder).items())
    return {name: (size, None if is_remote(folder) else checksum_of(folder / name)) for name, size in sizes}


def _discard_finished(folder: epath.Path):
    """Removes a corpus that was cleaned to its end, the report last: until then it is known for damaged."""
    if (folder / REPORT).exists():
        logging.warning("%s: something is damaged, and is cleaned again.", folder)
        for child in children(folder):
            if child != folder / REPORT:
                remove(child)
        remove(folder / REPORT)


def open_texts(folder: epath.Path) -> corpora.Documents:
    """The texts that tasks have written to a folder."""
    return corpora.open_documents(f"jsonl:{glob.escape(os.fspath(folder))}/*.jsonl.gz", "train")


def local_launcher(processes: int) -> Launcher:
    """For one machine: 0 processes for one a core."""
    return Launcher("local", tasks=LOCAL_TASKS, workers=processes or cores())


@dataclasses.dataclass(frozen=True)
class _Work:
    """Where the stages of cleaning a corpus lie, and what runs them."""

    directory: epath.Path
    launcher: Launcher

    def folder(self, name: str) -> epath.Path:
        """A folder for the files of all tasks; what another number of tasks has left half done is no use."""
        return self.directory / f"{name}-{self.launcher.tasks}"

    def run(self, stage: str, steps: list, tasks: int | None = None):
        """See Launcher.run."""
        self.launcher.run(stage, steps, self.folder("logs") / stage, tasks)


def _filters(rule: str, examples: epath.Path) -> list:
    """The steps of a rule."""
    from datatrove.pipeline.filters import GopherRepetitionFilter, LambdaFilter
    from hojichar import document_filters

    from transformer_lm.data.datatrove_steps import Characters, KeepExamples, kept_by, named

    steps = []
    if rule == "repetition":
        lines = KeepExamples(examples, "repetition-lines")
        steps = [GopherRepetitionFilter(top_n_grams=(), dup_n_grams=(), language=Characters(), exclusion_writer=lines)]
    filters = [getattr(document_filters, name)(**arguments) for name, arguments in RULES[rule].items()]
    steps.append(LambdaFilter(functools.partial(kept_by, filters), KeepExamples(examples, rule)))
    return [named(rule, step) for step in steps]


def _deduplicate(filtered: epath.Path, target: epath.Path, work: _Work):
    """MinHash over 5-grams of characters (Broder 1997), of each cluster of near-duplicates one text is kept."""
    from datatrove.pipeline import dedup
    from datatrove.pipeline.writers import JsonlWriter

    from transformer_lm.data.datatrove_steps import Characters, KeepExamples, ReadDocuments, named, opening_many_files

    config = dedup.MinhashConfig(n_grams=NGRAM, num_buckets=NUM_BUCKETS, hashes_per_bucket=HASHES_PER_BUCKET)
    signatures, pairs, clusters = (str(work.folder("minhash") / name) for name in ("signatures", "pairs", "clusters"))
    examples = KeepExamples(work.folder("examples"), MINHASH)
    keep = named(MINHASH, dedup.MinhashDedupFilter(clusters, exclusion_writer=examples))
    read = ReadDocuments(open_texts(filtered), "filtered")  # datatrove's reader decodes as the locale says
    work.run("signatures", [read, dedup.MinhashDedupSignature(signatures, config, language=Characters())])
    buckets = dedup.MinhashDedupBuckets(signatures, pairs, config=config)
    work.run("pairs", [opening_many_files, buckets], tasks=NUM_BUCKETS)
    work.run("clusters", [dedup.MinhashDedupCluster(pairs, clusters, config)], tasks=1)
    work.run("deduplicate", [read, keep, JsonlWriter(str(target))])


def _report(rules: list[str], work: _Work) -> dict:
    """How many texts there were, how many each rule removed, with examples; from the tasks' own counts."""
    counts: Counter[tuple[str, str]] = Counter()  # by step and what is counted
    for path in work.folder("logs").glob("*/stats/*.json"):
        for step in json.loads(path.read_bytes()):
            for name, stat in step["stats"].items():
                counts[step["name"], name] += stat if isinstance(stat, int) else stat["total"]
    removed = {rule: counts[rule, "dropped"] for rule in rules}
    examples: dict[str, list[str]] = defaultdict(list)
    for path in sorted(children(work.folder("examples"))):
        examples[path.name.split("-")[0]] += json.loads(path.read_bytes())
    return {
        "counts": {
            "documents": counts["documents", "documents"],
            **{name: counts["texts", name] for name in ("texts", "nul_characters", "lone_surrogates")},
            "removed": removed,
            "kept": counts["texts", "texts"] - sum(removed.values()),
        },
        "examples": {rule: texts[:5] for rule, texts in examples.items()},
    }
