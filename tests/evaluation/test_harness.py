"""lm-evaluation-harness on our network: what it asks is what our own scores and texts say."""

import gzip
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURE, ROOT, one_line_error, run

import transformer_lm
from transformer_lm import models
from transformer_lm.errors import UserError, one_line
from transformer_lm.generation.language_model import LanguageModel

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import manager  # noqa: E402

from transformer_lm.evaluation import harness  # noqa: E402

JCOMMONSENSEQA = {
    "q_id": 0, "question": "桃から生まれたのは？", "choice0": "一寸法師", "choice1": "桃太郎", "choice2": "金太郎",
    "choice3": "浦島", "choice4": "鬼", "label": 1,
}  # fmt: skip
JNLI = [
    {"sentence_pair_id": "0", "sentence1": "猫が二匹いる。", "sentence2": "動物がいる。", "label": "entailment"},
    {"sentence_pair_id": "1", "sentence1": "猫が二匹いる。", "sentence2": "猫はいない。", "label": "contradiction"},
    {"sentence_pair_id": "2", "sentence1": "猫が二匹いる。", "sentence2": "猫は黒い。", "label": "neutral"},
]
MARC_JA = [
    {"review_id": "R1", "text": "とても良い品でした。", "label": "positive"},
    {"review_id": "R2", "text": "すぐに壊れました。", "label": "negative"},
]
JSQUAD = {
    "version": "1.1",
    "data": [{
        "title": "梅雨",
        "paragraphs": [{
            "context": "梅雨 [SEP] 梅雨（つゆ）は、雨季の一種である。",
            "qas": [
                {"question": "梅雨とは何か。", "id": "a0", "is_impossible": False,
                 "answers": [{"text": "雨季", "answer_start": 15}, {"text": "雨季の一種", "answer_start": 15}]},
                {"question": "何と読むか。", "id": "a1", "is_impossible": False,
                 "answers": [{"text": "つゆ", "answer_start": 11}]},
            ],
        }],
    }],
}  # fmt: skip
ALPACA = "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。要求を適切に満たす応答を書きなさい。\n\n"


def lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


@pytest.fixture(scope="module")
def jglue(tmp_path_factory):
    """The four datasets, small, in both layouts and with an older version beside one."""
    folder = tmp_path_factory.mktemp("jglue")
    for name in ("jcommonsenseqa-v1.3", "jnli-v1.1", "marc_ja-v1.1"):
        (folder / name).mkdir()
    (folder / "jcommonsenseqa-v1.3" / "valid-v1.3.json").write_bytes(lines([JCOMMONSENSEQA] * 3))
    (folder / "jnli-v1.1" / "valid-v1.1.json").write_bytes(b"an older version, which is not read")
    (folder / "jnli-valid-v1.3.json.gz").write_bytes(gzip.compress(lines(JNLI)))
    (folder / "marc_ja-v1.1" / "valid-v1.1.json").write_bytes(lines(MARC_JA))
    (folder / "jsquad-valid-v1.3.json").write_text(json.dumps(JSQUAD, ensure_ascii=False))
    return folder


@pytest.fixture(scope="module")
def model():
    return transformer_lm.load(FIXTURE)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Which are filled up, and slow without XLA's optimizations."""
    monkeypatch.setattr(harness, "BATCH_TOKENS", 1_000)


def ask(kind: str, *arguments) -> list[Instance]:
    return [Instance(kind, {}, request, number) for number, request in enumerate(arguments)]


def test_loglikelihood_is_the_sum_of_our_scores(model):
    contexts = ["昔々", "吾輩は", "", "むかし、 "]
    continuations = ["あるところに", "猫である。名前はまだ無い。", "お爺さんが", "ある所"]
    requests = ask("loglikelihood", *zip(contexts, continuations, strict=True))
    answers = harness.HarnessModel(model).loglikelihood(requests * 20, disable_tqdm=True)
    np.testing.assert_allclose(answers[:4], answers[-4:], atol=1e-4)  # in any company
    for context, continuation, (log_prob, greedy) in zip(contexts, continuations, answers, strict=False):
        [whole] = model.score([context + continuation])
        given = len(model.tokenizer.encode(context.rstrip()))
        assert log_prob == pytest.approx(whole.token_log_probs[given:].sum(), abs=1e-4)
        assert greedy is False


