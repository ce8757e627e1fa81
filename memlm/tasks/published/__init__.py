"""BABILong samples as published: read without ever holding a file, and written by us."""

from memlm.tasks.published.reading import iterate, load
from memlm.tasks.published.records import Record, RecordSample
from memlm.tasks.published.writing import load_tokenizer, write

__all__ = ["Record", "RecordSample", "iterate", "load", "load_tokenizer", "write"]
