"""Conversations as token ids: what opens a turn, what ends it, and the same for other people's tools.

turns = Turns.of(tokenizer)
ids, is_answer = turns.encode([{"role": "user", "content": "こんにちは"}], add_generation_prompt=True)

A tokenizer with the control pieces that the v2 recipes reserve has a piece for what opens a turn of the user (number
0), the assistant (1) and the system (2), and one that ends each turn (3). Texts are encoded one by one, so that none
becomes such a piece, whatever it holds. In a tokenizer without them, as the original's, turns are words of plain text
that begin with a sign, which is left out of the texts: "◆ユーザー こんにちは ◆ ◆アシスタント". They are cut one by
one, too; other people's tools cut the whole text at once, which is why it has one space between two words, and no more.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformer_lm.errors import UserError
from transformer_lm.tokenizer import NAME_MARK, SPACE, Tokenizer

ROLES = ("user", "assistant", "system")
CONTROL_NAMES = tuple(f"<|reserved_{number}|>" for number in range(4))  # of ROLES, and of a turn's end
SIGNS = "◆※★"  # of plain text; the first that the tokenizer knows. No normalization makes them of other characters.
WORDS = ("ユーザー", "アシスタント", "システム", "")  # behind the sign, for ROLES and a turn's end
# What other people's tools must cut as we do, or the tokenizer can do no turns of words.
SAMPLE = (
    {"role": "system", "content": "短く。"},
    {"role": "user", "content": "誰？"},
    {"role": "assistant", "content": "太助です。"},
    {"role": "user", "content": "なぜ？"},
)


class Message(NamedTuple):
    """What somebody says."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True)
