"""A model of conversations, from its run to a talk with it and to its exports."""

import dataclasses
import io
import json
import sys

import pytest
from conftest import command, init, one_line_error, run
from test_tensor_tables import config_of
from test_turns import KEEP_SPACES, make_tokenizer

import transformer_lm
from transformer_lm import export_gguf, export_huggingface, generate_text, recipe
from transformer_lm.checkpoints import loading
from transformer_lm.configs import mukashi_chat
from transformer_lm.errors import UserError
from transformer_lm.generation.sampler import SamplingConfig
from transformer_lm.generation.scheduler import Request, Scheduler
from transformer_lm.huggingface import exported_model
from transformer_lm.tokenizer import EOS_ID, NAME_MARK, START_ID
from transformer_lm.tokenizer.turns import Message, Turns

ASKED = ["猿が出てくる昔話をお願いします。", "どこで聞きましたか。"]


@pytest.fixture(scope="module")
def model(trained_chat):
    return transformer_lm.load(trained_chat)


def test_run_says_that_it_has_turns(trained_chat, trained, model):
    assert model.turns == Turns.of(model.tokenizer)
    assert transformer_lm.load(trained).turns is None
    with pytest.raises(UserError, match="was not trained on conversations"):
        transformer_lm.load(trained).chat([{"role": "user", "content": "?"}])


