from pipeline.datasets.base import Dataset, RawSample, Row, field, message, need, tools
from pipeline.datasets.parts import IMAGE_FIELDS, image_fields

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class Llava(Dataset):
    """{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", ...}]}

    `image` may be a list, or absent in a row that is text alone.
    """

    name = "llava"

    def sample(self, row: Row) -> RawSample:
        turns = [need(turn, "a conversation turn", dict) for turn in field(row, "conversations", list)]
        return RawSample(
            messages=[message(_role(turn.get("from")), turn.get("value"), turn) for turn in turns],
            images=image_fields(row),
            tools=tools(row.get("tools")),
            image_field="the row's " + " or ".join(IMAGE_FIELDS),
        )


def _role(name: object) -> str:
    name = need(name, "a turn's 'from'", str)
    return ROLES.get(name, name)
