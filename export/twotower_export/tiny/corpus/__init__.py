"""The small text that the trained tiny checkpoint speaks: stories and facts made from templates.

Everything here was written for this project, so it may be shipped with it. The text is highly
predictable but not trivial: what follows a prompt depends on names, colours and places that the
prompt chose, so a model must carry them along to continue sensibly.
"""

from twotower_export.tiny.corpus.documents import Document, documents, vocabulary, words
from twotower_export.tiny.corpus.facts import fact_documents
from twotower_export.tiny.corpus.stories import story_documents

__all__ = [
    "Document",
    "documents",
    "fact_documents",
    "story_documents",
    "vocabulary",
    "words",
]
