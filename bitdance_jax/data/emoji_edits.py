"""Pairs of embedded images that differ in one thing, with instructions: made from their captions.

"woman astronaut, dark skin tone" and "man astronaut, dark skin tone" show the same but for who it
is: "make it a man" turns the first into the second.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from bitdance_jax.data.edits import EditSource, Pair
from bitdance_jax.data.emoji import CaptionedEmojiSource


Attribute = Literal["person", "tone", "hair"]

_TONE = " skin tone"
_PEOPLE = re.compile(r"\b(person|man|woman)\b")

_HAIR = {
    "blond hair": ("make the hair blond", "with blond hair", "give it blond hair"),
    "red hair": ("make the hair red", "with red hair", "give it red hair"),
    "curly hair": ("make the hair curly", "with curly hair", "give it curly hair"),
    "white hair": ("make the hair white", "with white hair", "give it white hair"),
    "bald": ("make it bald", "with a bald head", "give it a bald head"),
    "beard": ("add a beard", "with a beard", "give it a beard"),
    None: ("with plain hair", "make the hair plain", "give it plain hair"),
}

_NAMES_OF_PEOPLE = {
    name: (base, person)
    for base, names in {
        "older {}": {"older person": "person", "old man": "man", "old woman": "woman"},
        "mer{}": {"merperson": "person", "merman": "man", "mermaid": "woman"},
        "{} Claus": {"mx claus": "person", "Santa Claus": "man", "Mrs. Claus": "woman"},
        "{} with crown": {"person with crown": "person", "prince": "man", "princess": "woman"},
        "young {}": {"child": "child", "boy": "boy", "girl": "girl"},
    }.items()
    for name, person in names.items()
}


class Look(NamedTuple):
    """What a caption says.

    Attributes:
      base: the rest of it, with {} in place of the person: "{} astronaut", "thumbs up".
      person: "person", "man", "woman", "child", "boy" or "girl"; None where nobody is named.
      tone: of the skin, "light" to "dark"; None: yellow, or there is no skin.
      hair: "red hair", "beard", "bald" and so on; None: no caption says more.
    """

    base: str
    person: str | None = None
    tone: str | None = None
    hair: str | None = None


def looks(captions: Sequence[str]) -> list[Look]:
    """What each of some captions says. "astronaut" is a person if there is a "man astronaut"."""
    parsed = [_look(caption) for caption in captions]
    bases = {look.base for look in parsed if look.person}
    return [
        look._replace(base=f"{{}} {look.base}", person="person")
        if look.person is None and f"{{}} {look.base}" in bases
        else look
        for look in parsed
    ]


def difference(one: Look, other: Look) -> Attribute | None:
    """The attribute in which both differ; None if it is none, or not the only one."""
    if one.base != other.base:
        return None
    names: tuple[Attribute, ...] = ("person", "tone", "hair")
    differing = [name for name in names if getattr(one, name) != getattr(other, name)]
    return differing[0] if len(differing) == 1 else None


def rest(look: Look, attribute: Attribute) -> Look:
    """All but an attribute."""
    nothing: Any = {attribute: None}
    return look._replace(**nothing)


def instructions(attribute: Attribute, value: str | None) -> tuple[str, ...]:
    """Ways to ask for a value of an attribute."""
    if attribute == "hair":
        return _HAIR[value]
    if attribute == "person":
        return (f"make it a {value}", f"as a {value}", f"change it to a {value}")
    tone = "yellow" if value is None else value
    return (
        f"make the skin {tone}",
        f"make it {tone}-skinned",
        f"with {tone} skin",
        f"change it to {tone} skin tone",
    )


def emoji_edits() -> EditSource:
    """All pairs of images whose captions differ in one attribute, in both directions.

    The pairs to train on are those of two training images. Those whose second image is held out
    are held out, and the image is in no other pair: nothing shows it in training.
    """
    images = CaptionedEmojiSource()
    parsed = looks(images.captions)
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, look in enumerate(parsed):
        numbers[look.base].append(number)
    pairs = []
    for alike in numbers.values():
        for source in alike:
            for target in alike:
                attribute = difference(parsed[source], parsed[target])
                if attribute is None or images.held_out[source]:
                    continue
                value = getattr(parsed[target], attribute)
                pairs.append(Pair(source, target, instructions(attribute, value)))
    held_out = images.held_out[[pair.target for pair in pairs]]
    return EditSource(images.location, images, pairs, held_out)


def _look(caption: str) -> Look:
    first, *rest = caption.split(", ")
    tones = [part for part in rest if part.endswith(_TONE)]
    hair = [part for part in rest if part in _HAIR]
    # Two people, with skin tones of their own: no single instruction names the one.
    others = [part for part in rest if part not in hair and part not in tones[:1]]
    if first in _NAMES_OF_PEOPLE:
        first, person = _NAMES_OF_PEOPLE[first]
    elif len(people := _PEOPLE.findall(first)) == 1:
        first, person = _PEOPLE.sub("{}", first), people[0]
    else:
        person = None
    tone = tones[0].removesuffix(_TONE) if tones else None
    return Look(", ".join([first, *others]), person, tone, hair[0] if hair else None)
