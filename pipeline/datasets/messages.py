from pipeline.datasets.base import Dataset, RawSample, Row, conversation, field, tools
from pipeline.datasets.parts import IMAGE_FIELDS, image_fields


class Messages(Dataset):
    """{"messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, ...], "images": ["a.jpg"], "tools": [...]}"""

    name = "messages"

    def sample(self, row: Row) -> RawSample:
        return RawSample(
            messages=conversation(field(row, "messages", list), row.get("system")),
            images=image_fields(row),
            tools=tools(row.get("tools"), row.get("functions")),
            image_field="the row's " + " or ".join(IMAGE_FIELDS),
        )
