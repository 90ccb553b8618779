import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kanyun.errors import UserError
from pipeline.checks import RowError
from pipeline.datasets import dataset
from pipeline.datasets.base import Dataset, RawSample, Row, field, message
from tests.support.raw_rows import fields, rows_of

IMAGE = {"type": "image", "text": None}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def evidence_of(name: str, row: Any) -> str:
    with pytest.raises(RowError) as caught:
        dataset(name).sample(row)
    assert caught.value.reason == "malformed_row"
    return caught.value.evidence


def test_markers_are_replaced_in_place_and_nothing_else_changes() -> None:
    row = {
        "messages": [{"role": "user", "content": " a<image>\n\n<image><image> <Image> b "}],
        "images": ["x", b"y", "z"],
    }
    sample = dataset("messages").sample(row).placed()
    assert sample.messages == [
        {"role": "user", "content": [text(" a"), IMAGE, text("\n\n"), IMAGE, IMAGE, text(" <Image> b ")]}
    ]
    assert sample.images == ("x", b"y", "z")


def test_a_marker_in_a_list_of_parts_is_text() -> None:
    content = [{"type": "text", "text": "the <image> tag"}, {"type": "image"}]
    row = {"messages": [{"role": "user", "content": content}], "images": ["a"]}
    sample = dataset("messages").sample(row).placed()
    assert sample.messages == [{"role": "user", "content": [text("the <image> tag"), IMAGE]}]


def test_images_come_as_paths_or_bytes() -> None:
    given: list[Any] = [
        {"bytes": b"1", "path": "p"},
        {"bytes": None, "path": "q"},
        b"2",
        "r",
        {"bytes": b"", "path": "s"},
    ]
    given += [{"image": "t"}, {"type": "image_url", "image_url": {"url": "u"}}, {"image": {"bytes": b"3"}}]
    images = dataset("messages").sample({"messages": [], "images": given}).images
    assert images == (b"1", "q", b"2", "r", "s", "t", "u", b"3")
    assert dataset("messages").sample({"messages": [], "images": None}).images == ()


def test_images_in_the_content_itself() -> None:
    """Qwen's, OpenAI's and transformers' spellings, a table's with nulls, and a bare place for the row's own list."""
    parts: list[Any] = [
        {"type": "image", "image": "1"},
        {"type": "image_url", "image_url": {"url": "2", "detail": "high"}},
        {"type": "image_url", "image_url": "3"},
        {"image": "4"},
        {"type": "image", "text": None, "image": None},
        {"type": "image", "url": "5"},
        {"type": "image", "image": {"bytes": b"6", "path": None}},
        {"type": "image", "image": "data:image/png;base64,aGVs%62G8="},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}},
        {"text": "What?", "type": None, "image": None},
    ]
    row = {"messages": [{"role": "user", "content": parts}], "images": ["own"]}
    sample = dataset("messages").sample(row).placed()
    assert sample.images == ("1", "2", "3", "4", "own", "5", b"6", b"hello", b"hello")
    assert sample.messages == [{"role": "user", "content": [IMAGE] * 9 + [text("What?")]}]


def test_parts_that_say_which_of_the_images_they_are() -> None:
    """As in LLaVA's mix for VSFT, whose parts all have an `index`; pandas writes it as a float."""
    parts: list[Any] = [
        {"type": "image", "text": None, "index": 2.0},
        {"type": "text", "text": "beside", "index": None},
        {"type": "image", "index": 0},
        {"type": "image"},
        {"type": "image", "index": 2},
    ]
    row = {"messages": [{"role": "user", "content": parts}], "images": ["0", "1", "2"]}
    sample = dataset("messages").sample(row).placed()
    assert sample.images == ("2", "0", "1", "2")
    assert sample.messages == [{"role": "user", "content": [IMAGE, text("beside"), IMAGE, IMAGE, IMAGE]}]
    with pytest.raises(RowError, match="a part is image 2, the row has 2 images") as caught:
        dataset("messages").sample(row | {"images": ["0", "1"]}).placed()
    assert caught.value.reason == "image_count_mismatch"


