"""Writes the tokenizer, the chat template and the generation settings of the demo model.

A byte is a token, with no merges: token 65 is "A". The special tokens follow the 256 bytes.

    python tokenizer.py ../demo
"""

import json
import os
import sys

SPECIALS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCAB_SIZE = 288
SPECIALS += [f"<|reserved_{i}|>" for i in range(VOCAB_SIZE - 256 - len(SPECIALS))]

CHAT_TEMPLATE = (
    "{{- bos_token -}}\n"
    "{%- for message in messages -%}\n"
    "  {%- if message.role == 'system' or message.role == 'developer' -%}{{- '<|system|>' -}}\n"
    "  {%- elif message.role == 'assistant' -%}{{- '<|assistant|>' -}}\n"
    "  {%- else -%}{{- '<|user|>' -}}\n"
    "  {%- endif -%}\n"
    "  {%- if message.content is string -%}{{- message.content -}}\n"
    "  {%- elif message.content -%}\n"
    "    {%- for part in message.content -%}\n"
    "      {%- if part.type == 'text' -%}{{- part.text -}}{%- endif -%}\n"
    "    {%- endfor -%}\n"
    "  {%- endif -%}\n"
    "  {{- '<|end|>' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}\n"
)


def byte_letters():
    """The letter that stands for each byte in byte-level vocabularies."""
    plain = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    letters, extra = {}, 0
    for b in range(256):
        if b in plain:
            letters[b] = chr(b)
        else:
            letters[b] = chr(256 + extra)
            extra += 1
    return letters


def tokenizer():
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 256 + i, "content": s, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i, s in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<|bos|>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [257], "tokens": ["<|bos|>"]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {letter: b for b, letter in byte_letters().items()},
            "merges": [],
        },
    }


def write_json(folder, name, value):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write("\n")


def write(folder, max_positions):
    write_json(folder, "tokenizer.json", tokenizer())
    write_json(folder, "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        "chat_template": CHAT_TEMPLATE,
    })
    write_json(folder, "generation_config.json", {
        "bos_token_id": 257,
        "eos_token_id": 258,
        "pad_token_id": 256,
        "do_sample": False,
    })


if __name__ == "__main__":
    write(sys.argv[1], 512)
