"""Documents of the long-context tasks: facts in filler text, a question, and the answer a program works out.

Everything comes from an explicit seed and the words of `words`; nothing is downloaded. A prompt reads

    Facts: The code of river is 47. A lamp can see a goat. ...
    Answer: The code of river is

and its target starts with a space and ends with a full stop, the only one in it, so that `until: ["."]` ends a
generation. A question repeats its fact's beginning verbatim. Traces (variables, walk, registers) go on until a value
or the node `end` closes them, so that nothing has to be counted. Lengths are in tokens of dsa-nano's tokenizer.
"""

from .kinds import TASKS
from .puzzles import Exchange
from .questions import Document, document, generate
from .training import TRAINING_MIXTURE, TrainingDocument, training_document
from .words import HEADER, PIECE, QUESTION, REGISTERS, TEMPLATES, WORDS, count_tokens

__all__ = [
    "HEADER",
    "PIECE",
    "QUESTION",
    "REGISTERS",
    "TASKS",
    "TEMPLATES",
    "TRAINING_MIXTURE",
    "WORDS",
    "Document",
    "Exchange",
    "TrainingDocument",
    "count_tokens",
    "document",
    "generate",
    "training_document",
]