@pytest.mark.parametrize(
    ("role", "question", "lost"),
    [
        ("user", "Picture 1: <img>im/0.jpg</img>\nWhat is it?", True),
        ("assistant", "Write <img>im/0.jpg</img>.", False),
        ("user", "Is <img src='a.png'></img> or <img> </p> valid?", False),
    ],
)
def test_paths_within_the_text_are_no_images(role: str, question: str, lost: bool) -> None:
    """Qwen-VL's rows would be trained without their pictures."""
    raw = {"messages": [{"role": role, "content": question}]}
    if not lost:
        assert dataset("messages").sample(raw).placed().messages == [{"role": role, "content": [text(question)]}]
        return
    with pytest.raises(RowError) as caught:
        dataset("messages").sample(raw).placed()
    assert caught.value.evidence.startswith(
        "'<img>im/0.jpg</img>' is text here: write <image>, and the image's path in"
    )
    assert caught.value.reason == "image_count_mismatch"


def test_a_marker_beside_inline_images_alone_is_text() -> None:
    turns = [
        {"role": "user", "content": [{"type": "image", "image": "1"}]},
        {"role": "assistant", "content": "![x](<image>) <video>"},
    ]
    sample = dataset("messages").sample({"messages": turns}).placed()
    assert sample.images == ("1",)
    assert sample.messages is not None
    assert sample.messages[1]["content"] == [text("![x](<image>) <video>")]


@pytest.mark.parametrize(
    ("uri", "data"),
    [
        ("data:image/png;base64,aGVsbG8=", b"hello"),
        ("DATA:;base64,aGVsbG8=", b"hello"),
        ("data:image/svg+xml,%3Csvg%20a%3E", b"<svg a>"),
        ("data:image/png;charset=utf-8;base64,aGVs\nbG8", b"hello"),
        ("data:image/png;base64,_-8=", b"\xff\xef"),
        ("data:image/png;base64;charset=utf-8,aGVsbG8=", b"hello"),
        ("\n data:image/png; BASE64 , aGVs\r\nbG8=\n", b"hello"),
        ("_-8" + "A" * 129, b"\xff\xef" + bytes(97)),
        (f"{'/+8A' * 33}\n", b"\xff\xef\x00" * 33),
    ],
)
def test_data_uris_and_base64_are_their_bytes(uri: str, data: bytes) -> None:
    assert dataset("llava").sample({"image": uri, "conversations": []}).images == (data,)
    assert dataset("messages").sample({"images": [{"url": uri}], "messages": []}).images == (data,)


def test_bytes_that_came_through_json() -> None:
    assert dataset("llava").sample({"image": {"bytes": "aGVsbG8", "path": None}, "conversations": []}).images == (
        b"hello",
    )


def test_both_spellings_of_a_turn() -> None:
    """Tables that were joined have the fields of both."""
    plain = {"role": "user", "content": "hi", "from": None, "value": None}
    turns = [plain, {"from": "gpt", "value": "ho"}]
    expected = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert dataset("llava").sample({"conversations": turns}).messages == expected
    assert dataset("messages").sample({"messages": turns}).messages == expected


def test_the_first_field_that_has_images() -> None:
    row = {"messages": [], "images": [], "image": "a.jpg"}
    assert dataset("messages").sample(row).images == ("a.jpg",)
    nones: list[Any] = [None, "", b"", {}, {"bytes": None, "path": None}, {"bytes": b"", "path": ""}]
    for none in nones:
        assert dataset("messages").sample({"messages": [], "images": none, "image": none}).images == ()
        assert dataset("messages").sample({"messages": [], "images": none, "image": "a.jpg"}).images == ("a.jpg",)


def test_a_data_uri_that_is_none() -> None:
    with pytest.raises(RowError) as caught:
        dataset("messages").sample({"messages": [], "images": ["data:image/png;base64,aGVsbG8" + "x" * 802]})
    assert caught.value.reason == "image_unreadable"
    assert len(caught.value.evidence) < 200


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": "a.mp4"},
        {"type": "video_url"},
        {"video": "a.mp4"},
        {"type": "audio", "audio_url": "a.wav"},
        {"type": "input_audio", "input_audio": {}},
    ],
)
def test_videos_and_sounds_in_the_content(part: Any) -> None:
    with pytest.raises(RowError) as caught:
        dataset("messages").sample({"messages": [{"role": "user", "content": [part]}]})
    assert caught.value.reason == ("audio" if "audio" in str(part) else "video")


