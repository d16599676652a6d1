"""Export a trained model as one GGUF file, which llama.cpp and the tools that are built on it load.

python3 export_gguf.py --workdir=logs/my_model --output=exported/my_model.gguf [--type=float32|bfloat16|q8_0]

--workdir is all that generate_text.py takes: a workdir, an exported folder, hf://OWNER/NAME. --output is a new file,
whose name the model gets. --type is what matrices are stored in. The network must be that of the v2 recipes, and its
tokenizer one that llama.cpp has, too: docs/huggingface.md says which. Of the recipe only sampling_* count: what
llama.cpp does where it is told nothing else.
"""

from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict

from transformer_lm import cli, errors, files, recipe
from transformer_lm.checkpoints import loading
from transformer_lm.errors import UserError
from transformer_lm.generation.sampler import SamplingConfig
from transformer_lm.huggingface import gguf_file

# Where several commands are imported, another's flag of this name may be replaced.
_OUTPUT = flags.DEFINE_string("output", None, "File to write, new, with the ending .gguf.", allow_override=True)
_TYPE = flags.DEFINE_enum("type", "float32", list(gguf_file.TYPES), "What matrices are stored in.")


def main(config: ConfigDict, workdir: str):
    """Writes --output, whole or not at all."""
    if not (_OUTPUT.value or "").endswith(".gguf") or files.is_remote(_OUTPUT.value):
        raise UserError(f"--output={_OUTPUT.value or ''} must name a local file, like --output=exported/my_model.gguf.")
    export(workdir, Path(_OUTPUT.value).expanduser().absolute(), _TYPE.value, recipe.read(config).sampling)


def export(address: str, output: Path, kind: str, sampling: SamplingConfig):
    """Writes a model at an address, as `loading.load_model` takes it, into a new file; `kind` is one of TYPES."""
    if output.exists():
        raise UserError(f"--output={output} exists; remove it or name another.")
    name = output.stem.encode(errors="backslashreplace").decode()
    found = loading.find_model(address)
    tokenizer, turns = found.tokenizer()
    gguf_file.check(found.network, tokenizer, name)
    loaded = found.load()
    settings = {"temp": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    with errors.writing(f"--output={output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        files.write_file_atomically(
            output,
            lambda path: gguf_file.save(path, name, loaded.config, loaded.params, tokenizer, settings, kind, turns),
        )
    logging.info("Exported the model of step %d to %s.", loaded.step, output)


if __name__ == "__main__":
    cli.run(main, needs_config=False)
