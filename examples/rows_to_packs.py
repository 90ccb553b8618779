"""Five rows to a drawn pack: python -m examples.rows_to_packs OUT, then open OUT/packs.html."""

import json
import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

from jobs.demo.make_model import write_model
from kanyun.naming import discover
from kanyun.preview import preview
from pipeline.recipe import Recipe, RecipeDataset

if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
    sys.exit(__doc__)
out = Path(sys.argv[1]).absolute()
digits, documents = out / "raw/digits", out / "raw/documents"
for folder in (digits, documents):
    folder.mkdir(parents=True)

# Four scans with a question and an answer each, and a document: one JSON object a line.
rows = []
for scan, word in zip(load_digits().images, ("Zero", "One", "Two", "Three"), strict=False):
    Image.fromarray((255 - 15 * scan).astype("uint8")).resize((112, 112)).save(digits / f"{word}.png")
    question = {"role": "user", "content": "<image>Which digit is this?"}
    answer = {"role": "assistant", "content": word}
    rows.append(json.dumps({"messages": [question, answer], "images": [f"{word}.png"]}))
(digits / "train.jsonl").write_text("\n".join(rows))
document = "A digit is one of ten signs. " * 3
(documents / "train.jsonl").write_text(json.dumps({"text": document}))

write_model([document, *rows], out / "model", "qwen2_5_vl")  # a tiny one's folder: config, tokenizer, processor
datasets = {
    "digits": RecipeDataset(raw=str(digits), dataset="messages", ratio=4),  # each scan four times an epoch
    "documents": RecipeDataset(raw=str(documents), dataset="text"),
}
Recipe(str(out / "work"), str(out / "model"), length=256, datasets=datasets).run(overwrite=False)
(out / "packs.html").write_text(preview(discover(str(out / "work/packed"))[0], 8))
