"""Tokenizer and processor settings as a digest: packs fit a model only if both were made with the same ones.

Read from the plain JSON files of a Hugging Face folder, so that neither pipeline nor trainer need transformers for it.
"""

import json
from dataclasses import dataclass
from typing import Any

from kanyun.errors import UserError
from kanyun.manifest import canonical, digest_of
from kanyun.storage import Folder

# What a Hugging Face folder has besides weights and config.json; goes verbatim wherever a dataset or checkpoint goes.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
# The parts of tokenizer.json that decide which ids a text gets, and what an id means.
_TOKENIZER_PARTS = ("model", "normalizer", "pre_tokenizer", "added_tokens")
# transformers' defaults of Qwen2VLImageProcessor, for files that leave them out.
_PROCESSOR_DEFAULTS = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 56 * 56,
    "max_pixels": 28 * 28 * 1280,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


@dataclass(frozen=True)
class Fingerprint:
    digest: str
    # patch_size, temporal_patch_size, merge_size, min_pixels, max_pixels, image_mean, image_std; None = text only
    processor: dict[str, Any] | None
    token_ids: dict[str, int]  # special token -> id


def fingerprint(folder: Folder) -> Fingerprint:
    """Fingerprint of a Hugging Face folder with a fast tokenizer.

    Raises UserError if there is no tokenizer.json.
    """
    tokenizer = _json(folder, "tokenizer.json")
    if tokenizer is None:
        raise UserError(f"{folder.uri} has no tokenizer.json: give a Hugging Face folder with a fast tokenizer")
    processor = _processor(folder)
    facts = {"processor": processor, **{part: tokenizer.get(part) for part in _TOKENIZER_PARTS}}
    special = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    return Fingerprint(digest_of(canonical(facts)), processor, special)


def copy_tokenizer(source: Folder, target: Folder) -> None:
    """Copy the files of TOKENIZER_FILES that `source` has, byte for byte."""
    for name in TOKENIZER_FILES:
        if source.exists(name):
            target.write(name, source.read(name))


def _processor(folder: Folder) -> dict[str, Any] | None:
    """Image processor settings, from transformers 5's processor_config.json or from preprocessor_config.json."""
    nested = (_json(folder, "processor_config.json") or {}).get("image_processor")
    settings = nested or _json(folder, "preprocessor_config.json")
    if settings is None:
        return None
    found = {key: settings[key] for key in _PROCESSOR_DEFAULTS if settings.get(key) is not None}
    size = settings.get("size") or {}  # newer name of the two pixel limits; the older one wins, as in transformers
    renamed = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    return _PROCESSOR_DEFAULTS | {key: value for key, value in renamed.items() if value is not None} | found


def _json(folder: Folder, name: str) -> dict[str, Any] | None:
    if not folder.exists(name):
        return None
    try:
        value: dict[str, Any] = json.loads(folder.read(name))
        return value
    except ValueError as error:
        raise UserError(f"{folder.uri}/{name} is not JSON ({error}): save the tokenizer folder again") from error
