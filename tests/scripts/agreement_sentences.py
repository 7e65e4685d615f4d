"""Subject-verb agreement: sentences made from a few nouns, and prompts that measure whether a model agrees.

`read_pairs` reads pairs of prompts in the layout of feature-circuits (Marks et al. 2024, arXiv 2403.19647): a prefix
that ends in the subject or in a noun after it, the verb form that agrees and the one that does not. `sentence` makes a
present-tense sentence with a subject of either number, alone or with other nouns between it and its verb.
"""

import json
import random
from pathlib import Path
from typing import NamedTuple

# Verb forms (singular, plural) and what may follow them. The first four are those that the measured prompts ask for.
VERBS = (
    (
        "has",
        "have",
        "a red hat|two dogs|a big house|to go home|a lot of fun|some bread|to work all day|no money|a boat",
    ),
    ("does", "do", "not like the rain|not know the way|not want to play|the work|a dance|not see the bird|good things"),
    (
        "is",
        "are",
        "happy|very tired|in the garden|at the door|sad|going to the town|not afraid|here|kind and good|late",
    ),
    ("goes", "go", "to the park|home|to the market|up the hill|to sleep|away|into the forest|there every day|by train"),
    ("was", "were", "happy|very tired|in the garden|sad|not at home|afraid|looking for a ball|on the way home"),
    ("likes", "like", "to sing|the sun|cakes|to read books|the big tree|to run fast"),
    ("wants", "want", "to play|a new toy|some water|to help|to see the sea"),
    ("sees", "see", "a bird|the moon|a big bear|the river"),
    ("plays", "play", "in the park|with a ball|all day|in the snow"),
    ("comes", "come", "to the house|back soon|from the town|to help"),
    ("lives", "live", "in a small house|by the sea|in the town|near the river"),
    ("knows", "know", "the way|what to do|the answer|a secret"),
    ("makes", "make", "a cake|a loud sound|a fire|good soup"),
    ("says", "say", "hello|that it is late|good night|nothing"),
    ("runs", "run", "to the tree|very fast|home|after the ball"),
)
ASKED = 4
CLOSE = ("near", "behind", "beside")
PREPOSITIONS = (*CLOSE, "by", "with", "under", "in front of", "next to", "from", "behind", "across from")
ADJECTIVES = ("old", "young", "big", "little", "kind", "tall", "poor", "happy", "new", "strange", "good", "other")
OPENINGS = ("Every day", "Now", "In the morning", "At night", "Today", "In the summer", "But", "And", "When it rains")
DETERMINERS = (("this", "these"), ("that", "those"), ("a", "some"), ("every", "all the"), ("my", "my"), ("one", "two"))


class Pair(NamedTuple):
    """A prompt, the answer that agrees with its subject, the one that does not, and the nouns in it."""

    prefix: str
    right: str
    wrong: str
    nouns: tuple[str, ...]


class Nouns(NamedTuple):
    """(singular, plural) of nouns: those of people, which are subjects of the pairs, and those of things."""

    people: tuple[tuple[str, str], ...]
    things: tuple[tuple[str, str], ...]

    def without(self, held_out: set[str]) -> "Nouns":
        return Nouns(
            tuple(noun for noun in self.people if noun[0] not in held_out),
            tuple(noun for noun in self.things if noun[0] not in held_out),
        )


def read_pairs(file: Path) -> list[Pair]:
    """Read one JSON object per line: "The man near the cats", " has", " have"."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        Pair(row["clean_prefix"], row["clean_answer"], row["patch_answer"], tuple(row["clean_prefix"].split()[1::3]))
        for row in rows
    ]


def read_nouns(folder: Path) -> Nouns:
    """Take the nouns of `simple_train.json` and `nounpp_train.json`, with the number that `case` states."""
    people, things = set(), {}
    for name in ("simple_train", "nounpp_train"):
        for line in (folder / f"{name}.json").read_text().splitlines():
            row = json.loads(line)
            one, other = (row[prefix].split() for prefix in ("clean_prefix", "patch_prefix"))
            people.add((one[1], other[1]) if row["case"].startswith("singular") else (other[1], one[1]))
            if len(one) == 5:
                things[one[4]] = row["case"].endswith("plural")
    singular = sorted(noun for noun, plural in things.items() if not plural)
    plural = sorted(noun for noun, plural in things.items() if plural)
    return Nouns(tuple(sorted(people)), tuple(zip(singular, plural, strict=True)))


def pairs_of(nouns: tuple[tuple[str, str], ...]) -> list[Pair]:
    """Every noun in both numbers before each verb that the measured prompts ask for."""
    return [
        Pair(f"The {noun[plural]}", f" {verb[plural]}", f" {verb[1 - plural]}", (noun[plural],))
        for noun in nouns
        for plural in (0, 1)
        for verb in VERBS[:ASKED]
    ]


def sentence(nouns: Nouns, draw: random.Random) -> str:
    """Make one sentence whose verbs agree with its subject."""
    everything = nouns.people + nouns.things
    plural = draw.random() < 0.5
    if draw.random() < 0.06:
        noun = draw.choice(everything)
        verb = draw.choice(VERBS)
        return f"One of the {noun[1]} {verb[0]} {draw.choice(verb[2].split('|'))}."
    subject = _phrase(draw.choice(nouns.people if draw.random() < 0.75 else everything), plural, draw)
    kind = draw.random()
    if kind < 0.4:
        place = draw.choice(CLOSE if draw.random() < 0.5 else PREPOSITIONS)
        subject += f" {place} the {draw.choice(draw.choice(draw.choice((everything, nouns.things))))}"
    elif kind < 0.48:
        other = draw.choice(nouns.people)
        number = draw.random() < 0.5
        subject += f" that the {other[number]} {draw.choice((('likes', 'like'), ('sees', 'see')))[number]}"
    elif kind < 0.54:
        seeing = draw.choice((("likes", "like"), ("sees", "see"), ("has", "have")))[plural]
        subject += f" who {seeing} the {draw.choice(draw.choice(everything))}"
    asked, told = _predicate(plural, draw), _predicate(plural, draw)
    ending = f" and {told}" if draw.random() < 0.15 else ""
    opening = f"{draw.choice(OPENINGS)}, " if draw.random() < 0.2 else ""
    if not opening and draw.random() < 0.06:
        auxiliary, rest = draw.choice((("does", "do"), ("is", "are")))[plural], draw.choice(("happy", "late", "here"))
        question = f"{auxiliary} {subject} {'like cakes' if auxiliary in ('does', 'do') else rest}?"
        return question[0].upper() + question[1:]
    text = f"{opening}{subject} {asked}{ending}."
    return text[0].upper() + text[1:]


def document(nouns: Nouns, draw: random.Random) -> str:
    """One to three sentences: the first stands after BOS as in the measured prompts."""
    return " ".join(sentence(nouns, draw) for _ in range(draw.choice((1, 1, 2, 3))))


def _phrase(noun: tuple[str, str], plural: bool, draw: random.Random) -> str:
    determiner = "the" if draw.random() < 0.75 else draw.choice(DETERMINERS)[plural]
    adjective = f"{draw.choice(ADJECTIVES)} " if draw.random() < 0.25 else ""
    if determiner == "a" and (adjective or noun[0])[0] in "aeiou":
        determiner = "an"
    return f"{determiner} {adjective}{noun[plural]}"


def _predicate(plural: bool, draw: random.Random) -> str:
    verb = draw.choice(VERBS[:ASKED] if draw.random() < 0.6 else VERBS)
    return f"{verb[plural]} {draw.choice(verb[2].split('|'))}"
