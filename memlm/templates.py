"""The text around questions, answers, facts and recalled passages: the default of every template.

A question is asked in two ways. `DOCUMENT_QUESTION_TEMPLATE` is how people ask about their documents: a
model's config holds it, and `DocumentStream.ask` fills it. `BABILONG_QUESTION_TEMPLATE` is how a BABILong
sample goes on, in training as in evaluation: there facts, sentences, recalled passages, the question and
the answer each follow one space.
"""

# A trained model keeps its own; the answer follows after a space.
DOCUMENT_QUESTION_TEMPLATE = "\n\nQuestion: {question}\nAnswer:"
# How a recalled passage is written before the question; {document} and {start} may be named.
DOCUMENT_RECALL_TEMPLATE = "\nRecalled: {text}"

BABILONG_FACT_TEMPLATE = " {fact}"
BABILONG_QUESTION_TEMPLATE = " {question}"
BABILONG_ANSWER_TEMPLATE = " {answer}"
BABILONG_RECALL_TEMPLATE = " {text}"
