"""A Hugging Face folder's tokenizer, chat template and image settings, read from its plain files.

transformers is not imported: that costs a driver 6 to 10 s and 0.8 GB, for torch and the models. What is read here must
equal what transformers 5 reads; tests/unit/test_tokenizer_settings.py compares both.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from kanyun.errors import UserError
from kanyun.fingerprint import fingerprint
from kanyun.storage import Folder

END_OF_DOCUMENT = "<|endoftext|>"
# Special tokens with a role, which transformers passes to chat templates by these names.
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Settings:
    """What the encoder needs of a Hugging Face folder; small enough to go to every task."""

    tokenizer_json: str
    chat_template: str | None
    template_variables: tuple[tuple[str, str], ...]  # bos_token, eos_token, ...: transformers gives them to templates
    processor_json: str  # image settings of kanyun.fingerprint as JSON; "null" = text only

    @classmethod
    def load(cls, folder: str) -> "Settings":
        """Read `folder` (local or HDFS).

        Raises:
            UserError: no fast tokenizer, a damaged one, or not Qwen's; or a special token that tokenizer.json lacks.
        """
        root = Folder(folder)
        processor = fingerprint(root).processor
        text = root.read("tokenizer.json").decode()
        config = _json(root, "tokenizer_config.json")
        try:
            roles, added = _special_tokens(root, config), set(_added_tokens(config))
            template = _chat_template(root, config, processor is not None)
        except (AttributeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{root.path} has a chat template or special tokens that transformers would not write ({error!r}): "
                "load the tokenizer with transformers and save it again (save_pretrained)"
            ) from error
        _check(root.path, text, added | set(roles.values()))
        return cls(
            tokenizer_json=text,
            chat_template=template,
            template_variables=tuple(sorted(roles.items())),
            processor_json=json.dumps(processor, sort_keys=True),
        )


def _check(folder: str, tokenizer_json: str, special: set[str]) -> None:
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # tokenizers raises nothing more precise
        raise UserError(
            f"tokenizers cannot load {folder}/tokenizer.json ({error}): save the tokenizer again"
        ) from error
    if tokenizer.token_to_id(END_OF_DOCUMENT) is None:
        raise UserError(f"the tokenizer in {folder} has no {END_OF_DOCUMENT}: give that of a Qwen model")
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if missing := sorted(special - known):
        # transformers would append them to the vocabulary; the fingerprint, and other readers, would not know
        raise UserError(
            f"{folder}/tokenizer_config.json names the special token {missing[0]}, which tokenizer.json does not have: "
            "load the tokenizer with transformers and save it again (save_pretrained)"
        )


def _chat_template(root: Folder, config: dict[str, Any], is_processor: bool) -> str | None:
    """The default template, from the file that transformers prefers.

    A processor's own comes before its tokenizer's: processor_config.json, chat_template.json, chat_template.jinja.
    """
    candidates: list[Any] = []
    if is_processor:
        files = ("processor_config.json", "chat_template.json")
        candidates = [_json(root, name).get("chat_template") for name in files]
    if root.exists("chat_template.jinja"):
        candidates.append(root.read("chat_template.jinja").decode())
    candidates.append(config.get("chat_template"))
    template = next((template for template in candidates if template), None)
    if isinstance(template, list):  # [{"name": "default", "template": ...}, ...]
        template = {named["name"]: named["template"] for named in template}
    return template.get("default") if isinstance(template, dict) else template


def _special_tokens(root: Folder, config: dict[str, Any]) -> dict[str, str]:
    """Role -> token. special_tokens_map.json counts only for folders older than `added_tokens_decoder`."""
    defaults = dict.fromkeys(("unk_token", "eos_token", "pad_token"), END_OF_DOCUMENT)  # Qwen2Tokenizer's
    legacy = {} if "added_tokens_decoder" in config else _json(root, "special_tokens_map.json")
    named = defaults | config | legacy
    return {role: _content(named[role]) for role in _ROLES if named.get(role)}


def _added_tokens(config: dict[str, Any]) -> Iterator[str]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = extra.values() if isinstance(extra, dict) else extra
    for token in (*config.get("added_tokens_decoder", {}).values(), *extra):
        yield _content(token)


def _content(token: Any) -> str:
    """A token is written as a string, or as an AddedToken's fields."""
    return str(token["content"] if isinstance(token, dict) else token)


def _json(root: Folder, name: str) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file.

    Raises UserError if the file holds something else.
    """
    if not root.exists(name):
        return {}
    try:
        value = json.loads(root.read(name))
    except ValueError as error:
        raise UserError(f"{root.path}/{name} is not JSON ({error}): save the tokenizer folder again") from error
    if not isinstance(value, dict):
        raise UserError(f"{root.path}/{name} is not a JSON object: save the tokenizer folder again")
    return value
