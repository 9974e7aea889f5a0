"""The words of the generated world: parts of names, and values with their paraphrases.

Path: [here] → world_relations → world_pages → world. Only data: no randomness, no files.
"""

from __future__ import annotations

from collections.abc import Mapping

# Joined, the parts of a name can be taken apart in one way only: starts and middles end with their vowel.
NAME_STARTS = tuple("ba be bo da do fa ga go ha ho ka ke ko la lo ma me mo na no pa ro sa so ta te to va ve wa".split())
NAME_MIDDLES = tuple("bi du fo gi ka la li lo ma mi na ne ni no ra ri ro ru sa se ta te ti to va vi zo zu".split())
SURNAME_ENDS = tuple("ck ks ld lm ls lt n nd nt rd rk rn rs sk st x".split())
PLACE_ENDS = tuple("bury by dale ford gate ham haven holm hurst mere mouth ness port stead thorpe wick".split())
REGION_ENDS = tuple("land mark moor reach shire wold".split())

HER_NAMES = tuple(
    "Ada Bera Calla Dina Elsa Fay Greta Hanna Ida Jutta Karin Lena Mina Nora Olga Petra Rosa Sina Tilda Vera".split()
)
HIS_NAMES = tuple(
    "Abel Bruno Cyril Dario Emil Felix Gus Henrik Ivo Jonas Karl Luca Max Niels Otto Paul Rafe Simon Tom Viktor".split()
)
ADJECTIVES = tuple(
    "amber bitter blue broken crimson distant early empty frozen gentle golden green hidden hollow iron ivory "
    "lonely lost narrow northern pale quiet red restless rising second secret silent silver stone white winter".split()
)
TITLE_NOUNS = tuple(
    "bridge bell candle captain crown daughter door feather garden ghost guest harbor island journey key lantern "
    "letter mirror orchard river road rose season shadow song star storm tower valley voyage widow window".split()
)
ANIMALS = tuple(
    "beetle carp crane crow eel falcon finch frog gull hare heron lizard lynx moth newt otter owl plover shrew "
    "snail stoat swallow toad trout viper wren".split()
)
EVENTS = ("Siege of {}", "{} Fair", "Great Fire of {}", "{} Congress", "{} Regatta", "Treaty of {}")
FIRMS = (
    "{} Brothers",
    "{} Brewery",
    "{} Foundry",
    "{} Mills",
    "{} Press",
    "{} Shipping",
    "{} Trading Company",
    "{} Works",
)

# Values that are no pages: as pages and most tasks write them → as riddles and talk paraphrase them.
OCCUPATIONS: Mapping[str, str] = {
    "painter": "artist in oils",
    "botanist": "student of plants",
    "astronomer": "watcher of the heavens",
    "physician": "healer of the sick",
    "composer": "maker of music",
    "architect": "designer of buildings",
    "poet": "writer of verse",
    "lawyer": "pleader in court",
    "engineer": "builder of machines",
    "actor": "performer on the stage",
    "chemist": "mixer of substances",
    "historian": "teller of the past",
    "admiral": "commander of fleets",
    "banker": "lender of money",
    "geographer": "drawer of maps",
    "mathematician": "solver of equations",
}
GENRES: Mapping[str, str] = {
    "novel": "long tale in prose",
    "opera": "sung drama",
    "comedy": "funny stage piece",
    "ballad": "story told in verse",
    "symphony": "piece for orchestra",
    "ballet": "danced drama",
    "memoir": "account of a life",
    "waltz": "piece for dancing",
    "fable": "story with a moral",
    "tragedy": "stage piece with a sad end",
}
PRODUCTS: Mapping[str, str] = {
    "clocks": "devices that tell the hour",
    "glass": "panes and bottles",
    "beer": "a brewed drink",
    "paper": "sheets for writing",
    "ropes": "twisted lines for sailors",
    "pianos": "instruments with keys",
    "soap": "bars for washing",
    "ships": "vessels for the sea",
    "carpets": "woven floor coverings",
    "lamps": "sources of light",
}
TRADES: Mapping[str, str] = {
    "salt": "what seasons food",
    "wool": "the coats of sheep",
    "copper": "a reddish metal",
    "timber": "felled trees",
    "herring": "small sea fish",
    "wine": "pressed grapes",
    "coal": "black fuel",
    "horses": "animals for riding",
    "marble": "stone for statues",
    "honey": "the labor of bees",
}
DIETS: Mapping[str, str] = {
    "seeds": "what plants sow",
    "moss": "soft green growth",
    "snails": "slow shelled animals",
    "berries": "small sweet fruit",
    "mice": "little rodents",
    "insects": "six-legged prey",
    "reeds": "tall grass of the shore",
    "mussels": "bivalves",
}
OUTCOMES: Mapping[str, str] = {
    "a truce": "the silence of arms",
    "a flood": "streets under water",
    "a new law": "a changed statute",
    "an election": "a vote of the people",
    "a riot": "an angry crowd",
    "a marriage": "a wedding",
    "a strike": "workers laying down tools",
    "a bankruptcy": "unpaid debts",
}
LANDSCAPES: Mapping[str, str] = {
    "glaciers": "rivers of ice",
    "vineyards": "rows of grapes",
    "marshes": "wet lowlands",
    "volcanoes": "mountains of fire",
    "forests": "endless trees",
    "lakes": "still waters",
}
YEARS = tuple(str(year) for year in range(1610, 1960))
PARAPHRASES: Mapping[str, str] = {
    **OCCUPATIONS,
    **GENRES,
    **PRODUCTS,
    **TRADES,
    **DIETS,
    **OUTCOMES,
    **LANDSCAPES,
}

# Talk and news around the facts.
OPENINGS = (
    "I have been reading about {} lately.",
    "Somebody told me about {} the other day.",
    "Have you ever heard of {}?",
    "{} is a subject that I love.",
)
REPLIES = ("Oh yes!", "I know a little.", "Sure, a friend told me.", "Of course.")
REACTIONS = ("How nice.", "I did not know that.", "Really?", "That sounds good.")
GREETINGS = (
    ("Hi, how are you today?", "Fine, thank you. What is on your mind?"),
    ("Hello there, I am bored.", "Then let us talk about something."),
    ("It rains again here.", "Same here. Good weather for books."),
)
NEWS = (
    "The council met on Monday and heard several guests .",
    "No further details were given by the officials .",
    "A large crowd had come to hear the speech .",
    "Prices at the market closed lower this week .",
    "The mayor thanked everybody who had helped .",
    "The exhibition stays open until the end of the month .",
)
