"""Score a Hugging Face folder on the held-out scans with transformers alone: nothing of ours is imported here.

usage: score.py HF_FOLDER HELD_OUT RESULT.json
example: python jobs/demo/score.py demo/hf demo/heldout/digits demo/score.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

BATCH = 50
ANSWER_TOKENS = 4


def prompt(processor: Any, row: dict[str, Any]) -> str:
    """The question as a chat that waits for the assistant's answer."""
    text = row["messages"][0]["content"].removeprefix("<image>")
    content = [{"type": "image"}, {"type": "text", "text": text}]
    rendered: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return rendered


@torch.no_grad()
def answers(model: Any, processor: Any, folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    images = [Image.open(folder / row["images"][0]) for row in rows]
    texts = [prompt(processor, row) for row in rows]
    inputs = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    found: list[str] = processor.batch_decode(new, skip_special_tokens=True)
    return found


def main(hf: Path, held_out: Path, result: Path) -> None:
    processor = AutoProcessor.from_pretrained(hf)
    model = AutoModelForImageTextToText.from_pretrained(hf, dtype=torch.float32).eval()
    rows = [json.loads(line) for line in (held_out / "questions.jsonl").read_text().splitlines()]
    right, wrong = 0, []
    for start in tqdm(range(0, len(rows), BATCH), desc="held-out scans", unit="batch"):
        batch = rows[start : start + BATCH]
        for row, answer in zip(batch, answers(model, processor, held_out, batch)):
            expected = row["messages"][1]["content"]
            right += answer == expected
            if answer != expected:
                wrong.append({"image": row["images"][0], "expected": expected, "answer": answer})
    accuracy = right / len(rows)
    result.write_text(json.dumps({"accuracy": accuracy, "scans": len(rows), "wrong": wrong}, indent=2) + "\n")
    print(f"{right} of {len(rows)} held-out scans read right: {accuracy:.1%}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
