"""The words and sentences that documents are made of, and how many tokens they take.

dsa-nano's tokenizer is trained on these: changing one changes it. It splits text as `PIECE` does and has every word
here as one entry: a token is a word with its leading space, one or two digits with theirs if they have one, or one
run of punctuation. Values are two digits, so that a value is one token. `count_tokens` is that rule.
"""

from __future__ import annotations

import re

PIECE = re.compile(r" ?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]+|\s")

WORDS = tuple(
    re.findall(
        "[a-z]+",
        """
    ant ape arm art ash bag ball band bank bar barn bay beam bean bear bed bee bell bird boat bowl box
    bread cake camp candle cap car card cat cherry chest clock cloth cloud coal coat coin cook cow crab
    crow crown cup dam desk dish dock dog donkey door dove duck dust eagle ear egg engine face fan farm
    fence fern field fig fish flag flame flour flute fly foam fog food foot fork frog fruit garden ghost
    gift glass goat goose grain grape grass grove guitar gun hand harp hawk hay head hen herb hill honey
    hook horn horse house ice ink inn iron island jacket jeep jet jewel judge kettle key king knife lace
    ladder lake lamb lane leaf leg lemon lid lily lion lock maid mask mat meat melon milk mint monk moon
    mouse mouth mud mug nail neck nest net nose nut ocean oil olive onion orange oven owl page paint palm
    park peach pear pen piano pie pig pill pillow pipe plane plum pond pool pot potato prince queen quilt
    rabbit rain rake ram rat ring river rock roof room root rose rug salt sand sauce saw school seal seat
    seed sheep ship shoe shop silk sink sky sled snake sock soup spider spoon stone stool stove straw
    sugar suit sun swan sword table tail tank tent thorn toad tooth torch towel tower town toy train tray
    tree tub turkey turtle vase wagon wall wasp water well whale wheat wheel whip wind wine wing wire
    wood wool worm zebra
    """,
    )
)
REGISTERS = ("red", "blue", "green", "gold", "pink", "gray", "black", "white")

HEADER = "Facts:"
QUESTION = "\nAnswer:"
HEADER_TOKENS, QUESTION_TOKENS = 2, 3

# Each: the sentence, its tokens, how many words it takes.
FILLERS = (
    (" The %s is old.", 5, 1),
    (" A %s can see the %s.", 7, 2),
    (" We put the %s on a %s.", 8, 2),
    (" He met a %s and a %s by the %s.", 11, 3),
    (" The %s and the %s met a %s in the %s.", 12, 4),
)
SHORTEST_FILLER = FILLERS[0]

# Every sentence that a document may hold, for whoever must know its words.
TEMPLATES = (
    " The code of %s is %s.",
    " Let %s be %s.",
    " At %s add %s then %s makes %s.",
    " At %s %s set %s then end.",
    " At %s %s take %s then end.",
    " Note %s.",
    *(filler for filler, _, _ in FILLERS),
)


def count_tokens(text: str) -> int:
    """Tokens of a text made of this module's words."""
    return len(PIECE.findall(text))
