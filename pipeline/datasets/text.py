from pipeline.datasets.base import Dataset, Row, Sample, field


class Text(Dataset):
    """{"text": "A document, trained on from its first token to its end-of-document token."}"""

    name = "text"

    def sample(self, row: Row) -> Sample:
        return Sample(text=field(row, "text", str))
