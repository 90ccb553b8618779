"""The digest of a tokenizer: what it means counts, how it is spelled does not; what was written before stays valid."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kanyun.errors import UserError
from kanyun.fingerprint import check_model, difference, fingerprint
from kanyun.manifest import canonical, digest_of
from kanyun.storage import Folder

ADDED = [{"id": 4, "content": "<|im_end|>", "special": True, "normalized": False, "lstrip": False}]
TOKENIZER: dict[str, Any] = {
    "model": {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": "",
        "ignore_merges": False,
        "vocab": {"a": 0, "b": 1, "ab": 2, "abb": 3},
        "merges": [["a", "b"], ["ab", "b"]],
    },
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    },
    "added_tokens": ADDED,
}
PROCESSOR = {"patch_size": 14, "min_pixels": 3136, "image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}
Change = Callable[[dict[str, Any], dict[str, Any]], Any]


def write(folder: Path, change: Change = lambda tokenizer, processor: None) -> Folder:
    tokenizer, processor = json.loads(json.dumps([TOKENIZER, PROCESSOR]))
    change(tokenizer, processor)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return Folder(str(folder))


def set_model(**values: Any) -> Change:
    return lambda tokenizer, processor: tokenizer["model"].update(values)


SAME: dict[str, Change] = {
    "merges as text": set_model(merges=["a b", "ab b"]),
    "no ignore_merges": lambda tokenizer, processor: tokenizer["model"].pop("ignore_merges"),
    "ignore_merges null": set_model(ignore_merges=None),
    "prefix null": set_model(continuing_subword_prefix=None, end_of_word_suffix="", unk_token=None),
    "new flags at their default": set_model(byte_fallback=False, fuse_unk=False),
    "no type": lambda tokenizer, processor: tokenizer["model"].pop("type"),
    "vocabulary in another order": set_model(vocab={"abb": 3, "ab": 2, "b": 1, "a": 0}),
    "a sequence of one": lambda tokenizer, processor: tokenizer.update(
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    ),
    "offsets": lambda tokenizer, processor: tokenizer["pre_tokenizer"]["pretokenizers"][1].update(trim_offsets=False),
    "flags of a token": lambda tokenizer, processor: tokenizer["added_tokens"][0].update(rstrip=False),
    "numbers as floats": lambda tokenizer, processor: processor.update(min_pixels=3136.0, image_std=[1.0, 1.0, 1.0]),
    "the new name of a limit": lambda tokenizer, processor: processor.update(
        size={"shortest_edge": processor.pop("min_pixels")}
    ),
}
OTHER: dict[str, Change] = {
    "merges in another order": set_model(merges=["ab b", "a b"]),
    "ignore_merges": set_model(ignore_merges=True),
    "byte_fallback": set_model(byte_fallback=True),
    "an id": set_model(vocab={"a": 1, "b": 0, "ab": 2, "abb": 3}),
    "use_regex at its default": lambda tokenizer, processor: tokenizer["pre_tokenizer"]["pretokenizers"][1].pop(
        "use_regex"
    ),
    "no normalizer": lambda tokenizer, processor: tokenizer.update(normalizer=None),
    "a token more": lambda tokenizer, processor: tokenizer["added_tokens"].append({"id": 5, "content": "<x>"}),
    "strips": lambda tokenizer, processor: tokenizer["added_tokens"][0].update(lstrip=True),
    "a limit": lambda tokenizer, processor: processor.update(min_pixels=3137),
}


@pytest.mark.parametrize("name", SAME)
def test_spelling_does_not_count(tmp_path: Path, name: str) -> None:
    one, other = fingerprint(write(tmp_path / "one")), fingerprint(write(tmp_path / "other", SAME[name]))
    assert one.digest == other.digest


@pytest.mark.parametrize("name", OTHER)
def test_meaning_counts(tmp_path: Path, name: str) -> None:
    one, other = fingerprint(write(tmp_path / "one")), fingerprint(write(tmp_path / "other", OTHER[name]))
    assert one.digest != other.digest


def test_digests_made_before_stay_valid(tmp_path: Path) -> None:
    """The former algorithm, here written out: a digest of the files' spelling."""
    kept = write(tmp_path / "kept", SAME["merges as text"])
    tokenizer = json.loads(kept.read("tokenizer.json"))
    parts = {part: tokenizer[part] for part in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    former = digest_of(canonical({"processor": fingerprint(kept).processor, **parts}))
    nothing = Folder(str(tmp_path / "nothing"))
    assert fingerprint(kept).is_of(former, nothing)
    respelled = fingerprint(write(tmp_path / "respelled"))  # the model's folder, saved by a newer transformers
    assert not respelled.is_of(former, nothing)
    assert respelled.is_of(former, kept)
    other = fingerprint(write(tmp_path / "other", OTHER["an id"]))
    assert not other.is_of(former, kept)
    assert not respelled.is_of("0" * 32, kept)


def test_a_token_without_a_row_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    check_model(folder)  # no config.json: a tokenizer alone
    for config in ({"vocab_size": 4}, {"vocab_size": 9, "text_config": {"vocab_size": 4}}):
        folder.write("config.json", json.dumps(config).encode())
        with pytest.raises(
            UserError, match=r"token '<\|im_end\|>' has id 4, but config.json has vocab_size 4, .*resize"
        ):
            check_model(folder)
    folder.write("config.json", b'{"vocab_size": 5}')
    check_model(folder)
    folder.write("tokenizer_config.json", b'{"added_tokens_decoder": {"7": {"content": "<late>"}}}')
    with pytest.raises(UserError, match="'<late>' has id 7"):
        check_model(folder)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"do_normalize": False}, "has do_normalize False in its image settings, but pixels are made with True"),
        ({"do_resize": False}, "has do_resize False"),
        ({"rescale_factor": 1 / 127.5}, "has rescale_factor 0.00784.* made with 0.0039"),
        ({"resample": 2}, "has resample 2 .* made with 3"),
        ({"image_mean": 0.5}, r"damaged image settings \(image_mean is 0.5, no list of a number for each channel\)"),
        (
            {"image_processor_type": "CLIPImageProcessor"},
            "image processor CLIPImageProcessor: give the folder",
        ),
    ],
)
def test_pixels_that_training_would_not_make_are_refused(tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fingerprint(write(tmp_path / "model", lambda tokenizer, processor: processor.update(setting)))


def test_image_settings_as_transformers_saves_them(tmp_path: Path) -> None:
    saved = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "crop_size": None,
    }
    plain = fingerprint(write(tmp_path / "plain"))
    assert fingerprint(write(tmp_path / "saved", lambda tokenizer, processor: processor.update(saved))) == plain