class Turns:
    """How a tokenizer's model takes turns; made by `of`.

    Attributes:
      tokenizer: what cuts texts.
      names: the marks as text, by role, and of a turn's end.
      marks: their token ids.
      sign: what texts may not hold, since marks begin with it; "" where marks are control pieces.
    """

    tokenizer: Tokenizer
    names: tuple[str, ...]
    marks: tuple[tuple[int, ...], ...]
    sign: str = ""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Turns":
        """The turns that a tokenizer can do; raises UserError if it can do none."""
        ids = [tokenizer.control_id(name) for name in CONTROL_NAMES]
        if None not in ids and not tokenizer.pieces("。")[0].startswith(SPACE):
            return cls(tokenizer, CONTROL_NAMES, tuple((number,) for number in ids))
        for sign in SIGNS:
            names = tuple(sign + word for word in WORDS)
            marks = [tokenizer.encode(name) for name in names]
            whole = tokenizer.encode(" ".join(names))  # words are cut one by one, and come back
            if whole == [token for mark in marks for token in mark] and tokenizer.decode(whole) == " ".join(names):
                turns = cls(tokenizer, names, tuple(map(tuple, marks)), sign)
                if turns.encode_rendered(turns.render(SAMPLE)) == turns.encode(SAMPLE, add_generation_prompt=True)[0]:
                    return turns
                break  # with another sign, models would be asked otherwise than they were trained
        raise UserError(
            f"{tokenizer.source} cannot hold conversations: it has neither the control pieces "
            f"{', '.join(CONTROL_NAMES)} and --add_dummy_prefix=false, nor one of the signs {SIGNS} and white space "
            "between words that no piece reaches across. Remove it, or use another --workdir, to train one with the "
            "spm_train_options of the v2 recipes."
        )

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end the assistant's turn, as EOS does; none where `stop` has what ends it."""
        return () if self.sign else self.marks[-1]

    @functools.cached_property
    def exported_end_ids(self) -> tuple[int, ...]:
        """Tokens that end the assistant's turn in tools that cut no text: those that hold the sign, as no answer does.

        That of a turn's end comes first. There are none where the tokenizer writes the sign in bytes.
        """
        if not self.sign:
            return self.marks[-1]
        numbers = range(self.tokenizer.vocab_size)
        holding = [number for number in numbers if self.sign in self.tokenizer.piece_text(number)]
        return tuple(sorted(holding, key=lambda number: number not in self.marks[-1]))

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end the assistant's turn; none where `end_ids` has what ends it."""
        return (" " + self.sign, self.sign) if self.sign else ()

    def encode(self, messages: Any, add_generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, without START_ID in front and without EOS.

        Args:
          messages: as `read_messages` takes them.
          add_generation_prompt: whether the assistant's turn is opened, for the model to write it.

        Returns:
          the ids, and of each whether the assistant says it: its texts and the ends of its turns.

        Raises:
          UserError: the messages are no conversation, or with add_generation_prompt not one that awaits an answer.
        """
        ids: list[int] = []
        is_answer: list[bool] = []

        def add(more: Sequence[int], said: bool):
            ids.extend(more)
            is_answer.extend([said] * len(more))

        messages = read_messages(messages)
        for role, text in messages:
            add(self.marks[ROLES.index(role)], False)
            add(self.tokenizer.encode(self._clean(text)), role == "assistant")
            add(self.marks[-1], role == "assistant")
        if add_generation_prompt:
            if messages[-1].role != "user":
                raise UserError("messages must end with one of the user, for the assistant to answer.")
            add(self.marks[ROLES.index("assistant")], False)
        return ids, is_answer

    def _clean(self, text: str) -> str:
        """A message's text without what would be a mark: here, or in an exported tokenizer."""
        for character in NAME_MARK + self.sign:
            text = text.replace(character, "")
        return text

    def end_of(self, ids: Sequence[int]) -> int:
        """Where the assistant's turn ends in ids which it wrote, by a piece; their number where it does not."""
        return min((ids.index(token) for token in self.end_ids if token in ids), default=len(ids))

    def answer(self, ids: Sequence[int]) -> str:
        """The text that the assistant said in ids which it wrote, to the end of its turn."""
        text = self.tokenizer.decode(ids[: self.end_of(ids)])
        return self.said(text.partition(self.sign)[0].rstrip()) if self.sign else text

    def said(self, text: str) -> str:
        """What an answer begins with, without the space between a word that opens the turn and the next one."""
        return text.lstrip() if self.sign else text

    @property
    def _shown(self) -> list[str]:
        """The marks as they stand in one text with what is said, where an exported tokenizer finds them."""
        return [name if self.sign else name + NAME_MARK for name in self.names]

    @property
    def _space(self) -> str:
        """What stands between the words of a text with marks that are words."""
        return " " if self.sign else ""

    def render(self, messages: Any, add_generation_prompt: bool = True) -> str:
        """A conversation as one text, which opens the assistant's turn, or else leaves the last message unended."""
        *openings, end = self._shown
        marks = dict(zip(ROLES, openings, strict=True))
        words: list[str] = []
        for role, said in read_messages(messages):
            words += [marks[role], *filter(None, [self._clean(said)]), end]
        words = [*words, marks["assistant"], ""] if add_generation_prompt else words[:-1]
        return self._space.join(words)

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a text that `render` gave, or of one that goes on with such a text."""
        if self.sign:  # the space behind a turn that is open belongs to the answer
            return self.tokenizer.encode(text[:-1] if text.endswith(self.names[1] + " ") else text)
        marks = dict(zip(self._shown, self.marks, strict=True))
        parts = re.split(f"({'|'.join(map(re.escape, marks))})", text)
        return [token for part in parts for token in marks.get(part) or self.tokenizer.encode(part)]

    def jinja(self, space_in_front: bool = True) -> str:
        """`encode` as a template of transformers' apply_chat_template, with START_ID in front.

        Args:
          space_in_front: whether there is a space between START_ID and a word, which a fast tokenizer does not put
            there itself. llama.cpp does.
        """
        user, assistant, system, end = self._shown
        opened = assistant
        if self.sign and self.tokenizer.encode(assistant + " ") == list(self.marks[1]):
            opened += " "  # then an answer may be put behind it as it is
        values = {
            "front": self._space * space_in_front, "user": user, "assistant": assistant, "system": system, "end": end,
            "space": self._space, "opened": opened,
        }  # fmt: skip
        clean = "".join(f" | replace('{character}', '')" for character in NAME_MARK + self.sign)
        return _TEMPLATE.format(clean=clean, **{name: f"'{value}'" for name, value in values.items()})


_TEMPLATE = """\
{{{{- bos_token -}}}}{{{{- {front} -}}}}
{{%- set roles = 'Roles must be user and assistant in turn, perhaps after one of system.' -%}}
{{%- set contents = 'A content must be a text, or a list of parts of the type text.' -%}}
{{%- if not messages -%}}{{{{- raise_exception('There must be at least one message.') -}}}}{{%- endif -%}}
{{%- for message in messages -%}}
{{%- if message.role == 'system' and loop.first and not loop.last -%}}{{{{- {system} -}}}}
{{%- elif message.role == 'user' and (loop.first or loop.previtem.role != 'user') -%}}{{{{- {user} -}}}}
{{%- elif message.role == 'assistant' and not loop.first and loop.previtem.role == 'user' -%}}{{{{- {assistant} -}}}}
{{%- else -%}}{{{{- raise_exception(roles) -}}}}
{{%- endif -%}}
{{%- if message.content is string -%}}{{%- set text = message.content -%}}
{{%- elif message.content is iterable and message.content is not mapping -%}}
{{%- for part in message.content -%}}
{{%- if part.type != 'text' or part.text is not string -%}}{{{{- raise_exception(contents) -}}}}{{%- endif -%}}
{{%- endfor -%}}
{{%- set text = message.content | map(attribute='text') | join('') -%}}
{{%- else -%}}{{{{- raise_exception(contents) -}}}}
{{%- endif -%}}
{{%- set text = text{clean} -%}}
{{%- if text -%}}{{{{- {space} + text -}}}}{{%- endif -%}}
{{{{- {space} + {end} -}}}}
{{%- if not loop.last -%}}{{{{- {space} -}}}}
{{%- elif add_generation_prompt and message.role == 'user' -%}}{{{{- {space} + {opened} -}}}}
{{%- elif add_generation_prompt -%}}{{{{- raise_exception('The last message must be of the user.') -}}}}
{{%- endif -%}}
{{%- endfor -%}}
"""


def read_messages(messages: Any) -> list[Message]:
    """The messages of a conversation: roles user and assistant in turn, from the user on, perhaps after a system's.

    Args:
      messages: objects with role and content, which is a text or OpenAI's list of parts {"type": "text", "text": ...}.

    Raises:
      UserError: they are something else.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise UserError("messages must be a list of objects with role and content, at least one.")
    read = [_read_message(message, f"messages[{number}]") for number, message in enumerate(messages)]
    spoken = read[1:] if read[0].role == "system" else read
    if not spoken:
        raise UserError("messages has one of the system alone; one of the user must follow.")
    for number, message in enumerate(spoken, len(read) - len(spoken)):
        wanted = ROLES[(number - len(read) + len(spoken)) % 2]
        if message.role != wanted:
            raise UserError(
                f"messages[{number}] has the role {message.role!r} where {wanted!r} must be: user and assistant speak "
                "in turn, from the user on, perhaps after one message of the system."
            )
    return read


def _read_message(message: Any, place: str) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise UserError(f"{place}={str(message)[:80]!r} must have a role that is one of {', '.join(ROLES)}.")
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{place}: content must be a text, or a list of parts like {{'type': 'text', 'text': '...'}}.")
    return Message(message["role"], "".join(texts))