def test_metrics(trained_chat):
    lines = [json.loads(line) for line in (trained_chat / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "eval_loss" in line)
    assert 0 <= last["instruction_accuracy"] <= 1
    manifests = [json.loads(path.read_text()) for path in (trained_chat / "prepared").glob("*/manifest.json")]
    assert {manifest["preprocessor"] for manifest in manifests} == {"conversations"}


def generate(workdir, *arguments, **options):
    greedy = ["--config.sampling_temperature=0", "--config.max_predict_length=500"]
    return run(
        [sys.executable, "-m", "transformer_lm.generate_text", f"--workdir={workdir}", *greedy, *arguments], **options
    )


def talk(model, monkeypatch, lines: list[str], most: int) -> list[Request]:
    """What the model is asked where somebody types these lines."""
    requests = []

    def submit(self, request):
        requests.append(request)
        return Scheduler.submit(self, request)

    monkeypatch.setattr(generate_text, "Scheduler", type("Watched", (Scheduler,), {"submit": submit}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    fields = mukashi_chat.get_config()
    fields.update(max_predict_length=most, sampling_temperature=0.0)
    generate_text.talk(model, recipe.read(fields))
    return requests


def test_interactive_is_one_conversation(model, monkeypatch, capsys):
    """What the model reads is all that was said, its own answers included; what it shows are those."""
    requests = talk(model, monkeypatch, [ASKED[0], "", ASKED[1]], most=12)
    first, second, rest = capsys.readouterr().out.split("\n\n")
    assert not rest
    messages = [{"role": "user", "content": ASKED[0]}]
    assert requests[0].prompt == model.turns.encode(messages, True)[0]
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": ASKED[1]}]
    assert requests[1].prompt == model.turns.encode(messages, True)[0]
    assert requests[1].max_tokens == 12
    assert requests[1].end_ids == model.turns.end_ids
    assert second != ASKED[1]


def test_a_message_that_fills_the_context_begins_a_conversation(model, monkeypatch, caplog, capsys):
    """Nobody types it again; one that does not fit even alone is refused, and the conversation goes on without it."""

    def alone(text):
        return model.turns.encode([{"role": "user", "content": text}], add_generation_prompt=True)[0]

    half = "昔々" * (model.network.context // 2 // len(model.tokenizer.encode("昔々")))
    assert model.network.context // 3 < len(alone(half)) < model.network.context - 8
    assert len(alone(half)) * 2 > model.network.context - 8
    *first, last = talk(model, monkeypatch, [half, half, half * 3, ASKED[0]], most=4)
    assert [request.prompt for request in first] == [alone(half)] * 2
    answer = capsys.readouterr().out.split("\n\n")[1]
    messages = [Message("user", half), Message("assistant", answer), Message("user", ASKED[0])]
    assert last.prompt == model.turns.encode(messages, add_generation_prompt=True)[0]
    assert "a new conversation begins" in caplog.text
    assert f"A message of {len(alone(half * 3))} tokens is too long" in caplog.text


def test_prompts_are_instructions(trained_chat, model):
    done = generate(trained_chat, "--output=jsonl", "--num_generated_texts=1", f"--config.prompts={ASKED[0]}")
    [text] = map(json.loads, done.stdout.splitlines())
    assert text["tokens"][: len(ids := model.turns.encode([{"role": "user", "content": ASKED[0]}], True)[0])] == ids
    assert text["text"].startswith(f"{ASKED[0]}\n")


@pytest.mark.parametrize("prompt", ["誰\ud83dですか。", "\udce3", "あ\udc00\ud800"])
def test_half_a_surrogate_pair_in_a_prompt(model, trained, prompt):
    """Which UTF-8 cannot hold, is U+FFFD in all that comes of it, as without turns."""
    whole = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in prompt)
    for one in (model, transformer_lm.load(trained)):
        written = one.generate(prompt)
        assert written == one.generate(whole)
        json.dumps(written, ensure_ascii=False).encode()


def test_export(trained_chat, model, tmp_path):
    output = tmp_path / "exported"
    done = run([
        sys.executable, "-m", "transformer_lm.export_huggingface", f"--workdir={trained_chat}", f"--output={output}"
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = json.loads((output / "tokenizer_config.json").read_text())
    assert config["chat_template"] == model.turns.jinja()
    end = model.turns.end_ids
    generation = json.loads((output / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [EOS_ID, *end]
    assert "max_length" not in generation  # a conversation's, which an answer's cannot bound
    assert generation["max_new_tokens"] == 64
    card = (output / "README.md").read_text()
    assert "apply_chat_template" in card
    assert "会話を学習していて" in card
    again = transformer_lm.load(output)
    assert (again.turns.marks, again.turns.sign) == (model.turns.marks, "")
    assert again.chat([{"role": "user", "content": ASKED[0]}], temperature=0) == model.chat(
        [{"role": "user", "content": ASKED[0]}], temperature=0
    )


@pytest.mark.parametrize(
    ("settings", "words"), [({"seed": 2**32}, "seed"), ({"seed": None}, "seed"), ({"max_length": 0}, "max_")]
)
def test_impossible_settings(model, settings, words):
    with pytest.raises(UserError, match=words):
        model.chat([{"role": "user", "content": ASKED[0]}], **settings)


def test_gguf(trained_chat, model, tmp_path):
    gguf = pytest.importorskip("gguf")
    output = tmp_path / "chat.gguf"
    done = run([
        sys.executable, "-m", "transformer_lm.export_gguf", f"--workdir={trained_chat}", f"--output={output}"
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr
    fields = gguf.GGUFReader(output).fields
    assert fields["tokenizer.chat_template"].contents() == model.turns.jinja()
    assert fields["tokenizer.ggml.eot_token_id"].contents() == model.turns.end_ids[0]


def export_words(spm, folder):
    """Exports a model whose marks are words; its card and its generation_config.json."""
    network = dataclasses.replace(config_of("modern"), vocab_size=spm.vocab_size)
    (folder / "model").mkdir(parents=True)
    exported_model.save(folder / "model", network, init(network), 5, has_turns=True)
    (folder / "model" / "sentencepiece_model").write_bytes(spm.model)
    export_huggingface.export(str(folder / "model"), folder / "out", SamplingConfig())
    card = (folder / "out" / "README.md").read_text()
    return card, json.loads((folder / "out" / "generation_config.json").read_text())


def test_exports_of_marks_that_are_words(tmp_path):
    """Pieces that hold the sign end an answer, or else the card's code looks for it in the text."""
    pytest.importorskip("safetensors")
    bpe = f"--model_type=bpe {KEEP_SPACES}"
    with_piece = make_tokenizer(bpe, *["◆ユーザー ◆アシスタント ◆"] * 50)
    card, generation = export_words(with_piece, tmp_path / "piece")
    [first, *_] = end = Turns.of(with_piece).exported_end_ids
    assert with_piece.piece_text(first) == " ◆"
    assert generation["eos_token_id"] == [EOS_ID, *end]
    assert 'True).partition("◆")[0].strip())' in card
    assert "stop_strings" not in card

    card, generation = export_words(make_tokenizer(bpe), tmp_path / "bytes")
    assert generation["eos_token_id"] == EOS_ID
    assert 'True).partition("◆")[0].strip())' in card
    assert 'generate(**inputs, stop_strings=["◆"], tokenizer=tokenizer)' in card

    gguf = pytest.importorskip("gguf")
    for name, ends in (("piece", [first]), ("bytes", [])):
        output = tmp_path / f"{name}.gguf"
        export_gguf.export(str(tmp_path / name / "model"), output, "float32", SamplingConfig())
        fields = gguf.GGUFReader(output).fields
        assert [fields[key].contents() for key in fields if key.endswith("eot_token_id")] == ends


def test_tasks_are_asked_in_conversations(model, trained, tmp_path):
    pytest.importorskip("lm_eval")
    from transformer_lm.evaluation import harness

    question = {"sentence1": "猫が二匹いる。", "sentence2": "動物がいる。", "label": "entailment"}
    (tmp_path / "jnli-valid-v1.3.json").write_text(json.dumps(question))
    [sample] = harness.run_tasks(model, ["jnli-1.3-0.3"], data_dir=str(tmp_path), chat=True)["samples"]["jnli-1.3-0.3"]
    prompt = sample["arguments"][0][0]
    _, system, _, asked, _, rest = (part.removesuffix("<|reserved_3|>") for part in prompt.split(NAME_MARK))
    assert not rest
    assert system.startswith("以下は、タスクを説明する指示")
    assert "前提：猫が二匹いる。" in asked
    messages = [{"role": "system", "content": system}, {"role": "user", "content": asked}]
    ids, _ = model.turns.encode(messages, add_generation_prompt=True)
    for (_, answer), [[log_prob, _]] in zip(sample["arguments"], sample["resps"], strict=True):
        tokens = model.tokenizer.encode(answer)
        [[log_probs, _]] = model.score_tokens([[START_ID, *ids, *tokens]])
        assert log_probs[-len(tokens) :].sum() == pytest.approx(log_prob, abs=1e-3)
    with pytest.raises(UserError, match="--chat_template: this model was not trained on conversations"):
        harness.run_tasks(transformer_lm.load(trained), ["jnli-1.3-0.3"], data_dir=str(tmp_path), chat=True)


def test_base_models_are_exported_without_a_template(trained):
    assert loading.find_model(trained).has_turns is False


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cleaning_rules": "length"}, "cleaning_rules='length' is for texts; leave it out with conversations=True"),
        ({"dataset_name": "mukashi"}, "dataset_name='mukashi' has texts"),
        ({"spm_train_options": "--character_coverage=1.0 --model_type=char"}, "cannot hold conversations"),
    ],
)
def test_errors(fields, words, tmp_path):
    chat = {"conversations": True, "dataset_name": "mukashi_chat", "eval_dataset_name": "mukashi_chat"}
    assert words in one_line_error(run(command("main", tmp_path / "run", **(chat | fields))))
