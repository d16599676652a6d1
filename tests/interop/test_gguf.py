"""GGUF files in llama.cpp, which cuts texts and computes by code of its own: the same ids, logits and texts."""

import dataclasses
import gzip
import json
import math
import sys
import urllib.request

import numpy as np
import pytest
from conftest import command, run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_fast_tokenizer import PARTS, random_strings
from test_gguf_file import BPE, CONTROLS, KEEP_ALL, make_tokenizer, network_for, write
from test_tensor_tables import MODERN, random_params
from test_transformers import assert_close, our_logits
from test_turns import TRICKS, said
from words import make_model_that_ends_its_turn

import transformer_lm
from transformer_lm import tokenizer
from transformer_lm.data import tokenizer_training
from transformer_lm.generation import sampler
from transformer_lm.generation.sampler import SamplingConfig
from transformer_lm.huggingface import fast_tokenizer
from transformer_lm.tokenizer import EOS_ID, START_ID
from transformer_lm.tokenizer.turns import Turns

WHY = "llama.cpp is not installed: make test-interop"
xllamacpp = pytest.importorskip("xllamacpp", reason=WHY)
pytest.importorskip("gguf", reason=WHY)

NO_PREFIX = "--add_dummy_prefix=false"
TOKENIZERS = {
    "bpe": f"{BPE} {NO_PREFIX} --control_symbols={','.join(CONTROLS)}",
    "bpe, prefix": BPE,
    "bpe, user-defined": f"{BPE} {NO_PREFIX} --user_defined_symbols=お爺さん,お爺,<sep>,。",
    "unigram": "",
    "unigram, keeps all": f"{KEEP_ALL} {NO_PREFIX}",
    "unigram, nfkc": f"--normalization_rule_name=nfkc --remove_extra_whitespaces=false {NO_PREFIX}",
}