def test_what_a_message_carries_beside_its_content() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"é": 1.5}}}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [call], "weight": 1.0, "loss": True, "id": 7},
        {"role": "tool", "content": "r", "tool_call_id": "c", "name": "f", "tool_calls": None},
        {"role": "assistant", "content": "x", "weight": 0, "tool_calls": []},
        {"role": "assistant", "content": "y", "tool_calls": json.dumps([call])},
    ]
    sample = dataset("messages").sample({"messages": turns, "tools": json.dumps([call])}).placed()
    assert sample.messages is not None
    first, result, untrained, text_of_json = sample.messages
    assert (first["content"], json.loads(first["extra"]), "loss" in first) == (None, {"tool_calls": [call]}, False)
    assert json.loads(result["extra"]) == {"tool_call_id": "c", "name": "f"}
    assert untrained == {"role": "assistant", "content": [text("x")], "loss": False}
    assert json.loads(text_of_json["extra"]) == {"tool_calls": [call]}
    assert json.loads(sample.tools or "") == [call]
    for none in (None, [], "", "[]"):
        assert dataset("llava").sample({"conversations": [], "tools": none}).tools is None


@pytest.mark.parametrize(("name", "key"), [("messages", "messages"), ("llava", "conversations")])
def test_lists_as_json_text(name: str, key: str) -> None:
    """As databases, CSV files and many exports to parquet have them, all of a list or each object."""
    turns = [{"role": "user", "content": "<image>é?"}, {"role": "assistant", "content": "A \n[1]."}]
    expected = dataset(name).sample({key: turns, "images": ["a.jpg"]}).placed()
    for messages in (json.dumps(turns), f" {json.dumps(turns, ensure_ascii=False)}\n", [*map(json.dumps, turns)]):
        for images in ({"images": '["a.jpg"]'}, {"images": "[]", "image": "a.jpg"}, {"image": ' ["a.jpg"]'}):
            assert dataset(name).sample({key: messages, **images, "tools": "[]"}).placed() == expected
    for path in ("[1].jpg", "[a]", "{1}.jpg"):
        assert dataset(name).sample({key: "[]", "image": path}).images == (path,)


def test_llava_has_one_image_several_or_none() -> None:
    turns = [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "ho"}]
    for given_image, expected in (("a", ("a",)), (["a", "b"], ("a", "b")), (None, ()), ({"bytes": b"1"}, (b"1",))):
        sample = dataset("llava").sample({"image": given_image, "conversations": turns})
        assert sample.images == expected
    assert sample.messages is not None
    assert [m["role"] for m in sample.messages] == ["user", "assistant"]
    assert dataset("llava").sample({"conversations": turns}).images == ()


def test_a_document_is_taken_as_it_is() -> None:
    assert dataset("text").sample({"text": " <image> \n"}) == RawSample(text=" <image> \n")


