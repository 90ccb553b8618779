"""Five rows to a drawn pack: python -m examples.rows_to_packs OUT, then open OUT/packs.html."""

import json
import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

from jobs.demo.make_model import main as make_model
from kanyun.naming import discover
from kanyun.preview import preview
from pipeline.recipe import Recipe, RecipeDataset

out = Path(sys.argv[1]).absolute()
digits, documents = out / "raw/digits", out / "raw/pydoc"
for folder in (digits, documents):
    folder.mkdir(parents=True)

# Four scans with a question and an answer each, and a document: one JSON object a line.
with (digits / "train.jsonl").open("w") as rows:
    for scan, word in zip(load_digits().images, ("Zero", "One", "Two", "Three"), strict=False):
        Image.fromarray((255 - 15 * scan).astype("uint8")).resize((112, 112)).save(digits / f"{word}.png")
        question = {"role": "user", "content": "<image>Which digit is this?"}
        answer = {"role": "assistant", "content": word}
        rows.write(json.dumps({"messages": [question, answer], "images": [f"{word}.png"]}) + "\n")
(documents / "documents.jsonl").write_text(json.dumps({"text": "A digit is one of ten signs. " * 3}) + "\n")

make_model(out / "raw", out / "model")  # a tiny model's folder: config, tokenizer, processor
datasets = {
    "digits": RecipeDataset(raw=str(digits), dataset="messages", ratio=4),  # each scan four times an epoch
    "pydoc": RecipeDataset(raw=str(documents), dataset="text"),
}
Recipe(str(out / "work"), str(out / "model"), length=256, datasets=datasets).run(overwrite=False)
(out / "packs.html").write_text(preview(discover(str(out / "work/packed"))[0], 4))
