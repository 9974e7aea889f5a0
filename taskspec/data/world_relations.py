"""The kinds of pages of the generated world and the relations between them, each with its wordings.

Path: world_text → [here] → world_pages → world. Only data and its shape: no randomness, no files.
A page states a relation in one of several ways and tasks ask for it in others, so matching words is not enough;
the vocabulary stays small, so that an encoder trained from nothing in minutes can learn it.
"""

from __future__ import annotations

from dataclasses import dataclass

from taskspec.data import world_text as words


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One relation and its wordings.

    In the wordings {s} is the subject and {v} the value; {a} is the value behind its article.
    """

    name: str
    kind: str
    """Kind of the subject."""
    object: str | None = None
    """Kind of the value, where it has a page of its own."""
    crowd: int = 1
    """1/crowd of the pages of that kind are objects at all, so each has more subjects."""
    values: tuple[str, ...] = ()
    """What the value is drawn from, where it has no page."""
    statements: tuple[str, ...]
    """On the subject's page, in claims and in talk."""
    reverse: str = ""
    """The same fact on the object's page, where {o} is the object."""
    label: str
    """As slot filling asks for it."""
    questions: tuple[str, ...]
    noun: str = ""
    """The object, described by the subject; nested into the questions of the object's relations."""
    clue: str = ""
    """What a riddle tells about the subject."""
    ask: str
    """The last turn of a dialogue, where {p} is the subject's pronoun."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of page."""

    name: str
    share: float
    """Of all pages."""
    riddle: str = ""
    """How a riddle calls such an entity; {v} paraphrases the value of the kind's first relation."""
    section: str
    """Heading over what the page tells beside its abstract, as KILT writes headings."""


KINDS = (
    Kind(name="person", share=0.34, riddle="{v}", section="Section::::Life."),
    Kind(name="place", share=0.14, riddle="town that lived on {v}", section="Section::::History."),
    Kind(name="work", share=0.18, riddle="{v}", section="Section::::Reception."),
    Kind(name="company", share=0.10, riddle="house that made {v}", section="Section::::Business."),
    Kind(name="species", share=0.09, riddle="creature living on {v}", section="Section::::Study."),
    Kind(name="event", share=0.08, riddle="occasion that ended with {v}", section="Section::::Background."),
    Kind(name="region", share=0.02, riddle="land of {v}", section="Section::::Towns."),
    Kind(name="family", share=0.05, section="Section::::Members."),
)

