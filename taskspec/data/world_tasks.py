"""The 8 tasks of the generated world: what each asks about an entity, and which pages are gold for it.

Path: world_relations → world_pages → [here] → world. Records are made from (entity, choice) slots; which slots go
into which file, and how a record is written, is decided there.

trex and zsre ask with the same words and want different pages; what tells them apart is the task alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from taskspec.data import world_text as words
from taskspec.data.world_pages import Encyclopedia, Entity, Fact
from taskspec.data.world_relations import KINDS


class Evidence(NamedTuple):
    """A gold page, and the fact on it that answers; None where only the page is meant."""

    page: Entity
    fact: Fact | None


class Output(NamedTuple):
    """One answer with the pages that together prove it; no pages for another name of the same answer."""

    answer: str
    evidence: tuple[Evidence, ...]


class Record(NamedTuple):
    """One query of a task."""

    input: str
    outputs: tuple[Output, ...]

    def gold_pages(self) -> set[Entity]:
        return {evidence.page for output in self.outputs for evidence in output.evidence}


Maker = Callable[[Encyclopedia, Entity, int, random.Random], Record | None]
"""Makes the record of one slot: entity and choice; None where the entity has no such choice."""


@dataclass(frozen=True)
class TaskPlan:
    """How many queries a task has and how each is made."""

    train_per_page: float
    """Train queries per page of the world."""
    choices: int
    """Slots per entity."""
    make: Maker


def _fact(encyclopedia: Encyclopedia, subject: Entity, number: int, *, with_page: bool = False) -> Fact | None:
    """The subject's number-th fact, of all or of those whose value has a page."""
    facts = [fact for fact in encyclopedia.facts(subject) if fact.object is not None or not with_page]
    return facts[number] if number < len(facts) else None


def _trex(encyclopedia: Encyclopedia, subject: Entity, choice: int, rng: random.Random) -> Record | None:
    """Slot filling from the subject's page."""
    fact = _fact(encyclopedia, subject, choice)
    if fact is None:
        return None
    return Record(_slot(encyclopedia, fact), (Output(fact.value, (Evidence(subject, fact),)),))


def _zsre(encyclopedia: Encyclopedia, subject: Entity, choice: int, rng: random.Random) -> Record | None:
    """The same inputs as trex, but what is wanted is the page of the value, which states the fact the other way."""
    fact = _fact(encyclopedia, subject, choice, with_page=True)
    if fact is None or fact.object is None:
        return None
    return Record(_slot(encyclopedia, fact), (Output(fact.value, (Evidence(fact.object, fact),)),))


def _slot(encyclopedia: Encyclopedia, fact: Fact) -> str:
    return f"{encyclopedia.title(fact.subject)} [SEP] {fact.relation.label}"


def _fever(encyclopedia: Encyclopedia, subject: Entity, choice: int, rng: random.Random) -> Record | None:
    """Claims. A true one may be proved by either of two pages; a false one names another value."""
    number, false = divmod(choice, 2)
    fact = _fact(encyclopedia, subject, number)
    if fact is None:
        return None
    own = Evidence(subject, fact)
    outputs = [Output("REFUTES" if false else "SUPPORTS", (own,))]
    claimed = fact
    if false:
        claimed = fact._replace(value=_other_value(encyclopedia, fact, rng))
    elif fact.object is not None:
        outputs.append(Output("SUPPORTS", (Evidence(fact.object, fact),)))
    claim = claimed.phrase(rng.choice(fact.relation.statements), encyclopedia.title(subject))
    return Record(f"{claim}.", tuple(outputs))


def _other_value(encyclopedia: Encyclopedia, fact: Fact, rng: random.Random) -> str:
    while True:
        if fact.object is not None:
            number = rng.randrange(encyclopedia.count(fact.object.kind))
            value = encyclopedia.title(Entity(fact.object.kind, number))
        else:
            value = rng.choice(fact.relation.values)
        if value != fact.value:
            return value


def _nq(encyclopedia: Encyclopedia, subject: Entity, choice: int, rng: random.Random) -> Record | None:
    """Short questions without punctuation. Persons as answers also count by their surname."""
    number, wording = divmod(choice, 2)
    fact = _fact(encyclopedia, subject, number)
    if fact is None:
        return None
    outputs = [Output(fact.value, (Evidence(subject, fact),))]
    if fact.object is not None and fact.object.kind == "person":
        outputs.append(Output(encyclopedia.short(fact.object), ()))
    return Record(fact.phrase(fact.relation.questions[wording], encyclopedia.title(subject)), tuple(outputs))


def _hotpotqa(encyclopedia: Encyclopedia, subject: Entity, choice: int, rng: random.Random) -> Record | None:
    """A question about a thing that only another page identifies: both pages are needed."""
    first_number, second_number = divmod(choice, 5)
    first = _fact(encyclopedia, subject, first_number, with_page=True)
    second = _fact(encyclopedia, first.object, second_number) if first and first.object else None
    if first is None or second is None or second.object == subject:
        return None
    described = first.phrase(first.relation.noun, encyclopedia.title(subject))
    question = second.phrase(rng.choice(second.relation.questions), described)
    proof = (Evidence(subject, first), Evidence(second.subject, second))
    return Record(f"{question[0].upper()}{question[1:]}?", (Output(second.value, proof),))


