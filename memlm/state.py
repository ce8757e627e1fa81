"""The memory of a batch of documents: named tensors, every one of them (B, ...).

A state is a value. Every method returns a new one; nothing in the package changes a state in place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memlm.files import write_atomically

FORMAT = "memlm-state"
# Version 2 has a checksum.
VERSION = 2
CHECKSUM = "sha256"


def flatten(tree: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Name the leaves of a mechanism's state: NamedTuples, dicts, tuples and tensors, nested."""
    if isinstance(tree, Tensor):
        yield prefix, tree
        return
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        items: Any = zip(tree._fields, tree, strict=True)
    elif isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (tuple, list)):
        items = enumerate(tree)
    else:
        raise TypeError(
            f"a state holds tensors in NamedTuples, dicts or tuples, not {type(tree).__name__} "
            f"(at {prefix!r}); return tensors only"
        )
    for key, value in items:
        yield from flatten(value, f"{prefix}.{key}")


def unflatten(template: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Rebuild a tree shaped like `template` from the leaves `flatten` named."""
    if isinstance(template, Tensor):
        return tensors[prefix]
    if isinstance(template, tuple) and hasattr(template, "_fields"):
        values = (
            unflatten(value, f"{prefix}.{key}", tensors)
            for key, value in zip(template._fields, template, strict=True)
        )
        return type(template)(*values)
    if isinstance(template, dict):
        return {k: unflatten(v, f"{prefix}.{k}", tensors) for k, v in template.items()}
    return type(template)(
        unflatten(value, f"{prefix}.{i}", tensors) for i, value in enumerate(template)
    )


def skeleton(tree: Any) -> Any:
    """`tree` with nothing in its leaves: a template for `unflatten` that holds no memory."""
    names = dict(flatten(tree, ""))
    return unflatten(tree, "", {name: torch.empty(0) for name in names})


class MemoryState:
    """What a model remembers of `batch_size` documents, row by row.

    tensors: name -> (B, ...). signature: which memories made it, as text ("" when unknown); a model
    refuses the state of another one.
    """

    __slots__ = ("batch_size", "signature", "tensors")

    def __init__(self, tensors: dict[str, Tensor], batch_size: int, signature: str = "") -> None:
        for name, value in tensors.items():
            if value.ndim == 0 or value.shape[0] != batch_size:
                raise ValueError(
                    f"state tensor {name!r} has shape {tuple(value.shape)}, but every leaf must be "
                    f"(batch_size={batch_size}, ...)"
                )
        self.tensors = dict(tensors)
        self.batch_size = batch_size
        self.signature = signature

    def __repr__(self) -> str:
        return (
            f"MemoryState(batch_size={self.batch_size}, tensors={len(self.tensors)}, "
            f"nbytes={self.nbytes})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryState:
        """An independent copy, detached from any graph, which a copy cannot be part of."""
        return self.fork()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def map(
        self, function: Callable[[Tensor], Tensor], batch_size: int | None = None
    ) -> MemoryState:
        """Apply `function` to every tensor."""
        new = {name: function(value) for name, value in self.tensors.items()}
        return MemoryState(
            new, self.batch_size if batch_size is None else batch_size, self.signature
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: constant however much was read."""
        return sum(value.numel() * value.element_size() for value in self.tensors.values())

    @torch.no_grad()
    def largest(self) -> Tensor:
        """(n,) the largest magnitude in each floating-point tensor, in order; NaN where one holds a NaN."""
        found = [value.detach() for value in self.floating().values()]
        if not found:
            return torch.zeros(0)
        if found[0].is_cuda:
            norms = torch._foreach_norm(found, float("inf"))
            return torch.stack([norm.double().to(found[0].device) for norm in norms])
        # One kernel for all of them is at least ten times slower on a CPU.
        return torch.stack([value.abs().amax().double() for value in found])

    def floating(self) -> dict[str, Tensor]:
        """The floating-point tensors that are not empty."""
        return {k: v for k, v in self.tensors.items() if v.is_floating_point() and v.numel()}

    def detach(self) -> MemoryState:
        """The same values without their graph."""
        return self.map(lambda value: value.detach())

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MemoryState:
        """Move to a device, and floating-point tensors to a dtype."""

        def move(value: Tensor) -> Tensor:
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        return self.map(move)

    def select(self, rows: Sequence[int] | Tensor) -> MemoryState:
        """Rows by index (repeats allowed) or by a (B,) bool mask, in the order given."""
        index = torch.as_tensor(rows)
        if index.dtype == torch.bool:
            if index.shape != (self.batch_size,):
                raise ValueError(
                    f"rows is a mask of shape {tuple(index.shape)}, but the state has "
                    f"{self.batch_size} rows; give one bool per row"
                )
            index = index.nonzero().squeeze(1)
        index = index.to(torch.long).reshape(-1)
        if (
            index.numel()
            and not -self.batch_size <= int(index.min()) <= int(index.max()) < self.batch_size
        ):
            raise IndexError(
                f"rows {index.tolist()} are outside the state's {self.batch_size} rows; "
                f"use 0 to {self.batch_size - 1}"
            )
        index = index % max(self.batch_size, 1)
        return self.map(lambda value: value.index_select(0, index.to(value.device)), len(index))

    @classmethod
    def cat(cls, states: Sequence[MemoryState]) -> MemoryState:
        """The rows of `states`, of one model, below each other. ValueError where they do not fit."""
        if not states:
            raise ValueError("states is empty; give at least one state")
        first = states[0]
        for state in states[1:]:
            if state.signature != first.signature or state.tensors.keys() != first.tensors.keys():
                raise ValueError(
                    "states of different models have no rows in common; use one model's"
                )
        found = {name: torch.cat([one[name] for one in states]) for name in first.tensors}
        return cls(found, sum(state.batch_size for state in states), first.signature)

    def where(self, rows: Tensor, other: MemoryState) -> MemoryState:
        """This state on rows where `rows` (B,) is True, `other` on the rest."""
        return MemoryState(
            {
                name: where_rows(rows, value, other.tensors[name])
                for name, value in self.tensors.items()
            },
            self.batch_size,
            self.signature,
        )

    def fork(self) -> MemoryState:
        """An independent copy, detached."""
        return self.map(lambda value: value.detach().clone())

    def save(self, path: str | os.PathLike[str], extra: dict[str, str] | None = None) -> None:
        """Write one safetensors file, atomically; `extra` goes into its metadata, beside a checksum."""
        from safetensors.torch import save_file

        metadata = {
            **(extra or {}),
            "format": FORMAT,
            "version": str(VERSION),
            "batch_size": str(self.batch_size),
            "signature": self.signature,
        }
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in self.tensors.items()}
        metadata[CHECKSUM] = tensors_checksum(tensors, metadata)
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "cpu") -> MemoryState:
        """Read what `save` wrote. ValueError when the file is damaged, foreign, or newer."""
        return cls.load_with_extra(path, device)[0]

    @classmethod
    def load_with_extra(
        cls, path: str | os.PathLike[str], device: str = "cpu"
    ) -> tuple[MemoryState, dict[str, str]]:
        """As `load`, with the file's metadata."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"path {str(path)!r} holds no state; give a file `save` wrote")
        tensors, metadata = read_safetensors(path, "save the state again")
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"path {str(path)!r} is a safetensors file, but no {FORMAT}; "
                "give a file written by MemoryState.save"
            )
        try:
            version, batch_size = int(metadata.get("version", "0")), int(metadata["batch_size"])
        except (ValueError, KeyError) as error:
            raise _damaged(path, f"its numbers cannot be read: {error}") from error
        if version > VERSION:
            raise ValueError(
                f"path {str(path)!r} has state version {version}, this memlm reads up to {VERSION}; "
                "upgrade memlm"
            )
        known = metadata.pop(CHECKSUM, None)
        # Files of version 1 have none.
        if version != 1 and known != tensors_checksum(tensors, metadata):
            raise _damaged(path, "its checksum does not match")
        try:
            state = cls(tensors, batch_size, metadata.get("signature", ""))
        except ValueError as error:
            raise _damaged(path, error) from error
        return state.to(device), metadata


def tensors_checksum(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """SHA-256, in hex, of names, dtypes, shapes and values, and of the text that goes with them."""
    names = sorted(tensors)
    described = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    told = json.dumps([sorted((metadata or {}).items()), described])
    found = hashlib.sha256(told.encode())
    for name in names:
        plain = tensors[name].detach().cpu().contiguous().reshape(-1)
        if plain.numel():
            found.update(plain.view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_safetensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file. ValueError for any other, whatever it claims."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            # Copies: what safetensors gives is the file itself, and would follow every change to it.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, metadata
    except (SafetensorError, ValueError, OSError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"path {str(path)!r} is not a readable safetensors file ({error}); {remedy}"
        ) from error


def _damaged(path: Path, why: object) -> ValueError:
    return ValueError(f"path {str(path)!r} is damaged ({why}); take an earlier copy of it")


def where_rows(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` on rows where `rows` (B,) is True, `old` elsewhere; both (B, ...)."""
    return torch.where(rows.to(new.device).reshape(-1, *(1 for _ in new.shape[1:])), new, old)
