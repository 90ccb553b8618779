"""Tokens, loss mask and image tokens of a sample, token for token as the model's processor in transformers makes them.

`Encoder` needs `tokenizers` and `jinja2` alone: importing transformers would cost 10 s and 0.8 GB in every process.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE

from kanyun.vision import grid_thw, image_tokens
from pipeline.chat_template import ChatTemplate
from pipeline.checks import Reason, says_nothing
from pipeline.tokenizer_settings import END_OF_DOCUMENT, Settings

IMAGE_TOKENS = ("<|image_pad|>", "<|video_pad|>")  # the processor takes them for media, wherever they come from
VISION_TOKENS = (*IMAGE_TOKENS, "<|vision_start|>", "<|vision_end|>")
# Words whose tokens are remembered, the first that come: 30 MB. With 10,000, the default, text that was not seen before
# takes 18 % longer (6 MB of Python's library, CPU time of 28 November 2026).
CACHED_WORDS = 100_000


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


class Encoder:
    """Rows to tokens. One a process: making it parses the vocabulary (0.4 s for Qwen's)."""

    def __init__(self, settings: Settings):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Spark has a process a core already
        self._tokenizer = Tokenizer.from_str(settings.tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if isinstance(self._tokenizer.model, BPE):
            self._tokenizer.model._resize_cache(CACHED_WORDS)
        self._template = ChatTemplate(settings.chat_template, dict(settings.template_variables))
        self._processor: dict[str, Any] | None = json.loads(settings.processor_json)
        self._end_of_document = self._tokenizer.token_to_id(END_OF_DOCUMENT)
        self._vision = {token: self._tokenizer.token_to_id(token) for token in VISION_TOKENS}

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[Encoded | Rejected]:
        """Encode rows of pipeline.schema.SAMPLE (`messages` or `text`, `images`, `tools`), in order, untruncated."""
        texts: list[str] = []
        plans: list[_Plan] = []
        for row in rows:
            text: str = row["text"]
            plan: _Plan = None
            if row["messages"] is not None:
                text, plan = self._render(row)
            texts.append(text)
            plans.append(plan)
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [self._finish(row, plan, encoding) for row, plan, encoding in zip(rows, plans, encodings)]

    def _render(self, row: Mapping[str, Any]) -> tuple[str, _Plan]:
        if self._processor is None and row["images"]:
            evidence = f"{len(row['images'])} images, but the tokenizer folder has no image settings"
            return "", Rejected(Reason.PROCESSOR_FAILED, evidence)
        try:
            rendered = self._template.render(row["messages"], row.get("tools"))
            rendered.text.encode()  # raises for half of a surrogate pair, an escape in arguments that came as text
        except Exception as error:  # a template is a program: whatever it raises is about this row
            return "", Rejected(Reason.PROCESSOR_FAILED, f"chat template: {error}")
        if any(says_nothing(rendered.text[start:end]) for start, end in rendered.answers):
            return "", Rejected(Reason.TEXT_TOO_SHORT, "an assistant turn is empty as the chat template renders it")
        return rendered.text, rendered.answers

    def _finish(self, row: Mapping[str, Any], plan: _Plan, encoding: Encoding) -> Encoded | Rejected:
        if isinstance(plan, Rejected):
            return plan
        if plan is None:
            ids = np.array([*encoding.ids, self._end_of_document], np.int32)
            mask = np.ones(len(ids), np.bool_)
        else:
            tokens = encoding.ids
            ids = np.fromiter(tokens, np.int32, len(tokens))  # np.array takes a third longer
            mask = np.zeros(len(ids), np.bool_)
            for start, end in plan:
                mask[_token_at(encoding, start) : _token_at(encoding, end) + 1] = True
        return self._expand_images(ids, mask, row["images"] or [])

    def _expand_images(self, ids: np.ndarray, mask: np.ndarray, images: Sequence[Any]) -> Encoded | Rejected:
        """Repeat each image's one placeholder once a token of the image, computed from its size alone. Untrained."""
        if self._processor is None:
            return Encoded(ids, mask, [])
        for token, expected in zip(IMAGE_TOKENS, (len(images), 0)):
            count = int(np.count_nonzero(ids == self._vision[token]))
            if count != expected:
                evidence = f"{count} {token} in the conversation as rendered, {expected} expected"
                return Rejected(Reason.IMAGE_COUNT_MISMATCH, evidence)
        if not images:
            return Encoded(ids, mask, [])
        try:
            grids = [grid_thw(image["width"], image["height"], self._processor) for image in images]
        except ValueError as error:
            return Rejected(Reason.PROCESSOR_FAILED, f"image size: {error}")
        mask &= ~np.isin(ids, [number for number in self._vision.values() if number is not None])
        repeats = np.ones(len(ids), np.int64)
        repeats[ids == self._vision[IMAGE_TOKENS[0]]] = [image_tokens(g, self._processor["merge_size"]) for g in grids]
        return Encoded(np.repeat(ids, repeats), np.repeat(mask, repeats), grids)


def _token_at(encoding: Encoding, character: int) -> int:
    """Return the first token that has a part of this character (normalisation may leave a character without one)."""
    while (token := encoding.char_to_token(character)) is None:
        character += 1
    return int(token)
