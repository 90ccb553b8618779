from pipeline.datasets.base import Dataset, RawSample, Row, field, message, need, tools
from pipeline.datasets.parts import IMAGE_FIELDS, image_fields


class Messages(Dataset):
    """{"messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, ...], "images": ["a.jpg"], "tools": [...]}"""

    name = "messages"

    def sample(self, row: Row) -> RawSample:
        turns = [need(turn, "a message", dict) for turn in field(row, "messages", list)]
        return RawSample(
            messages=[message(turn.get("role"), turn.get("content"), turn) for turn in turns],
            images=image_fields(row),
            tools=tools(row.get("tools")),
            image_field="the row's " + " or ".join(IMAGE_FIELDS),
        )
