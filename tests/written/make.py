"""Write what the present version writes, to be read by every later one.

    python -m tests.written.make tests/written/0.1

A folder per memory holds a saved model, its memory alone, the state behind a document, and the logits that
follow; `stream` holds a document stream with its index. A folder that is committed is never written again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from memlm import DocumentStream, MemLMForCausalLM, __version__
from memlm.files import write_json
from memlm.retrieval import ChunkIndex, HashingEmbedder
from memlm.train.tokenizer import train_tokenizer
from tests.cases import (
    CASES,
    SEGMENT,
    VOCAB,
    base_model,
    needs_recurrence,
    randomise,
    standing,
    tokens,
)

TEXT = "Mary went to the kitchen. John moved to the garden. Sandra took the milk there. " * 6
QUESTION = "Where is Mary?"
CONTINUATION = " Mary went back to the garden."
# What the logits are of: a document in two calls.
FIRST, SECOND = (2, 3 * SEGMENT), (2, SEGMENT + 2)


def base(dtype: torch.dtype = torch.float32, vocab_size: int = VOCAB) -> PreTrainedModel:
    """A random Llama, small enough to be committed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def base_for(memory: object, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """`base`, or where a memory cannot stand on it one that it can stand on."""
    if not needs_recurrence(memory):
        return base(dtype)
    return base_model(standing(memory, "llama")).to(dtype)


def model(memory: object, dtype: torch.dtype = torch.float32) -> MemLMForCausalLM:
    """A memory model with nothing at zero."""
    made = MemLMForCausalLM.from_base(
        base_for(memory, dtype), memory=memory, segment_length=SEGMENT
    )
    randomise(made.memory, std=0.2)
    return made.eval()


@torch.no_grad()
def write_model(made: MemLMForCausalLM, folder: Path) -> None:
    """Model, memory alone, state, and the logits behind it."""
    made.save_pretrained(folder / "model")
    made.save_memory(folder / "memory")
    state = made(tokens(*FIRST)).memory_state
    state.save(folder / "state.safetensors")
    logits = made(tokens(*SECOND, seed=3), memory_state=state).logits
    save_file({"logits": logits.contiguous()}, folder / "expected.safetensors")


def write_stream(folder: Path) -> None:
    """A stream in the middle of a word, its index, its model and tokenizer, and what it says."""
    tokenizer = train_tokenizer([TEXT], vocab_size=300)
    made = MemLMForCausalLM.from_base(
        base(vocab_size=len(tokenizer)), memory=CASES["armt"], segment_length=16
    )
    randomise(made.memory, std=0.2)
    made.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    index = ChunkIndex(HashingEmbedder(dim=64))
    stream = DocumentStream(made, tokenizer, retrieval=index)
    stream.write(TEXT[:-3], document="rooms.txt")
    stream.save(folder / "stream")
    answer = stream.ask(QUESTION, max_new_tokens=6)
    write_json(
        folder / "expected.json",
        {
            "tokens_seen": stream.tokens_seen,
            "score": stream.score(CONTINUATION),
            "answer": str(answer),
            "sources": [source.text for source in answer.sources],
            "dim": 64,
        },
    )


def main(folder: Path) -> None:
    """Write everything into a folder that is not there yet."""
    if folder.exists():
        raise SystemExit(f"{folder} exists: what a version wrote is never written again")
    for name, config in CASES.items():
        write_model(model(config), folder / name)
    write_model(model("none"), folder / "none")
    write_model(model(CASES["armt"], torch.bfloat16), folder / "armt-bfloat16")
    write_stream(folder / "stream")
    write_json(folder / "version.json", {"memlm": __version__, "torch": torch.__version__})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
