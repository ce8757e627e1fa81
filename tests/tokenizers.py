"""Tokenizers made in the test, of the kinds that real models use."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (
    "Mary went to the kitchen. John moved to the hallway, didn't he? It's 42 degrees — naïve café. "
    "The quick brown fox jumps over the lazy dog; then  two spaces and\na new line.\n\n"
) * 3


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """ "byte-bpe" (GPT-2, Llama 3), "metaspace" with a start token (Llama 2, Gemma), "words"."""
    special = ["<pad>", "<bos>", "<eos>"]
    if kind == "byte-bpe":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "metaspace":
        core = Tokenizer(models.BPE(unk_token="<pad>"))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.decoder = decoders.Metaspace(prepend_scheme="first")
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    else:
        core = Tokenizer(models.WordLevel(unk_token="<pad>"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(
            vocab_size=300, special_tokens=special, show_progress=False
        )
    core.train_from_iterator([TEXT], trainer)
    if kind == "metaspace":
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
