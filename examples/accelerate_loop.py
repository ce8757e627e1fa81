"""A training loop of your own, with accelerate: a document of any length, window by window.

    python examples/accelerate_loop.py HuggingFaceTB/SmolLM2-135M book.txt --out runs/loop
    accelerate launch examples/accelerate_loop.py ...

Under several processes, all documents have to have the same number of windows; here each is the same text.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

import memlm
from memlm import MemLMForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", required=True)
    parser.add_argument("--segment-length", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    model = MemLMForCausalLM.from_base(
        arguments.base, memory="armt", segment_length=arguments.segment_length
    )
    text = arguments.text.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    rates = [
        {"params": list(model.base.parameters()), "lr": 2e-5},
        {"params": list(model.memory.parameters()), "lr": 1e-3},
    ]

    accelerator = Accelerator()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(rates))
    for epoch in range(arguments.epochs):
        loss = 0.0
        document = ids.to(accelerator.device)
        for out in memlm.windows(model, document, labels=document, bptt_depth=2):
            accelerator.backward(out.loss)
            loss += float(out.loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: loss {loss:.3f}")
    accelerator.unwrap_model(model).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