def test_greedy_continuations_are_known_as_such(model):
    prompt = "夏目漱石は、"
    [text] = model.generate(prompt, temperature=0, max_length=20)
    ids = model.tokenizer.encode(prompt)
    request = (None, [0, *ids], text["tokens"][len(ids) :])
    wrong = (None, [0, *ids], [*text["tokens"][len(ids) : -1], 5])
    found = harness.HarnessModel(model)._loglikelihood_tokens([request, wrong], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_an_answer_longer_than_the_context(model):
    """Which would have the log probability of its end alone."""
    asked = harness.HarnessModel(model, max_length=16)
    assert asked._loglikelihood_tokens([(None, [0], [5] * 16)])[0][0] < 0
    with pytest.raises(UserError, match=r"An answer of 17 tokens cannot be scored: .* max_length=16"):
        asked._loglikelihood_tokens([(None, [0], [5] * 17)])


def test_rolling_log_likelihood(model):
    """A text that fits is its score; one that does not, the sum over windows, each token in one."""
    texts = ["吾輩は猫である。", "名前はまだ無い。" * 30]
    rolling = harness.HarnessModel(model).loglikelihood_rolling(ask("loglikelihood_rolling", *[(t,) for t in texts]))
    assert rolling == pytest.approx([score.log_prob for score in model.score(texts)], abs=1e-3)

    short = harness.HarnessModel(model, max_length=16)
    [found] = short.loglikelihood_rolling(ask("loglikelihood_rolling", (texts[1],)))
    ids = [0, *model.tokenizer.encode(texts[1])]
    expected = 0.0
    for start in range(1, len(ids), 16):
        new = min(16, len(ids) - start)
        context = ids[max(0, start + new - 17) : start + new]  # as much of it as fits before the new tokens
        [(log_probs, _)] = model.score_tokens([context])
        expected += log_probs[-new:].sum()
    assert found == pytest.approx(expected, abs=1e-3)


PROMPTS = ["夏目漱石は、", "昔々", "吾輩は猫である。" * 5, "むかし"]


@pytest.fixture(scope="module")
def at_once_and_alone(model):
    """For each prompt its ids and 100 or more tokens that follow greedily."""
    found = []
    for prompt in PROMPTS:
        [text] = model.generate(prompt, temperature=0, max_length=200)
        ids = model.tokenizer.encode(prompt)
        assert text["tokens"][: len(ids)] == ids
        found.append(text["tokens"][len(ids) :])
    assert min(map(len, found)) >= 100
    return found


@pytest.mark.parametrize("limit", [5, 32, 100])
def test_generation_is_the_samplers(model, at_once_and_alone, limit):
    """In rounds and in company as at once and alone."""
    requests = ask("generate_until", *[(prompt, {"until": [], "max_gen_toks": limit}) for prompt in PROMPTS])
    answers = harness.HarnessModel(model).generate_until(requests, disable_tqdm=True)
    assert answers == [model.tokenizer.decode(tokens[:limit]) for tokens in at_once_and_alone]


def test_generation_stops(model):
    prompt = "夏目漱石は、"
    [(whole,)] = [harness.HarnessModel(model).generate_until(ask("generate_until", (prompt, {"max_gen_toks": 64})))]
    stop = whole[10:12]
    stopped = harness.HarnessModel(model).generate_until(
        ask("generate_until", (prompt, {"max_gen_toks": 64, "until": [stop, "never"]}))
    )
    assert stopped == [whole.split(stop)[0]]


def test_generation_samples_when_asked(model):
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 50, "max_gen_toks": 20}
    one, two = harness.HarnessModel(model).generate_until(ask("generate_until", ("昔々", settings), ("昔々", settings)))
    assert one != two
    with pytest.raises(UserError, match="leaves no room for a prompt"):
        harness.HarnessModel(model, max_length=20).generate_until(ask("generate_until", ("昔々", settings)))


