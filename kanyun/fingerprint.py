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
# transformers' defaults of Qwen2VLImageProcessor, which is Qwen2.5-VL's and Qwen3-VL's, for files that leave them out.
_PROCESSOR_DEFAULTS = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 56 * 56,
    "max_pixels": 28 * 28 * 1280,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# Image settings of training and of every published Qwen-VL; a folder with others is refused. 3 = bicubic.
_PIXELS = {"do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_RESTORE = "put the model's own preprocessor_config.json there"
# The name of a processor setting in config.json's vision_config.
_IN_VISION_CONFIG = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
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

    Raises UserError if there is no tokenizer.json, or image settings ask for other pixels than training makes.
    """
    tokenizer = _json(folder, "tokenizer.json")
    if tokenizer is None:
        raise UserError(f"{folder.uri} has no tokenizer.json: give a Hugging Face folder with a fast tokenizer")
    processor = _processor(folder)
    try:
        special = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
        settings = {"processor": processor and _processor_meaning(processor), **_tokenizer_meaning(tokenizer)}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder.uri}/tokenizer.json is damaged ({error!r}): save the tokenizer folder again"
        ) from error
    spelled = {"processor": processor, **{part: tokenizer.get(part) for part in _TOKENIZER_PARTS}}
    return Fingerprint(digest_of(canonical(settings)), processor, special, former=digest_of(canonical(spelled)))


def check_model(folder: Folder) -> None:
    """Compare tokenizer and processor with the model, as config.json has it; without config.json there is no model.

    Raises UserError if a token has an id that the embedding has no row for (training would end in an IndexError), or
    if the processor cuts images into other patches than the vision tower reads.
    """
    config = _json(folder, "config.json")
    if config is None:
        return
    vocab_size = {**config, **(config.get("text_config") or {})}.get("vocab_size")
    token, largest = largest_token(folder)
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"{folder.uri}: token {token!r} has id {largest}, but config.json has vocab_size {vocab_size}, so the "
            "model has no embedding for it: add rows with `python -m convert resize-vocab HF OUT`"
        )
    vision, processor = config.get("vision_config") or {}, _processor(folder) or {}
    for name, name_in_config in _IN_VISION_CONFIG.items():
        if name in processor and vision.get(name_in_config, processor[name]) != processor[name]:
            raise UserError(
                f"{folder.uri}: the processor's {name} is {processor[name]}, but config.json has {name_in_config} "
                f"{vision[name_in_config]} in vision_config: {_RESTORE}"
            )


def check_images(folder: Folder) -> None:
    """Raise UserError if this is an image model that lacks its image settings: it cannot be given samples with images.

    Texts need none of them.
    """
    if (_json(folder, "config.json") or {}).get("vision_config") and _processor(folder) is None:
        raise UserError(f"{folder.uri} has no preprocessor_config.json, which samples with images need: {_RESTORE}")


def difference(one: dict[str, Any] | None, other: dict[str, Any] | None) -> tuple[str, str]:
    """Return what differs between two `Fingerprint.processor`, of each: ("patch_size 16", "patch_size 14").

    Another patch size is another kind of model, whose other settings say no more. ("", "") if both mean the same.
    """
    if one is None or other is None:
        words = [f"{'an' if processor else 'no'} image processor" for processor in (one, other)]
        return ("", "") if words[0] == words[1] else (words[0], words[1])
    meanings = _processor_meaning(one), _processor_meaning(other)
    names = [name for name in _PROCESSOR_DEFAULTS if meanings[0][name] != meanings[1][name]]
    names = ["patch_size"] if "patch_size" in names else names
    words = [", ".join(f"{name} {processor[name]}" for name in names) for processor in (one, other)]
    return words[0], words[1]


def largest_token(folder: Folder) -> tuple[str, int]:
    """Return the token with the largest id and that id; ("", -1) if the folder has no tokenizer.

    A token may be added in tokenizer.json, or in one of two older files that transformers reads too.
    """
    tokenizer = _json(folder, "tokenizer.json") or {}
    settings, added = _json(folder, "tokenizer_config.json") or {}, _json(folder, "added_tokens.json") or {}
    try:
        vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
        decoder = settings.get("added_tokens_decoder") or {}
        ids = [
            *(vocabulary.items() if isinstance(vocabulary, dict) else []),
            *((token["content"], token["id"]) for token in tokenizer.get("added_tokens") or []),
            *((token["content"], int(number)) for number, token in decoder.items()),
            *added.items(),
        ]
        return max(ids, key=lambda item: item[1], default=("", -1))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder.uri}: its tokenizer is damaged ({error!r}): save the tokenizer folder again"
        ) from error


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


def _processor_meaning(processor: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with numbers in one spelling: 3136 and 3136.0 are the same."""
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
    try:
        _refuse_other_pixels(folder, settings)
        named = _named_settings(settings)
        if number := next((name for name in ("image_mean", "image_std") if not isinstance(named[name], list)), ""):
            raise ValueError(f"{number} is {named[number]!r}, no list of a number for each channel")
        sizes = [value for value in _processor_meaning(named).values() if not isinstance(value, list)]
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{folder.uri} has damaged image settings ({error}): {_RESTORE}") from error
    if min(sizes) <= 0:
        raise UserError(f"{folder.uri} has an image setting that is not above 0 ({named}): {_RESTORE}")
    return named


def _named_settings(settings: dict[str, Any]) -> dict[str, Any]:
    named = {key: settings[key] for key in _PROCESSOR_DEFAULTS if settings.get(key) is not None}
    size = settings.get("size") or {}  # newer name of the two pixel limits; the older one wins, as in transformers
    renamed = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    return _PROCESSOR_DEFAULTS | {key: value for key, value in renamed.items() if value is not None} | named


def _refuse_other_pixels(folder: Folder, settings: dict[str, Any]) -> None:
    kind = settings.get("image_processor_type") or "Qwen"
    if not kind.startswith("Qwen"):  # Qwen2VLImageProcessor, older folders have Qwen2_5_VLImageProcessor
        raise UserError(
            f"{folder.uri} has an image processor {kind}: give the folder of a Qwen2.5-VL or Qwen3-VL model"
        )
    for name, used in _PIXELS.items():
        value = settings.get(name)
        if value is not None and abs(value - used) > 1e-9:
            raise UserError(
                f"{folder.uri} has {name} {value} in its image settings, but pixels are made with {used} in training, "
                "as in every published Qwen-VL: the model would see other images; give a folder with that setting"
            )


def _json(folder: Folder, name: str) -> dict[str, Any] | None:
    if not folder.exists(name):
        return None
    try:
        # As text: json takes bytes in UTF-16, and with a byte order mark, which tokenizers and transformers do not.
        value: dict[str, Any] = json.loads(folder.read(name).decode())
        if not isinstance(value, dict):
            raise ValueError("it is no object of names and values")
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder.uri}/{name} is not JSON ({error}): save the tokenizer folder again") from error