def test_a_processor_of_another_model_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    folder.write("config.json", b'{"vision_config": {"patch_size": 14, "spatial_merge_size": 2}}')
    check_model(folder)
    for vision, message in (
        ('"patch_size": 16', "processor's patch_size is 14, but config.json has patch_size 16 in vision_config"),
        ('"spatial_merge_size": 3', "merge_size is 2, but config.json has spatial_merge_size 3"),
        ('"temporal_patch_size": 1', "temporal_patch_size is 2, but config.json has temporal_patch_size 1"),
    ):
        folder.write("config.json", f'{{"vision_config": {{{vision}}}}}'.encode())
        with pytest.raises(UserError, match=message):
            check_model(folder)


def test_the_difference_between_two_processors_in_words(tmp_path: Path) -> None:
    def settings(**changes: Any) -> dict[str, Any] | None:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        return fingerprint(write(folder, lambda tokenizer, processor: processor.update(changes))).processor

    own = settings()
    assert difference(own, settings(min_pixels=3136.0)) == difference(None, None) == ("", "")
    assert difference(settings(patch_size=16, min_pixels=65536), own) == ("patch_size 16", "patch_size 14")
    assert difference(settings(min_pixels=784, max_pixels=9), own) == (
        "min_pixels 784, max_pixels 9",
        "min_pixels 3136, max_pixels 1003520",
    )
    assert difference(None, own) == ("no image processor", "an image processor")


def test_a_damaged_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    folder.write("tokenizer.json", b'{"model": null}')
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        fingerprint(folder)
