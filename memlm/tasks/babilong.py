"""BABILong (arXiv:2406.10149): bAbI facts scattered through running text, at any length.

Composition "exact": lengths are powers of two of the model's own tokens (4k is 4,096, 1M is 2**20), all
of them facts and noise. Composition "published" keeps the rules of the published code
(github.com/booydar/babilong, data/create_tasks.py and babilong_utils.py); see `Composition`. Either way a
sample depends on its own seed alone, so noise that one sample leaves over is not carried over to the next.
Only the list of stretches of text that make up a sample is held in memory.
"""

from memlm.tasks.asking import encode_answer, encode_question
from memlm.tasks.compose import Sample, compose, facts_fit
from memlm.tasks.composition import COMPOSITIONS, Composition, composition_of
from memlm.tasks.lengths import format_length, parse_length
from memlm.tasks.published import Record, RecordSample, iterate, load, write
from memlm.templates import BABILONG_ANSWER_TEMPLATE as ANSWER_TEMPLATE
from memlm.templates import BABILONG_FACT_TEMPLATE as FACT_TEMPLATE
from memlm.templates import BABILONG_QUESTION_TEMPLATE as QUESTION_TEMPLATE

__all__ = [
    "ANSWER_TEMPLATE",
    "COMPOSITIONS",
    "FACT_TEMPLATE",
    "QUESTION_TEMPLATE",
    "Composition",
    "Record",
    "RecordSample",
    "Sample",
    "compose",
    "composition_of",
    "encode_answer",
    "encode_question",
    "facts_fit",
    "format_length",
    "iterate",
    "load",
    "parse_length",
    "write",
]
