"""What a saved stream says beside its memory, checked before it is used, and where its index lies."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memlm.files import parse_json

Count = Annotated[int, Field(ge=0)]
# The folder of a stream's index, beside its file.
INDEX = "index"
_INDEXES = re.compile(rf"{INDEX}(-[0-9a-f]{{8}})?")


def another_index() -> str:
    """A name for the index of a stream that is saved over another one, whose file names its own."""
    return f"{INDEX}-{secrets.token_hex(4)}"


def other_indexes(directory: Path, kept: str) -> list[Path]:
    """Folders of indexes, by their names, that a stream's file does not name which names `kept`."""
    names = [name for name in os.listdir(directory) if _INDEXES.fullmatch(name)]
    return [directory / name for name in names if name != kept]


class SavedStream(BaseModel):
    """The fields of a stream's file; what older versions did not write has the value it had then.

    committed: tokens in the memory. open: tokens after them, vocabulary: how many there are to choose
    from. writes: segments written, one row. text, context: what is not tokenised yet, and what stands
    before it. retrieval: the state of a `Retriever`; index: the folder of its index.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    committed: Count
    open: list[Count]
    text: str
    context: str | None
    segment_length: Count
    vocabulary: Count
    writes: Annotated[list[Count], Field(min_length=1, max_length=1)] | None = None
    turns: list[dict[str, str]] = []
    # Up to version 1, a control token written out in a text was read as a control token.
    split_special_tokens: bool = False
    retrieval: dict[str, Any] | None = None
    index: str = INDEX

    @classmethod
    def parse(cls, text: str) -> SavedStream:
        """The fields in a text. ValueError names the first one that cannot be."""
        try:
            saved = cls.model_validate(parse_json(text))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise ValueError(f"{where}: {first['msg']}") from error
        if not _INDEXES.fullmatch(saved.index):
            raise ValueError(f"index: {saved.index!r} is no folder of an index")
        if any(token >= saved.vocabulary for token in saved.open):
            raise ValueError(f"open: holds a token beyond the {saved.vocabulary} there are")
        return saved
