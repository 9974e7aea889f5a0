"""The generated world's entities, facts and pages, each computed from its number and the seed when asked for.

Path: world_text → world_relations → [here] → world. Nothing is stored: names, links and values are arithmetic on an
entity's number, so a world of a million pages takes no more memory than one of a thousand. Knows no tasks, no files.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from taskspec.data import world_text as words
from taskspec.data.world_relations import KINDS, RELATIONS, Relation

ABSTRACT = "Section::::Abstract."
BEARERS = 5
"""Persons per surname: what entity linking has to tell apart."""
MOST_REPEATED = 9
"""Sentences on a page that repeat facts of other pages."""
SEE_ALSO = "Section::::See also."
HELD_OUT_PERCENT = 18
"""Pages that are gold in dev sets only."""


RELATIONS_OF = {kind.name: tuple(relation for relation in RELATIONS if relation.kind == kind.name) for kind in KINDS}


class Entity(NamedTuple):
    """What a page is about: its kind and its number among that kind."""

    kind: str
    number: int


class Fact(NamedTuple):
    """One relation of one subject. `object` is the value's page, where it has one."""

    relation: Relation
    subject: Entity
    value: str
    object: Entity | None

    def phrase(self, wording: str, subject: str, object: str = "") -> str:
        """A wording of the relation with its names filled in."""
        article = "an" if self.value[0] in "aeiou" else "a"
        return wording.format(s=subject, o=object, v=self.value, a=f"{article} {self.value}")

    @property
    def key(self) -> tuple[str, Entity]:
        """Identifies the fact on a page."""
        return self.relation.name, self.subject


class Span(NamedTuple):
    """Characters [start, end) of one paragraph."""

    paragraph: int
    start: int
    end: int


class Page(NamedTuple):
    """A page as KILT has it: `paragraphs[0]` is the title, headings are paragraphs, each ends with a newline."""

    paragraphs: list[str]
    sections: list[str]
    """The heading over each paragraph."""
    evidence: dict[tuple[str, Entity], Span]
    """Fact.key → the sentence that states it."""
    mentions: list[tuple[Entity, Span]]
    """Other pages' entities, and the sentence that names each."""


class Shuffle:
    """A permutation of range(size) that takes no memory: a Feistel network over pairs of digits in a base of √size,
    walked on from the few numbers that fall outside the range."""

    def __init__(self, size: int, rng: random.Random) -> None:
        self.size = size
        self._base = math.isqrt(size - 1) + 1
        self._keys = [rng.getrandbits(64) | 1 for _ in range(4)]

    def __call__(self, number: int) -> int:
        while True:
            left, right = divmod(number, self._base)
            for key in self._keys:
                left, right = right, (left + ((right + 1) * key % (1 << 64) >> 29)) % self._base
            number = left * self._base + right
            if number < self.size:
                return number

    def inverse(self, place: int) -> int:
        while True:
            left, right = divmod(place, self._base)
            for key in reversed(self._keys):
                left, right = (right - ((left + 1) * key % (1 << 64) >> 29)) % self._base, left
            place = left * self._base + right
            if place < self.size:
                return place


