from pathlib import Path

import pytest

from pipeline.checks import (
    CHECKS,
    MAX_EVIDENCE,
    Message,
    Reason,
    RowError,
    check_image_count,
    check_messages,
    check_size,
    check_text,
    text_after_images,
)
from pipeline.datasets.base import message

# The names are in users' scripts and in the documentation.
CODES = """malformed_row image_missing image_unreadable image_too_small image_aspect_ratio image_too_large
image_path_escapes image_count_mismatch processor_failed text_too_short too_long duplicate
near_duplicate row_too_large video"""


def reason_of(check: object, *args: object) -> str:
    with pytest.raises(RowError) as caught:
        check(*args)  # type: ignore[operator]
    return str(caught.value.reason)


def chat(*turns: tuple[str, str]) -> list[Message]:
    return [message(role, content) for role, content in turns]


def test_reason_codes_have_the_agreed_names() -> None:
    assert {str(reason) for reason in Reason} == set(CODES.split())


def test_the_table_of_reasons_is_whole_and_in_readme() -> None:
    assert [check.reason for check in CHECKS] == list(Reason)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for check in CHECKS:
        assert f"| `{check.reason}` | {check.row} | {check.limit} |\n" in readme


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
    if reason is None:
        check_size(*size)
    else:
        assert reason_of(check_size, *size) == reason


def test_text_counts_after_the_last_image_of_all_messages() -> None:
    messages = chat(("user", "long text before <image> ab"), ("assistant", "c  "))
    assert text_after_images(messages) == " abc  "
    assert reason_of(check_text, text_after_images(messages), 4) == "text_too_short"  # "abc"
    check_text(text_after_images(chat(("user", "<image>ab"), ("assistant", "cd"))), 4)
    assert text_after_images(chat(("user", "all of"), ("assistant", " it"))) == "all of it"
    check_text("日本語文", 4)  # characters, not bytes
    check_text("abc", 3)


def test_messages_need_known_roles_and_an_assistant() -> None:
    check_messages(chat(("system", "s"), ("user", "u"), ("assistant", "a")))
    for bad in ([], chat(("user", "u")), chat(("user", "u"), ("bot", "a"), ("assistant", "a"))):
        assert reason_of(check_messages, bad) == "malformed_row"


def test_image_parts_and_images_must_agree() -> None:
    two = chat(("user", "<image><image>what?"), ("assistant", "a"))
    check_image_count(two, 2)
    assert reason_of(check_image_count, two, 1) == "image_count_mismatch"
    assert reason_of(check_image_count, two, 3) == "image_count_mismatch"


def test_evidence_is_short_and_can_be_written() -> None:
    error = RowError(Reason.MALFORMED_ROW, "\ud800" + "x" * 1000)
    assert error.evidence.startswith("\\ud800")
    assert len(error.evidence) == MAX_EVIDENCE
