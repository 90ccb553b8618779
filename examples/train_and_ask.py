"""Train the tiny model on the packs of rows_to_packs.py and ask it something: python -m examples.train_and_ask OUT"""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
    sys.exit(__doc__)
out = Path(sys.argv[1]).absolute()
config = {
    "model": str(out / "model"),
    "init": "random",
    "data": str(out / "work/packed"),
    "output": str(out / "run"),
    "length": 256,
    "global_batch": 1,
    "steps": 80,
    "lr": 3e-3,
    "warmup_steps": 10,
}
(out / "train.yaml").write_text(json.dumps(config))
subprocess.run([sys.executable, "-m", "trainer", "run", str(out / "train.yaml")], check=True)
subprocess.run([sys.executable, "-m", "convert", "to-hf", str(out / "run"), str(out / "hf")], check=True)

# From here on it is a model like any other: transformers alone.
model = AutoModelForImageTextToText.from_pretrained(out / "hf")
processor = AutoProcessor.from_pretrained(out / "hf")
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit is this?"}]}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
for word in ("Zero", "One", "Two", "Three"):
    scan = Image.open(out / f"raw/digits/{word}.png").convert("RGB")
    inputs = processor(text=[text], images=[scan], return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(f"{word}.png: {processor.decode(answer, skip_special_tokens=True)}")