class Llama:
    """llama.cpp with a model; its caches and its attention round nothing."""

    def __init__(self, path):
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = 0  # the model's
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.fit_params = parameters.warmup = False
        parameters.verbosity = 0
        self._server = xllamacpp.Server(parameters)

    def ask(self, path: str, **body):
        """The answer of llama.cpp's server."""
        url, headers = self._server.listening_address + path, {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def encode(self, text: str, **options) -> list[int]:
        return self.ask("/tokenize", content=text, **options)["tokens"]

    def complete(self, prompt: str | list[int], tokens: int, **options) -> dict:
        return self.ask("/completion", prompt=prompt, n_predict=tokens, temperature=0, return_tokens=True, **options)

    def log_probs(self, ids: list[int], vocab_size: int) -> np.ndarray:
        """Of what follows [V]."""
        found = self.complete(ids, 1, n_probs=vocab_size)["completion_probabilities"][0]["top_logprobs"]
        assert sorted(entry["id"] for entry in found) == list(range(vocab_size))
        return np.array([entry["logprob"] for entry in sorted(found, key=lambda entry: entry["id"])])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Makes a tokenizer, and llama.cpp with a small model of it, once for each kind."""
    made = {}

    def make(name):
        if name not in made:
            spm = make_tokenizer(TOKENIZERS[name])
            path = tmp_path_factory.mktemp("gguf") / "model.gguf"
            network = network_for(spm)
            write(path, network, random_params(network), spm)
            made[name] = spm, Llama(path)
        return made[name]

    return make


@pytest.mark.parametrize("name", TOKENIZERS)
class TestIds:
    @settings(max_examples=150, deadline=None)
    @given(
        parts=st.lists(st.sampled_from([*PARTS, CONTROLS[0]]) | st.text("あいう昔々 abc", max_size=4), max_size=8),
        special=st.booleans(),
    )
    @example(parts=[], special=True)
    @example(parts=[" ", "\x01", " "], special=True)
    @example(parts=["<s>", "昔々", "</s>"], special=True)
    def test_hard_strings(self, pair, name, parts, special):
        """Also where names of control pieces are looked for, as in prompts."""
        spm, llama = pair(name)
        text = "".join(parts)
        assert llama.encode(text, parse_special=special) == spm.encode(text)

    def test_random_strings(self, pair, name):
        spm, llama = pair(name)
        for text in [*fast_tokenizer.HARD_STRINGS, *random_strings(500)]:
            assert llama.encode(text) == spm.encode(text), text

    def test_begins_with_the_start(self, pair, name):
        spm, llama = pair(name)
        text = "昔々あるところに"
        assert llama.encode(text, add_special=True) == [START_ID, *spm.encode(text)]
        assert llama.complete(text, 1)["tokens_evaluated"] == 1 + len(spm.encode(text))

    def test_same_text_back(self, pair, name):
        spm, llama = pair(name)
        for text in ("昔々  あるところに", "お爺さん。abc", " é"):
            ids = [number for number in spm.encode(text) if number]
            found = llama.ask("/detokenize", tokens=ids)["content"]
            assert found.removeprefix(" " if "prefix" in name or name == "unigram" else "") == spm.decode(ids)


@pytest.mark.parametrize("options", [TOKENIZERS["bpe"], "--character_coverage=0.995"])
def test_every_line_of_the_literature(literature, tenth, tmp_path, options):
    """In its text, and a tenth of them each by itself, too."""
    with gzip.open(literature / "wikipedia_leads.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(record)["text"] for record in file]
    spm = tokenizer.Tokenizer(
        tokenizer_training.train([(texts, 1.0)], vocab_size=4_000, max_corpus_chars=200_000, options=options)
    )
    network = network_for(spm)
    write(tmp_path / "model.gguf", network, random_params(network), spm)
    llama = Llama(tmp_path / "model.gguf")
    lines = tenth([line for text in texts for line in text.split("\n")])
    assert [text for text in [*texts, *lines] if llama.encode(text) != spm.encode(text)] == []


@pytest.fixture(scope="module")
def bpe() -> tokenizer.Tokenizer:
    return make_tokenizer(TOKENIZERS["bpe"])


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x - x.max() - math.log(np.exp(x - x.max()).sum())


@pytest.mark.parametrize("shape", ["modern", "modern, grouped, wide", "modern, via embedding"])
class TestNetworks:
    @pytest.fixture
    def model(self, bpe, shape, tmp_path):
        network = network_for(bpe, shape)
        params = random_params(network)
        write(tmp_path / "model.gguf", network, params, bpe)
        return network, params, Llama(tmp_path / "model.gguf")

    def test_log_probabilities(self, model):
        network, params, llama = model
        rng = np.random.default_rng(0)
        for length in (1, 2, 9, 30):
            ids = [START_ID, *rng.integers(EOS_ID + 1, network.vocab_size, length - 1).tolist()]
            expected = log_softmax(our_logits(network, params, np.array([ids]))[0, -1])
            assert_close(llama.log_probs(ids, network.vocab_size), expected)

    def test_greedy_texts(self, bpe, model):
        network, params, llama = model
        prompts = ["", "昔々", "お爺さんとお婆さんが"]
        sampling = SamplingConfig(temperature=0.0, max_length=network.context - 1)
        expected = sampler.generate(
            network, params, [bpe.encode(prompt) for prompt in prompts], num_samples=1, sampling=sampling, seed=0
        )
        for prompt, [text] in zip(prompts, expected, strict=True):
            assert llama.complete(prompt, 16)["tokens"] == text.tokens[:16]

    def test_facts(self, bpe, model):
        network, _, llama = model
        found = llama.ask("/props")
        assert found["default_generation_settings"]["n_ctx"] >= network.context  # rounded up
        assert [found["bos_token"], found["eos_token"]] == ["<unk>\ufdd3", "</s>\ufdd3"]
        settings = found["default_generation_settings"]["params"]
        assert settings["samplers"] == ["temperature", "top_k", "top_p"]
        assert [settings[name] for name in ("temperature", "top_k", "top_p")] == pytest.approx([0.6, 20, 0.9])
        trained = llama.ask("/v1/models")["data"][0]["meta"]
        assert trained["n_ctx_train"] == network.context
        assert trained["n_vocab"] == network.vocab_size


def test_ends_with_the_text(bpe, tmp_path):
    """Where EOS is the likeliest token."""
    network = network_for(bpe)
    params = random_params(network)
    prompt = bpe.encode("昔々")
    sampling = SamplingConfig(temperature=0.0, max_length=len(prompt) + 1)
    [[text]] = sampler.generate(network, params, [prompt], num_samples=1, sampling=sampling, seed=0)
    params["logits"]["kernel"][:, [EOS_ID, text.tokens[0]]] = params["logits"]["kernel"][:, [text.tokens[0], EOS_ID]]
    write(tmp_path / "model.gguf", network, params, bpe)
    found = Llama(tmp_path / "model.gguf").complete("昔々", 8)
    assert (found["content"], found["stop_type"]) == ("", "eos")


@pytest.mark.parametrize(("kind", "most"), [("bfloat16", 0.02), ("q8_0", 0.05)])
def test_rounded_models(bpe, tmp_path, kind, most):
    """Nearly the same probabilities: their differences by the spread of the logits."""
    network = dataclasses.replace(network_for(bpe), emb_dim=64, qkv_dim=64, mlp_dim=96)
    params = random_params(network)
    write(tmp_path / "model.gguf", network, params, bpe, kind)
    llama = Llama(tmp_path / "model.gguf")
    ids = [START_ID, *bpe.encode("昔々あるところに、お爺さんが")]
    expected = log_softmax(our_logits(network, params, np.array([ids]))[0, -1])
    differences = llama.log_probs(ids, network.vocab_size) - expected
    assert 0 < differences.std() < most * expected.std()


def exported(workdir, output) -> Llama:
    """llama.cpp with what the command writes."""
    export = ["-m", "transformer_lm.export_gguf", f"--workdir={workdir}", f"--output={output}"]
    done = run([sys.executable, *export])
    assert done.returncode == 0, done.stderr
    return Llama(output)


def test_the_whole_circle(tmp_path):
    """Train and export by the commands: the same text as ours."""
    options = f"--character_coverage=1.0 {TOKENIZERS['bpe']}"
    changes = {"vocab_size": 1500, "max_target_length": 64, "emb_dim": 32, "num_kv_heads": 1, **MODERN}
    done = run(command("main", tmp_path / "run", num_train_steps=30, spm_train_options=options, **changes))
    assert done.returncode == 0, done.stderr
    trained, llama = transformer_lm.load(tmp_path / "run"), exported(tmp_path / "run", tmp_path / "tales.gguf")
    for prompt in ("昔々あるところに", "おじいさんが", ""):
        length = len(trained.tokenizer.encode(prompt)) + 20
        [ours] = trained.generate(prompt, temperature=0, max_length=length)
        assert prompt + llama.complete(prompt, 20)["content"] == ours["text"]


@pytest.fixture(scope="module")
def chat(trained_chat, tmp_path_factory):
    """A model of conversations, and llama.cpp with it."""
    return transformer_lm.load(trained_chat), exported(trained_chat, tmp_path_factory.mktemp("chat") / "chat.gguf")


@pytest.mark.parametrize(
    "messages",
    [
        said("猿が出てくる昔話をお願いします。"),
        said("昔々", "あるところに", "なぜ？"),
        [{"role": "system", "content": "短く。"}, *said("誰？", "太助です。", "なぜ？")],
        said("".join(TRICKS), "".join(TRICKS), " 昔々\n\nあるところに "),
    ],
)
def test_a_conversation_has_the_same_ids(chat, messages):
    """By llama.cpp's own reading of the template; texts that look like marks are text."""
    model, llama = chat
    prompt = llama.ask("/apply-template", messages=messages)["prompt"]
    expected = [START_ID, *model.turns.encode(messages, add_generation_prompt=True)[0]]
    assert llama.encode(prompt, add_special=True, parse_special=True) == expected


WORDS = {
    "a piece for the sign": lambda: make_tokenizer(TOKENIZERS["bpe, prefix"], more=["◆ユーザー ◆アシスタント ◆"] * 50),
    "the sign in bytes": lambda: make_tokenizer(TOKENIZERS["bpe, prefix"]),
    "unigram": lambda: make_tokenizer(TOKENIZERS["unigram"], more=["◆ユーザー ◆アシスタント ◆システム"] * 50),
}


@pytest.mark.parametrize("kind", WORDS)
def test_a_conversation_of_words(kind, tmp_path):
    """The same ids; an answer ends where the sign is a piece, and else where the request says so."""
    turns = Turns.of(WORDS[kind]())
    question = said("誰？")
    make_model_that_ends_its_turn(tmp_path / "model", turns, question[0]["content"])
    llama = exported(tmp_path / "model", tmp_path / "words.gguf")
    for messages in (
        question,
        said("昔々", "", "なぜ？"),
        said("".join(TRICKS), "".join(TRICKS), " 昔々\n\nあるところに "),
    ):
        prompt = llama.ask("/apply-template", messages=messages)["prompt"]
        expected = [START_ID, *turns.encode(messages, add_generation_prompt=True)[0]]
        assert llama.encode(prompt, add_special=True, parse_special=True) == expected
    found = llama.ask("/v1/chat/completions", messages=question, max_tokens=60, temperature=0, stop=["◆"])
    expected = transformer_lm.load(tmp_path / "model").chat(question, temperature=0)
    assert found["choices"][0]["message"]["content"].strip() == expected
    [found] = llama.ask("/v1/chat/completions", messages=question, max_tokens=60, temperature=0)["choices"]
    assert (found["finish_reason"] == "stop") == bool(turns.exported_end_ids)
    if turns.exported_end_ids:  # and is shown, which no other piece is that ends a text
        assert found["message"]["content"].strip() == f"{expected} {turns.sign}"


def test_answers(chat):
    """Greedy, by OpenAI's address, to the end of the turn and no further."""
    model, llama = chat
    messages = said("猿が出てくる昔話をお願いします。")
    read = len(model.turns.encode(messages, add_generation_prompt=True)[0])
    found = llama.ask("/v1/chat/completions", messages=messages, max_tokens=60, temperature=0)
    expected = model.chat(messages, temperature=0, max_length=read + 60)
    assert found["choices"][0]["message"]["content"] == expected
    assert found["usage"]["prompt_tokens"] == 1 + read
