"""Datasets of the Hugging Face hub: `huggingface:OWNER/NAME[/CONFIG][:SPLIT]`, through the library `datasets`.

Also `huggingface:FOLDER[:SPLIT]` for a folder in the hub's layout, and the original's name of cc100. Downloaded data
lie in HF_HOME; with HF_HUB_OFFLINE=1 nothing else is asked for.
"""

import itertools
import os
import re
from collections.abc import Iterator

import fsspec

from transformer_lm.data.corpora.base import Options, Source
from transformer_lm.data.corpora.files import check_texts, read_file
from transformer_lm.data.corpora.listing import list_files
from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import
from transformer_lm.files import is_remote

SHARD_DOCUMENTS = 100_000
READ_DOCUMENTS = 256
_PATTERN = re.compile("[*?[\r\n\ud800-\udfff]|::")  # in a folder's name
_JSON_LINES = re.compile(r".*\.(jsonl|ndjson|json)(\.(gz|bz2|xz|zst))?", re.IGNORECASE | re.DOTALL)

# Names that were loading scripts, which `datasets` no longer runs, and where the same texts lie today as Parquet.
MIRRORS = {
    "cc100/lang=ja": ("range3/cc100-ja", None),
    "wiki40b/ja": ("google/wiki40b", "ja"),
}


