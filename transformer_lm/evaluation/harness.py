"""The tasks of lm-evaluation-harness (lm_eval), run on our own network; needs no PyTorch.

Importing this module registers the model `transformer_lm` with lm_eval, whose `simple_evaluate(model="transformer_lm",
model_args={"address": ...})` then finds it; `run_tasks` is that with the project's tasks.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import lm_eval
import lm_eval.evaluator
import lm_eval.utils
import tqdm
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from transformer_lm import errors
from transformer_lm.errors import UserError, stage
from transformer_lm.fields import LARGEST, Count, Range, check_value
from transformer_lm.generation import language_model, sampler
from transformer_lm.generation.language_model import LanguageModel
from transformer_lm.huggingface import fast_tokenizer
from transformer_lm.tokenizer import EOS_ID, START_ID

TASKS = Path(__file__).parent / "tasks"
MAX_NEW_TOKENS = 256  # lm_eval's own default
FIRST_NEW_TOKENS = 32  # of the first round of an answer: most are short
BATCH_TOKENS = 8_192  # of prompts and answers that are generated at once: their keys and values are kept

CountOrNone = Annotated[int | None, Range(least=1, most=LARGEST)]
CountOrZeroOrNone = Annotated[int | None, Range(least=0, most=LARGEST)]


@register_model("transformer_lm")
class HarnessModel(TemplateLM):
    """A language model as lm_eval asks it: texts in, log probabilities and texts out.

    Requests are worked on by length, longest first, in batches of a bounded number of tokens. Texts begin with
    START_ID, and what is longer than `max_length` loses its beginning, as with lm_eval's model `hf`.
    """

    eot_token_id = EOS_ID  # closes a text
    prefix_token_id = START_ID  # opens a text

    def __init__(
        self,
        model: LanguageModel | None = None,
        *,
        address: str = "",
        dtype: str = "float32",
        max_length: int | None = None,
        **_,
    ):
        """Takes a model, or loads the one at an address; **_ is what lm_eval hands to every model, like batch_size."""
        super().__init__()
        check_value("max_length", max_length, CountOrZeroOrNone)
        self.model = model or language_model.load(address, dtype=dtype)
        self.max_length = max_length or self.model.network.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Token ids, with START_ID in front unless told otherwise."""
        return [START_ID] * (add_special_tokens is not False) + self._encode(string)

    def _encode(self, text: str) -> list[int]:
        turns = self.model.turns
        return turns.encode_rendered(text) if turns else self.model.tokenizer.encode(text)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """See lm_eval: messages as one text; without add_generation_prompt the last one is to be gone on with."""
        return self.model.turns.render(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """See lm_eval: what requests that it keeps depend on."""
        return self.model.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        """See lm_eval: for its record."""
        return self.model.turns.jinja() if chat_template else ""

    def _loglikelihood_tokens(self, requests: Iterable, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """(texts, context ids, continuation ids) -> sum of log probabilities, and whether greedy decoding writes it."""
        requests = list(requests)
        if (longest := max((len(continuation) for _, _, continuation in requests), default=0)) > self.max_length:
            raise UserError(
                f"An answer of {longest} tokens cannot be scored: the context has max_length={self.max_length}."
            )
        sequences = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in requests]
        with tqdm.tqdm(total=len(requests), desc="Log probabilities", disable=disable_tqdm) as bar:
            scored = self.model.score_tokens(sequences, report=bar.update)
        answers = []
        for (texts, _, continuation), (log_probs, greedy) in zip(requests, scored, strict=True):
            start = len(log_probs) - len(continuation)
            answers.append((float(log_probs[start:].sum(dtype="float64")), bool(greedy[start:].all())))
            if texts is not None:  # a window of a text has none of its own
                self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log probabilities of whole texts; of one longer than max_length in windows, each token in one of them."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[number] += log_prob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each cut before the first of its stop strings."""
        groups: dict[str, list[int]] = {}  # requests with the same settings
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        answers: dict[int, str] = {}
        with tqdm.tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar:
            for numbers in groups.values():
                settings = normalize_gen_kwargs(dict(requests[numbers[0]].args[1]), MAX_NEW_TOKENS)
                prompts = {number: self._prompt(requests[number].args[0], settings) for number in numbers}
                most = 1 << (len(prompts) - 1).bit_length()  # rows that few prompts fill
                order = sorted(prompts, key=lambda number: len(prompts[number]), reverse=True)
                while order:
                    width = sampler.padded_length(len(prompts[order[0]])) + settings["max_gen_toks"]
                    rows = max(1, min(most, BATCH_TOKENS // width))
                    batch, order = order[:rows], order[rows:]
                    answers |= self._continue({number: prompts[number] for number in batch}, rows, settings)
                    bar.update(len(batch))
        for number, answer in answers.items():
            self.cache_hook.add_partial("generate_until", requests[number].args, answer)
        return [answers[number] for number in range(len(requests))]

    @functools.cached_property
    def _decode(self) -> Callable[[list[int]], str]:
        """Makes texts of tokens, also of bytes that are no whole character, as for users of the exported model."""
        try:
            return fast_tokenizer.convert(self.model.tokenizer).decode
        except UserError:  # it cannot be exported
            return self.model.tokenizer.decode

    def _prompt(self, text: str, settings: dict) -> list[int]:
        """Ids of a prompt without START_ID, shortened from the left to leave room for the answer."""
        new = settings["max_gen_toks"]
        check_value("max_gen_toks", new, Count)
        room = self.max_length - new
        if room < 2:
            raise UserError(f"max_gen_toks={new} leaves no room for a prompt: max_length={self.max_length}.")
        return self._encode(text)[1 - room :]

    def _continue(self, prompts: dict[int, list[int]], rows: int, settings: dict) -> dict[int, str]:
        """Answers to prompts. In a few rounds, each of twice as many tokens: who has met a stop string is left out."""
        answers: dict[int, str] = {}
        tokens: dict[int, list[int]] = {number: [] for number in prompts}
        limit, new = settings["max_gen_toks"], FIRST_NEW_TOKENS
        until = [*(settings.get("until") or ()), *(self.model.turns.stop if self.model.turns else ())]
        while tokens:
            so_far = [prompts[number] + written for number, written in tokens.items()]
            length = sampler.padded_length(max(map(len, so_far))) + new
            so_far += so_far[:1] * (rows - len(so_far))  # always as many, so that few shapes are compiled
            sampling = _sampling(settings, length)
            with stage("generating text", lower="max_gen_toks"):
                written = sampler.generate(
                    self.model.network, self.model.decoding_params, so_far,
                    num_samples=1, sampling=sampling, seed=length,
                )  # fmt: skip
            for number, [more] in zip(list(tokens), written, strict=False):
                tokens[number] = (tokens[number] + more.tokens)[:limit]
                ended = self._end_turn(tokens[number]) or more.finished
                text = self._decode(tokens[number])
                answer = postprocess_generated_text(text, until, None)
                if ended or len(tokens[number]) == limit or answer != text:
                    answers[number] = answer
                    del tokens[number]
            new *= 2
        return answers

    def _end_turn(self, tokens: list[int]) -> bool:
        """Whether the assistant's turn ends in tokens; what stands behind goes."""
        end = self.model.turns.end_of(tokens) if self.model.turns else len(tokens)
        ended = end < len(tokens)
        del tokens[end:]
        return ended


def _sampling(settings: dict, length: int) -> sampler.SamplingConfig:
    """lm_eval's settings of a generation in our terms; greedy unless it says do_sample."""
    chosen = {"temperature": 0.0}
    if settings.get("do_sample"):
        chosen = {name: settings[name] for name in ("temperature", "top_k", "top_p") if name in settings}
    return sampler.SamplingConfig(**chosen, max_length=length)


def run_tasks(
    model: LanguageModel,
    tasks: Sequence[str],
    *,
    data_dir: str | None = None,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
) -> dict:
    """Runs tasks.

    Args:
      model: what is evaluated.
      tasks: names of the project's tasks (in tasks/), of those below `include_path`, or of lm_eval's own.
      data_dir: the folder with JGLUE's files, for the project's tasks.
      include_path: a folder with task files of the user's; such a file may name Python functions beside it to run.
      num_fewshot: worked examples before each question; None for what the task says.
      limit: how many questions of each task are asked; None for all.
      chat: whether the model is asked in a conversation.

    Returns:
      what lm_eval.simple_evaluate returns: "results", "samples", "versions" and more.

    Raises:
      UserError: there is no such task, its data are missing, it cannot be run, or the model does not take turns.
    """
    tasks = language_model.list_of_texts(tasks, "tasks")
    check_value("num_fewshot", num_fewshot, CountOrZeroOrNone)
    check_value("limit", limit, CountOrNone)
    if chat and model.turns is None:
        raise UserError("--chat_template: this model was not trained on conversations; leave it out.")
    asked = HarnessModel(model)
    with stage("running tasks"), _faults_of_tasks(tasks, num_fewshot), _no_report_of_the_machine():
        manager = _find_tasks(tasks, [include_path] if include_path else [], data_dir)
        return lm_eval.simple_evaluate(
            asked, tasks=tasks, task_manager=manager, num_fewshot=num_fewshot, limit=limit,
            apply_chat_template=chat, torch_random_seed=None,  # imports PyTorch, too
        )  # fmt: skip


def _find_tasks(tasks: Sequence[str], folders: list[str], data_dir: str | None) -> TaskManager:
    """What finds the tasks: among the project's and the user's, or else among lm_eval's own as well."""
    paths = [str(TASKS), *folders]
    metadata = {"data_dir": data_dir} if data_dir else None
    manager = own = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
    if not all(own.match_tasks([name]) for name in tasks):
        manager = TaskManager(include_path=paths, metadata=metadata)  # thousands of files: some seconds
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise UserError(
            f"--tasks: there is no task {unknown[0]!r}; the project has {', '.join(own.all_tasks)}, and lm_eval "
            "its own."
        )
    return manager


@contextlib.contextmanager
def _faults_of_tasks(tasks: Sequence[str], num_fewshot: int | None) -> Iterator[None]:
    """What lm_eval raises inside, of whatever type, becomes a UserError: a task's file or settings are at fault.

    What fails in the model has a stage; that stays as it is, and so does what the machine lacks.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        if hasattr(error, "stage") or errors.is_out_of_memory(error):
            raise
        fewer = f", or lower num_fewshot={num_fewshot}" if num_fewshot else ""
        raise UserError(
            f"--tasks={','.join(tasks)} cannot be run: mend the task's file{fewer}; --debug shows where. "
            f"{type(error).__name__}: {error}"
        ) from error


@contextlib.contextmanager
def _no_report_of_the_machine() -> Iterator[None]:
    """Within, lm_eval does not import PyTorch and start a dozen programs for a report that nobody reads: seconds."""
    add_env_info, lm_eval.evaluator.add_env_info = lm_eval.evaluator.add_env_info, lambda storage: None
    try:
        yield
    finally:
        lm_eval.evaluator.add_env_info = add_env_info


def plain_metrics(metrics: dict) -> dict[str, float]:
    """A task's entry of "results" as {"acc": 0.5, "acc_stderr": 0.01}, without the name of the filter `none`."""
    return {
        name.removesuffix(",none"): value
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and name != "sample_len"
    }
