"""A tiny Gemma3nForConditionalGeneration with real (timm and conformer) towers, weights random.

timm's block arguments stand in config.json as strings, which transformers cannot read back:
`nestd.conversion.encoders.towers.decode_model_args` makes them timm's again, for whoever builds a
model of such a config.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3nAudioConfig,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nVisionConfig,
)

from nestd.conversion.encoders.towers import decode_model_args
from support.checkpoints import randomise, save_checkpoint, text_config
from support.tiny import VOCABULARY, byte_tokenizer

MODEL_ARGS = {
    "block_args": [["er_r1_k3_s2_e4_c32"], ["uir_r1_a3_k5_s2_e4_c64"]],
    "stem_size": 8,
    "msfa_output_resolution": 4,
}
VISION_OFFSET, AUDIO_OFFSET, HARD_IDS = VOCABULARY - 20, VOCABULARY - 10, 10
# As in Gemma 3n, what begins a medium is an id of the text, the others lie behind it.
SPECIAL_TOKENS = {
    "<start_of_image>": 261,
    "<start_of_audio>": 262,
    "<end_of_image>": VISION_OFFSET,
    "<image_soft_token>": VISION_OFFSET + 1,
    "<end_of_audio>": AUDIO_OFFSET,
    "<audio_soft_token>": AUDIO_OFFSET + 1,
}
# Gemma 3n's own, without its whitespace.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set prefix = (system if system is string else system[0].text) + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set prefix = '' %}{% set turns = messages %}"
    "{% endif %}{% for message in turns %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n'"
    " + (prefix if loop.first else '') }}"
    "{% if message.content is string %}{{ message.content | trim }}{% else %}"
    "{% for item in message.content %}{% if item.type == 'audio' %}{{ '<audio_soft_token>' }}"
    "{% elif item.type == 'image' %}{{ '<image_soft_token>' }}"
    "{% elif item.type == 'text' %}{{ item.text | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def conditional_generation_model() -> Gemma3nForConditionalGeneration:
    """Return a random float32 model; its vision tower is MobileNet-V5 cut to two blocks."""
    vision = Gemma3nVisionConfig(
        hidden_size=2048,
        vocab_size=HARD_IDS,
        vocab_offset=VISION_OFFSET,
        model_args=decode_model_args(MODEL_ARGS),
    )
    audio = Gemma3nAudioConfig(
        vocab_size=HARD_IDS,
        vocab_offset=AUDIO_OFFSET,
        hidden_size=32,
        conf_num_attention_heads=2,
        conf_num_hidden_layers=2,
        sscp_conv_channel_size=(8, 4),
    )
    config = Gemma3nConfig(
        text_config=text_config().to_dict(),
        vision_config=vision.to_dict(),
        audio_config=audio.to_dict(),
        vision_soft_tokens_per_image=16,
        boi_token_id=SPECIAL_TOKENS["<start_of_image>"],
        image_token_id=SPECIAL_TOKENS["<image_soft_token>"],
        eoi_token_id=SPECIAL_TOKENS["<end_of_image>"],
        boa_token_id=SPECIAL_TOKENS["<start_of_audio>"],
        audio_token_id=SPECIAL_TOKENS["<audio_soft_token>"],
        eoa_token_id=SPECIAL_TOKENS["<end_of_audio>"],
    )
    config._attn_implementation = "eager"
    model = Gemma3nForConditionalGeneration(config).eval()
    # timm has put functions into the block arguments, which config.json cannot hold.
    model.config.vision_config.model_args = MODEL_ARGS
    randomise(model)
    return model


def multimodal_tokenizer() -> Tokenizer:
    """Return the byte-level tokenizer with the six tokens of media at the config's ids."""
    vocabulary = byte_tokenizer().get_vocab() | SPECIAL_TOKENS
    taken = set(vocabulary.values())
    vocabulary |= {f"<unused{i}>": i for i in range(VOCABULARY) if i not in taken}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in vocabulary if token.startswith("<")]
    tokenizer.add_special_tokens([token for token in special if len(token.content) > 1])
    return tokenizer


def save_multimodal_checkpoint(model: Gemma3nForConditionalGeneration, path: Path) -> Path:
    """Save `model` as a checkpoint directory with tokenizer and chat template; return it."""
    save_checkpoint(model, path)
    multimodal_tokenizer().save(str(path / "tokenizer.json"))
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(tokens))
    return path
