from pipeline.datasets.base import Dataset, RawSample, Row, field, images, message, need

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class Llava(Dataset):
    """{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", ...}]}

    `image` may be a list, or absent in a row that is text alone.
    """

    name = "llava"

    def sample(self, row: Row) -> RawSample:
        turns = [need(turn, "a conversation turn", dict) for turn in field(row, "conversations", list)]
        image = row.get("image")
        return RawSample(
            messages=[message(_role(turn.get("from")), turn.get("value")) for turn in turns],
            images=images(image if isinstance(image, list | None) else [image]),
        )


def _role(name: object) -> str:
    name = need(name, "a turn's 'from'", str)
    return ROLES.get(name, name)