class Link:
    """Which object each subject of a relation has: every used object has equally many subjects, to one."""

    def __init__(self, subjects: int, objects: int, crowd: int, rng: random.Random) -> None:
        self._subjects = Shuffle(subjects, rng)
        self._objects = Shuffle(objects, rng)
        self._used = -(-objects // crowd)

    def object(self, subject: int) -> int:
        return self._objects(self._subjects(subject) % self._used)

    def subjects(self, object: int) -> list[int]:
        first = self._objects.inverse(object)
        if first >= self._used:
            return []
        return [self._subjects.inverse(place) for place in range(first, self._subjects.size, self._used)]


class Names:
    """Distinct made-up names: a start, as many middles as `count` names need but at least `middles`, an end."""

    def __init__(self, count: int, middles: int, ends: Sequence[str], rng: random.Random) -> None:
        self._ends = ends
        self._middles = middles
        while (size := len(words.NAME_STARTS) * len(words.NAME_MIDDLES) ** self._middles * len(ends)) < count:
            self._middles += 1
        self._shuffle = Shuffle(size, rng)

    def __call__(self, number: int) -> str:
        rest, start = divmod(self._shuffle(number), len(words.NAME_STARTS))
        parts = [words.NAME_STARTS[start]]
        for _ in range(self._middles):
            rest, middle = divmod(rest, len(words.NAME_MIDDLES))
            parts.append(words.NAME_MIDDLES[middle])
        return "".join([*parts, self._ends[rest]]).capitalize()


class Encyclopedia:
    """All entities of one world."""

    def __init__(self, pages: int, seed: int) -> None:
        rng = random.Random(f"taskspec world {seed}")
        self.pages = pages
        self._seed = seed
        self._counts = {kind.name: round(kind.share * pages) for kind in KINDS}
        self._counts["person"] += pages - sum(self._counts.values())
        self._order = Shuffle(pages, rng)
        self._surnames = -(-self._counts["person"] // BEARERS)
        self._surname = Names(self._surnames, 1, words.SURNAME_ENDS, rng)
        self._place = Names(self._counts["place"], 0, words.PLACE_ENDS, rng)
        self._region = Names(self._counts["region"], 1, words.REGION_ENDS, rng)
        self._pairs = {
            kind: Shuffle(len(words.ADJECTIVES) * len(nouns), rng)
            for kind, nouns in (("work", words.TITLE_NOUNS), ("species", words.ANIMALS))
        }
        self._links = {
            relation.name: Link(self._counts[relation.kind], self._counts[relation.object], relation.crowd, rng)
            for relation in RELATIONS
            if relation.object is not None
        }
        self.title = lru_cache(maxsize=1 << 16)(self._title)
        self.facts = lru_cache(maxsize=1 << 14)(self._facts)
        self.page = lru_cache(maxsize=1 << 12)(self._page)

    def _draw(self, below: int, *key: object) -> int:
        """A number in [0, below) that depends on the seed and the key alone."""
        digest = hashlib.blake2b("/".join(map(str, (self._seed, *key))).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % below

    # Which entities there are.

    def count(self, kind: str) -> int:
        return self._counts[kind]

    def entity(self, row: int) -> Entity:
        """The entity of the row-th page of the knowledge source."""
        number = self._order(row)
        for kind, count in self._counts.items():
            if number < count:
                return Entity(kind, number)
            number -= count
        raise AssertionError(f"row {row} of {self.pages}")

    def wikipedia_id(self, entity: Entity) -> str:
        before = 0
        for kind, count in self._counts.items():
            if kind == entity.kind:
                break
            before += count
        return str(100_000 + 16 * self._order.inverse(before + entity.number) + self._draw(16, "id", *entity))

    def held_out(self, entity: Entity) -> bool:
        """Whether no training query may have this page as gold."""
        return self._draw(100, "held out", *entity) < HELD_OUT_PERCENT

    # What they are called.

    def _title(self, entity: Entity) -> str:
        kind, number = entity
        if kind == "person":
            bearer, surname = divmod(number, self._surnames)
            names = [*words.HER_NAMES, *words.HIS_NAMES]
            # 7 and the number of names have no common factor: the bearers of a surname differ.
            first = (self._draw(len(names), kind, surname) + 7 * bearer) % len(names)
            return f"{names[first]} {self._surname(surname)}"
        if kind == "place":
            return self._place(number)
        if kind == "region":
            return self._region(number)
        if kind == "family":
            return f"{self._surname(number)} family"
        if kind == "company":
            return self._pick(words.FIRMS, kind, number, self._surnames).format(self._surname(number % self._surnames))
        if kind == "event":
            hosts = -(-self._counts["place"] // 5)
            return self._pick(words.EVENTS, kind, number, hosts).format(self._place(number % hosts))
        nouns, form = (words.TITLE_NOUNS, "The {} of {}") if kind == "work" else (words.ANIMALS, "{1} {0}")
        half, odd = divmod(number, 2)
        if odd:
            noun = self._pick(nouns, kind, half, self._counts["place"])
            return form.format(noun.capitalize() if kind == "work" else noun, self._place(half % self._counts["place"]))
        again, pair = divmod(half, self._pairs[kind].size)
        first, second = divmod(self._pairs[kind](pair), len(nouns))
        title = f"{words.ADJECTIVES[first]} {nouns[second]}"
        title = f"The {title.title()}" if kind == "work" else title.capitalize()
        return f"{title} of {self._place(again - 1)}" if again else title

    def _pick(self, forms: Sequence[str], kind: str, number: int, names: int) -> str:
        """The form of a title built on the (number mod names)-th name; another one each time the name comes again."""
        again, name = divmod(number, names)
        return forms[(self._draw(len(forms), kind, name) + again) % len(forms)]

    def short(self, entity: Entity) -> str:
        """What texts call the entity once it is known: a person by surname, all else by title."""
        title = self.title(entity)
        return title.rpartition(" ")[2] if entity.kind == "person" else title

    def pronoun(self, entity: Entity) -> str:
        if entity.kind != "person":
            return "it"
        return "she" if self.title(entity).partition(" ")[0] in words.HER_NAMES else "he"

    # What is true of them.

    def _facts(self, subject: Entity) -> tuple[Fact, ...]:
        """What the subject's page states about it; the first says what it is."""
        facts = []
        for relation in RELATIONS_OF[subject.kind]:
            if relation.object is None:
                value = relation.values[self._draw(len(relation.values), relation.name, subject.number)]
                facts.append(Fact(relation, subject, value, None))
            else:
                object = Entity(relation.object, self._links[relation.name].object(subject.number))
                if object != subject:
                    facts.append(Fact(relation, subject, self.title(object), object))
        return tuple(facts)

    def about(self, object: Entity) -> list[Fact]:
        """Facts of other subjects whose value the object is; its page states them too."""
        return [
            Fact(relation, Entity(relation.kind, number), self.title(object), object)
            for relation in RELATIONS
            if relation.object == object.kind
            for number in self._links[relation.name].subjects(object.number)
            if Entity(relation.kind, number) != object
        ]

    def bearers(self, entity: Entity) -> Iterator[Entity]:
        """All persons of a family's or a person's surname."""
        for number in range(entity.number % self._surnames, self._counts["person"], self._surnames):
            yield Entity("person", number)

    # Their pages.

    def _page(self, entity: Entity) -> Page:
        rng = random.Random(f"{self._seed}/{entity}")
        if entity.kind == "family":
            return self._family_page(entity, rng)
        title, short, pronoun = self.title(entity), self.short(entity), self.pronoun(entity)
        definition, *others = self.facts(entity)
        rng.shuffle(others)
        own = [_Sentence(definition.phrase(rng.choice(definition.relation.statements), title), definition, None)]
        for fact in others:
            wording = rng.choice(fact.relation.statements)
            own.append(_Sentence(fact.phrase(wording, pronoun if wording[:3] == "{s}" else short), fact, fact.object))
        told = []
        for fact in self.about(entity):
            wording = fact.relation.reverse
            name = pronoun if wording[:3] == "{o}" else short
            told.append(_Sentence(fact.phrase(wording, self.title(fact.subject), name), fact, fact.subject))
        early = rng.randint(2, 3)
        told += own[early:]
        rng.shuffle(told)
        # What the pages of things mentioned here state: the same facts again, where they are not gold.
        nearby = {sentence.mention: None for sentence in own + told if sentence.mention is not None}
        repeated = []
        for other in rng.sample(list(nearby), min(len(nearby), MOST_REPEATED)):
            fact = rng.choice(self.facts(other))
            statement = fact.phrase(rng.choice(fact.relation.statements), self.title(other))
            repeated.append(_Sentence(statement, None, other))
        heading = next(kind.section for kind in KINDS if kind.name == entity.kind)
        return _assemble(title, [(ABSTRACT, own[:early]), (heading, told), (SEE_ALSO, repeated)])

    def _family_page(self, entity: Entity, rng: random.Random) -> Page:
        """Repeats facts of everybody of that surname; gold for nothing."""
        name = self.title(entity)
        members = [_Sentence(f"The {name} has several members of note", None, None)]
        for person in self.bearers(entity):
            occupation, *others = self.facts(person)
            fact = rng.choice(others)
            subject = f"{self.title(person)}, {occupation.phrase('{a}', '')},"
            members.append(_Sentence(fact.phrase(fact.relation.statements[0], subject), None, person))
        return _assemble(name, [(ABSTRACT, members)])


class _Sentence(NamedTuple):
    text: str
    fact: Fact | None
    """What it is evidence of."""
    mention: Entity | None


def _assemble(title: str, sections: list[tuple[str, list[_Sentence]]]) -> Page:
    """Sentences put one behind the other, and where each one came to stand."""
    page = Page([f"{title}\n"], [ABSTRACT], {}, [])
    for heading, sentences in sections:
        if not sentences:
            continue
        if heading != ABSTRACT:
            page.paragraphs.append(f"{heading}\n")
            page.sections.append(heading)
        text = ""
        for sentence in sentences:
            start = len(text)
            text += f"{sentence.text[0].upper()}{sentence.text[1:]}. "
            span = Span(len(page.paragraphs), start, len(text) - 1)
            if sentence.fact is not None:
                page.evidence[sentence.fact.key] = span
            if sentence.mention is not None:
                page.mentions.append((sentence.mention, span))
        page.paragraphs.append(f"{text.rstrip()}\n")
        page.sections.append(heading)
    return page
