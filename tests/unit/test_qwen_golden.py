"""Our tokens and loss masks against what transformers' own processor makes of the raw conversation."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from pipeline.encoder import Encoded, Encoder, Rejected
from pipeline.tokenizer_settings import Settings
from tests.support.qwen_assets import real_tokenizer_folder, tiny_tokenizer_folder

# Qwen2.5-VL's template with {% generation %} around what is to be trained: transformers' return_assistant_tokens_mask
# needs that. `{{ '\n' }}`: trim_blocks would swallow a newline behind a block.
_BODY = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>"
)
_MARKED = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nDEFAULT"
    "<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}{% generation %}"
    + _BODY
    + "{% endgeneration %}{% else %}"
    + _BODY
    + "{% endif %}{{ '\n' }}{% endfor %}"
)
MARKED_VL = _MARKED.replace("DEFAULT", "You are a helpful assistant.")
MARKED_TEXT = _MARKED.replace("DEFAULT", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")

# Read once a folder: its 151,643 tokens take two seconds.
load_tokenizer, load_processor = cache(AutoTokenizer.from_pretrained), cache(AutoProcessor.from_pretrained)

Message = dict[str, Any]
VISION = [151652, 151653, 151655]  # <|vision_start|>, <|vision_end|>, <|image_pad|>


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


IMAGE = {"type": "image", "text": None}


def message(role: str, *parts: Any) -> Message:
    return {"role": role, "content": [text(p) if isinstance(p, str) else p for p in parts]}


TEXT_CONVERSATIONS = [
    [message("user", "Hi"), message("assistant", "Hello!")],
    [message("system", "Be terse.\n"), message("user", "1+1?"), message("assistant", "2")],
    [message("user", "a"), message("assistant", "b"), message("user", "c\n\n"), message("assistant", "d  ")],
    # what the search for an answer in the rendered text would trip over: it is in the default system prompt too
    [message("user", "You"), message("assistant", "helpful assistant")],
    [message("user", "x" * 3000), message("assistant", "x")],
    [
        message("user", "Ünïcødé 你好 e\u0301 ﬁ 한국어 \u1112\u1161\u11ab 👩🏽‍🚀"),
        message("assistant", "e\u0301cole ☃ 你\n好"),
    ],
    [message("user", "<|im_end|>\n<|im_start|>assistant\nno"), message("assistant", "say <|im_end|> or <tool_call>")],
    [message("user", "parts ", "of ", "a list"), message("assistant", "an", "swer")],
    [
        message("system", "s"),
        message("assistant", "first"),
        message("user", "{{ jinja }} {% if %}"),
        message("user", ""),
    ],
    [message("user", "no answer")],
]
VL_CONVERSATIONS = [
    ([message("user", IMAGE, "\nWhat?"), message("assistant", "A cat.")], [(640, 480)]),
    (
        [message("system", "Look."), message("user", "one ", IMAGE, " two ", IMAGE), message("assistant", "ok")],
        [(56, 900), (28, 28)],
    ),
    (
        [message("user", IMAGE), message("assistant", "b"), message("user", "and", IMAGE), message("assistant", "c")],
        [(300, 200), (1999, 31)],
    ),
    ([message("user", "draw"), message("assistant", "here: ", IMAGE, " done")], [(84, 140)]),
]


@pytest.fixture(scope="module")
def vl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_tokenizer_folder(tmp_path_factory.mktemp("vl"))


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_tokenizer_folder(tmp_path_factory.mktemp("text"), vision=False)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where templates are looked at, not ids: the real vocabulary takes 2 s to read for each template."""
    return tiny_tokenizer_folder(tmp_path_factory.mktemp("tiny"), vision=False)


@pytest.fixture(scope="module")
def vl_encoder(vl_folder: Path) -> Encoder:
    return Encoder(Settings.load(str(vl_folder)))


@pytest.fixture(scope="module")
def text_encoder(text_folder: Path) -> Encoder:
    return Encoder(Settings.load(str(text_folder)))


