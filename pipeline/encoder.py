"""What must agree with Qwen's processor token for token: chat template, tokens, loss mask, image tokens.

`Encoder` needs `tokenizers` and `jinja2` alone: importing transformers would cost 10 s and 0.8 GB in every process.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Encoding, Tokenizer

from kanyun.vision import grid_thw, image_tokens
from pipeline.checks import Reason
from pipeline.tokenizer_settings import END_OF_DOCUMENT, Settings

IMAGE_TOKENS = ("<|image_pad|>", "<|video_pad|>")  # the processor takes them for media, wherever they come from
END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True)
class Encoded:
    """One sample as training sees it."""

    input_ids: np.ndarray  # [tokens] int32
    loss_mask: np.ndarray  # [tokens] bool: true = a trained target
    image_grid_thw: list[tuple[int, int, int]]  # patches of each image


@dataclass(frozen=True)
class Rejected:
    reason: Reason
    evidence: str


# What is trained of a text: (start, start of the end of turn) of each assistant message, in characters; None = all.
_Plan = list[tuple[int, int]] | None | Rejected
_Structure = tuple[tuple[str, tuple[str, ...]], ...]  # (role, types of the parts) of each message


# A text that templates which do not take texts as they are (trim, escape, cut thoughts out) would change.
_PROBE = " \n<think>\nthought\n</think>\n & <b>'\"</b> \n"


@dataclass(frozen=True)
class _Skeleton:
    """A chat template's output for one sequence of roles and parts, with holes where the texts go."""

    literals: tuple[str, ...]  # literals[n] comes before text n; the last one ends the conversation
    trained: tuple[tuple[int, int], ...]  # (first, last) text of each assistant message; its end of turn follows

    def fill(self, texts: Sequence[str]) -> tuple[str, list[int]]:
        """The conversation, and where each text ends in it."""
        pieces, ends, position = [], [], 0
        for literal, text in zip(self.literals, texts):
            pieces += [literal, text]
            position += len(literal) + len(text)
            ends.append(position)
        return "".join(pieces) + self.literals[-1], ends


