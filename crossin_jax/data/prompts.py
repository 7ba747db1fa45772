"""Examples become token ids and a loss mask: the one source of every prompt.

Training, scoring and generation call the same `Renderer`, so a model is asked with the same tokens
as in training. Shape letter: T tokens of an example or a prompt.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from crossin_jax.config import UserError
from crossin_jax.data.kinds import Example
from crossin_jax.data.records import MASKED
from crossin_jax.data.templates import (
    DATE,
    MARK,
    TemplateRefusal,
    load_template,
    open_chat_template,
)
from crossin_jax.data.tokens import find_hidden, token_bytes


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids (T,) int32 with BOS and EOS; loss_mask (T,) bool: token t is a target."""

    # "<s> Name it. Seine </s>" has the mask 0 0 0 1 1: the answer and EOS are targets.

    ids: np.ndarray
    loss_mask: np.ndarray


class RowFault(UserError):
    """One example that cannot be learned from; `reason` does not name the example."""

    def __init__(self, reason: str, example_id: str):
        super().__init__(f"row {example_id!r}: {reason}")
        self.reason, self.example_id = reason, example_id


def hash_parts(*parts: Any) -> str:
    """A short name of everything that decides which tokens a prompt becomes."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


class Piece(NamedTuple):
    """A text that is tokenized by itself."""

    # "Q: Name it.\nA: Seine" has the target span (14, 20), " Seine", and ends with </s>.

    text: str
    targets: tuple[tuple[int, int], ...]  # (start, stop) of the characters that are learned
    end: int | None  # the token to put after the text


class Renderer:
    """Renders examples and prompts under one template and tokenizer; `hash` names both.

    `others` has the renderers of components with a template of their own.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | dict[str, Any],
        *,
        system: str | None = None,
        tokenization: str = "joint",
        others: dict[str, "Renderer"] | None = None,
    ):
        self.template = load_template(template)
        self.template_name = template if isinstance(template, str) else "of the model"
        self.system, self.apart, self.others = system, tokenization == "apart", others or {}
        self._check_settings()
        self.chat_template = open_chat_template(tokenizer) if self.template is None else None
        self._open_tokenizer(tokenizer)
        self._find_ids(tokenizer)
        # In a template without special tokens, "</s>" in a row is plain text. In a template with
        # them, such a row would end a turn where the template did not.
        around = "" if self.template is None else "".join(map(str, asdict(self.template).values()))
        self._forgeable = self.template is None or bool(self._specials.search(around))
        self._tokenizer.encode_special_tokens = not self._forgeable
        self.hash = hash_parts(
            self._tokenizer.to_str(),
            asdict(self.template) if self.template else tokenizer.chat_template,
            system,
            tokenization,
            self.bos_id,
            self.end_id,
            *((name, r.hash) for name, r in self.others.items()),
            *([DATE.isoformat()] if self.chat_template and self.chat_template.is_dated else []),
        )

    def _check_settings(self) -> None:
        """Refuses settings that the template has no place for."""
        if self.apart and self.template is None:
            raise UserError(
                "data.tokenization='apart' is the release's form and has no meaning for template "
                "'chat'; use joint"
            )
        if self.system and self.template and "{system}" not in self.template.prompt_no_input:
            raise UserError(
                f"data.system is set, but template {self.template_name!r} has no place for it; "
                f"use llama, chatml or chat"
            )

    def _open_tokenizer(self, tokenizer: Any) -> None:
        """Copies the tokenizer, so that the caller's keeps its settings, and lists its tokens."""
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Whether a character of a token stands for a byte: see `token_bytes`.
        self.is_byte_level = "ByteLevel" in json.dumps(
            json.loads(self._tokenizer.to_str())["decoder"]
        )
        self.vocab_size = len(tokenizer)
        self._num_embeddings: int | None = None  # of the model; None: enough for all tokens
        self._added_tokens = self._tokenizer.get_added_tokens_decoder()
        self._hidden = find_hidden(self._added_tokens)
        self.special_ids = frozenset(tokenizer.all_special_ids) | self._hidden
        names = [self._tokenizer.id_to_token(i) for i in sorted(self.special_ids)]
        self._specials = re.compile("|".join(map(re.escape, names)))
        self._num_bytes = np.array(
            [
                len(token_bytes(self.id_to_token(i), self.is_byte_level, i in self.special_ids))
                for i in range(self._tokenizer.get_vocab_size())
            ]
        )

    def _find_ids(self, tokenizer: Any) -> None:
        """The ids that begin a text, end an answer in training (`end_id`) and in generation
        (`eos_ids`, any of them), and fill a row.
        """
        first = tokenizer("a").input_ids[:1]
        self.bos_id = tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None
        if tokenizer.eos_token_id is None:
            raise UserError(
                "model.tokenizer has no EOS token: an answer could not end; set eos_token in "
                "tokenizer_config.json"
            )
        self.end_id = self._find_end(tokenizer)
        self.eos_id = tokenizer.eos_token_id
        answer_ends = getattr(tokenizer, "answer_ends", ())
        self.eos_ids = tuple(dict.fromkeys((self.end_id, self.eos_id, *answer_ends)))
        self.pad_id = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _find_end(self, tokenizer: Any) -> int:
        """The token after an answer: the chat template's last one, the template's, or EOS."""
        if self.template is None:
            start, text = self._chat_texts((("user", "a"), ("assistant", "b")))[0]
            ids = [i for i in self._encode(text[start:]).ids if i in self.special_ids]
            return ids[-1] if ids else tokenizer.eos_token_id
        end = self._tokenizer.token_to_id(self.template.end) if self.template.end else None
        return end if end is not None else tokenizer.eos_token_id

    def check_embeddings(self, num_embeddings: int, name: str | None) -> None:
        """Refuses a tokenizer of another model, and notes how many embeddings the model has.

        Added tokens beyond them are common (Gemma 3: <image_soft_token>): they become a `RowFault`.
        """
        count = 1 + max(self._tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
        count = max(count, self.end_id + 1, (self.bos_id or 0) + 1)  # these are in every row
        if count > num_embeddings:
            raise UserError(
                f"model.tokenizer={name}: {count} tokens, but the model's vocabulary has "
                f"{num_embeddings}; use the tokenizer that came with the weights"
            )
        if self.pad_id >= num_embeddings:  # padding is masked, but its embedding is looked up
            self.pad_id = self.end_id
        self._num_embeddings = num_embeddings if self.vocab_size > num_embeddings else None
        for other in self.others.values():
            other.check_embeddings(num_embeddings, name)

    # ---- Public methods

    def render(self, example: Example) -> Rendered:
        """Ids and mask of one example; raises `RowFault` for one that cannot be learned from."""
        result = self.render_many([example])[0]
        if isinstance(result, RowFault):
            raise result
        return result

    def render_answer(self, instruction: str, input: str, output: str) -> Rendered:
        """Prompt, answer and EOS: the tokens that training would see, for scoring an answer."""
        return self.render(Example("", "", "", "", instruction, input, output))

    def render_prompt(self, instruction: str, input: str = "") -> np.ndarray:
        """Ids (T,) int32 up to where the answer begins."""
        if self.template is None:
            return self.render_chat(self._to_messages(instruction, input))
        return self._add_bos(self._encode(self._fill_prompt(instruction, input)).ids)

    def render_chat(self, messages: Sequence[tuple[str, str]]) -> np.ndarray:
        """Ids (T,) int32 of (role, text) turns, up to where the next answer begins.

        A template for single questions is repeated for every question, as in training.
        """
        if self.template is None:
            if self.system and messages[0][0] != "system":
                messages = (("system", self.system), *messages)
            text = self.chat_template.render(messages, True).rstrip(" ")
            return self._add_bos(self._encode(text).ids)
        last = 1 + max(
            (i for i, (role, _) in enumerate(messages) if role == "assistant"), default=-1
        )
        ids: list[int] = []
        if last:
            answered = Example("", "", "", "", "", "", "", tuple(messages[:last]))
            for piece in self._split(answered):
                ids += self._encode(piece.text).ids
                if piece.end is not None:
                    ids.append(piece.end)
        question = self._fill_prompt("\n\n".join(text for _, text in messages[last:]))
        return self._add_bos([*ids, *self._encode(question).ids])

    def _fill_prompt(self, instruction: str, input: str = "") -> str:
        """The text of a prompt up to where the answer begins."""
        text = self.template.fill(instruction, input, self.system)
        return text if self.apart else text.rstrip(" ")

    def encode_text(self, text: str) -> np.ndarray:
        """Ids (T,) int32 of a bare text, after BOS where the tokenizer has one."""
        return self._add_bos(self._encode(text).ids)

    def decode(self, ids: Sequence[int], shown: Sequence[str] = ()) -> str:
        """The text of an answer, without special tokens except those in a text of `shown`."""
        hidden = self._hidden if not shown else find_hidden(self._added_tokens, shown)
        return self._tokenizer.decode([int(i) for i in ids if int(i) not in hidden], False)

    def id_to_token(self, i: int) -> str:
        """The tokenizer's own name of a token."""
        return self._tokenizer.id_to_token(i) or f"<{i}>"

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return list(map(len, encodings))

    def render_many(self, examples: Sequence[Example]) -> list[Rendered | RowFault]:
        """Renders at once, on all cores that TOKENIZERS_PARALLELISM allows.

        An example that cannot be learned from gives a `RowFault`; a chat that the chat template
        refuses raises it.
        """
        owners = [self.others.get(example.component, self) for example in examples]
        texts = [owner._split(example) for owner, example in zip(owners, examples, strict=True)]
        results: list[Any] = [None] * len(examples)
        for renderer in dict.fromkeys(owners):
            mine = [i for i, owner in enumerate(owners) if owner is renderer]
            tokens = iter(renderer._tokenize([piece for i in mine for piece in texts[i]]))
            for i in mine:
                parts = [(piece, *next(tokens)) for piece in texts[i]]
                results[i] = renderer._join_pieces(examples[i], parts)
        return results

    def _tokenize(self, pieces: list[Piece]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """(ids, ranges of learned tokens) of each piece.

        One answer at the end is found by counting bytes from there, a quarter faster than with
        offsets. Offsets are used for several answers, and where the bytes of the tokens are not
        those of the text (unknown characters, a normalizer).
        """
        results: list[Any] = [None] * len(pieces)
        fast = [
            i
            for i, piece in enumerate(pieces)
            if len(piece.targets) < 2 and all(stop == len(piece.text) for _, stop in piece.targets)
        ]
        encodings = self._tokenizer.encode_batch_fast(
            [pieces[i].text for i in fast], add_special_tokens=False
        )
        for i, encoding in zip(fast, encodings, strict=True):
            results[i] = encoding.ids, _count_back(self._num_bytes[encoding.ids], pieces[i])
        slow = [i for i, result in enumerate(results) if result is None or result[1] is None]
        encodings = self._tokenizer.encode_batch(
            [pieces[i].text for i in slow], add_special_tokens=False
        )
        for i, encoding in zip(slow, encodings, strict=True):
            results[i] = encoding.ids, _find_tokens(encoding, pieces[i])
        return results

    # ---- Text and spans

    def _split(self, example: Example) -> list[Piece]:
        """The texts to tokenize: one for an exchange or a chat, two under tokenization "apart"."""
        if not (example.instruction or example.input or example.messages):  # kind "text"
            return [Piece(example.output, ((0, len(example.output)),), self.eos_id)]
        if self.template is None:
            question = self._to_messages(example.instruction, example.input)
            try:
                turns = self._chat_texts(
                    example.messages or (*question, ("assistant", example.output))
                )
            except TemplateRefusal as error:
                raise RowFault(str(error), example.id) from None
            return [Piece(turns[-1][1], tuple((start, len(whole)) for start, whole in turns), None)]
        pieces = []
        for instruction, input, output, is_learned in example.exchanges:
            prompt = self.template.fill(instruction, input, self.system)
            if self.apart:
                spans = ((0, len(output)),) if is_learned else ()
                pieces += [Piece(prompt, (), None), Piece(output, spans, self.end_id)]
                continue
            body = prompt.rstrip(" ")
            text = body + (prompt[len(body) :] or self.template.answer_prefix) + output
            spans = ((len(body), len(text)),) if is_learned else ()
            pieces.append(Piece(text, spans, self.end_id))
        return pieces

    def _to_messages(self, instruction: str, input: str) -> tuple[tuple[str, str], ...]:
        user = ("user", f"{instruction}\n{input}" if input else instruction)
        return (("system", self.system), user) if self.system else (user,)

    def _chat_texts(self, messages: Sequence[tuple[str, str]]) -> list[tuple[int, str]]:
        """For each assistant turn: where it starts, and the whole text up to its end."""
        # A chat template writes the whole chat for every turn. The text that an answer adds is
        # learned:
        #
        #     with the turns before it, opened    <user>Hi<end><assistant>
        #     with the answer                     <user>Hi<end><assistant>Hello<end>
        spans = []
        if self.system and messages[0][0] != "system":
            messages = (("system", self.system), *messages)
        roles = [role for role, _ in messages]
        messages = [("assistant" if role == MASKED else role, text) for role, text in messages]
        for k, (_, answer) in enumerate(messages):
            if roles[k] != "assistant":
                continue
            before = self.chat_template.render(messages[:k], True)
            after = self.chat_template.render(messages[: k + 1], False)
            if not after.startswith(before) and not spans and k == len(messages) - 1:
                after = self._answer_opened(before, messages[:k], answer)
            if not after.startswith(before) or spans and not after.startswith(spans[-1][1]):
                raise TemplateRefusal(
                    "the tokenizer's chat template rewrites earlier turns, so it is unknown "
                    "which tokens are learned; use single turns, or a template file"
                )
            spans.append((len(before.rstrip(" ")), after))
        return spans

    def _answer_opened(self, before: str, messages: Sequence[tuple[str, str]], answer: str) -> str:
        """A single turn under a template whose opening of an answer does not stay in the chat."""
        # Templates of reasoning models open a thought, and drop it when the chat goes on. A model
        # must learn what follows the opening, because its prompts end with the opening:
        #
        #     opened      <user>Hi<end><assistant><think>
        #     the chat    <user>Hi<end><assistant>Hello<end>
        #     learned     <user>Hi<end><assistant><think>Hello<end>
        chat = self.chat_template.render((*messages, ("assistant", MARK)), False)
        start, mark, end = chat.rpartition(MARK)
        opening = before[len(os.path.commonprefix([before, start])) :].strip()
        if opening and answer.lstrip().startswith(opening):  # the answer brings its own thought
            answer = answer.lstrip()[len(opening) :].lstrip("\n")
        return before + answer + end if mark else chat

    # ---- Ids

    def _encode(self, text: str) -> Any:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _add_bos(self, ids: Sequence[int]) -> np.ndarray:
        """The ids after BOS, unless the tokenizer has none or the text began with it."""
        if self.bos_id is not None and (not len(ids) or ids[0] != self.bos_id):
            ids = [self.bos_id, *ids]
        return np.array(ids, np.int32)

    def _join_pieces(
        self, example: Example, parts: list[tuple[Piece, list[int], list]]
    ) -> Rendered | RowFault:
        """Ids and mask of an example, each answer with its end token; or why it is not learned."""
        ids: list[int] = []
        ranges: list[tuple[int, int]] = []  # of learned tokens
        for piece, part, found in parts:
            ranges += [(start + len(ids), stop + len(ids)) for start, stop in found]
            ids = ids + part
            if piece.end is not None:
                if piece.targets:
                    ranges.append((len(ids), len(ids) + 1))
                ids.append(piece.end)
        if self.template is None and parts[0][0].end is None:
            ids, ranges = self._end_chat(ids, ranges)
        opened = self._add_bos(ids)
        shift, loss_mask = len(opened) - len(ids), np.zeros(len(opened), bool)
        for start, stop in ranges:
            loss_mask[start + shift : stop + shift] = True
        if self._forgeable and self._has_special(example):
            return RowFault("special token in the text: it would forge a turn", example.id)
        turns = example.messages or ()
        answers = [text for role, text in turns if role == "assistant"] or [example.output]
        learned = {i for start, stop in ranges for i in ids[start:stop]}
        if not any(map(str.strip, answers)) or learned <= self.special_ids:
            return RowFault("nothing to learn: the answer has no tokens", example.id)
        # A chat template may write BOS before each question.
        questions = sum(role == "user" for role, _ in turns) if self.template is None else 1
        num_bos = ids.count(self.bos_id) + shift
        if self.bos_id not in (None, self.end_id) and num_bos > max(questions, 1):
            return RowFault("double BOS: the template or the text brings its own", example.id)
        far = opened.max(initial=0)
        if self._num_embeddings is not None and far >= self._num_embeddings:
            at = f"{self.id_to_token(far)} has id {far}, of {self._num_embeddings} embeddings"
            return RowFault(f"token without an embedding: {at}", example.id)
        return Rendered(opened, loss_mask)

    def _end_chat(
        self, ids: list[int], ranges: list[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ends each range of learned tokens at its last `end_id`, and the chat with the last range.

        A chat template may write more after an answer, such as a line break.
        """
        ends = [
            [i + 1 for i in range(start, stop) if ids[i] == self.end_id] for start, stop in ranges
        ]
        ranges = [
            (start, end[-1] if end else stop)
            for (start, stop), end in zip(ranges, ends, strict=True)
        ]
        if ranges and ids[ranges[-1][1] - 1] == self.end_id:
            return ids[: ranges[-1][1]], ranges
        return [*ids, self.end_id], [*ranges, (len(ids), len(ids) + 1)]

    def _has_special(self, example: Example) -> bool:
        texts = [text for _, text in example.messages or ()]
        texts = texts or [example.instruction, example.input, example.output]
        return any(map(self._specials.search, texts))


# In "Q: x\nA: Paris", " Paris" is learned, 6 bytes. The bytes of the tokens are added up from the
# end, and the answer begins with the token at which the sum reaches 6:
#
#     tokens    Q    :    _x    \n    A    :    _Par    is
#     sums      …                          7    6       2
def _count_back(num_bytes: np.ndarray, piece: Piece) -> list[tuple[int, int]] | None:
    """The tokens of an answer that ends the text; None where their bytes are not the text's."""
    if not piece.targets:
        return []
    start = piece.targets[0][0]
    if not start:
        return [(0, len(num_bytes))]
    sides = piece.text[:start], piece.text[start:]
    prompt, answer = (len(side.encode("utf-8", "surrogatepass")) for side in sides)
    from_end = np.cumsum(num_bytes[::-1])
    # Some tokenizers put a space first, so there may be 1 byte more.
    if not len(from_end) or from_end[-1] - prompt - answer not in (0, 1):
        return None
    if not answer:
        return []
    return [(len(num_bytes) - int(np.searchsorted(from_end, answer)) - 1, len(num_bytes))]


def _find_tokens(encoding: Any, piece: Piece) -> list[tuple[int, int]]:
    """The tokens of each target span; a token across its start belongs to the answer."""

    def find_first(start: int, stop: int) -> int | None:
        tokens = map(encoding.char_to_token, range(start, stop))
        return next((token for token in tokens if token is not None), None)

    ranges = []
    for start, stop in piece.targets:
        first, after = find_first(start, stop), find_first(stop, len(piece.text))
        if first is not None:
            ranges.append((first, len(encoding) if after is None else after))
    return ranges