def test_bytes_are_the_text_in_them_where_a_text_is_needed() -> None:
    """Hive and Impala write parquet's texts without a mark; a tar's KEY.text is bytes, too."""
    part = {"type": b"text", "text": "zwölf".encode()}
    turns = [{"role": b"user", "content": b"wie?"}, {"role": b"assistant", "content": [part]}]
    expected = [{"role": "user", "content": "wie?"}, {"role": "assistant", "content": [text("zwölf")]}]
    for messages in (turns, json.dumps(expected).encode()):
        assert dataset("messages").sample({"messages": messages, "images": [b"image"]}).messages == expected
    assert dataset("text").sample({"text": b"one"}) == RawSample(text="one")
    assert dataset("messages").sample({"messages": [], "images": [b"", {"bytes": b""}]}).images == (b"", b"")


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("messages", {}, "no field 'messages', it has none"),
        ("messages", {"messages": None}, "messages is null, a list is needed"),
        (
            "messages",
            {"messages": "hello"},
            "messages: a text that is no JSON (Expecting value: line 1",
        ),
        ("messages", {"messages": {"role": "user"}}, "messages is an object"),
        ("messages", {"messages": ["hello"]}, "a message: a text that is no JSON ("),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "content is null"),
        ("messages", {"messages": [{"role": "user", "content": 7}]}, "is a number, a string or a list is needed: 7"),
        ("messages", {"messages": [{"role": "user", "content": b"\xff"}]}, "is bytes, a string or a list is needed"),
        ("messages", {"messages": [{"role": 3, "content": "x"}]}, "role is a number"),
        ("messages", {"messages": [{"content": "x"}]}, "role is null"),
        ("messages", {"messages": [{"role": "user", "content": ["x"]}]}, "a part of a message's content is a string"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "tune"}]}]}, "{'type': 'tune'}"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "{'type': 'text'}"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image", "index": -1}]}]}, "index is -1, a"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image", "index": "0"}]}]}, "index is '0', a"),
        ("messages", {"messages": [], "images": [None]}, "an image is None"),
        ("messages", {"messages": [], "images": [""]}, "an image is ''"),
        ("messages", {"messages": [], "images": [{"bytes": None, "path": None}]}, "an image is {"),
        (
            "messages",
            {"messages": [{"role": "user", "content": "x", "loss": 0.5}]},
            "loss is 0.5, known are 0",
        ),
        ("messages", {"messages": [{"role": "user", "content": "x", "weight": "0"}]}, "weight is '0'"),
        ("messages", {"messages": [{"role": "user", "content": "x", "train": "no"}]}, "train is 'no', known are 0"),
        (
            "messages",
            {"messages": [{"role": "user", "content": "x", "training_detail": [{"begin_offset": 0}]}]},
            "only whole messages are trained or not",
        ),
        ("messages", {"messages": [{"role": "tool_call", "content": "f(1)"}]}, "tool calls: a text that is no JSON"),
        ("messages", {"messages": [{"role": "tool_call", "content": ""}]}, "a turn of tool calls has none"),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": "x", "reasoning_content": ["why"]}]},
            "reasoning_content is a list, a string is needed",
        ),
        (
            "llava",
            {
                "conversations": [
                    {"from": "gpt", "value": "x", "loss": False},
                    {"from": "function_call", "value": '{"name": "f"}'},
                ]
            },
            "only one of them is to be trained",
        ),
        ("llava", {"conversations": [], "system": ["Be brief."]}, "the row's system is a list"),
        ("messages", {"messages": [], "tools": [1]}, "a tool is a number"),
        ("messages", {"messages": [], "tools": "[{"}, "tools: a text that is no JSON ("),
        ("messages", {"messages": [], "tools": '{"name": "f"}'}, "tools is an object"),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": "", "tool_calls": ["f"]}]},
            "a tool call: a text that is no JSON",
        ),
        ("messages", {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "function name is null"),
        ("llava", {"image": 5, "conversations": []}, "an image is 5"),
        ("llava", {"image": "a"}, "no field 'conversations', it has 'image'"),
        ("llava", {"conversations": [{"from": None, "value": "x"}]}, "a message's role is null"),
        ("llava", {"conversations": [{"from": "gpt", "value": None}]}, "content is null"),
        ("text", {"text": None}, "text is null, a string is needed"),
        ("text", {"text": True}, "text is a boolean"),
        ("text", {"txt": "x"}, "no field 'text', it has 'txt'"),
    ],
)
def test_malformed_rows_say_what_is_wrong(name: str, row: Any, says: str) -> None:
    assert says in evidence_of(name, row)


def test_a_further_dataset_is_one_class() -> None:
    class Captions(Dataset):
        name = "captions-of-a-test"
        min_text = 1

        def sample(self, row: Row) -> RawSample:
            turns = [message("user", "<image>"), message("assistant", field(row, "caption", str))]
            return RawSample(messages=turns, images=(field(row, "file", str),))

    try:
        assert dataset("captions-of-a-test").sample({"caption": "a", "file": "f"}).images == ("f",)
    finally:
        del Dataset.known["captions-of-a-test"]
    known = ", ".join(sorted(Dataset.known))
    assert {"llava", "messages", "text"} <= set(Dataset.known)
    with pytest.raises(UserError, match=f"unknown dataset 'captions-of-a-test', known are {known}: "):
        dataset("captions-of-a-test")


def test_bad_values_in_parquet_cost_their_row_alone(tmp_path: Path) -> None:
    texts = pa.array([b"fine", b"\xff\xfe", b"fine too"]).view(pa.string())
    pq.write_table(pa.table({"text": texts, "bin": [b"12", None, b"1"]}), tmp_path / "a.parquet")
    first, bad, last = rows_of(tmp_path / "a.parquet")
    assert json.loads(first.raw) == {"text": "fine", "bin": "<2 bytes>"}
    assert fields(first)["bin"] == b"12"
    assert "a string is needed: a value that cannot be read: UnicodeDecodeError: 'utf-8'" in evidence_of(
        "text", bad.fields
    )
    assert json.loads(bad.raw)["text"].startswith("a value that cannot be read")
    assert (last.position, fields(last)["text"]) == (2, "fine too")