def test_the_four_tasks(model, jglue):
    """Prompts letter by letter those of version 0.3, and scores those that our own log probabilities give."""
    tasks = ["jglue", "marc_ja-1.1-0.3"]
    found = harness.run_tasks(model, tasks, data_dir=str(jglue))
    samples = {task: sorted(of, key=lambda sample: sample["doc_id"]) for task, of in found["samples"].items()}
    first = {task.split("-")[0]: of[0]["arguments"][0] for task, of in samples.items()}
    assert first["jcommonsenseqa"] == (
        ALPACA + "### 指示:\n与えられた選択肢の中から、最適な答えを選んでください。出力は以下から選択してください：\n"
        "- 一寸法師\n- 桃太郎\n- 金太郎\n- 浦島\n- 鬼\n\n### 入力:\n桃から生まれたのは？\n\n### 応答:\n",
        "一寸法師",
    )
    assert first["jnli"] == (
        ALPACA + "### 指示:\n与えられた前提と仮説の関係を回答してください。\n\n出力は以下から選択してください：\n"
        "含意\n矛盾\n中立\n\n### 入力:\n前提：猫が二匹いる。\n仮説：動物がいる。\n\n### 応答:\n",
        "含意",
    )
    assert first["marc_ja"] == (
        ALPACA + "### 指示:\n以下の製品レビューを、ポジティブまたはネガティブの感情クラスのいずれかに分類してください。"
        "\n\n### 入力:\nとても良い品でした。\n\n### 応答:\n",
        "ポジティブ",
    )
    assert first["jsquad"] == (
        ALPACA + "### 指示:\n与えられた文脈から、質問に対する答えを抜き出してください。\n\n### 入力:\n"
        "文脈：梅雨（つゆ）は、雨季の一種である。\n質問：梅雨とは何か。\n\n### 応答:\n",
        {"until": ["\n"], "max_gen_toks": 64, "do_sample": False},
    )
    assert {task: len(of) for task, of in samples.items()} == {
        "jcommonsenseqa-1.1-0.3": 3, "jnli-1.3-0.3": 3, "jsquad-1.1-0.3": 2, "marc_ja-1.1-0.3": 2,
    }  # fmt: skip
    for task, of in samples.items():
        if not task.startswith("jsquad"):
            results = found["results"][task]
            assert results["acc,none"] == pytest.approx(np.mean([self_scored(model, sample) for sample in of]))
    assert [sample["target"] for sample in samples["jnli-1.3-0.3"]] == [0, 1, 2]
    assert [sample["target"] for sample in samples["marc_ja-1.1-0.3"]] == [0, 1]


def test_worked_examples(model, jglue):
    """Of the task's other questions, before each; none where none are asked for."""
    for number in (None, 2):
        found = harness.run_tasks(model, ["jnli-1.3-0.3"], data_dir=str(jglue), num_fewshot=number, limit=1)
        [sample] = found["samples"]["jnli-1.3-0.3"]
        prompt = sample["arguments"][0][0]
        assert prompt.count("### 指示:") == 1 + (number or 0)
        assert prompt.count("### 応答:\n含意") + prompt.count("### 応答:\n矛盾") + prompt.count("### 応答:\n中立") == (
            number or 0
        )


def test_a_tokenizer_that_cannot_be_exported(model, jglue, monkeypatch):
    """Has its own answers, and no error after all other tasks are done."""
    monkeypatch.setattr(harness.fast_tokenizer, "convert", refuse)
    found = harness.run_tasks(model, ["jsquad-1.1-0.3"], data_dir=str(jglue), limit=1)
    assert 0 <= found["results"]["jsquad-1.1-0.3"]["f1,none"] <= 1


def refuse(*_):
    raise UserError("model_type=char; unigram and bpe can be exported.")


def self_scored(model, sample) -> bool:
    """Whether the answer that our scores find likeliest is right."""
    scores = []
    for context, choice in sample["arguments"]:
        given = len(model.tokenizer.encode(context.rstrip()))
        scores.append(model.score([context + choice])[0].token_log_probs[given:].sum())
    return int(np.argmax(scores)) == sample["target"]


