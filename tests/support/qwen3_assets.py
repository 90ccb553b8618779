"""Hugging Face folders of Qwen3 for tests: its tokens, a chat template that acts as the hub's, a tiny model.

Qwen3's tokenizer is Qwen2.5's with four more tokens. Its template writes the thinking of the turn in progress and
strips that of earlier turns; `<think>` stands in the content, or `reasoning_content` beside it.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from tests.support.qwen_assets import (
    language_config,
    real_tokenizer_json,
    save_random,
    tiny_tokenizer_json,
    write_folder,
)

ADDED = ["<tool_response>", "</tool_response>", "<think>", "</think>"]  # ids 151665 to 151668

TEMPLATE = """\
{%- set first = messages[0] %}
{%- set system = first.content if first.role == 'system' else '' %}
{%- if tools %}
    {{- '<|im_start|>system\\n' + (system + '\\n\\n' if system else '') }}
    {{- "# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n" }}
    {{- "You are provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" + (tool | tojson) }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments " }}
    {{- "within <tool_call></tool_call> XML tags:\\n<tool_call>\\n" }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif system %}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- endif %}
{#- Thinking is kept after the last question that a person has asked; a tool's answer is none. #}
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' and not (message.content.startswith('<tool_response>') \
and message.content.endswith('</tool_response>')) %}
        {%- set last.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if last.question < 0 %}
    {%- set last.question = messages | length - 1 %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {%- set thinking = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thinking = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thinking = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > last.question and (loop.last or thinking) %}
            {{- '<think>\\n' + thinking.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {{- '\\n' if content or not loop.first }}
            {{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
            {{- function.arguments if function.arguments is string else function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif not (loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def qwen3_tokenizer_folder(path: Path | str, *, real_vocabulary: bool = True) -> Path:
    """Qwen3's tokenizer and template; no weights."""
    return write_folder(Path(path), qwen3_tokenizer_json(real_vocabulary), False, template=TEMPLATE)


def tiny_qwen3_folder(
    path: Path | str, *, tied: bool = True, seed: int = 0, layers: int = 2, real_vocabulary: bool = False
) -> Path:
    """A Qwen3 of 64 channels with random weights in float32, with tokenizer and template.

    4 heads of 32 channels, so that heads x head_dim = 128 is not the hidden size; 2 key/value groups. Norms are not 1.
    """
    import transformers

    folder = qwen3_tokenizer_folder(path, real_vocabulary=real_vocabulary)
    config = transformers.Qwen3Config(
        **language_config(qwen3_tokenizer_json(real_vocabulary), layers),
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
    )
    save_random(transformers.Qwen3ForCausalLM(config), folder, seed)
    return folder


def qwen3_tokenizer_json(real_vocabulary: bool) -> str:
    tokenizer = Tokenizer.from_str(real_tokenizer_json() if real_vocabulary else tiny_tokenizer_json())
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return json.dumps(json.loads(tokenizer.to_str()))
