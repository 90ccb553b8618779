"""What is read from a tokenizer folder equals what transformers reads, without importing it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, AutoTokenizer

from kanyun.errors import UserError
from pipeline.tokenizer_settings import Settings
from tests.support.qwen3_vl_assets import qwen3_vl_tokenizer_folder
from tests.support.qwen_assets import tiny_tokenizer_folder


@pytest.fixture(params=["qwen2_5", "qwen2_5_vl", "qwen3_vl"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    if request.param == "qwen3_vl":
        return qwen3_vl_tokenizer_folder(tmp_path, real_vocabulary=False)
    return tiny_tokenizer_folder(tmp_path, vision=request.param == "qwen2_5_vl")


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_as_transformers(folder: Path) -> Settings:
    settings = Settings.load(str(folder))
    loaded = AutoProcessor.from_pretrained(folder)
    tokenizer = getattr(loaded, "tokenizer", loaded)
    template = loaded.chat_template or tokenizer.chat_template
    assert settings.chat_template == (template["default"] if isinstance(template, dict) else template)
    assert dict(settings.template_variables) == tokenizer.special_tokens_map
    ours, theirs = json.loads(settings.tokenizer_json), json.loads(tokenizer.backend_tokenizer.to_str())
    for part in ("added_tokens", "normalizer", "pre_tokenizer"):
        assert ours[part] == theirs[part]
    assert ours["model"]["vocab"] == theirs["model"]["vocab"]
    assert ours["model"]["merges"] == theirs["model"]["merges"]
    return settings


def test_a_folder_as_on_the_hub(folder: Path) -> None:
    assert dict(assert_as_transformers(folder).template_variables)["eos_token"] == "<|im_end|>"


def test_a_folder_as_transformers_saves_it(folder: Path, tmp_path: Path) -> None:
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    saved = assert_as_transformers(tmp_path / "saved")
    assert saved.processor_json == Settings.load(str(folder)).processor_json
    assert saved.chat_template == Settings.load(str(folder)).chat_template


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "processor_config.json"])
def test_of_several_templates_the_one_that_transformers_takes(folder: Path, name: str) -> None:
    text = "{{ eos_token }}other"
    (folder / name).write_text(text if name.endswith("jinja") else json.dumps({"chat_template": text}))
    assert_as_transformers(folder)


def test_the_default_of_named_templates(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    change(folder / "tokenizer_config.json", chat_template=named)
    (folder / "chat_template.json").unlink(missing_ok=True)
    assert assert_as_transformers(folder).chat_template == "plain"


def test_roles_of_an_old_folder_come_from_its_special_tokens_map(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("added_tokens_decoder", "eos_token", "pad_token"):
        del config[key]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    eos = {"content": "<|im_start|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": eos}))
    variables = dict(assert_as_transformers(folder).template_variables)
    assert (variables["eos_token"], variables["pad_token"]) == ("<|im_start|>", "<|endoftext|>")


def test_a_special_token_that_tokenizer_json_lacks_is_refused(folder: Path) -> None:
    """transformers gives it the next id, which neither the fingerprint nor the trainer would know."""
    change(folder / "tokenizer_config.json", eos_token="<|new|>")
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|new|>") is not None
    with pytest.raises(UserError, match=r"<\|new\|>, which tokenizer.json does not have"):
        Settings.load(str(folder))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[]", "is not a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "special tokens that transformers would not write"),
        ("chat_template.jinja", b"\xff", "a chat template or special tokens that transformers would not write"),
        ("tokenizer.json", '{"model": {}}', "tokenizers cannot load"),
    ],
)
def test_a_damaged_folder_is_one_sentence(folder: Path, name: str, text: str | bytes, message: str) -> None:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        Settings.load(str(folder))


def test_neither_torch_nor_transformers_is_imported(folder: Path) -> None:
    """A driver of build with both holds 0.9 GB; without, 0.2."""
    code = (
        "import sys; from pipeline.encoder import Encoder; from pipeline.stages.build import Settings; "
        f"Encoder(Settings.load({str(folder)!r})); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
