"""A real byte-level BPE tokenizer of some hundred tokens, trained here, and a chat template to go with it."""

from __future__ import annotations

import functools

from runtime.chat_template import ChatTemplate
from runtime.tokenizer import Tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] == 'refuse me' %}{{ raise_exception('refused') }}{% endif %}"
    "<|u|>{{ message['role'] }}: {{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)
EOS = 1


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<|u|>", "<|a|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(["hello world the quick brown fox jumps over the lazy dog"] * 5, trainer)
    return Tokenizer(backend, vocab_size=backend.get_vocab_size(), bos_token_id=0, eos_token_ids=(EOS,))


@functools.cache
def tiny_template() -> ChatTemplate:
    return ChatTemplate(CHAT_TEMPLATE, {"eos_token": "</s>"})
