"""Small datasets in the real formats, made by the libraries that made the real ones."""

import io
import json
import os
import re
from pathlib import Path

WIKI40B_MARKS = "\n_START_ARTICLE_\n{title}\n_START_SECTION_\n概要\n_START_PARAGRAPH_\n{text}"


def wiki40b_document(title: str, *paragraphs: str) -> str:
    """An article as wiki40b marks it up: a section, then a paragraph; _NEWLINE_ within paragraphs."""
    return WIKI40B_MARKS.format(title=title, text="_NEWLINE_".join(paragraphs))


def make_tfds(folder: Path, name: str, splits: dict[str, list[str]], file_format: str = "array_record"):
    """Prepares a dataset with the features that TFDS gives lm1b and wiki40b/ja, by TFDS's own builder.

    Without TensorFlow TFDS writes no TFRecord, so that there the records, which are the same, are framed anew by
    tensorboardX's writer of TFRecord files.
    """
    import tensorflow_datasets as tfds

    dataset, _, config = name.partition("/")
    text = tfds.features.Text()
    wiki = {"wikidata_id": text, "text": text, "version_id": text}
    made_as = "array_record" if file_format == "tfrecord" else file_format

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset
        VERSION = tfds.core.Version("1.3.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config, version="1.3.0")] if config else []

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(wiki if config else {"text": text})
            )

        def _split_generators(self, manager):
            del manager
            return {split: self._generate_examples(texts) for split, texts in splits.items()}

        def _generate_examples(self, texts):
            for number, content in enumerate(texts):
                ids = {"wikidata_id": f"Q{number}", "version_id": str(number)} if config else {}
                yield number, {"text": content, **ids}

    builder = Builder(data_dir=folder, file_format=made_as, **({"config": config} if config else {}))
    builder.download_and_prepare()
    if file_format == "tfrecord":
        _as_tfrecord(Path(builder.data_path))


def _as_tfrecord(folder: Path):
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from tensorboardX.record_writer import RecordWriter

    for path in folder.glob("*.array_record-*"):
        writer = RecordWriter(str(path).replace("array_record", "tfrecord"))
        for record in ArrayRecordDataSource([str(path)]):
            writer.write(record)
        writer.close()
        path.unlink()
    info = folder / "dataset_info.json"
    info.write_text(re.sub(r'"fileFormat": "\w+"', '"fileFormat": "tfrecord"', info.read_text()))


def make_hub_cache(
    home: Path, repository: str, files: dict[str, bytes], kind: str = "datasets", revision: str = "main"
):
    """A repository in the hub's cache as `hf download` leaves it: blobs, snapshots, refs."""
    folder = home / "hub" / f"{kind}--{repository.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / revision).write_text(commit)
    (folder / "blobs").mkdir()
    for number, (name, content) in enumerate(files.items()):
        blob = folder / "blobs" / f"{number:040x}"
        blob.write_bytes(content)
        path = folder / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(blob, path.parent))


def parquet(texts: list[str]) -> bytes:
    """A Parquet file with columns id and text."""
    import pyarrow as pa
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"id": [str(i) for i in range(len(texts))], "text": texts}), buffer)
    return buffer.getvalue()


def write_jsonl(path: Path, texts: list[str], field: str = "text"):
    """One JSON object a line."""
    path.write_text("".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
