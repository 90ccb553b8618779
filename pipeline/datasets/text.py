from pipeline.datasets.base import Dataset, RawSample, Row, field


class Text(Dataset):
    """{"text": "A document, trained on from its first token to its end-of-document token."}"""

    name = "text"

    def sample(self, row: Row) -> RawSample:
        return RawSample(text=field(row, "text", str))
