"""The small world the shipped model knows: its people, things and facts, as plain data.

Knows nothing of documents, tokens or models. `stories.py` and `corpus.py` turn it into text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Animal:
    """One animal; an empty string means the world has no such fact about it."""

    name: str
    size: int
    home: str
    food: str
    legs: str
    sound: str
    baby: str


@dataclass(frozen=True)
class Fact:
    """One thing the model knows: several ways to ask for it and the one plain answer."""

    questions: tuple[str, ...]
    answer: str


GIRLS = (
    "Mia", "Anna", "Lily", "Rosa", "Emma", "Clara", "Zoe", "Lucy", "Ella", "Nina", "Sara", "Ruby", "Molly",
    "Grace", "Ivy", "Hanna", "Julia", "Maya", "Lena", "Kate",
)  # fmt: skip
BOYS = (
    "Tom", "Ben", "Sam", "Leo", "Max", "Jack", "Finn", "Paul", "Noah", "Oscar", "Peter", "Hugo", "Emil",
    "David", "Adam", "Luke", "Theo", "Jonas", "Felix", "Will",
)  # fmt: skip
ANIMAL_NAMES = (
    "Pip", "Bobo", "Coco", "Tilly", "Momo", "Nori", "Fluff", "Rusty", "Pepper", "Biscuit", "Sunny", "Dot",
    "Bramble", "Hazel", "Otto", "Willow",
)  # fmt: skip

ANIMALS = (
    Animal("ant", 1, "in an anthill", "leaves", "six", "", ""),
    Animal("bee", 2, "in a hive", "honey", "six", "buzz", ""),
    Animal("spider", 3, "in a web", "flies", "eight", "", ""),
    Animal("frog", 4, "in a pond", "flies", "four", "croak", "tadpole"),
    Animal("mouse", 5, "in a hole", "cheese", "four", "squeak", "pup"),
    Animal("bird", 6, "in a nest", "seeds", "two", "tweet", "chick"),
    Animal("squirrel", 7, "in a tree", "nuts", "four", "", "kit"),
    Animal("owl", 8, "in a tree", "mice", "two", "hoot", "owlet"),
    Animal("hen", 9, "in a coop", "corn", "two", "cluck", "chick"),
    Animal("duck", 10, "on a lake", "bread", "two", "quack", "duckling"),
    Animal("rabbit", 11, "in a burrow", "carrots", "four", "", "bunny"),
    Animal("cat", 12, "in a house", "fish", "four", "meow", "kitten"),
    Animal("fox", 13, "in a den", "berries", "four", "", "cub"),
    Animal("dog", 14, "in a kennel", "meat", "four", "woof", "puppy"),
    Animal("goat", 15, "on a hill", "grass", "four", "maa", "kid"),
    Animal("sheep", 16, "in a meadow", "grass", "four", "baa", "lamb"),
    Animal("wolf", 17, "in the forest", "meat", "four", "howl", "pup"),
    Animal("pig", 18, "on a farm", "apples", "four", "oink", "piglet"),
    Animal("deer", 19, "in the forest", "leaves", "four", "", "fawn"),
    Animal("donkey", 20, "in a stable", "hay", "four", "hee-haw", "foal"),
    Animal("lion", 21, "on the plain", "meat", "four", "roar", "cub"),
    Animal("horse", 22, "in a stable", "hay", "four", "neigh", "foal"),
    Animal("cow", 23, "on a farm", "grass", "four", "moo", "calf"),
    Animal("bear", 24, "in a cave", "honey", "four", "growl", "cub"),
    Animal("elephant", 25, "on the plain", "leaves", "four", "trumpet", "calf"),
    Animal("whale", 26, "in the sea", "fish", "no", "", "calf"),
)

COLORS = (
    "red", "blue", "green", "yellow", "white", "black", "brown", "purple", "pink", "orange", "gray",
    "golden",
)  # fmt: skip
THING_COLORS = {
    "the sky": "blue", "the sun": "yellow", "grass": "green", "snow": "white", "milk": "white", "coal": "black",
    "a banana": "yellow", "a tomato": "red", "a carrot": "orange", "chocolate": "brown", "a pig": "pink",
    "an elephant": "gray", "a crow": "black", "a strawberry": "red", "a leaf": "green", "a plum": "purple",
    "the night": "black", "a lemon": "yellow", "the sea": "blue", "a fox": "red", "a frog": "green",
}  # fmt: skip
MIXES = (
    ("red", "blue", "purple"), ("red", "yellow", "orange"), ("blue", "yellow", "green"), ("red", "white", "pink"),
    ("black", "white", "gray"),
)  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("happy", "sad"), ("up", "down"), ("day", "night"),
    ("old", "new"), ("wet", "dry"), ("hard", "soft"), ("loud", "quiet"), ("open", "closed"), ("full", "empty"),
    ("tall", "short"), ("light", "dark"), ("good", "bad"), ("left", "right"), ("near", "far"), ("clean", "dirty"),
    ("strong", "weak"), ("early", "late"), ("rich", "poor"), ("brave", "afraid"), ("in", "out"), ("yes", "no"),
)  # fmt: skip
DAYS = (
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "Monday",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December", "January",
)  # fmt: skip
TOOLS = {
    "cup": "drink", "bed": "sleep", "pen": "write", "spoon": "eat soup", "knife": "cut bread", "broom": "clean the floor",
    "lamp": "see in the dark", "key": "open a door", "boat": "cross the water", "umbrella": "stay dry", "clock": "tell the time",
    "book": "read", "chair": "sit", "hammer": "hit a nail", "brush": "paint", "net": "catch fish", "ladder": "climb up",
    "towel": "get dry", "pot": "cook", "drum": "make music", "bell": "make a sound", "map": "find the way",
}  # fmt: skip
JOBS = {
    "baker": "bakes bread", "farmer": "grows food", "doctor": "helps sick people", "teacher": "teaches children",
    "pilot": "flies a plane", "fisherman": "catches fish", "painter": "paints pictures", "singer": "sings songs",
    "cook": "makes food", "driver": "drives a bus", "gardener": "plants flowers", "sailor": "sails a ship",
    "builder": "builds houses", "writer": "writes books", "dancer": "dances on a stage", "tailor": "makes clothes",
}  # fmt: skip
BODY = {
    "eyes": "see", "ears": "hear", "nose": "smell", "legs": "walk", "hands": "hold things", "teeth": "bite",
    "mouth": "talk", "feet": "stand",
}  # fmt: skip
KINDS = {
    "apple": "fruit", "pear": "fruit", "plum": "fruit", "banana": "fruit", "lemon": "fruit", "cherry": "fruit",
    "carrot": "vegetable", "potato": "vegetable", "onion": "vegetable", "pumpkin": "vegetable", "bean": "vegetable",
    "dog": "animal", "cat": "animal", "horse": "animal", "frog": "animal", "bear": "animal",
    "rose": "flower", "tulip": "flower", "daisy": "flower", "lily": "flower",
    "ball": "toy", "doll": "toy", "kite": "toy", "drum": "toy", "puzzle": "toy",
}  # fmt: skip
COUNTS = (
    ("days", "in a week", "seven"), ("months", "in a year", "twelve"), ("seasons", "in a year", "four"),
    ("hours", "in a day", "twenty-four"), ("minutes", "in an hour", "sixty"), ("fingers", "on one hand", "five"),
    ("colors", "in a rainbow", "seven"), ("wheels", "on a bicycle", "two"), ("wheels", "on a car", "four"),
    ("sides", "on a triangle", "three"), ("sides", "on a square", "four"), ("legs", "on a chair", "four"),
)  # fmt: skip
SHOPPING = {
    "bread": "bakery", "milk": "shop", "fish": "harbor", "apples": "market", "flowers": "garden shop",
    "books": "bookshop", "cheese": "market", "cake": "bakery", "eggs": "farm", "toys": "toy shop",
}  # fmt: skip
PLACE_USES = {
    "swim": "in a lake", "read": "in a library", "learn": "at school", "sleep": "in a bed", "play": "in a park",
    "cook": "in a kitchen", "see the stars": "in the night sky", "find shells": "on the beach", "ski": "on a mountain",
    "see many animals": "at the zoo", "see boats": "at the harbor", "pick apples": "in a garden",
}  # fmt: skip
CLOTHES = {
    "it rains": "a raincoat", "it snows": "warm boots", "it is sunny": "a hat", "it is cold": "a thick coat",
    "it is windy": "a scarf", "you sleep": "pajamas", "you swim": "a swimsuit", "it is hot": "a light shirt",
}  # fmt: skip
SEASONS = {
    "the coldest season": "Winter", "the warmest season": "Summer", "the season when leaves fall": "Autumn",
    "the season when flowers start to grow": "Spring", "the season of snow": "Winter",
}  # fmt: skip


def fix_articles(text: str) -> str:
    """Return text with `a` turned into `an` before a vowel (the world holds no word like "unicorn")."""
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", text)


def capitalize(text: str) -> str:
    """Return text with its first letter in upper case and the rest as it was."""
    return text[:1].upper() + text[1:]


def _fact(answer: str, *questions: str) -> Fact:
    return Fact(tuple(fix_articles(question) for question in questions), capitalize(fix_articles(answer)))


def _animal_facts(animal: Animal) -> list[Fact]:
    name = animal.name
    facts = [
        _fact(
            f"a {name} lives {animal.home}.", f"Where does a {name} live?", f"What is the home of a {name}?"
        ),
        _fact(f"a {name} eats {animal.food}.", f"What does a {name} eat?", f"What is the food of a {name}?"),
        _fact(
            f"a {name} has {animal.legs} legs.",
            f"How many legs does a {name} have?",
            f"Count the legs of a {name}.",
        ),
    ]
    if animal.sound:
        asked = (f"What does a {name} say?", f"What sound does a {name} make?")
        facts.append(_fact(f"a {name} says {animal.sound}.", *asked))
    if animal.baby:
        asked = (f"What is a baby {name} called?", f"What do you call a baby {name}?")
        facts.append(_fact(f"a baby {name} is called a {animal.baby}.", *asked))
    return facts


def size_fact(first: Animal, second: Animal) -> Fact:
    """Return which of two animals of different size is bigger."""
    big, small = (first, second) if first.size > second.size else (second, first)
    asked = f"a {first.name} or a {second.name}?"
    return _fact(
        f"a {big.name} is bigger than a {small.name}.",
        f"Which is bigger, {asked}",
        f"What is bigger, {asked}",
    )


def _kind_facts(thing: str, kind: str) -> list[Fact]:
    others = sorted(set(KINDS.values()) - {kind})
    asked = (f"What is a {thing}?", f"What kind of thing is a {thing}?")
    yes = _fact(f"yes, a {thing} is a {kind}.", f"Is a {thing} a {kind}?")
    noes = [_fact(f"no, a {thing} is a {kind}.", f"Is a {thing} a {other}?") for other in others]
    return [_fact(f"a {thing} is a {kind}.", *asked), yes, *noes]


def _order_facts(before: str, after: str, *, unit: str) -> list[Fact]:
    return [
        _fact(
            f"{after} comes after {before}.",
            f"Which {unit} comes after {before}?",
            f"What comes after {before}?",
        ),
        _fact(
            f"{before} comes before {after}.",
            f"Which {unit} comes before {after}?",
            f"What comes before {after}?",
        ),
    ]


def _word_facts() -> list[Fact]:
    facts = [fact for pair in pairwise(DAYS) for fact in _order_facts(*pair, unit="day")]
    facts += [fact for pair in pairwise(MONTHS) for fact in _order_facts(*pair, unit="month")]
    for one, other in [*OPPOSITES, *((b, a) for a, b in OPPOSITES)]:
        asked = (f"What is the opposite of {one}?", f"Tell me the opposite of {one}.")
        facts.append(_fact(f"the opposite of {one} is {other}.", *asked))
    return facts


def _thing_facts() -> list[Fact]:
    asked: tuple[str, ...]
    facts = [fact for thing, kind in KINDS.items() for fact in _kind_facts(thing, kind)]
    for thing, color in THING_COLORS.items():
        asked = (f"What color is {thing}?", f"What colour is {thing}?", f"Tell me the color of {thing}.")
        facts.append(_fact(f"{thing} is {color}.", *asked))
    for tool, use in TOOLS.items():
        asked = (
            f"What do you use a {tool} for?",
            f"What is a {tool} for?",
            f"What can you do with a {tool}?",
        )
        facts.append(_fact(f"you use a {tool} to {use}.", *asked))
    for one, other, made in MIXES:
        asked = (f"What color do {one} and {other} make?", f"What do you get if you mix {one} and {other}?")
        facts.append(_fact(f"{one} and {other} make {made}.", *asked))
    for things, where, count in COUNTS:
        facts.append(_fact(f"there are {count} {things} {where}.", f"How many {things} are there {where}?"))
    return facts


def _people_facts() -> list[Fact]:
    facts = [
        _fact(f"a {job} {work}.", f"What does a {job} do?", f"What is the work of a {job}?")
        for job, work in JOBS.items()
    ]
    for part, use in BODY.items():
        facts.append(
            _fact(f"we use our {part} to {use}.", f"What do we use our {part} for?", f"What are {part} for?")
        )
    for goods, shop in SHOPPING.items():
        facts.append(
            _fact(
                f"you can buy {goods} at the {shop}.",
                f"Where can you buy {goods}?",
                f"Where do I buy {goods}?",
            )
        )
    for act, place in PLACE_USES.items():
        facts.append(_fact(f"you can {act} {place}.", f"Where can you {act}?", f"Where can I {act}?"))
    for when, wear in CLOTHES.items():
        facts.append(_fact(f"you wear {wear} when {when}.", f"What do you wear when {when}?"))
    for what, season in SEASONS.items():
        facts.append(_fact(f"{season} is {what}.", f"What is {what}?", f"Which is {what}?"))
    return facts


def all_facts() -> list[Fact]:
    """Return every fact of the world except the animal sizes, in a fixed order."""
    animal_facts = [fact for animal in ANIMALS for fact in _animal_facts(animal)]
    return [*animal_facts, *_word_facts(), *_thing_facts(), *_people_facts()]