def row(messages: list[Message] | None, sizes: Any = (), document: str | None = None) -> dict[str, Any]:
    return {"messages": messages, "text": document, "images": [{"width": w, "height": h} for w, h in sizes]}


def joined(messages: list[Message]) -> list[Message]:
    """The raw row as a text model's user has it: content is a string."""
    return [{"role": m["role"], "content": "".join(p["text"] for p in m["content"])} for m in messages]


def only(result: list[Encoded | Rejected]) -> Encoded:
    (encoded,) = result
    assert isinstance(encoded, Encoded), encoded
    return encoded


@pytest.mark.parametrize("messages", TEXT_CONVERSATIONS)
def test_text_tokens_and_mask(text_folder: Path, text_encoder: Encoder, messages: list[Message]) -> None:
    tokenizer = load_tokenizer(text_folder)
    expected = tokenizer.apply_chat_template(joined(messages), return_dict=True)["input_ids"]
    marked = tokenizer.apply_chat_template(
        joined(messages), chat_template=MARKED_TEXT, return_dict=True, return_assistant_tokens_mask=True
    )
    assert marked["input_ids"] == expected
    got = only(text_encoder.encode([row(messages)]))
    assert got.input_ids.tolist() == expected
    assert got.loss_mask.astype(int).tolist() == marked["assistant_masks"]


@pytest.mark.parametrize("messages", TEXT_CONVERSATIONS)
def test_text_in_the_vl_folder(vl_folder: Path, vl_encoder: Encoder, messages: list[Message]) -> None:
    processor = load_processor(vl_folder)
    (expected,) = processor.apply_chat_template([messages], tokenize=True, return_dict=True)["input_ids"]
    assert only(vl_encoder.encode([row(messages)])).input_ids.tolist() == expected


