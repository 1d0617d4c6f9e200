"""The story grammar: a plot is a row of slots, a slot a choice of sentences over one cast.

Knows only `world.py`; `corpus.py` wraps the stories into documents.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from gpuworker.tiny.world import ANIMAL_NAMES, ANIMALS, BOYS, COLORS, GIRLS, capitalize, fix_articles

TRAITS = (
    "kind", "brave", "little", "clever", "shy", "cheerful", "quiet", "curious", "lazy", "gentle", "funny",
    "careful", "young", "friendly",
)  # fmt: skip
WEATHERS = (
    "sunny", "rainy", "windy", "cold", "warm", "snowy", "bright", "foggy",
)  # fmt: skip
TIMES = (
    "morning", "afternoon", "evening", "day",
)  # fmt: skip
OBJECTS = (
    "ball", "kite", "doll", "hat", "drum", "book", "boat", "coat", "scarf", "lamp", "basket", "bell",
    "ring", "key", "puzzle", "cup", "blanket", "whistle", "box", "flute", "bag", "map", "shoe", "wagon",
    "balloon",
)  # fmt: skip
FOODS = (
    "apple", "cake", "cookie", "pie", "sandwich", "pear", "bun", "banana", "pancake", "plum", "muffin",
    "carrot",
)  # fmt: skip
PLACES = (
    "the forest", "the park", "the garden", "the beach", "the river", "the lake", "the farm", "the market",
    "the village", "the hill", "the meadow", "the old bridge", "the school", "the harbor", "the mill", "the barn",
    "the pond", "the playground", "the orchard", "the library",
)  # fmt: skip
SPOTS = (
    "under the bed", "behind the door", "in the tall grass", "under a bench", "behind a big rock", "in a hollow tree",
    "near the gate", "under the stairs", "in the hay", "beside the well", "on the roof", "behind the fence",
    "under a bush", "on top of the wall",
)  # fmt: skip
TROUBLES = (
    "stuck in the mud", "caught in a net", "trapped under a branch", "lost and cold", "stuck in a deep hole",
    "caught in the thorns", "stuck behind a heavy stone", "sitting alone in the rain",
)  # fmt: skip
SKILLS = (
    "swim", "dance", "sing", "ride a bicycle", "climb trees", "paint", "bake bread", "whistle", "skate", "jump over the stream",
    "play the flute", "row a boat",
)  # fmt: skip
BUILDS = (
    "tower", "sandcastle", "treehouse", "bridge", "birdhouse", "raft", "tent", "snowman", "cart", "fort",
)  # fmt: skip
MATERIALS = (
    "wood", "stones", "sticks", "leaves", "rope", "boards", "mud", "branches", "straw", "paper",
)  # fmt: skip
FEELINGS = (
    "happy", "proud", "glad", "cheerful", "calm", "thankful",
)  # fmt: skip
LOW_FEELINGS = (
    "sad", "worried", "lonely", "upset", "sorry", "tired",
)  # fmt: skip
RELATIVES = (
    ("mother", "she"),
    ("father", "he"),
    ("grandmother", "she"),
    ("grandfather", "he"),
    ("aunt", "she"),
    ("uncle", "he"),
)
NOISES = (
    ("a strange scratching sound", "scratching at the door"), ("a loud bang", "knocking over a bucket"),
    ("a soft tapping", "tapping on the window"), ("a low growl", "snoring under the table"),
    ("a long squeak", "swinging on the old gate"), ("a quick rustle", "hunting for crumbs"),
)  # fmt: skip

OPENING = (
    "Once upon a time, there was {hero_intro} named {hero}.",
    "{hero} was {hero_intro} who lived near {home}.",
    "Long ago, near {home}, there lived {hero_intro} named {hero}.",
    "There once was {hero_intro}. {His} name was {hero}.",
    "In a small house near {home} lived {hero_intro} named {hero}.",
)
DAY = (
    "One {weather} {time}, {hero} went to {place}.",
    "One {time}, {hero} and {friend} went to {place}.",
    "It was a {weather} {time}, and {hero} walked to {place}.",
)
CLOSING = (
    "{hero} felt very {feeling} that night.",
    "From that day on, {hero} and {friend} were the best of friends.",
    "{hero} smiled and felt {feeling}.",
    "They laughed and went home together.",
    "That night, {hero} slept well and dreamed of {place}.",
    "And {hero} never forgot that day.",
)
LOST = (
    OPENING,
    ("{hero} had a {color} {object}. {He} loved it very much.", "{His} favorite thing was a {color} {object}.",
     "{His} {relative} had given {him} a {color} {object}."),
    DAY,
    ("When {he} looked in {his} bag, the {object} was gone!", "But soon {he} saw that the {object} was missing.",
     "On the way, {he} lost the {object}."),
    ("{hero} was very {low}.", "\"Oh no! Where is my {object}?\" said {hero}.", "{He} sat down and began to cry."),
    ("{He} looked {spot}, but it was not there.", "{He} looked {spot} and {spot2}, but {he} could not find it."),
    ("{friend} saw {him} and asked, \"Can I help you?\"", "\"Do not worry,\" said {friend}. \"We will look together.\"",
     "Then {friend} came by and wanted to help."),
    ("At last they found the {object} {spot3}.", "{friend} found the {color} {object} {spot3}.",
     "They searched for a long time. The {object} was {spot3}!"),
    ("\"Thank you, {friend}!\" said {hero}.", "{hero} hugged {friend} and held the {object} tight."),
    CLOSING,
)  # fmt: skip
RESCUE = (
    OPENING, DAY,
    ("There {he} heard a small voice. \"Help! Please help me!\"", "Suddenly, {he} heard someone crying.",
     "On the path, {he} stopped and listened. Someone called for help."),
    ("It was a {beast}. It was {trouble}.", "A little {beast} was {trouble}.", "{He} saw a {color} {beast} that was {trouble}."),
    ("{hero} was a little afraid, but {he} wanted to help.", "\"I will help you,\" said {hero}.",
     "\"Do not be afraid,\" said {hero} in a soft voice."),
    ("{He} pulled and pulled until the {beast} was free.", "{He} ran to get {friend}, and together they set the {beast} free.",
     "{He} used a long stick and helped the {beast} out."),
    ("\"Thank you,\" said the {beast}. \"You are very {praise}.\"", "The {beast} was so {feeling} that it danced in a circle.",
     "{hero} gave the {beast} a {food} to eat."),
    CLOSING,
)  # fmt: skip
SHARE = (
    OPENING,
    ("One {time}, {his} {relative} baked a {food} for {him}.", "One {time}, {hero} got a big {food} at the market."),
    ("{hero} took the {food} to {place}.", "{He} wanted to eat the {food} at {place}."),
    ("There {he} met {friend}. {friend} was very hungry.", "{friend} was sitting {spot} and had nothing to eat."),
    ("At first, {hero} did not want to share.", "{hero} looked at the {food} and thought for a while.",
     "\"It smells so good,\" said {friend}."),
    ("Then {he} cut the {food} in two and gave one half to {friend}.", "\"Here, we can share it,\" said {hero}.",
     "But {he} had a kind heart, so {he} gave {friend} the bigger half."),
    ("\"This is the best {food} in the world!\" said {friend}.", "They ate together and talked about {place2}.",
     "The {food} tasted even better when they shared it."),
    CLOSING,
)  # fmt: skip
NOISE = (
    OPENING,
    ("One dark night, {hero} heard {noise}.", "Late in the evening, there was {noise}.", "In the middle of the night, {he} woke up and heard {noise}."),
    ("{He} was afraid and hid under the blanket.", "\"Who is there?\" {he} whispered.", "{His} heart beat very fast."),
    ("But {hero} wanted to be brave. {He} took a lamp and went to look.", "{He} called {his} {relative}, and they went to look together.",
     "{He} counted to three and opened the door."),
    ("It was only a {beast}! It was {noise_cause}.", "There sat a {color} {beast}, {noise_cause}."),
    ("{hero} laughed and laughed.", "\"You gave me a fright!\" said {hero}.", "\"It is only you!\" said {hero}."),
    ("{He} gave the {beast} a {food} and went back to bed.", "The {beast} got a warm place {spot}.",
     "{hero} told {friend} about it the next day."),
    CLOSING,
)  # fmt: skip
BUILD = (
    OPENING,
    ("{hero} wanted to build a {build}.", "\"Let us build a {build}!\" said {hero} one {weather} {time}.",
     "{His} dream was to build a {build} near {place}."),
    ("{He} looked for {material} and {material2} at {place}.", "{friend} brought {material}, and {hero} brought {material2}.",),
    ("They worked all day, but the {build} fell down.", "The first {build} was too weak and broke.",
     "Then a strong wind came and the {build} fell over."),
    ("{hero} felt {low}. \"I will never do it,\" {he} said.", "\"It is too hard,\" said {hero}.",),
    ("\"Try again,\" said {his} {relative}. \"Go slowly this time.\"", "\"We can do it if we work together,\" said {friend}.",),
    ("So they used more {material} and built it again.", "{hero} tried once more with better {material2}.",),
    ("This time the {build} was strong.", "Now the {build} stood tall, and everyone came to see it.", "In the end, it was the best {build} of all."),
    CLOSING,
)  # fmt: skip
LEARN = (
    OPENING,
    ("{hero} wanted to learn to {skill}.", "All {his} friends could {skill}, but {hero} could not.",
     "More than anything, {hero} wished to {skill}."),
    ("{He} tried at {place}, but it did not go well.", "The first time, {he} fell down and hurt {his} knee.",
     "{He} tried and tried, but it was hard."),
    ("{hero} felt {low} and wanted to stop.", "\"I cannot do it,\" said {hero}.",),
    ("{friend} said, \"Every day you get a little better.\"", "{His} {relative} said, \"Take your time. I will show you.\"",
     "\"I could not {skill} at first,\" said {friend}. \"Come, I will help you.\""),
    ("So {hero} tried every {time}.", "Every day, {he} went to {place} to try again.",),
    ("After a week, {hero} could {skill}!", "One {weather} {time}, it worked. {hero} could {skill}!",),
    ("{His} {relative} clapped and gave {him} a {food}.", "\"Look at me!\" {he} shouted.", "Everyone at {place} was {feeling} for {him}."),
    CLOSING,
)  # fmt: skip
TRUTH = (
    OPENING,
    ("One {weather} {time}, {hero} was playing with a {object}.", "One {time}, {hero} and {friend} were running in the house.",),
    ("By accident, {he} broke the {color} lamp of {his} {relative}.", "{He} bumped into the table, and the {color} cup fell and broke.",),
    ("{hero} hid the pieces {spot}.", "{He} wanted to run away and hide {spot}.",),
    ("But {he} felt very {low}.", "That {time}, {he} could not eat a single {food}.",),
    ("\"I must tell the truth,\" thought {hero}.", "\"You should tell the truth,\" said {friend}.",),
    ("{He} went to {his} {relative} and said, \"I broke it. I am sorry.\"", "\"I did it,\" said {hero}. \"I am so sorry.\"",),
    ("{His} {relative} was not angry. \"Thank you for telling me,\" {rel_he} said.", "{His} {relative} gave {him} a hug and said, \"We can fix it together.\"",),
    ("{hero} felt {feeling} again.", "{hero} learned that it is good to tell the truth.", "After that, {hero} was always careful."),
)  # fmt: skip
GIFT = (
    OPENING,
    ("It was the birthday of {friend}, and {hero} wanted to find a good gift.", "{friend} had a birthday, but {hero} had no gift.",),
    ("{He} went to {place} to look for one.", "{He} looked {spot} and {spot2} for something nice.",),
    ("{He} found a {color} {object}, but it was broken.", "{He} wanted to buy a {color} {object}, but {he} had no money.",),
    ("\"What can I do?\" said {hero}.", "{hero} felt {low}.",),
    ("Then {his} {relative} said, \"You can make one with your own hands.\"", "Then {he} had an idea. {He} would make a gift from {material}.",),
    ("{hero} worked all {time} and made a little {object2}.", "{He} took {material} and made a {color} {object2}.",),
    ("{friend} opened the box and smiled. \"A {object2}! I love it!\"", "\"You made this for me?\" said {friend}. \"It is the best gift of all.\"",),
    CLOSING,
)  # fmt: skip

PLOTS = {
    "a lost {object}": LOST,
    "a {beast} in trouble": RESCUE,
    "sharing a {food}": SHARE,
    "a noise in the night": NOISE,
    "building a {build}": BUILD,
    "learning to {skill}": LEARN,
    "telling the truth": TRUTH,
    "a birthday gift": GIFT,
}


@dataclass(frozen=True)
class Story:
    """One finished story; `topics` are phrases that fit after "a story about"."""

    text: str
    topics: tuple[str, ...]


def _hero(rng: random.Random) -> tuple[str, str, str, str]:
    """Return the hero's name, kind, introduction and pronoun."""
    trait = rng.choice(TRAITS)
    roll = rng.random()
    if roll < 0.4:
        animal = rng.choice(ANIMALS).name
        return rng.choice(ANIMAL_NAMES), animal, f"a {trait} {animal}", rng.choice(("he", "she"))
    if roll < 0.7:
        return rng.choice(GIRLS), "girl", f"a {trait} girl", "she"
    return rng.choice(BOYS), "boy", f"a {trait} boy", "he"


