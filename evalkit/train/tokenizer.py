"""The byte-level BPE tokenizer of dsa-nano: 1,024 entries, every word of the task documents one of them.

Trained on words and templates of `tasks/documents` alone, so that it is the same wherever it is made.
Two digits are one entry, the value of a document; any UTF-8 text is covered by the 256 byte entries.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tasks import documents

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
VOCAB_SIZE = 1024
PIECE = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s"
TEMPLATE_WORDS = tuple(
    sorted({word for text in documents.TEMPLATES for word in re.findall("[A-Za-z]+", text.replace("%s", ""))})
)


def _corpus() -> list[str]:
    """Words weighted so that those of the documents become single entries before the rest fills the vocabulary."""
    words = [f" {word}" for word in (*TEMPLATE_WORDS, *documents.REGISTERS)]
    digits = [f" {digit}." for digit in range(10)] + [f" {value:02d}." for value in range(100)]
    frame = [documents.HEADER, documents.QUESTION]
    return (
        50 * (words + digits + frame) + 8 * [f" {word}" for word in documents.WORDS] + list(documents.WORDS)
    )


def train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, _id(tokenizer, BOS))]
    )
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json, as AutoTokenizer reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _id(tokenizer: Tokenizer, token: str) -> int:
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no {token}")
    return found


class Encoder:
    """Text to ids, one look-up a piece: BPE never merges across pieces, so a piece's ids do not depend on its place."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pad, self.bos, self.eos = (_id(tokenizer, token) for token in (PAD, BOS, EOS))
        self.is_value = np.zeros(VOCAB_SIZE, dtype=np.bool_)  # the entries " 00" to " 99"
        self.is_value[[_id(tokenizer, f"Ġ{value:02d}") for value in range(100)]] = True
        self._ids: dict[str, int] = {}

    def __call__(self, text: str) -> list[int]:
        """Ids of a text made of the documents' words.

        Raises:
            ValueError: a piece of the text is more than one entry.
        """
        ids = self._ids
        pieces = documents.PIECE.findall(text)
        try:
            return [ids[piece] for piece in pieces]
        except KeyError:
            for piece in set(pieces) - ids.keys():
                encoded = self.tokenizer.encode(piece, add_special_tokens=False).ids
                if len(encoded) != 1:
                    raise ValueError(
                        f"{piece!r} is {len(encoded)} tokens; a document's words must be one each"
                    ) from None
                ids[piece] = encoded[0]
            return [ids[piece] for piece in pieces]
