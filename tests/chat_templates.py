"""Chat templates over a vocabulary of many control tokens: where the tests of templates start from."""

from __future__ import annotations

from typing import Any

from vocabularies import CONTROL, USER_DEFINED, byte_level

from edgert.chat_template import ChatTemplate
from edgert.tokenizer import Tokenizer

KEY = "tokenizer.chat_template"
CONTROLS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|bot|>", "[INST]", "☃")
TOKENIZER = Tokenizer.from_metadata(
    byte_level(
        ["i m", "< |", "e n", "en d"],
        {**dict.fromkeys(CONTROLS, CONTROL), "<tool_call>": USER_DEFINED},
        bos_token_id=260,
        eos_token_id=261,
    )
)  # <s>, </s>
HELLO = [{"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Tells <it> & "that", é',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where"}},
            "required": ["city"],
        },
    },
}


def make(source: str, tokenizer: Tokenizer = TOKENIZER, **named: str) -> ChatTemplate:
    sources = {KEY: source, **{f"{KEY}.{name}": text for name, text in named.items()}}
    return ChatTemplate.from_metadata(sources, tokenizer)


def render(source: str, messages: list[dict[str, Any]] = HELLO, **options: Any) -> str:
    return make(source).render(messages, **options)
