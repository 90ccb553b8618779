from pipeline.datasets.base import Dataset, RawSample, Row, conversation, field, tools
from pipeline.datasets.parts import IMAGE_FIELDS, image_fields


class Llava(Dataset):
    """{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", ...}]}

    LLaVA's rows and ShareGPT's: `image` may be a list, or absent in a row that is text alone.
    """

    name = "llava"

    def sample(self, row: Row) -> RawSample:
        return RawSample(
            messages=conversation(field(row, "conversations", list), row.get("system")),
            images=image_fields(row),
            tools=tools(row.get("tools"), row.get("functions")),
            image_field="the row's " + " or ".join(IMAGE_FIELDS),
        )
