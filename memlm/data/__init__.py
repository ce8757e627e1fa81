"""Data people have: rows of files and of the hub, told apart by their columns and checked before use.

rows: what a row can be. formats: from a row's columns to what it is. files, tables: where rows are.
opening: by name.
"""

from memlm.data.formats import find_format, make_row
from memlm.data.opening import Rows, open_rows
from memlm.data.rows import (
    AskedDocument,
    CompletionRow,
    DocumentRow,
    MessagesRow,
    Question,
    Row,
    TextRow,
    TokensRow,
)

__all__ = [
    "AskedDocument",
    "CompletionRow",
    "DocumentRow",
    "MessagesRow",
    "Question",
    "Row",
    "Rows",
    "TextRow",
    "TokensRow",
    "find_format",
    "make_row",
    "open_rows",
]
