"""ModelEmbedder: pooled hidden states of a Hugging Face model."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from memlm.loading import load_weights
from memlm.padding import pad_rows
from memlm.retrieval.embedders.checks import (
    checked_texts,
    checked_vectors,
    text_batches,
    unit_rows,
)
from memlm.retrieval.embedders.fingerprints import VERSION, digest, parameter_digest

# Letters, digits, signs and a line break: tokenizers that differ at all differ here.
_PROBE_TEXT = "It's 3.5 miles, he said - naïve café.\n\nMary went to the office."


class ModelEmbedder:
    """Pooled hidden states of a Hugging Face model: an encoder, a causal language model, a MemLM's base.

    model: a live model, used where it is and as it is; one with a `base` (MemLMForCausalLM) stands for
    its base. layer: which hidden states, 0 the embeddings and -1 the last, or "middle". pooling: "mean"
    over a text's tokens, special ones included, or its "last" token. max_length: how many tokens of a text
    are read, from its beginning (or as `tokenizer.truncation_side` says); by default 512, or the limit of
    model or tokenizer where that is lower. center: (dim,) vector subtracted before the length is made 1.

    Causal models put all texts close together: centre them with `fit`. The fingerprint is that of the
    model when the embedder is made: after training it, make another.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        layer: int | Literal["middle"] = -1,
        pooling: Literal["mean", "last"] = "mean",
        batch_size: int = 32,
        max_length: int | None = None,
        center: NDArray[np.float32] | None = None,
    ) -> None:
        if pooling not in ("mean", "last"):
            raise ValueError(f"pooling={pooling!r} is not known; use 'mean' or 'last'")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.model = _without_head(model)
        self.tokenizer = tokenizer
        config = self.model.config.get_text_config()
        layers = int(config.num_hidden_layers)
        if layer == "middle":
            layer = (layers + 1) // 2
        elif (
            isinstance(layer, bool)
            or not isinstance(layer, int)
            or not -layers - 1 <= layer <= layers
        ):
            raise ValueError(
                f"layer={layer!r} does not exist; use 'middle', or from 0, the embeddings, to {layers}"
            )
        self.layer = layer % (layers + 1)
        self._is_last = self.layer == layers
        self.pooling = pooling
        self.batch_size = batch_size
        self.dim = int(config.hidden_size)
        limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
        most = min(int(limit) for limit in limits if limit is not None and limit > 0)
        if max_length is None:
            max_length = min(512, most)
        if not 1 <= max_length <= most:
            raise ValueError(
                f"max_length={max_length} must be from 1 to {most}, the model's own limit"
            )
        self.max_length = max_length
        if center is not None:
            center = checked_vectors(
                np.asarray(center, dtype=np.float32)[None], 1, self.dim, "center"
            )[0]
        self.center = center
        self.fingerprint = self._make_fingerprint()

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **settings: Any) -> Self:
        """Load model and tokenizer of a hub id or a folder; `settings` are those of the class."""
        from transformers import AutoModel, AutoTokenizer

        model = load_weights(AutoModel.from_pretrained, name)
        return cls(model, AutoTokenizer.from_pretrained(name), **settings)

    def fit(self, texts: Iterable[str]) -> ModelEmbedder:
        """A new embedder, of the same model, centred at the mean of `texts`. ValueError without any."""
        total = np.zeros(self.dim, dtype=np.float64)
        count = 0
        for batch in text_batches(texts, 8 * self.batch_size):
            pooled, some = self._pooled_states(batch)
            total += pooled[some].sum(axis=0, dtype=np.float64)
            count += int(some.sum())
        if not count:
            raise ValueError("texts is empty or holds no token; give texts of the kind to embed")
        center = (total / count).astype(np.float32)
        return ModelEmbedder(
            self.model,
            self.tokenizer,
            self.layer,
            self.pooling,
            self.batch_size,
            self.max_length,
            center,
        )

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dim) float32, one row per text; zeros for a text without tokens."""
        texts = checked_texts(texts)
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for begin in range(0, len(texts), 8 * self.batch_size):
            pooled, some = self._pooled_states(texts[begin : begin + 8 * self.batch_size])
            if self.center is not None:
                pooled = pooled - self.center
            vectors[begin : begin + len(pooled)] = np.where(some[:, None], unit_rows(pooled), 0.0)
        return checked_vectors(vectors, len(texts), self.dim, "ModelEmbedder")

    def encode_document(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The same as `encode`."""
        return self.encode(texts)

    def encode_query(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The same as `encode`."""
        return self.encode(texts)

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The older name of `encode_query`."""
        return self.encode_query(texts)

    def _pooled_states(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Pooled states (n, dim), and which texts have tokens (n,)."""
        import torch

        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)
        ids: list[list[int]] = encoded["input_ids"]
        pooled = np.zeros((len(ids), self.dim), dtype=np.float32)
        some = np.array([bool(row) for row in ids], dtype=np.bool_)
        # Texts of about the same length go together, so that there is little padding.
        order = sorted(np.flatnonzero(some).tolist(), key=lambda i: len(ids[i]))
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                for begin in range(0, len(order), self.batch_size):
                    rows = order[begin : begin + self.batch_size]
                    pooled[rows] = self._pooled_batch([ids[row] for row in rows])
        finally:
            for module, mode in modes:
                module.training = mode
        return pooled, some

    def _pooled_batch(self, ids: list[list[int]]) -> NDArray[np.float32]:
        """Pooled states (n, dim) of texts as token ids, none of them empty, in one forward pass."""
        import torch

        device = next(self.model.parameters()).device
        # Padded on the right, whatever the tokenizer's side: positions count from the left.
        rows, real = pad_rows(ids, self.tokenizer.pad_token_id or 0)
        padded, mask = torch.from_numpy(rows).to(device), torch.from_numpy(real).to(device)
        lengths = mask.sum(1)
        settings: dict[str, Any] = {"output_hidden_states": not self._is_last}
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            settings["use_cache"] = False
        out = self.model(input_ids=padded, attention_mask=mask.long(), **settings)
        states = out.last_hidden_state if self._is_last else out.hidden_states[self.layer]
        states = states.float()
        if self.pooling == "last":
            chosen = states[torch.arange(len(ids), device=device), lengths - 1]
        else:
            # Not a product with the mask: padding may hold anything, even infinity.
            chosen = states.masked_fill(~mask[:, :, None], 0).sum(1) / lengths[:, None]
        return checked_vectors(chosen.cpu().numpy(), len(ids), self.dim, "ModelEmbedder")

    def _make_fingerprint(self) -> str:
        config = self.model.config.to_dict()
        # These say where a model came from, or what the parameters show anyway.
        for name in ("_name_or_path", "architectures", "transformers_version", "dtype"):
            config.pop(name, None)
        tokenizer = self.tokenizer
        described = {
            "config": config,
            "parameters": parameter_digest(self.model),
            "layer": self.layer,
            "pooling": self.pooling,
            "max_length": self.max_length,
            "center": None if self.center is None else digest(self.center.tobytes()),
            "tokenizer": [
                len(tokenizer),
                tokenizer.truncation_side,
                tokenizer(_PROBE_TEXT).input_ids,
            ],
        }
        text = json.dumps(described, sort_keys=True, default=str)
        return f"model-{VERSION}:{config.get('model_type')}:dim={self.dim}:{digest(text.encode())}"


def _without_head(model: Any) -> Any:
    """The part of a model that gives hidden states, without a memory around it or a head on it."""
    from torch import nn

    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}; give a live model, or use "
            "ModelEmbedder.from_pretrained(name)"
        )
    if isinstance(getattr(model, "base", None), nn.Module):
        model = model.base
    if hasattr(model, "get_base_model"):
        # peft's: adapters are part of the model inside.
        model = model.get_base_model()
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()
    return getattr(model, "base_model", model)
