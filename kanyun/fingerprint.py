"""Tokenizer and processor settings as a digest: packs fit a model only if both were made with the same ones.

The digest is of what the settings mean, not of how a version of transformers spells them. They are read from the plain
JSON files of a Hugging Face folder, so that neither pipeline nor trainer need transformers for it.
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
# Settings of tokenizers whose absence means this value; null and "" mean absent everywhere.
_TOKENIZER_DEFAULTS = {
    "add_prefix_space": True,
    "use_regex": True,
    "ignore_merges": False,
    "fuse_unk": False,
    "byte_fallback": False,
    "dropout": 0,
    "invert": False,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "special": False,
}
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
    former: str = ""  # the digest by the files' spelling, which datasets and checkpoints made before have

    def is_of(self, stored: str, files: Folder) -> bool:
        """Return whether the digest `stored` beside tokenizer `files` (which may be missing) is of this tokenizer."""
        if stored in (self.digest, self.former):
            return True
        if not files.exists("tokenizer.json"):
            return False
        kept = fingerprint(files)
        return kept.digest == self.digest and kept.former == stored


def fingerprint(folder: Folder) -> Fingerprint:
    """Return the fingerprint of a Hugging Face folder with a fast tokenizer.

    Raises UserError if there is no tokenizer.json.
    """
    tokenizer = _json(folder, "tokenizer.json")
    if tokenizer is None:
        raise UserError(f"{folder.uri} has no tokenizer.json: give a Hugging Face folder with a fast tokenizer")
    processor = _processor(folder)
    special = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    try:
        settings = {"processor": _processor_meaning(processor), **_tokenizer_meaning(tokenizer)}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder.uri}/tokenizer.json is damaged ({error!r}): save the tokenizer folder again"
        ) from error
    spelled = {"processor": processor, **{part: tokenizer.get(part) for part in _TOKENIZER_PARTS}}
    return Fingerprint(digest_of(canonical(settings)), processor, special, former=digest_of(canonical(spelled)))


def check_vocabulary(folder: Folder) -> None:
    """Compare the tokenizer with the model's embedding, as config.json has it; without config.json there is no model.

    Raises UserError if a token has an id that the embedding has no row for: training would end in an IndexError.
    """
    config = _json(folder, "config.json")
    vocab_size = {**config, **(config.get("text_config") or {})}.get("vocab_size") if config else None
    token, largest = largest_token(folder)
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"{folder.uri}: token {token!r} has id {largest}, but config.json has vocab_size {vocab_size}, so the "
            "model has no embedding for it: add rows with `python -m convert resize-vocab HF OUT`"
        )


def largest_token(folder: Folder) -> tuple[str, int]:
    """Return the token with the largest id and that id; ("", -1) if the folder has no tokenizer.

    A token may be added in tokenizer.json, or in one of two older files that transformers reads too.
    """
    tokenizer = _json(folder, "tokenizer.json") or {}
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    decoder = (_json(folder, "tokenizer_config.json") or {}).get("added_tokens_decoder") or {}
    ids = [
        *(vocabulary.items() if isinstance(vocabulary, dict) else []),
        *((token["content"], token["id"]) for token in tokenizer.get("added_tokens") or []),
        *((token["content"], int(number)) for number, token in decoder.items()),
        *(_json(folder, "added_tokens.json") or {}).items(),
    ]
    return max(ids, key=lambda item: item[1], default=("", -1))


def copy_tokenizer(source: Folder, target: Folder) -> None:
    """Copy the files of TOKENIZER_FILES that `source` has, byte for byte."""
    for name in TOKENIZER_FILES:
        if source.exists(name):
            target.write(name, source.read(name))


def _tokenizer_meaning(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of tokenizer.json that decide ids, in one spelling."""
    model = dict(tokenizer["model"])
    large = {"vocab": model.pop("vocab", None), "merges": model.pop("merges", None)}
    if large["merges"]:  # ["a", "b"], which older versions wrote as "a b"
        large["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in large["merges"]]
    return {
        "model": {"type": "BPE", **_meaning(model), **large},
        "normalizer": _meaning(tokenizer.get("normalizer")),
        "pre_tokenizer": _meaning(tokenizer.get("pre_tokenizer")),
        "added_tokens": sorted(_meaning(tokenizer.get("added_tokens") or []), key=lambda token: token["id"]),
    }


def _meaning(value: Any) -> Any:
    """Return settings without those that are at their default; a Sequence of one is its member, an empty one None."""
    if isinstance(value, list):
        return [_meaning(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "Sequence":
        members = _meaning(value.get("normalizers") or value.get("pretokenizers") or [])
        return members if len(members) > 1 else next(iter(members), None)
    return {
        key: _meaning(setting)
        for key, setting in value.items()
        # trim_offsets moves a token's place in the text, not its id.
        if setting not in (None, "") and key != "trim_offsets" and _TOKENIZER_DEFAULTS.get(key) != setting
    }


def _processor_meaning(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the settings with numbers in one spelling: 3136 and 3136.0 are the same."""
    if processor is None:
        return None
    return {
        key: [float(number) for number in value] if isinstance(value, list) else float(value)
        for key, value in processor.items()
    }


def _processor(folder: Folder) -> dict[str, Any] | None:
    """Image processor settings, from transformers 5's processor_config.json or from preprocessor_config.json."""
    nested = (_json(folder, "processor_config.json") or {}).get("image_processor")
    settings = nested or _json(folder, "preprocessor_config.json")
    if settings is None:
        return None
    named = {key: settings[key] for key in _PROCESSOR_DEFAULTS if settings.get(key) is not None}
    size = settings.get("size") or {}  # newer name of the two pixel limits; the older one wins, as in transformers
    renamed = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    return _PROCESSOR_DEFAULTS | {key: value for key, value in renamed.items() if value is not None} | named


def _json(folder: Folder, name: str) -> dict[str, Any] | None:
    if not folder.exists(name):
        return None
    try:
        value: dict[str, Any] = json.loads(folder.read(name))
        return value
    except ValueError as error:
        raise UserError(f"{folder.uri}/{name} is not JSON ({error}): save the tokenizer folder again") from error