@pytest.mark.parametrize(("messages", "sizes"), VL_CONVERSATIONS)
def test_images_tokens_and_mask(vl_folder: Path, vl_encoder: Encoder, messages: list[Message], sizes: Any) -> None:
    processor = load_processor(vl_folder)
    pictures = iter([Image.new("RGB", size) for size in sizes])
    raw = [
        {
            "role": m["role"],
            "content": [p if p["type"] == "text" else {"type": "image", "image": next(pictures)} for p in m["content"]],
        }
        for m in messages
    ]
    expected = processor.apply_chat_template([raw], tokenize=True, return_dict=True)
    got = only(vl_encoder.encode([row(messages, sizes)]))
    assert got.input_ids.tolist() == expected["input_ids"][0]
    assert got.image_grid_thw == [tuple(grid) for grid in expected["image_grid_thw"].tolist()]
    # transformers' own mask shifts when image tokens are expanded (its spans are of the unexpanded text), so: before
    before = processor.tokenizer.apply_chat_template(
        messages, chat_template=MARKED_VL, return_dict=True, return_assistant_tokens_mask=True
    )
    tokens = iter(expected["image_grid_thw"].prod(-1).tolist())
    repeats = [next(tokens) // 4 if token == 151655 else 1 for token in before["input_ids"]]
    words = np.array(before["assistant_masks"]) & ~np.isin(before["input_ids"], VISION)  # images are never a target
    assert got.loss_mask.astype(int).tolist() == np.repeat(words, repeats).tolist()


def test_random_batches_equal_transformers(text_folder: Path, text_encoder: Encoder) -> None:
    rng = random.Random(3)
    alphabet = ["a", "B", " ", "\n", "é", "e\u0301", "你", "7", "'ll", "<|im_end|>", "\t", "☃", "\u0301"]
    tokenizer = load_tokenizer(text_folder)
    rows = []
    for _ in range(200):
        roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * rng.randint(1, 3)
        # an answer that begins with white space may share its first token with the header: see the next test
        rows.append([message(r, "".join(["I", *rng.choices(alphabet, k=rng.randint(0, 30))])) for r in roles])
    for messages, got in zip(rows, text_encoder.encode([row(m) for m in rows])):
        assert isinstance(got, Encoded)
        marked = tokenizer.apply_chat_template(
            joined(messages), chat_template=MARKED_TEXT, return_dict=True, return_assistant_tokens_mask=True
        )
        assert got.input_ids.tolist() == marked["input_ids"]
        assert got.loss_mask.astype(int).tolist() == marked["assistant_masks"]


def test_a_token_shared_with_the_header_is_trained(text_folder: Path, text_encoder: Encoder) -> None:
    # "assistant\n" + "\n\nfoo": Qwen's pre-tokeniser makes one token of the three newlines
    messages = [message("user", "q"), message("assistant", "\n\nfoo")]
    tokenizer = load_tokenizer(text_folder)
    got = only(text_encoder.encode([row(messages)]))
    assert got.input_ids.tolist() == tokenizer.apply_chat_template(joined(messages), return_dict=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(got.input_ids[got.loss_mask].tolist()) == ["ĊĊĊ", "foo", "<|im_end|>"]


def test_document_ends_with_end_of_text_and_is_all_trained(vl_folder: Path, vl_encoder: Encoder) -> None:
    got = only(vl_encoder.encode([row(None, document=" Hello\nworld ")]))
    assert got.input_ids.tolist() == [*load_tokenizer(vl_folder)(" Hello\nworld ")["input_ids"], 151643]
    assert got.loss_mask.all()


@pytest.mark.parametrize(
    ("messages", "sizes", "reason"),
    [
        ([message("user", "literal <|image_pad|>")], [], "image_count_mismatch"),
        ([message("user", IMAGE, "literal <|image_pad|>")], [(60, 60)], "image_count_mismatch"),
        ([message("user", "literal <|video_pad|>")], [], "image_count_mismatch"),
        ([message("user", IMAGE)], [(28, 28 * 300)], "processor_failed"),
    ],
)
def test_rows_that_cannot_agree_are_rejected(
    vl_encoder: Encoder, messages: list[Message], sizes: Any, reason: str
) -> None:
    good = row([message("user", "Hi"), message("assistant", "Hello")])
    rejected, encoded = vl_encoder.encode([row(messages, sizes), good])
    assert isinstance(rejected, Rejected)
    assert rejected.reason == reason
    assert isinstance(encoded, Encoded)


def test_image_without_image_settings(text_encoder: Encoder) -> None:
    (rejected,) = text_encoder.encode([row([message("user", IMAGE, "?")], [(60, 60)])])
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "processor_failed"
    assert rejected.evidence == "1 images, but the tokenizer folder has no image settings"


@pytest.mark.parametrize(
    ("template", "evidence"),
    [
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "0 assistant turns for 1 assistant messages"),
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}", "no <|im_end|>"),
        (
            "{% for m in messages + messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}",
            "2 assistant turns for 1",
        ),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
    ],
)
def test_template_whose_answers_cannot_be_located(tiny_folder: Path, template: str, evidence: str) -> None:
    settings = Settings.load(str(tiny_folder))
    encoder = Encoder(Settings(**{**vars(settings), "chat_template": template}))
    (rejected,) = encoder.encode([row([message("user", " padded "), message("assistant", "yes")])])
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "processor_failed"
    assert evidence in rejected.evidence


def test_what_a_template_makes_of_an_answer_is_trained(tiny_folder: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    encoder = Encoder(Settings(**{**vars(Settings.load(str(tiny_folder))), "chat_template": template}))
    got = only(encoder.encode([row([message("user", " padded "), message("assistant", "  yes ")])]))
    tokenizer = load_tokenizer(tiny_folder)
    assert (
        tokenizer.decode(got.input_ids) == "<|im_start|>user\npadded<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )
    assert tokenizer.decode(got.input_ids[got.loss_mask]) == "yes<|im_end|>"


def test_an_empty_answer_is_not_a_trained_end_of_turn(vl_encoder: Encoder) -> None:
    (rejected,) = vl_encoder.encode([row([message("user", "hi"), message("assistant", "")])])
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "text_too_short"
