from pathlib import Path

import pytest

from pipeline.checks import CHECKS, MAX_EVIDENCE, Candidate, Message, On, Reason, RowError, run_checks
from pipeline.datasets.base import RawSample, message

# The names are in users' scripts and in the documentation.
CODES = """malformed_row image_missing image_unreadable image_too_small image_aspect_ratio image_too_large
image_path_escapes image_count_mismatch processor_failed text_too_short too_long duplicate
near_duplicate row_too_large video audio"""


def verdict(on: On, *subject: object) -> tuple[str, str] | None:
    """The reason and evidence against a subject, or None."""
    try:
        run_checks(on, *subject)
    except RowError as error:
        return str(error.reason), error.evidence
    return None


def reason_of(on: On, *subject: object) -> str | None:
    found = verdict(on, *subject)
    return found and found[0]


def candidate(messages: list[Message] | None, text: str | None = None, images: int = 0, min_text: int = 4) -> Candidate:
    """Return the candidate that preprocess makes of a row whose images are all of a list beside the messages."""
    sample = RawSample(messages, text, ("a.png",) * images).placed()
    return Candidate(sample.messages, sample.text, len(sample.images), "the row's images", min_text)


def chat(*turns: tuple[str, str]) -> list[Message]:
    return [message(role, content) for role, content in turns]


def test_reason_codes_have_the_agreed_names() -> None:
    assert {str(reason) for reason in Reason} == set(CODES.split())


def test_the_table_of_reasons_is_whole_and_in_the_documents() -> None:
    assert [check.reason for check in CHECKS] == list(Reason)
    page = (Path(__file__).parents[2] / "docs/datasets.md").read_text()
    for check in CHECKS:
        assert f"| `{check.reason}` | {check.row} | {check.limit} |\n" in page


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((28, 28), None),
        ((27, 500), "image_too_small"),
        ((500, 27), "image_too_small"),
        ((5600, 28), None),
        ((28, 5601), "image_aspect_ratio"),
        ((5601, 28), "image_aspect_ratio"),
        ((1, 1000), "image_too_small"),
    ],
)
def test_image_sizes_at_their_limits(size: tuple[int, int], reason: str | None) -> None:
    assert reason_of(On.IMAGE, *size) == reason


def test_text_counts_after_the_last_image_of_all_messages() -> None:
    short = chat(("user", "long text before <image> ab"), ("assistant", "c  "))
    assert verdict(On.CANDIDATE, candidate(short, images=1)) == (
        "text_too_short",
        "3 characters after the last image, 4 are needed: ' abc  '",
    )
    assert reason_of(On.CANDIDATE, candidate(short, images=1, min_text=3)) is None
    enough = chat(("user", "<image>ab"), ("assistant", "cd"))
    assert reason_of(On.CANDIDATE, candidate(enough, images=1)) is None
    assert reason_of(On.CANDIDATE, candidate(chat(("user", "all of"), ("assistant", " it")))) is None
    assert reason_of(On.CANDIDATE, candidate(None, "日本語文")) is None  # characters, not bytes
    assert reason_of(On.CANDIDATE, candidate(None, "日本語")) == "text_too_short"


def test_messages_need_known_roles_and_an_assistant() -> None:
    good = chat(("system", "s"), ("user", "user"), ("assistant", "a"), ("tool", "t"), ("assistant", "b"))
    assert reason_of(On.CANDIDATE, candidate(good)) is None
    for bad in ([], chat(("user", "u")), chat(("user", "u"), ("bot", "a"), ("assistant", "a"))):
        assert reason_of(On.CANDIDATE, candidate(bad)) == "malformed_row"


def test_an_assistant_turn_must_be_trained_and_say_something() -> None:
    user, call = message("user", "A question?"), {"function": {"name": "f", "arguments": {}}}
    quiet, empty = message("assistant", "No.", {"loss": False}), message("assistant", " \n")
    found = verdict(On.CANDIDATE, candidate([user, quiet, user, message("assistant", "x", {"weight": 0.0})]))
    assert found == ("malformed_row", "loss or weight of all 2 assistant messages is 0: there is nothing to train on")
    found = verdict(On.CANDIDATE, candidate([user, empty, user, message("assistant", "Yes.")]))
    assert found == ("text_too_short", "message 1 is an empty answer of the assistant")
    unheard = message("assistant", "", {"loss": False})
    assert reason_of(On.CANDIDATE, candidate([user, unheard, user, message("assistant", "Yes.")])) is None
    for content in ("", None):
        calling = message("assistant", content, {"tool_calls": [call]})
        assert reason_of(On.CANDIDATE, candidate([user, calling])) is None
        assert reason_of(On.CANDIDATE, candidate([message("user", "<image>"), calling], images=1)) is None
        assert reason_of(On.CANDIDATE, candidate([message("user", "<image>"), calling], images=1)) is None


