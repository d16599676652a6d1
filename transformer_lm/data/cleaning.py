"""Cleaning web text: rules that a text must pass, by HojiChar's and datatrove's filters, and near-duplicate removal.

A cleaned corpus is a folder with texts-*/*.jsonl.gz and report.json, which says how many texts each rule removed, with
examples. It is made by stages of datatrove tasks, on this machine or many (`launcher.py`). To add a rule, write a
function that makes its filters and a line in RULES.
"""

import glob
import json
import os
from collections import defaultdict

from absl import logging
from etils import epath

from transformer_lm.data import corpora
from transformer_lm.data.dataset_preprocessor import Preprocessing
from transformer_lm.data.launcher import Launcher
from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import
from transformer_lm.files import children, json_bytes, write_atomically

VERSION = 1  # to be raised when a rule comes to mean something else
REPORT = "report.json"
LOCAL_TASKS = 16  # on one machine; the same whatever its cores, since the duplicate that is kept depends on it

LOOKUP_CHARS = 200
MIN_CHARS, MAX_CHARS = 100, 1_000_000
SENTENCE_CHARS = 100
SYMBOL_RATIO = 0.4
NGRAM, NGRAM_RATIO, SAME_CHARACTER = 5, 0.33, 200
NUM_BUCKETS, HASHES_PER_BUCKET = 14, 8  # near 0.75 similarity of 5-grams is found (datatrove's and FineWeb's values)


def language(examples) -> list:
    """Japanese: kana among the first characters."""
    return [_hojichar("language", examples, ("AcceptJapanese", {"lookup_size": LOOKUP_CHARS}))]


def length(examples) -> list:
    """Neither too short nor too long."""
    return [
        _hojichar("length", examples, ("DocumentLengthFilter", {"min_doc_len": MIN_CHARS, "max_doc_len": MAX_CHARS}))
    ]


def sentences(examples) -> list:
    """Sentences: a 。 for every hundred characters."""
    return [_hojichar("sentences", examples, ("DiscardRareKuten", {"max_average_sentence_length": SENTENCE_CHARS}))]


def symbols(examples) -> list:
    """Not mostly symbols, white space and emoji."""
    return [_hojichar("symbols", examples, ("DiscardTooManySpecialToken", {"threshold": SYMBOL_RATIO}))]


def repetition(examples) -> list:
    """Without much repetition: of a character, of 5-grams of characters (BigScience), of lines (Gopher's shares)."""
    from datatrove.pipeline.filters import GopherRepetitionFilter

    from transformer_lm.data.datatrove_steps import Characters, KeepExamples, named

    lines = GopherRepetitionFilter(
        top_n_grams=(),
        dup_n_grams=(),
        language=Characters(),
        exclusion_writer=KeepExamples(examples, "repetition-lines"),
    )
    ngrams = ("CharRepetitionRatioFilter", {"threshold": NGRAM_RATIO, "ngram_size": NGRAM})
    return [
        named("repetition", lines),
        _hojichar("repetition", examples, ("SingleCharacterRepetitionFilter", {"threshold": SAME_CHARACTER}), ngrams),
    ]


MINHASH = "minhash"
RULES = {
    "language": language,
    "length": length,
    "sentences": sentences,
    "symbols": symbols,
    "repetition": repetition,
}


def parse_rules(rules: str) -> tuple[str, ...]:
    """ "language,minhash" -> ("language", "minhash"); raises UserError on an unknown rule."""
    names = tuple(name.strip() for name in rules.split(",") if name.strip())
    for name in names:
        if name not in (*RULES, MINHASH):
            raise UserError(f"cleaning_rules={rules!r}: {name!r} must be one of {', '.join((*RULES, MINHASH))}.")
    if MINHASH in names[:-1]:
        raise UserError(f"cleaning_rules={rules!r}: {MINHASH} compares what is left, and must be the last rule.")
    return names


