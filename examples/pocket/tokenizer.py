"""pocket's tokenizer: byte-level BPE, so any UTF-8 text round-trips and <unk> never occurs.

Digits are tokens of their own, which makes numbers easy to copy. `python tokenizer.py` trains it on
the training split and writes tokenizer.json, tokenizer_config.json and chat_template.jinja into
checkpoint/.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Final

from data import Example, examples
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CHECKPOINT: Final = Path(__file__).parent / "checkpoint"
VOCAB_SIZE: Final = 1024
IMAGE_TOKENS, AUDIO_TOKENS = 16, 32  # soft tokens of a picture, of a clip
PAD, EOS, BOS, UNK, START_OF_TURN, END_OF_TURN = range(6)
SPECIAL_TOKENS: Final = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>",
    *(f"<unused{i}>" for i in range(10)),
)  # fmt: skip
# Behind the text's ids, first those of pictures, then those of sounds. Sixteen each, so that the
# vocabulary stays a multiple of 32; the last one stands in for the soft tokens of a shorter clip.
MEDIA_TOKENS: Final = (
    "<start_of_image>", "<image_soft_token>", "<end_of_image>",
    *(f"<unused{i}>" for i in range(10, 23)),
    "<start_of_audio>", "<audio_soft_token>", "<end_of_audio>",
    *(f"<unused{i}>" for i in range(23, 36)),
)  # fmt: skip
IMAGE_IDS, AUDIO_IDS = VOCAB_SIZE, VOCAB_SIZE + 16  # the first of each

CHAT_TEMPLATE: Final = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'audio' -%}
                {{ '<audio_soft_token>' }}
            {%- elif item['type'] == 'image' -%}
                {{ '<image_soft_token>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""


def train_tokenizer(sample: list[Example]) -> Tokenizer:
    """Train the BPE on requests and commands; deterministic for a given sample."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [text for example in sample for text in ("user\n", example.request, example.command)]
    tokenizer.train_from_iterator([*lines, *["model\n"] * len(sample)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.add_special_tokens(list(MEDIA_TOKENS))
    return tokenizer


def load_tokenizer() -> Tokenizer:
    """The trained tokenizer of the checkpoint."""
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def encode_prompt(tokenizer: Tokenizer, request: str) -> list[int]:
    """The ids the chat template gives for one user turn, up to where the model answers."""
    text = f"<start_of_turn>user\n{request}<end_of_turn>\n<start_of_turn>model\n"
    return [BOS, *tokenizer.encode(text, add_special_tokens=False).ids]


def encode_answer(tokenizer: Tokenizer, command: str) -> list[int]:
    """The ids the model is to generate, its stop token included."""
    return [*tokenizer.encode(command, add_special_tokens=False).ids, END_OF_TURN]


def main() -> None:
    """Train and write the tokenizer's files."""
    CHECKPOINT.mkdir(exist_ok=True)
    tokenizer = train_tokenizer(list(islice(examples("train", seed=1), 40_000)))
    tokenizer.save(str(CHECKPOINT / "tokenizer.json"))
    (CHECKPOINT / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "additional_special_tokens": [*SPECIAL_TOKENS[4:], *MEDIA_TOKENS],
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "audio_token": "<audio_soft_token>",
        "boa_token": "<start_of_audio>",
        "eoa_token": "<end_of_audio>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    path = CHECKPOINT / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
