"""Export a trained model as a Hugging Face model folder, which transformers and other tools load by name.

python3 export_huggingface.py --workdir=logs/japanese_0.1b_v1 --output=exported/japanese_0.1b_v1

--workdir is all that generate_text.py takes: a workdir, an original checkpoint, hf://OWNER/NAME. --output is a folder
that is new or empty. It gets config.json, model.safetensors (in shards above 5 GB), tokenizer.json,
tokenizer_config.json, generation_config.json, README.md (the model card) and sentencepiece_model; docs/huggingface.md
says what is in them. Of the recipe only sampling_* and max_predict_length count, for generation_config.json.
"""

import dataclasses
import shutil
import uuid
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict

from transformer_lm import cli, errors, files, recipe
from transformer_lm.checkpoints import loading
from transformer_lm.checkpoints.facts import read_facts
from transformer_lm.checkpoints.workdir import TOKENIZER_FILE
from transformer_lm.errors import UserError
from transformer_lm.generation.sampler import SamplingConfig
from transformer_lm.huggingface import exported_model, fast_tokenizer, model_card
from transformer_lm.huggingface.architectures import table_of
from transformer_lm.huggingface.tensor_tables import SPECIAL_TOKENS
from transformer_lm.tokenizer import EOS_ID, Tokenizer
from transformer_lm.tokenizer.turns import Turns

# Where several commands are imported, another's flag of this name may be replaced.
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write, new or empty.", allow_override=True)


def main(config: ConfigDict, workdir: str):
    """Writes --output, whole or not at all."""
    if not _OUTPUT.value or files.is_remote(_OUTPUT.value):
        raise UserError(f"--output={_OUTPUT.value or ''} must name a local folder, like --output=exported/my_model.")
    export(workdir, Path(_OUTPUT.value).expanduser().absolute(), recipe.read(config).sampling)


def export(address: str, output: Path, sampling: SamplingConfig):
    """Writes a model at an address, as `loading.load_model` takes it, into a new folder."""
    output = output.resolve()  # where a link leads
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output={output} exists and is not an empty folder; remove it or name another.")
    loaded = loading.load_model(address)
    tokenizer, turns = loaded.tokenizer()
    facts = read_facts(address, loaded.step, tokenizer)
    card = model_card.write(output.name, loaded.config, loaded.step, facts, turns)
    temporary = (output if output.exists() else output.parent) / f".tmp{uuid.uuid4().hex}"
    try:
        with errors.writing(f"--output={output}"):
            temporary.mkdir(parents=True)
            _write(temporary, loaded, tokenizer, turns, facts["texts"], card, sampling)
            _move(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logging.info("Exported the model of step %d to %s.", loaded.step, output)


def _write(
    folder: Path,
    loaded: loading.LoadedModel,
    tokenizer: Tokenizer,
    turns: Turns | None,
    texts: list[str],
    card: str,
    sampling: SamplingConfig,
):
    """Writes all files of an export into a folder, to the disk."""
    positions = table_of(loaded.config).sizes.positions
    fast_tokenizer.save(folder, tokenizer, positions, turns, texts)  # first, since it may refuse
    exported_model.save(folder, loaded.config, loaded.params, loaded.step, has_turns=loaded.has_turns)
    files.write_json(folder / "generation_config.json", _generation_settings(sampling, positions, turns))
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.model)
    (folder / "README.md").write_bytes(card.encode(errors="backslashreplace"))  # as in JSON
    for path in folder.iterdir():
        files.sync(path)


def _move(temporary: Path, output: Path):
    """Makes `temporary` the output; into a folder that exists, and may be somebody's current one, go its files."""
    if not output.exists():
        temporary.rename(output)
        return
    moved = []
    try:
        for path in temporary.iterdir():
            moved.append(path.rename(output / path.name))
    except OSError:
        for path in moved:
            path.unlink()
        raise


def _generation_settings(sampling: SamplingConfig, positions: int, turns: Turns | None) -> dict:
    """How transformers' generate() samples unless it is told otherwise."""
    chosen = dataclasses.asdict(sampling)
    most = min(chosen.pop("max_length"), positions)
    settings = {**SPECIAL_TOKENS, "max_new_tokens" if turns else "max_length": most}  # of an answer, or of all
    if turns and turns.exported_end_ids:
        settings["eos_token_id"] = [EOS_ID, *turns.exported_end_ids]
    if sampling.temperature == 0:
        return {**settings, "do_sample": False}
    return {**chosen, **settings, "do_sample": True}


if __name__ == "__main__":
    cli.run(main, needs_config=False)
