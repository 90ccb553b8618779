"""docs/gallery.md, and docs/zh/gallery.md in Chinese, are what the pipeline says today about its planted rows."""

import re
from pathlib import Path

from pyspark.sql import SparkSession

from docs.make_gallery import make
from pipeline.checks import Reason

DOCS = Path(__file__).parents[2] / "docs"


def test_made_again_the_gallery_is_the_same(spark: SparkSession, tmp_path: Path) -> None:
    text, chinese = make(tmp_path / "docs", tmp_path / "here")
    assert text == (DOCS / "gallery.md").read_text()
    assert chinese == (DOCS / "zh/gallery.md").read_text()
    assert re.findall("^## (.*)$", text, re.MULTILINE) == list(Reason)
    shown = set(re.findall('src="gallery/(.*?)"', text))
    assert shown == set(re.findall('src="../gallery/(.*?)"', chinese))
    pictures = {path.name: path.stat().st_size for path in (DOCS / "gallery").iterdir()}
    assert shown == pictures.keys() == {path.name for path in (tmp_path / "docs/gallery").iterdir()}
    assert sum(pictures.values()) < 100_000
    assert str(tmp_path) not in text