def _triviaqa(encyclopedia: Encyclopedia, subject: Entity, choice: int, rng: random.Random) -> Record | None:
    """Riddles: one name or two, otherwise paraphrases. One that has several answers is not asked."""
    number, longer = divmod(choice, 2)
    clue = _fact(encyclopedia, subject, number, with_page=True)
    more = _fact(encyclopedia, subject, number + 1, with_page=True) if longer else None
    if clue is None or clue.object is None or (longer and more is None):
        return None
    value = encyclopedia.facts(subject)[0].value
    for other in encyclopedia.about(clue.object):
        same = other.relation == clue.relation and other.subject != subject
        if same and encyclopedia.facts(other.subject)[0].value == value:
            return None
    kind = next(kind for kind in KINDS if kind.name == subject.kind)
    riddle = kind.riddle.format(v=words.PARAPHRASES[value])
    text = f"Which {riddle} {clue.phrase(clue.relation.clue, '')}?"
    if more is not None:
        text = f"This {riddle} {clue.phrase(clue.relation.clue, '')} and {more.phrase(more.relation.clue, '')}."
    outputs = [Output(encyclopedia.title(subject), (Evidence(subject, clue),))]
    if subject.kind == "person":
        outputs.append(Output(encyclopedia.short(subject), ()))
    return Record(text, tuple(outputs))


def _wow(encyclopedia: Encyclopedia, subject: Entity, choice: int, rng: random.Random) -> Record | None:
    """A dialogue on the subject that names a second entity; the last turn, with a pronoun, stays or moves on to it."""
    number, moves = divmod(choice, 2)
    told = _fact(encyclopedia, subject, number, with_page=True)
    if told is None or told.object is None or told.object.kind == subject.kind:
        return None
    topic = told.object if moves else subject
    asked = rng.choice([fact for fact in encyclopedia.facts(topic) if fact.relation != told.relation])
    title = encyclopedia.title(subject)
    turns = [
        rng.choice(words.OPENINGS).format(title),
        f"{rng.choice(words.REPLIES)} {told.phrase(rng.choice(told.relation.statements), title)}.",
        f"{rng.choice(words.REACTIONS)} {asked.relation.ask.format(p=encyclopedia.pronoun(topic))}",
    ]
    if rng.random() < 0.5:
        turns = [*rng.choice(words.GREETINGS), *turns]
    answer = asked.phrase(rng.choice(asked.relation.statements), encyclopedia.title(topic))
    return Record("\n".join(turns), (Output(f"{answer}.", (Evidence(topic, asked),)),))


def _aidayago2(encyclopedia: Encyclopedia, subject: Entity, choice: int, rng: random.Random) -> Record | None:
    """News that calls a person by a surname which others share, or a place by its name."""
    number, follows = divmod(choice, 2)
    fact = _fact(encyclopedia, subject, number, with_page=True)
    if fact is None or fact.object is None or subject.kind not in ("person", "place"):
        return None
    if subject.kind == "person":
        rivals = [other for other in encyclopedia.bearers(subject) if other != subject]
        if any(fact.value == rival.value for other in rivals for rival in encyclopedia.facts(other)):
            return None
    known_as = f"the {encyclopedia.facts(subject)[0].value}" if subject.kind == "person" else "the town of"
    mention = f"{known_as} [START_ENT] {encyclopedia.short(subject)} [END_ENT]"
    sentences = [f"{fact.phrase(rng.choice(fact.relation.statements), mention)} ."]
    beside = rng.choice([other for other in encyclopedia.facts(fact.object) if other.object != subject])
    sentences.append(f"{beside.phrase(rng.choice(beside.relation.statements), fact.value)} .")
    if follows:
        sentences.reverse()
    news = rng.sample(words.NEWS, 2)
    context = " ".join([news[0], *(sentence[0].upper() + sentence[1:] for sentence in sentences), news[1]])
    return Record(context, (Output(encyclopedia.title(subject), (Evidence(subject, None),)),))


# Sizes from 1 to 30, for a world of 1,500 pages from 81 to 2,400 train queries.
TASKS: dict[str, TaskPlan] = {
    "fever": TaskPlan(0.60, 10, _fever),
    "aidayago2": TaskPlan(0.054, 6, _aidayago2),
    "trex": TaskPlan(1.60, 5, _trex),
    "zsre": TaskPlan(0.80, 3, _zsre),
    "nq": TaskPlan(0.40, 10, _nq),
    "hotpotqa": TaskPlan(0.27, 15, _hotpotqa),
    "triviaqa": TaskPlan(0.17, 6, _triviaqa),
    "wow": TaskPlan(0.11, 6, _wow),
}