class HuggingFace(Source):
    """A dataset of the hub. With :SPLIT it is that split alone, which is then its `train`, too."""

    def __init__(self, address: str, options: Options = Options()):
        super().__init__()
        self._options, self.name = options, f"huggingface:{address}"
        datasets = optional_import("datasets", "hf", f"dataset_name={self.name!r}")
        path, config, self._only = parse_address(address)
        self._builder = self._open(datasets, path, config)
        self._cache: dict[str, object] = {}
        self._files: dict[str, list[str]] = {}
        self.splits = (self._only, "train") if self._only else self._split_names(datasets)

    def _open(self, datasets, path: str, config: str | None):
        try:
            try:
                return datasets.load_dataset_builder(path, config)
            except ConnectionError:  # not prepared by `datasets`, but maybe downloaded by `hf download`
                if (snapshot := _downloaded(path)) is None:
                    raise
                return datasets.load_dataset_builder(snapshot, config)
        except ConnectionError as error:
            raise UserError(
                f"dataset_name={self.name!r}: {error}. Look at the network, or at HF_HUB_OFFLINE."
            ) from error

    def _split_names(self, datasets) -> tuple[str, ...]:
        if self._builder.info.splits:
            return tuple(self._builder.info.splits)
        if getattr(self._builder.config, "data_files", None):
            return tuple(map(str, self._builder.config.data_files))
        return tuple(map(str, self._builder.as_streaming_dataset()))

    def __reduce__(self):  # opened again in another process
        return type(self), (self.name.partition(":")[2], self._options), {"_sizes": self._sizes}

    @property
    def fingerprint(self) -> str:
        """Name, configuration, version, and what `datasets` knows the content by (the hub's commit)."""
        builder = self._builder
        facts = (builder.dataset_name, builder.config_id, str(builder.info.version), builder.hash, self._only)
        return " ".join(map(str, (*facts, self._options.text_field)))

    def num_shards(self, split: str) -> int:
        """See Source."""
        if files := self._json_files(split):
            return len(files)
        if self._options.streaming:
            return self._dataset(split).num_shards
        return -(-len(self._dataset(split)) // SHARD_DOCUMENTS)

    def shard_name(self, split: str, shard: int) -> str:
        """See Source."""
        return f"Dataset {self.name!r}, split {split!r}, shard {shard} (text_field={self._options.text_field})"

    def known_size(self, split: str, shard: int) -> int | None:
        """See Source."""
        if self._options.streaming or self._json_files(split):
            return super().known_size(split, shard)
        return min(SHARD_DOCUMENTS, len(self._dataset(split)) - shard * SHARD_DOCUMENTS)

    def read_shard(self, split: str, shard: int, start: int = 0) -> Iterator[str]:
        """See Source."""
        if files := self._json_files(split):
            path = files[shard]
            place = fsspec.core.url_to_fs(path) if is_remote(path) else (fsspec.filesystem("file"), path)
            texts = read_file("jsonl", *place, self._options)
            yield from itertools.islice(texts, start, None)
            return
        dataset, field = self._dataset(split), self._options.text_field
        if self._options.streaming:
            batches = dataset.shard(dataset.num_shards, shard).iter(READ_DOCUMENTS)
            texts = (text for batch in batches for text in check_texts(batch[field], self.name, field))
            yield from itertools.islice(texts, start, None)
            return
        first, last = shard * SHARD_DOCUMENTS, min((shard + 1) * SHARD_DOCUMENTS, len(dataset))
        for at in range(first + start, last, READ_DOCUMENTS):
            yield from check_texts(dataset[at : min(at + READ_DOCUMENTS, last)][field], self.name, field)

    def _json_files(self, split: str) -> list[str]:
        """The files of a split, downloaded unless it is streamed, where all are JSON lines; else none.

        These are read as `jsonl:` reads them. `datasets` wants the same fields in every line of every file, has no
        word on which line it cannot read, and dies of some (values nested very deep).
        """
        from datasets import DownloadManager
        from datasets.packaged_modules.json.json import Json

        split = self._only or split
        if split not in self._files:
            plain = isinstance(self._builder, Json) and self._builder.config.field is None
            files = list(self._builder.config.data_files[split]) if plain else []
            if not all(map(_JSON_LINES.fullmatch, files)):
                files = []
            self._files[split] = files if self._options.streaming else DownloadManager().download(files)
        return self._files[split]

    def _dataset(self, split: str):
        """The dataset of a split, downloaded when it is first asked for (unless it is streamed)."""
        split = self._only or split
        if split not in self._cache:
            if self._options.streaming:
                dataset = self._builder.as_streaming_dataset(split)
            else:
                self._builder.download_and_prepare()
                dataset = self._builder.as_dataset(split)
            names = dataset.column_names or list(next(iter(dataset.take(1)), {}))
            if self._options.text_field not in names:
                raise UserError(
                    f"Dataset {self.name!r} has no column {self._options.text_field!r}; it has {', '.join(names)}: "
                    "set text_field."
                )
            self._cache[split] = dataset.select_columns([self._options.text_field])
        return self._cache[split]


def _downloaded(repository: str) -> str | None:
    """The folder of a dataset in the hub's cache, None where it is not there."""
    hub = optional_import("huggingface_hub", "hf", f"huggingface:{repository}")
    try:
        return hub.snapshot_download(repository, repo_type="dataset", local_files_only=True)
    except (OSError, ValueError):
        return None


def _check_folder(folder: str):
    """Raises UserError where `datasets` would leave files out without a word, or find those of other folders."""
    advice = f"name the files: jsonl:, text: or parquet:{folder}/**"
    if _PATTERN.search(folder):
        raise UserError(f"huggingface:{folder}: `datasets` takes this name for a pattern; rename it, or {advice}.")
    for info in list_files(os.path.join(folder, "**"))[1]:
        parent, name = os.path.split(info["name"])
        if os.path.realpath(parent) != parent or re.search("[\r\n]|::", name):
            raise UserError(
                f"{info['name']}: `datasets` finds no file so named or in a linked folder; rename it, or {advice}."
            )


def parse_address(address: str) -> tuple[str, str | None, str | None]:
    """ "OWNER/NAME/CONFIG:SPLIT" -> what `datasets` calls path and configuration, and the split."""
    split = ""
    if not os.path.isdir(os.path.expanduser(address)):
        address, _, split = re.fullmatch(r"(.*?)(:([^:/]*))?", address, re.DOTALL).groups()
    if address in MIRRORS:
        return (*MIRRORS[address], split or None)
    if os.path.isdir(folder := os.path.expanduser(address)):
        _check_folder(os.path.realpath(folder))
        return folder, None, split or None
    parts = address.split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise UserError(
            f"dataset_name='huggingface:{address}' must be like huggingface:OWNER/NAME[/CONFIG][:SPLIT], a folder, "
            f"or one of {', '.join(f'huggingface:{name}' for name in MIRRORS)}."
        )
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or None