@pytest.mark.parametrize(
    ("answer", "exact_match", "f1"),
    [
        ("雨季", 1, 1),
        (" 「雨季」。", 1, 1),
        ("雨季の", 0, 4 / 5),  # against 雨季; against 雨季の一種 3 / 4
        ("梅雨", 0, 0.5),
        ("", 0, 0),
        ("雪", 0, 0),
    ],
)
def test_scores_of_answers(answer, exact_match, f1):
    from transformer_lm.evaluation.tasks import jglue

    found = jglue.score_answer({"answers": ["雨季", "雨季の一種"]}, [answer])
    assert found == {"exact_match": exact_match, "f1": pytest.approx(f1)}


def test_our_tasks_beside_lm_evals(model, monkeypatch, tmp_path):
    """A name of lm_eval's own is known, in whatever company, and no other."""
    asked = {}
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda model, **arguments: asked.update(arguments))
    shutil.copytree(Path(manager.__file__).with_name("hellaswag"), tmp_path / "hellaswag")
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "manager.py"))  # not thousands of files: many seconds
    harness.run_tasks(model, ["jnli-1.3-0.3", "hellaswag"])
    assert asked["task_manager"].match_tasks(asked["tasks"]) == ["hellaswag", "jnli-1.3-0.3"]
    with pytest.raises(UserError, match=r"there is no task 'no_such_task'; the project has jcommonsenseqa-1\.1-0\.3"):
        harness.run_tasks(model, ["jnli-1.3-0.3", "no_such_task"])


@pytest.mark.parametrize(
    ("task", "changed", "num_fewshot", "words"),
    [
        ("jnli", {}, 9, "or lower num_fewshot=9; --debug shows where. ValueError"),
        ("jnli", {"fewshot_config": {"sampler": "first_n"}}, 4, "or lower num_fewshot=4; --debug shows where. Asser"),
        ("jnli", {"doc_to_text": "{% if %}"}, None, "mend the task's file; --debug shows where. TemplateSyntaxError"),
        ("jnli", {"doc_to_text": "{{ a.b.c }}"}, None, "mend the task's file; --debug shows where. UndefinedError"),
        ("jnli", {"output_type": "dreaming"}, None, "mend the task's file"),
        ("jsquad", {"generation_kwargs": {"max_gen_toks": -40}}, None, "max_gen_toks=-40 must be at least 1"),
        ("jsquad", {"generation_kwargs": {"max_tokens": 0}}, None, "max_gen_toks=0 must be at least 1"),
        ("jsquad", {"generation_kwargs": {"max_gen_toks": "many"}}, None, "mend the task's file"),
    ],
)
def test_tasks_that_cannot_be_run(model, jglue, tmp_path, task, changed, num_fewshot, words):
    """Whatever lm_eval raises for them is one line, with what the user can do."""
    own = {"include": str(harness.TASKS / f"{task}.yaml"), "task": "mine", "tag": "ones_own", "num_fewshot": None}
    (tmp_path / "mine.yaml").write_text(json.dumps(own | changed))
    with pytest.raises(UserError) as error:
        harness.run_tasks(
            model, ["mine"], data_dir=str(jglue), include_path=str(tmp_path), num_fewshot=num_fewshot, limit=1
        )
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"limit": -3}, "limit=-3 must be at least 1"),
        ({"limit": float("nan")}, "limit=nan must be a whole number or None"),
        ({"limit": 0.5}, "limit=0.5 must be a whole number or None"),
        ({"num_fewshot": 1.5}, "num_fewshot=1.5 must be a whole number or None"),
        ({"num_fewshot": -1}, "num_fewshot=-1 must be at least 0"),
        ({"tasks": [3]}, "tasks=3 must be a text"),
    ],
)
def test_impossible_arguments(model, arguments, words):
    with pytest.raises(UserError, match=words):
        harness.run_tasks(model, **({"tasks": ["jglue"]} | arguments))


@pytest.mark.parametrize("max_length", [-5, "long"])
def test_impossible_max_length(model, max_length):
    with pytest.raises(UserError, match="max_length="):
        harness.HarnessModel(model, max_length=max_length)


