"""Hugging Face folders of Qwen3-VL for tests: chat templates that act as the hub's, processor settings, a tiny model.

Its tokenizer is Qwen3's. Its processor is Qwen2-VL's image processor with patches of 16 x 16 pixels, of which 2 x 2 are
a visual token of 32 x 32, mean and standard deviation 0.5, and pixel limits under the names of `size`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.qwen3_assets import qwen3_tokenizer_json
from tests.support.qwen_assets import language_config, save_random, write_folder

TOKEN_PIXELS = 32 * 32  # of a visual token
PUBLISHED_PIXELS = 64 * TOKEN_PIXELS, 16384 * TOKEN_PIXELS  # the limits of every published Qwen3-VL

_CONTENT = """\
{%- macro media(part) %}
    {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
    {%- elif part.type == 'video' or 'video' in part %}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
    {%- elif 'text' in part %}
        {{- part.text }}
    {%- endif %}
{%- endmacro %}
{%- macro shown(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}{{- media(part) }}{%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- macro texts(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content if 'text' in part %}{{- part.text }}{%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- macro calls(message, content) %}
    {%- for call in message.tool_calls or [] %}
        {%- set function = call.function or call %}
        {{- '\\n' if content or not loop.first }}
        {{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
        {{- function.arguments if function.arguments is string else function.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
{%- endmacro %}
{%- macro head(system) %}
    {%- if tools %}
        {{- '<|im_start|>system\\n' + (system + '\\n\\n' if messages[0].role == 'system' else '') }}
        {{- "# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n" }}
        {{- "You are provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}
        {%- for tool in tools %}
            {{- "\\n" + (tool | tojson) }}
        {%- endfor %}
        {{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments " }}
        {{- "within <tool_call></tool_call> XML tags:\\n<tool_call>\\n" }}
        {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
    {%- elif messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
    {%- endif %}
{%- endmacro %}
"""
_RESULT = """\
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' }}
        {{- '\\n<tool_response>\\n' + shown(message.content) + '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}
    {%- endif %}
{%- endfor %}
"""

# Qwen3-VL-*-Instruct: no thinking, no default system prompt, no system message but the first, no picture in an answer.
INSTRUCT_TEMPLATE = (
    _CONTENT
    + """\
{{- head(texts(messages[0].content)) }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + shown(message.content) + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + texts(message.content) + calls(message, message.content) + '<|im_end|>\\n' }}
"""
    + _RESULT
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# Qwen3-VL-*-Thinking: writes the thinking behind a person's last question and strips earlier ones, as Qwen3 does.
THINKING_TEMPLATE = (
    _CONTENT
    + """\
{{- head(shown(messages[0].content)) }}
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- set content = shown(message.content) %}
    {%- if message.role == 'user' and not (content.startswith('<tool_response>') \
and content.endswith('</tool_response>')) %}
        {%- set last.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if last.question < 0 %}
    {%- set last.question = messages | length - 1 %}
{%- endif %}
{%- for message in messages %}
    {%- set content = shown(message.content) %}
    {%- if message.role == 'user' or message.role == 'system' and not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thinking = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thinking = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thinking = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > last.question and (loop.last or thinking) %}
            {{- '<think>\\n' + thinking.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {{- calls(message, content) + '<|im_end|>\\n' }}
"""
    + _RESULT
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)


def processor_settings(min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """preprocessor_config.json as the hub has it."""
    return {
        "size": {"longest_edge": max_pixels, "shortest_edge": min_pixels},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }


def qwen3_vl_tokenizer_folder(
    path: Path | str,
    *,
    real_vocabulary: bool = True,
    template: str = INSTRUCT_TEMPLATE,
    min_pixels: int = PUBLISHED_PIXELS[0],
    max_pixels: int = PUBLISHED_PIXELS[1],
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Qwen3-VL's tokenizer, template and processor settings, of which `settings` replaces some; no weights."""
    text = qwen3_tokenizer_json(real_vocabulary)
    settings = processor_settings(min_pixels, max_pixels) | dict(settings or {})
    folder = write_folder(Path(path), text, True, template=template, processor=settings)
    del settings["image_processor_type"]  # what is left is in video_preprocessor_config.json too
    video = settings | {"video_processor_type": "Qwen3VLVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2))
    return folder


# A tower of other sizes than any released one has: tokens of 24 x 24 pixels, nine patches each, of a single frame.
OTHER_TOWER: dict[str, Any] = {
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 3,
    "temporal_patch_size": 1,
    "num_position_embeddings": 25,
    "image_mean": [0.48, 0.45, 0.4],
    "image_std": [0.3, 0.25, 0.2],
}


def tiny_qwen3_vl_folder(
    path: Path | str,
    *,
    tied: bool = True,
    seed: int = 0,
    layers: int = 3,
    deepstack: tuple[int, ...] = (0, 2),
    min_pixels: int = 4 * TOKEN_PIXELS,
    max_pixels: int = 256 * TOKEN_PIXELS,
    vision_hidden_size: int = 64,
    tower: Mapping[str, Any] | None = None,
    real_vocabulary: bool = False,
) -> Path:
    """A Qwen3-VL of 64 channels with random weights in float32, with tokenizer, template and processor settings.

    4 heads of 32 channels, so that heads x head_dim is not the hidden size, 2 key/value groups, interleaved mrope in
    sections [6, 5, 5]; a vision tower of 4 blocks, whose blocks `deepstack` are added behind the first layers, with
    learned positions of 6 x 6 patches, which every grid interpolates. `max_pixels` bounds an image to 256 tokens. No
    weight is trivial: norms are not 1, biases not 0. `tower` replaces sizes of the tower by their names in config.json,
    and pixels are made for them, with the image_mean and image_std in it.
    """
    import transformers
    from tokenizers import Tokenizer

    text, sizes = qwen3_tokenizer_json(real_vocabulary), dict(tower or {})
    settings: dict[str, Any] = {name: sizes.pop(name) for name in ("image_mean", "image_std") if name in sizes}
    shared = {
        "patch_size": "patch_size",
        "temporal_patch_size": "temporal_patch_size",
        "merge_size": "spatial_merge_size",
    }
    settings |= {mine: sizes[theirs] for mine, theirs in shared.items() if theirs in sizes}
    folder = qwen3_vl_tokenizer_folder(
        path, real_vocabulary=real_vocabulary, min_pixels=min_pixels, max_pixels=max_pixels, settings=settings
    )
    token = Tokenizer.from_str(text).token_to_id
    config = transformers.Qwen3VLConfig(
        text_config={
            **language_config(text, layers),
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 4,
            "hidden_size": vision_hidden_size,
            "num_heads": 4,
            "intermediate_size": 80,  # an odd multiple of 16, as 4304 is
            "out_hidden_size": 64,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": list(deepstack),
            **sizes,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    save_random(transformers.Qwen3VLForConditionalGeneration(config), folder, seed)
    return folder