class Encoder:
    """Rows to tokens. One a process: making it parses the vocabulary (0.4 s for Qwen's)."""

    def __init__(self, settings: Settings):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Spark has a process a core already
        self._tokenizer = Tokenizer.from_str(settings.tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._template = _compile(settings.chat_template) if settings.chat_template else None
        self._variables = dict(settings.template_variables)
        self._processor: dict[str, Any] | None = json.loads(settings.processor_json)
        self._end_of_document = self._tokenizer.token_to_id(END_OF_DOCUMENT)
        self._media = {token: self._tokenizer.token_to_id(token) for token in IMAGE_TOKENS}
        self._skeleton = lru_cache(maxsize=4096)(self._make_skeleton)

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[Encoded | Rejected]:
        """Rows of pipeline.schema.SAMPLE (`messages` or `text`, `images`), in order. Nothing is truncated."""
        texts: list[str] = []
        plans: list[_Plan] = []
        for row in rows:
            text: str = row["text"]
            plan: _Plan = None
            if row["messages"] is not None:
                try:
                    text, plan = self._render(row["messages"])
                except Exception as error:  # a template is a program: whatever it raises is about this row
                    text, plan = "", Rejected(Reason.PROCESSOR_FAILED, f"chat template: {error}")
            texts.append(text)
            plans.append(plan)
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [self._finish(*facts) for facts in zip(rows, plans, encodings)]

    def _finish(self, row: Mapping[str, Any], plan: _Plan, encoding: Encoding) -> Encoded | Rejected:
        if isinstance(plan, Rejected):
            return plan
        if plan is None:
            ids = np.array([*encoding.ids, self._end_of_document], np.int32)
            mask = np.ones(len(ids), np.bool_)
        else:
            ids = np.array(encoding.ids, np.int32)
            mask = np.zeros(len(ids), np.bool_)
            for start, end in plan:
                mask[_token_at(encoding, start) : _token_at(encoding, end) + 1] = True
        return self._expand_images(ids, mask, row["images"] or [])

    def _expand_images(self, ids: np.ndarray, mask: np.ndarray, images: Sequence[Any]) -> Encoded | Rejected:
        """Each image's one placeholder becomes as many as the image has tokens, computed from its size alone."""
        if self._processor is None:
            if images:
                return Rejected(
                    Reason.PROCESSOR_FAILED, f"{len(images)} images, but the tokenizer folder has no image settings"
                )
            return Encoded(ids, mask, [])
        for token, expected in zip(IMAGE_TOKENS, (len(images), 0)):
            found = int(np.count_nonzero(ids == self._media[token]))
            if found != expected:
                evidence = f"{found} {token} in the conversation as rendered, {expected} expected"
                return Rejected(Reason.IMAGE_COUNT_MISMATCH, evidence)
        if not images:
            return Encoded(ids, mask, [])
        try:
            grids = [grid_thw(image["width"], image["height"], self._processor) for image in images]
        except ValueError as error:
            return Rejected(Reason.PROCESSOR_FAILED, f"image size: {error}")
        repeats = np.ones(len(ids), np.int64)
        repeats[ids == self._media[IMAGE_TOKENS[0]]] = [image_tokens(g, self._processor["merge_size"]) for g in grids]
        return Encoded(np.repeat(ids, repeats), np.repeat(mask, repeats), grids)

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as the template writes it, and what is trained of it: (start, start of the end of turn).

        The template runs with holes, once for all rows of a structure: that is 10 x faster, and shows where each text
        goes. Searching for the answers in the finished text would go wrong where texts repeat one another.
        """
        skeleton = self._skeleton(tuple((m["role"], tuple(part["type"] for part in m["content"])) for m in messages))
        texts = [text for m in messages for text in _texts(m["content"])]
        rendered, ends = skeleton.fill(texts)
        return rendered, [(ends[first] - len(texts[first]), ends[last]) for first, last in skeleton.trained]

    def _make_skeleton(self, structure: _Structure) -> _Skeleton:
        counts = [len(_texts([{"type": kind, "text": ""} for kind in kinds])) for _, kinds in structure]
        total = sum(counts)
        pieces = re.split("\ue000([0-9]+)\ue001", self._apply(structure, [f"\ue000{n}\ue001" for n in range(total)]))
        literals, holes = pieces[::2], pieces[1::2]
        if holes != [str(n) for n in range(total)]:
            raise ValueError("it does not print each message once and in order, so the trained tokens are not known")
        ends = np.cumsum(counts).tolist()
        trained = [(e - n, e - 1) for e, n, (role, _) in zip(ends, counts, structure) if role == "assistant"]
        if not all(literals[last + 1].startswith(END_OF_TURN) for _, last in trained):
            raise ValueError(f"it prints no {END_OF_TURN} after an assistant message")
        skeleton = _Skeleton(tuple(literals), tuple(trained))
        if self._apply(structure, [_PROBE] * total) != skeleton.fill([_PROBE] * total)[0]:
            raise ValueError("it changes the text of messages, so the trained tokens are not known")
        return skeleton

    def _apply(self, structure: _Structure, texts: Sequence[str]) -> str:
        if self._template is None:
            raise ValueError("the tokenizer folder has none")
        remaining = iter(texts)
        messages = [{"role": role, "content": _content(kinds, remaining)} for role, kinds in structure]
        return self._template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=False, **self._variables
        )


def _texts(content: Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts of a message, as `_content` puts them into it."""
    texts = [part["text"] for part in content if part["type"] == "text"]
    return ["", *texts, ""] if len(texts) < len(content) else ["".join(texts)]


def _content(kinds: Sequence[str], texts: Iterator[str]) -> str | list[dict[str, str]]:
    """A message's content for the template: plain text (a text model's template knows no other), or a list of parts.

    A list has an empty text at either end, so that the skeleton has a hole where the content starts and ends.
    """
    if "image" not in kinds:
        return next(texts)
    parts = ("text", *kinds, "text")
    return [{"type": "text", "text": next(texts)} if kind == "text" else {"type": kind} for kind in parts]


def _token_at(encoding: Encoding, character: int) -> int:
    """Number of the first token that has a part of this character (normalisation may leave a character without one)."""
    while (token := encoding.char_to_token(character)) is None:
        character += 1
    return int(token)


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks what is trained in some templates; transformers prints what is inside, and so do we."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(template: str) -> jinja2.Template:
    """As transformers.utils.chat_template_utils compiles it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:  # jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=False, **options)

    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    return environment.from_string(template)
