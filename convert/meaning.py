"""What a config.json means to transformers, compared with what it means to the trainer.

It may spell a setting in two places; which one counts has changed over transformers' versions. Importing transformers
takes as long as importing torch, so conversion asks it beside its own work.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from kanyun.errors import UserError
from trainer.models.config import ModelConfig


@contextmanager
def meaning_compared(folder: Path, config: ModelConfig) -> Iterator[None]:
    """Compare beside the block, see `require_same_meaning`. Raises its error when the block ends, also in place of the
    block's own.
    """
    with ThreadPoolExecutor(1, "meaning") as pool:
        compared = pool.submit(require_same_meaning, folder, config)
        try:
            yield
        finally:
            compared.result()


def require_same_meaning(folder: Path, config: ModelConfig) -> None:
    """Raise UserError if transformers refuses the config.json in `folder`, or its decoder computes something else than
    the trainer's, in equal shapes.
    """
    import transformers

    with accepted(f"{folder}/config.json"):
        settings = transformers.AutoConfig.from_pretrained(folder)
        text = settings.get_text_config()
    rope = text.rope_parameters
    head_dim = getattr(text, "head_dim", config.head_dim)
    other_layers = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    meanings = {
        "rope type": (rope["rope_type"], "default"),
        "rope_theta": (rope["rope_theta"], config.rope_theta),
        "rms_norm_eps": (text.rms_norm_eps, config.norm_eps),
        "hidden_act": (text.hidden_act, "silu"),
        # An image model computes it from null, too; in a text model transformers does not.
        "head_dim": (config.head_dim if config.vision and head_dim is None else head_dim, config.head_dim),
        "layer_types": (min(other_layers, default="full_attention"), "full_attention"),
    }
    if config.vision:
        section = list(config.mrope_section)  # where config.json has none, the family's default is transformers'
        meanings["mrope_section"] = (list(rope.get("mrope_section", section)), section)
        meanings["in_channels"] = (settings.vision_config.in_channels, config.vision.channels)
    for name, (theirs, ours) in meanings.items():
        if theirs != ours:
            raise UserError(
                f"{folder}/config.json means {name} {theirs} to transformers, and {ours} to the trainer: leave the "
                "spelling that the model was trained with, if the trainer has it"
            )

    padding, rows = text.pad_token_id, config.vocab_size
    if padding is not None and not -rows <= padding < rows:
        raise UserError(
            f"{folder}/config.json has pad_token_id {padding}, but the embedding has {rows} rows: transformers cannot "
            "load it; correct pad_token_id, or delete it"
        )


@contextmanager
def accepted(file: str) -> Iterator[None]:
    """Turn any error that transformers raises in the `with` block into a UserError that names `file`."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(f"transformers refuses {file} ({reason}): correct it") from error
