from pipeline.datasets.base import Dataset, Row, Sample, field, images, message, need


class Messages(Dataset):
    """{"messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, ...], "images": ["a.jpg"]}"""

    name = "messages"

    def sample(self, row: Row) -> Sample:
        turns = [need(turn, "a message", dict) for turn in field(row, "messages", list)]
        return Sample(
            messages=[message(turn.get("role"), turn.get("content")) for turn in turns],
            images=images(row.get("images")),
        )