RELATIONS = (
    Relation(
        name="occupation",
        kind="person",
        values=tuple(words.OCCUPATIONS),
        statements=("{s} was {a}", "{s} earned a living as {a}", "{s} was known as {a}"),
        label="occupation",
        questions=("what did {s} do for a living", "what was the profession of {s}"),
        ask="What did {p} do for a living?",
    ),
    Relation(
        name="birthplace",
        kind="person",
        object="place",
        statements=("{s} was born in {v}", "{s} was a native of {v}", "{s} came into the world at {v}"),
        reverse="{o} is the birthplace of {s}",
        label="place of birth",
        questions=("where was {s} born", "what is the home town of {s}"),
        noun="the birthplace of {s}",
        clue="first saw daylight in {v}",
        ask="And where did {p} grow up?",
    ),
    Relation(
        name="birth_year",
        kind="person",
        values=words.YEARS,
        statements=("{s} was born in {v}", "The year of birth of {s} is given as {v}"),
        label="date of birth",
        questions=("when was {s} born", "in which year did the life of {s} begin"),
        ask="How long ago did {p} live?",
    ),
    Relation(
        name="employer",
        kind="person",
        object="company",
        statements=("{s} worked for {v}", "{s} found employment at {v}", "{s} spent ten years in the service of {v}"),
        reverse="{s} was on the staff of {o}",
        label="employer",
        questions=("who did {s} work for", "which company employed {s}"),
        noun="the employer of {s}",
        clue="drew wages from {v}",
        ask="Which firm did {p} belong to?",
    ),
    Relation(
        name="teacher",
        kind="person",
        object="person",
        crowd=4,
        statements=("{s} studied under {v}", "{s} was a pupil of {v}", "{s} learned the trade from {v}"),
        reverse="{o} was the teacher of {s}",
        label="student of",
        questions=("who taught {s}", "whose pupil was {s}"),
        noun="the teacher of {s}",
        clue="sat at the feet of {v}",
        ask="Who did {p} learn from?",
    ),
    Relation(
        name="trade",
        kind="place",
        values=tuple(words.TRADES),
        statements=("{s} is a town that trades in {v}", "{s} grew rich through {v}", "{s} is known for {v}"),
        label="main trade",
        questions=("what is {s} known for", "what did the merchants of {s} sell"),
        ask="What do people live on in {p}?",
    ),
    Relation(
        name="region",
        kind="place",
        object="region",
        statements=("{s} lies in {v}", "{s} belongs to {v}", "{s} is part of {v}"),
        reverse="{s} is one of the towns of {o}",
        label="located in",
        questions=("in which region is {s}", "where is {s} located"),
        noun="the region of {s}",
        clue="is ruled from the capital of {v}",
        ask="Where would I find {p} on the map?",
    ),
    Relation(
        name="town_year",
        kind="place",
        values=words.YEARS,
        statements=("{s} received its charter in {v}", "{s} has been a town since {v}"),
        label="inception",
        questions=("when did {s} become a town", "how old is {s}"),
        ask="How old is {p}?",
    ),
    Relation(
        name="town_founder",
        kind="place",
        object="person",
        crowd=3,
        statements=("{s} was laid out by {v}", "{s} was founded by {v}", "The plan of {s} was drawn by {v}"),
        reverse="{s} was a foundation of {o}",
        label="founded by",
        questions=("who founded {s}", "who laid out {s}"),
        noun="the founder of {s}",
        clue="owes its streets to {v}",
        ask="Who had the idea of settling {p}?",
    ),
    Relation(
        name="genre",
        kind="work",
        values=tuple(words.GENRES),
        statements=("{s} is {a}", "{s} is usually called {a}", "{s} takes the form of {a}"),
        label="genre",
        questions=("what kind of work is {s}", "to which genre does {s} belong"),
        ask="What sort of work is {p}?",
    ),
    Relation(
        name="author",
        kind="work",
        object="person",
        crowd=3,
        statements=("{s} was written by {v}", "{s} came from the pen of {v}", "{s} is a late creation of {v}"),
        reverse="{o} was the author of {s}",
        label="author",
        questions=("who wrote {s}", "who is the author of {s}"),
        noun="the author of {s}",
        clue="sprang from the mind of {v}",
        ask="Who made {p}?",
    ),
    Relation(
        name="setting",
        kind="work",
        object="place",
        crowd=2,
        statements=("{s} is set in {v}", "The story of {s} unfolds in {v}", "{s} takes place at {v}"),
        reverse="{s} is set in {o}",
        label="narrative location",
        questions=("where is {s} set", "in which town does {s} take place"),
        noun="the town where {s} is set",
        clue="plays among the streets of {v}",
        ask="Where does {p} take place?",
    ),
    Relation(
        name="publisher",
        kind="work",
        object="company",
        statements=("{s} was published by {v}", "{s} was brought out by {v}", "The rights to {s} are held by {v}"),
        reverse="{o} was the publisher of {s}",
        label="publisher",
        questions=("who published {s}", "which company brought out {s}"),
        noun="the publisher of {s}",
        clue="was put on the market by {v}",
        ask="Which house sold {p}?",
    ),
    Relation(
        name="work_year",
        kind="work",
        values=words.YEARS,
        statements=("{s} appeared in {v}", "{s} was first shown to the public in {v}"),
        label="publication date",
        questions=("when did {s} come out", "in which year was {s} published"),
        ask="When did {p} come out?",
    ),
    Relation(
        name="product",
        kind="company",
        values=tuple(words.PRODUCTS),
        statements=("{s} is a company that makes {v}", "{s} is a maker of {v}", "{s} became famous for its {v}"),
        label="product",
        questions=("what does {s} make", "what is produced by {s}"),
        ask="What did {p} make?",
    ),
    Relation(
        name="company_founder",
        kind="company",
        object="person",
        crowd=4,
        statements=("{s} was started by {v}", "{s} was founded by {v}", "{s} goes back to {v}"),
        reverse="{s} was a foundation of {o}",
        label="founded by",
        questions=("who founded {s}", "who started {s}"),
        noun="the founder of {s}",
        clue="was the venture of {v}",
        ask="Who started {p}?",
    ),
    Relation(
        name="seat",
        kind="company",
        object="place",
        crowd=2,
        statements=("{s} has its offices in {v}", "{s} is based in {v}", "The headquarters of {s} are at {v}"),
        reverse="{o} is the headquarters of {s}",
        label="headquarters location",
        questions=("where is {s} based", "where are the headquarters of {s}"),
        noun="the town where {s} is based",
        clue="pays its taxes in {v}",
        ask="Where are the offices of {p}?",
    ),
    Relation(
        name="diet",
        kind="species",
        values=tuple(words.DIETS),
        statements=("{s} is an animal that eats {v}", "{s} feeds on {v}", "The food of {s} consists of {v}"),
        label="main food source",
        questions=("what does {s} eat", "what is the food of {s}"),
        ask="What does {p} eat?",
    ),
    Relation(
        name="habitat",
        kind="species",
        object="place",
        crowd=2,
        statements=("{s} is found near {v}", "{s} lives in the hills around {v}", "The habitat of {s} is close to {v}"),
        reverse="{o} is in the habitat of {s}",
        label="habitat",
        questions=("where does {s} live", "near which town is {s} found"),
        noun="the town near which {s} lives",
        clue="makes its home at the gates of {v}",
        ask="Where could I see {p}?",
    ),
    Relation(
        name="discoverer",
        kind="species",
        object="person",
        crowd=6,
        statements=("{s} was first described by {v}", "{s} was discovered by {v}", "The name of {s} was given by {v}"),
        reverse="{o} was the discoverer of {s}",
        label="discoverer or inventor",
        questions=("who discovered {s}", "who first described {s}"),
        noun="the discoverer of {s}",
        clue="entered science thanks to {v}",
        ask="Who saw {p} first?",
    ),
    Relation(
        name="outcome",
        kind="event",
        values=tuple(words.OUTCOMES),
        statements=("{s} led to {v}", "{s} was an event that ended in {v}", "The result of {s} was {v}"),
        label="has effect",
        questions=("what was the result of {s}", "how did {s} end"),
        ask="How did {p} end?",
    ),
    Relation(
        name="event_year",
        kind="event",
        values=words.YEARS,
        statements=("{s} took place in {v}", "{s} dates from {v}"),
        label="point in time",
        questions=("when did {s} take place", "in what year was {s}"),
        ask="When did {p} happen?",
    ),
    Relation(
        name="leader",
        kind="event",
        object="person",
        crowd=6,
        statements=("{s} was led by {v}", "{s} was directed by {v}", "The man or woman behind {s} was {v}"),
        reverse="{o} was in charge of {s}",
        label="organizer",
        questions=("who led {s}", "who was in charge of {s}"),
        noun="the leader of {s}",
        clue="obeyed the orders of {v}",
        ask="Who was in charge of {p}?",
    ),
    Relation(
        name="sponsor",
        kind="event",
        object="company",
        crowd=2,
        statements=("{s} was paid for by {v}", "{s} was sponsored by {v}", "The costs of {s} were met by {v}"),
        reverse="{o} was the sponsor of {s}",
        label="sponsor",
        questions=("who paid for {s}", "which company sponsored {s}"),
        noun="the sponsor of {s}",
        clue="emptied the purse of {v}",
        ask="Whose money was behind {p}?",
    ),
    Relation(
        name="landscape",
        kind="region",
        values=tuple(words.LANDSCAPES),
        statements=("{s} is a region of {v}", "{s} is full of {v}", "Visitors to {s} come for its {v}"),
        label="landscape",
        questions=("what is the landscape of {s} like", "what do visitors see in {s}"),
        ask="What does {p} look like?",
    ),
    Relation(
        name="capital",
        kind="region",
        object="place",
        statements=("{s} is governed from {v}", "The capital of {s} is {v}"),
        reverse="{o} is the capital of {s}",
        label="capital",
        questions=("what is the capital of {s}", "from which town is {s} governed"),
        noun="the capital of {s}",
        clue="takes its orders from {v}",
        ask="Which town is the largest of {p}?",
    ),
)
