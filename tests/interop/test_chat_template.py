"""A model of conversations in other people's tools: the same ids from its template, the same answers and scores."""

import re

import pytest
from conftest import FIXTURE
from test_harness import jglue  # noqa: F401  a fixture
from test_turns import KEEP_SPACES, TRICKS, make_tokenizer, said
from words import make_model_that_ends_its_turn

import transformer_lm
from transformer_lm import export_huggingface
from transformer_lm.generation.sampler import SamplingConfig
from transformer_lm.huggingface import fast_tokenizer
from transformer_lm.tokenizer import START_ID, Tokenizer
from transformer_lm.tokenizer.turns import Turns

WHY = "PyTorch and transformers are not installed: make test-interop"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
lm_eval = pytest.importorskip("lm_eval", reason=WHY)
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from transformer_lm.evaluation import harness  # noqa: E402

TALKS = [
    (said("猿が出てくる昔話をお願いします。"), True),
    (said("昔々", "あるところに", "なぜ？"), True),
    ([{"role": "system", "content": "短く。"}, *said("誰？", "太助です。")], False),
    (said("".join(TRICKS), "".join(TRICKS), " 昔々\n\nあるところに "), True),
    ([{"role": "user", "content": [{"type": "text", "text": "誰"}, {"type": "text", "text": "？"}]}], True),
]


@pytest.fixture(scope="module")
def exported(trained_chat, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "chat"
    export_huggingface.export(str(trained_chat), output, SamplingConfig(temperature=0.0))
    return output


WORDS = {
    "words": lambda: Tokenizer.load(FIXTURE / "sentencepiece_model"),
    "words, a piece for the sign": lambda: make_tokenizer("--byte_fallback=true", *["◆ユーザー ◆アシスタント ◆"] * 50),
    "words, bpe, all spaces": lambda: make_tokenizer(f"--model_type=bpe {KEEP_SPACES}"),
    "words, unigram, all spaces": lambda: make_tokenizer(f"--model_type=unigram {KEEP_SPACES}"),
}


@pytest.fixture(scope="module", params=["pieces", *WORDS])
def both(request, exported, tmp_path_factory):
    """Our turns, and the tokenizer as transformers loads it."""
    if request.param == "pieces":
        return transformer_lm.load(exported).turns, transformers.AutoTokenizer.from_pretrained(exported)
    turns = Turns.of(WORDS[request.param]())
    folder = tmp_path_factory.mktemp("words")
    fast_tokenizer.save(folder, turns.tokenizer, 128, turns)
    return turns, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("talk", range(len(TALKS)))
def test_template_gives_the_same_ids(both, talk):
    turns, theirs = both
    messages, prompt = TALKS[talk]
    found = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]
    assert found == [START_ID, *turns.encode(messages, prompt)[0]]


def test_answers(exported):
    """Greedy, to the end of the turn and no further."""
    ours = transformer_lm.load(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    messages = said("猿が出てくる昔話をお願いします。")
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        written = model.generate(**inputs, do_sample=False, max_new_tokens=60)[0, inputs["input_ids"].shape[1] :]
    expected = ours.chat(messages, temperature=0, max_length=inputs["input_ids"].shape[1] + 59)
    assert tokenizer.decode(written, skip_special_tokens=True) == expected


@pytest.mark.parametrize("kind", WORDS)
def test_the_cards_code_shows_an_answer_of_words(kind, tmp_path, monkeypatch, capsys):
    """It stops at the end of the turn, and leaves it out."""
    turns = Turns.of(WORDS[kind]())
    read = make_model_that_ends_its_turn(tmp_path / "model", turns)
    export_huggingface.export(str(tmp_path / "model"), tmp_path / "card", SamplingConfig(0.0, max_length=60))
    [code, ours] = re.findall(r"```python\n(.*?)```", (tmp_path / "card" / "README.md").read_text(), re.DOTALL)[:2]
    monkeypatch.chdir(tmp_path)
    done: dict = {}
    exec(code, done)
    shown = capsys.readouterr().out
    exec(ours.replace("chat([", "chat(temperature=0, messages=["), {})
    assert shown == capsys.readouterr().out
    assert shown.strip()
    ends = [token in turns.exported_end_ids for token in turns.marks[-1]]
    assert len(done["answer"]) == read + (ends.index(True) + 1 if any(ends) else len(ends))


def test_a_conversation_longer_than_an_answer(tmp_path):
    """max_predict_length counts the tokens of an answer."""
    turns = Turns.of(WORDS["words"]())
    read = make_model_that_ends_its_turn(tmp_path / "model", turns)
    export_huggingface.export(str(tmp_path / "model"), tmp_path / "out", SamplingConfig(0.0, max_length=read))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = tokenizer.apply_chat_template(
        said("誰？"), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    before = inputs["input_ids"].shape[1]
    assert before > read
    assert model.generate(**inputs).shape[1] <= before + read


def test_tasks_as_conversations(exported, trained_chat, jglue):  # noqa: F811
    """Prompts and scores as of lm_eval's own model `hf`."""
    theirs = HFLM(pretrained=str(exported), device="cpu", batch_size=4)
    manager = TaskManager(include_path=str(harness.TASKS), include_defaults=False, metadata={"data_dir": str(jglue)})
    expected = lm_eval.simple_evaluate(theirs, tasks=["jglue"], task_manager=manager, apply_chat_template=True)
    found = harness.run_tasks(transformer_lm.load(trained_chat), ["jglue"], data_dir=str(jglue), chat=True)
    assert found["samples"].keys() == expected["samples"].keys()
    for task, samples in expected["samples"].items():
        for mine, sample in zip(found["samples"][task], samples, strict=True):
            if task.startswith("jsquad"):
                assert mine["resps"] == sample["resps"]
            else:
                for (one,), (other,) in zip(mine["resps"], sample["resps"], strict=True):
                    assert one[0] == pytest.approx(other[0], abs=1e-3)