def test_what_fails_in_the_model_is_no_fault_of_the_task(model, jglue, monkeypatch):
    def fail(*_, **__):
        raise ValueError("not of this kind")

    monkeypatch.setattr(harness.sampler, "generate", fail)
    with pytest.raises(ValueError, match="not of this kind") as error:
        harness.run_tasks(model, ["jsquad-1.1-0.3"], data_dir=str(jglue), limit=1)
    assert one_line(error.value).startswith("ValueError while generating text: not of this kind")


def test_registered_by_name(jglue):
    """lm_eval's own entry point finds the model, as its command line does."""
    own = manager.TaskManager(
        include_path=str(harness.TASKS), include_defaults=False, metadata={"data_dir": str(jglue)}
    )
    with harness._no_report_of_the_machine():  # which takes lm_eval seconds
        found = lm_eval.simple_evaluate(
            "transformer_lm",
            model_args={"address": str(FIXTURE)},
            tasks=["jnli-1.3-0.3"],
            task_manager=own,
            torch_random_seed=None,
        )
    assert found["results"]["jnli-1.3-0.3"]["sample_len"] == 3


class TestCommand:
    def evaluate(self, *arguments, cwd=None, script=("-m", "transformer_lm.evaluate"), **environment):
        command = [sys.executable, *script, f"--workdir={FIXTURE}", *arguments]
        return run(command, cwd=cwd, env=os.environ | environment)

    def test_tasks(self, jglue, tmp_path, model):
        """The project's, and one's own beside them."""
        (tmp_path / "mine.yaml").write_text(
            "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: "
            + str(tmp_path / "mine.jsonl")
            + "}}\n"
            "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
            "metric_list: [{metric: bits_per_byte}]\n"
        )
        (tmp_path / "mine.jsonl").write_bytes(lines([{"text": "吾輩は猫である。"}]))
        done = self.evaluate(
            "--tasks=jglue,mine", f"--tasks_data={jglue}", f"--include_path={tmp_path}",
            f"--samples={tmp_path}/samples.jsonl", "--limit=2", HF_HOME=str(tmp_path / "cache"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        values = json.loads(done.stdout)
        assert values["step"] == 499_999
        assert values["tasks"].keys() == {"jcommonsenseqa-1.1-0.3", "jnli-1.3-0.3", "jsquad-1.1-0.3", "mine"}
        assert values["tasks"]["jnli-1.3-0.3"].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
        samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
        assert [sample["task"] for sample in samples].count("jsquad-1.1-0.3") == 2
        [score] = model.score(["吾輩は猫である。"])
        expected = -score.log_prob / np.log(2) / len("吾輩は猫である。".encode())
        assert values["tasks"]["mine"]["bits_per_byte"] == pytest.approx(expected, rel=1e-4)

    def test_as_a_script_of_its_folder(self, jglue):
        """There our evaluate.py must not stand in for the package `evaluate`, which lm_eval imports."""
        done = self.evaluate(
            "--tasks=jnli-1.3-0.3", script=("evaluate.py",), cwd=ROOT / "transformer_lm", JGLUE_DIR=str(jglue)
        )
        assert done.returncode == 0, done.stderr
        assert "jnli-1.3-0.3" in json.loads(done.stdout)["tasks"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--tasks=jglue"], "needs JGLUE's files: name their folder by --tasks_data"),
            (["--tasks=jglue", "--tasks_data=/nowhere"], "--tasks_data=/nowhere: no such folder"),
        ],
    )
    def test_errors(self, arguments, words):
        assert words in one_line_error(self.evaluate(*arguments))


def test_a_context_longer_than_the_model(model):
    """Only its end counts, as with lm_eval's `hf`."""
    short = harness.HarnessModel(model, max_length=16)
    context, continuation = list(range(10, 60)), [7, 8, 9]
    [(found, _)] = short._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True)
    [(log_probs, _)] = model.score_tokens([(context + continuation)[-17:]])
    assert found == pytest.approx(log_probs[-3:].sum(), abs=1e-5)


def test_max_length_is_the_exported_models():
    config = models.TransformerConfig(vocab_size=50, emb_dim=16, num_heads=2, num_layers=1, qkv_dim=16, mlp_dim=16)
    params = models.abstract_params(config)
    assert harness.HarnessModel(LanguageModel(config, params, None, 0)).max_length == 2048