@pytest.mark.parametrize(
    "answer",
    ["\u200b\u200b\u200b\u200b", "\ufeff\n \u200d\u2060", "\u00ad" * 9, "\u200e\u202a\u202c\u2066", "\x00\x01\x7f\x85",
     "\ufe0f\u3164\u2800\u115f", "\U000e0020\U000e0100", "<think>\n\u200b\n</think>\n\n\ufeff", "<think></think>"],
)  # fmt: skip
def test_an_answer_that_shows_nothing_is_empty(answer: str) -> None:
    user, yes = message("user", "A question?"), message("assistant", "Yes.")
    empty = ("text_too_short", "message 1 is an empty answer of the assistant")
    for content in (answer, [{"type": "text", "text": one} for one in answer]):
        assert verdict(On.CANDIDATE, candidate([user, message("assistant", content), user, yes])) == empty
    for fields in ({"name": "bot"}, {"tool_call_id": "c1"}, {"reasoning_content": "\u200b"}):
        assert verdict(On.CANDIDATE, candidate([user, message("assistant", answer, fields), user, yes])) == empty
    for name, value in (("reasoning_content", "Hm."), ("tool_calls", [{"function": {"name": "f", "arguments": {}}}])):
        said = message("assistant", answer, {name: value})
        assert reason_of(On.CANDIDATE, candidate([user, said, user, yes])) is None
    assert (
        reason_of(On.CANDIDATE, candidate([user, message("assistant", f"{answer}👩\u200d👧{answer}"), user, yes]))
        is None
    )


def test_a_text_that_shows_nothing_is_too_short() -> None:
    found = verdict(On.CANDIDATE, Candidate(None, "\ufeff\u200b\u00ad" * 9, 0, "the row", 4))
    assert found is not None
    assert (found[0], found[1][:40]) == ("text_too_short", "0 characters after the last image, 4 are")
    assert reason_of(On.CANDIDATE, Candidate(None, "\ufeff四个字。\u200b", 0, "the row", 4)) is None


def test_image_parts_and_images_must_agree() -> None:
    two = chat(("user", "<image><image>what?"), ("assistant", "a"))
    assert reason_of(On.CANDIDATE, candidate(two, images=2)) is None
    assert verdict(On.CANDIDATE, candidate(two, images=1)) == (
        "image_count_mismatch",
        "2 image markers in the messages, 1 images in the row's images",
    )
    assert reason_of(On.CANDIDATE, candidate(two, images=3)) == "image_count_mismatch"


@pytest.mark.parametrize(
    ("question", "answer", "places"),
    [
        ("<image>\nWhat is it?", "A cat.", 1),
        ("What is it?\n <image> \nTell me.", "A cat.", 1),
        ("What is it? <image>", "A cat.", 1),
        ("Write a Markdown picture.", "<image>\n![figure](<image>)\n<image>", 0),
        ("What does <image> do in SVG, and <video> in HTML?", "It <image>s.", 0),
    ],
)
def test_a_marker_in_a_row_without_images(question: str, answer: str, places: int) -> None:
    """Its image is lost where the marker stands apart in a question; elsewhere it is text."""
    found = verdict(On.CANDIDATE, candidate(chat(("user", question), ("assistant", answer))))
    evidence = f"{places} image markers in the messages, 0 images in the row's images"
    assert found == (("image_count_mismatch", evidence) if places else None)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"videos": ["a.mp4"]}, "video"),
        ({"video": "a.mp4"}, "video"),
        ({"videos": [], "audio": None, "audios": "[]"}, None),
        ({"audios": ["a.wav"]}, "audio"),
        ({"audio": {"bytes": b"1"}}, "audio"),
    ],
)
def test_videos_and_sounds(row: dict[str, object], reason: str | None) -> None:
    assert reason_of(On.ROW, row) == reason


def test_evidence_is_short_and_can_be_written() -> None:
    error = RowError(Reason.MALFORMED_ROW, "\ud800" + "x " * 1000)
    assert error.evidence.startswith("\\ud800")
    assert len(error.evidence) == MAX_EVIDENCE