def clean(
    documents: corpora.Documents,
    preprocessing: Preprocessing,
    rules: tuple[str, ...],
    directory: epath.Path,
    launcher: Launcher,
):
    """Writes the texts that pass all rules to directory/texts-*/, and then the report.

    Args:
      documents: the corpus.
      preprocessing: from its documents to texts.
      rules: as `parse_rules` gives them.
      directory: the folder of the cleaned corpus; interrupted work in it is gone on with.
      launcher: where the tasks run.
    """
    for module in ("datatrove", "hojichar", "emoji"):
        optional_import(module, "prep", "cleaning_rules")
    from datatrove.pipeline.writers import JsonlWriter

    from transformer_lm.data import datatrove_steps as steps

    # The number of tasks stands in the folders' names: what another number of them has left half done is no use.
    logs, examples, texts, filtered, minhash = (
        directory / f"{name}-{launcher.tasks}" for name in ("logs", "examples", "texts", "filtered", "minhash")
    )
    deduplicating = MINHASH in rules
    documents.count()  # once here, not in every task
    filters = [step for rule in rules if rule != MINHASH for step in RULES[rule](examples)]
    filtered = filtered if deduplicating else texts
    launcher.run(
        "filter",
        [steps.ReadDocuments(documents), steps.ToTexts(preprocessing), *filters, JsonlWriter(str(filtered))],
        logs / "filter",
    )
    if not list(filtered.glob("*")):
        raise UserError(
            f"cleaning_rules={','.join(rules)!r} removed every text of {documents.name}, {documents.split}: "
            f"look at {examples}, and at the numbers in cleaning.py."
        )
    if deduplicating:
        _deduplicate(filtered, texts, minhash, logs, examples, launcher)
    report = {"texts": texts.name, **_report(rules, logs, examples)}
    write_atomically(directory / REPORT, json_bytes(report))
    for child in children(directory):
        if child not in (texts, logs, examples, directory / REPORT):
            child.rmtree()
    counts = report["counts"]
    logging.info("Cleaned %s %s: %d documents, %d texts, %d kept.",
                 documents.name, documents.split, counts["documents"], counts["texts"], counts["kept"])  # fmt: skip
    for rule, count in counts["removed"].items():
        logging.info("  %s removed %d (%.1f %%)%s", rule, count, 100 * count / max(counts["texts"], 1),
                     "".join(f"\n    {text[:60]!r}" for text in report["examples"].get(rule, [])))  # fmt: skip


def open_texts(folder: epath.Path) -> corpora.Documents:
    """The texts that tasks have written to a folder."""
    return corpora.open_documents(f"jsonl:{glob.escape(os.fspath(folder))}/*.jsonl.gz", "train")


def local_launcher(processes: int) -> Launcher:
    """For one machine: 0 processes for one a core."""
    return Launcher("local", tasks=LOCAL_TASKS, workers=processes or os.cpu_count() or 1)


def _deduplicate(
    filtered: epath.Path,
    texts: epath.Path,
    minhash: epath.Path,
    logs: epath.Path,
    examples: epath.Path,
    launcher: Launcher,
):
    """MinHash over 5-grams of characters (Broder 1997), of each cluster of near-duplicates one text is kept."""
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.writers import JsonlWriter

    from transformer_lm.data.datatrove_steps import Characters, KeepExamples, ReadDocuments, named

    config = MinhashConfig(n_grams=NGRAM, num_buckets=NUM_BUCKETS, hashes_per_bucket=HASHES_PER_BUCKET)
    signatures, pairs, clusters = (str(minhash / name) for name in ("signatures", "pairs", "clusters"))
    signature = MinhashDedupSignature(signatures, config, language=Characters())
    keep = named(MINHASH, MinhashDedupFilter(clusters, exclusion_writer=KeepExamples(examples, MINHASH)))
    read = ReadDocuments(open_texts(filtered), "filtered")  # datatrove's reader decodes as the locale says
    launcher.run("signatures", [read, signature], logs / "signatures")
    launcher.run("pairs", [MinhashDedupBuckets(signatures, pairs, config=config)], logs / "pairs", tasks=NUM_BUCKETS)
    launcher.run("clusters", [MinhashDedupCluster(pairs, clusters, config)], logs / "clusters", tasks=1)
    launcher.run("deduplicate", [read, keep, JsonlWriter(str(texts))], logs / "deduplicate")


def _report(rules: tuple[str, ...], logs: epath.Path, examples: epath.Path) -> dict:
    """How many texts there were, how many each rule removed, with examples; from the tasks' own counts."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for path in sorted(logs.glob("*/stats/*.json")):
        for step in json.loads(path.read_bytes()):
            for name, stat in step["stats"].items():
                counts[step["name"]][name] += stat if isinstance(stat, int) else stat["total"]
    removed = {rule: counts[rule]["dropped"] for rule in rules}
    texts = counts["texts"]["texts"]
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(examples.glob("*.json")) if examples.exists() else []:
        found[path.name.split("-")[0]] += json.loads(path.read_bytes())
    return {
        "counts": {
            "documents": counts["documents"]["documents"],
            "texts": texts,
            **{name: counts["texts"][name] for name in ("nul_characters", "lone_surrogates")},
            "removed": removed,
            "kept": texts - sum(removed.values()),
        },
        "examples": {rule: texts[:5] for rule, texts in found.items()},
    }


def _hojichar(rule: str, examples: epath.Path, *filters: tuple[str, dict]):
    """The step of a rule that is made of HojiChar's filters, (name, arguments) each."""
    from hojichar import document_filters

    from transformer_lm.data.datatrove_steps import HojicharFilter, KeepExamples, named

    made = [getattr(document_filters, name)(**arguments) for name, arguments in filters]
    return named(rule, HojicharFilter(made, KeepExamples(examples, rule)))
