from pipeline.datasets.base import Dataset, RawSample, Row, field, images, message, need


class Messages(Dataset):
    """{"messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, ...], "images": ["a.jpg"]}"""

    name = "messages"

    def sample(self, row: Row) -> RawSample:
        turns = [need(turn, "a message", dict) for turn in field(row, "messages", list)]
        return RawSample(
            messages=[message(turn.get("role"), turn.get("content")) for turn in turns],
            images=images(row.get("images")),
        )