def _cast(rng: random.Random) -> dict[str, str]:
    hero, kind, intro, he = _hero(rng)
    his, him = ("his", "him") if he == "he" else ("her", "her")
    friend = rng.choice([name for name in [*GIRLS, *BOYS, *ANIMAL_NAMES] if name != hero])
    relative, rel_he = rng.choice(RELATIVES)
    home, place, place2 = rng.sample(PLACES, 3)
    spot, spot2, spot3 = rng.sample(SPOTS, 3)
    material, material2 = rng.sample(MATERIALS, 2)
    an_object, object2 = rng.sample(OBJECTS, 2)
    noise, noise_cause = rng.choice(NOISES)
    beast = rng.choice([animal.name for animal in ANIMALS if animal.name not in {kind, "whale"}])
    return {
        "hero": hero, "kind": kind, "hero_intro": intro, "he": he, "He": capitalize(he), "his": his, "His": capitalize(his),
        "him": him, "friend": friend, "relative": relative, "rel_he": rel_he, "home": home, "place": place, "place2": place2,
        "spot": spot, "spot2": spot2, "spot3": spot3, "material": material, "material2": material2, "object": an_object,
        "object2": object2, "noise": noise, "noise_cause": noise_cause, "beast": beast, "color": rng.choice(COLORS),
        "weather": rng.choice(WEATHERS), "time": rng.choice(TIMES), "food": rng.choice(FOODS), "skill": rng.choice(SKILLS),
        "build": rng.choice(BUILDS), "feeling": rng.choice(FEELINGS), "low": rng.choice(LOW_FEELINGS),
        "trouble": rng.choice(TROUBLES), "praise": rng.choice(("kind", "brave", "good")),
    }  # fmt: skip


def write_story(rng: random.Random) -> Story:
    """Return one story of seven to ten sentences, drawn from the grammar with rng."""
    cast = _cast(rng)
    topic = rng.choice(list(PLOTS))
    sentences = [rng.choice(slot).format(**cast) for slot in PLOTS[topic]]
    about = topic.format(**cast)
    topics = (about, "a {kind}", "{hero_intro}", "a {kind} named {hero}", "{hero}", "a {kind} and " + about)
    text = fix_articles(" ".join(sentences))
    return Story(text, tuple(fix_articles(phrase.format(**cast)) for phrase in topics))
