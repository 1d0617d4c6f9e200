"""The generated training text: stories, questions, arithmetic and small talk as ChatML or plain documents.

Every document is drawn from a seed and its index, so the corpus needs no file and no download. A checksum
of the text decides its split: no held-out document is ever a training document. Used by `train.py`,
`example_data.py` and the tests.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from gpuworker.tiny.stories import FOODS, OBJECTS, PLACES, write_story
from gpuworker.tiny.world import ANIMALS, BOYS, GIRLS, all_facts, fix_articles, size_fact

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
HELD_OUT_SHARE = 16  # one document in this many is held out


class Split(StrEnum):
    TRAIN = "train"
    HELD_OUT = "held-out"


@dataclass(frozen=True)
class Document:
    """One training text, without the <|endoftext|> that separates it from the next."""

    kind: str
    text: str


Turn = tuple[str, str]  # what the user says, what the assistant answers

SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a kind storyteller.", "Answer in one short sentence.",
    "You are a friendly teacher.", "You are mintweb tiny.",
)  # fmt: skip
SMALL_TALK: tuple[tuple[Sequence[str], str], ...] = (
    (("Hello!", "Hi!", "Hello", "Hi", "Hey!", "Hi there!"), "Hello! How can I help you today?"),
    (("Good morning!", "Good morning"), "Good morning! How can I help you today?"),
    (("Good evening!", "Good evening"), "Good evening! How can I help you?"),
    (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."),
     "I am mintweb tiny, a very small language model."),
    (("What can you do?", "What do you know?", "Can you help me?"),
     "I can tell short stories, answer simple questions and do simple arithmetic."),
    (("How are you?", "How are you today?"), "I am well, thank you. How are you?"),
    (("Thank you!", "Thanks!", "Thank you", "Thanks a lot!"), "You are welcome!"),
    (("Goodbye!", "Bye!", "See you!", "Good night!"), "Goodbye! Have a nice day."),
    (("I am sad.", "I feel sad.", "I am sad today."), "I am sorry that you are sad. A good story may help you."),
    (("I am happy!", "I feel happy.", "I am happy today."), "That is good to hear!"),
    (("I am tired.", "I feel tired."), "Then you should rest for a while."),
    (("I am hungry.", "I feel hungry."), "Then you should eat something good."),
    (("Are you a person?", "Are you human?"), "No, I am a very small language model."),
    (("How old are you?",), "I am very young."),
    (("What is your favorite color?",), "My favorite color is green."),
    (("What is your favorite animal?",), "My favorite animal is the owl."),
    (("Where do you live?",), "I live in a small file on a computer."),
)  # fmt: skip
STORY_REQUESTS = (
    "Tell me a story about {}.", "Tell me a short story about {}.", "Write a story about {}.",
    "Write a short story about {}.", "Please tell me a story about {}.", "Can you tell me a story about {}?",
    "I want to hear a story about {}.",
)  # fmt: skip
OPEN_REQUESTS = (
    "Tell me a story.",
    "Tell me a short story.",
    "Write a story.",
    "Can you tell me a story?",
    "A story, please.",
)
SYLLABLES = (
    "ba", "do", "fi", "gu", "ka", "lo", "mi", "nu", "pa", "ro", "se", "ti", "vo", "xa", "zu", "bren", "dal",
    "fen", "gor", "kel", "mar", "nim", "pol", "quil", "rus", "tam", "vex", "zor",
)  # fmt: skip
FACTS = all_facts()


def render_chat(messages: Sequence[dict[str, str]]) -> str:
    """Return messages in the ChatML form of the model's chat template."""
    return "".join(f"{TURN_START}{message['role']}\n{message['content']}{TURN_END}\n" for message in messages)


def _as_typed(rng: random.Random, said: str) -> str:
    """Return said as some people type: now and then in lower case and without its last mark."""
    return said.lower().rstrip("?!.") if rng.random() < 0.12 else said


def fact_turn(rng: random.Random) -> Turn:
    """Return a question on one fact of the world and its answer."""
    fact = size_fact(*rng.sample(ANIMALS, 2)) if rng.random() < 0.08 else rng.choice(FACTS)
    return _as_typed(rng, rng.choice(fact.questions)), fact.answer


def _sum(rng: random.Random) -> tuple[int, str, str, int, int]:
    """Return the left number, the sign, its word, the right number and the result."""
    sign = rng.choice("++--*")
    if sign == "*":
        left, right = rng.randint(0, 5), rng.randint(0, 5)
        return left, "*", "times", right, left * right
    total = rng.randint(0, 20)
    part = rng.randint(0, total)
    if sign == "+":
        return part, "+", "plus", total - part, total
    return total, "-", "minus", part, total - part


def _word_problem(rng: random.Random) -> Turn:
    total = rng.randint(3, 20)
    part = rng.randint(1, total - 1)
    name, other = rng.sample([*GIRLS, *BOYS], 2)
    thing = rng.choice(("apples", "books", "shells", "coins", "stones", "eggs", "cookies", "flowers"))
    asked = f"How many {thing} does {name} have now?"
    if rng.random() < 0.5:
        return (
            f"{name} has {part} {thing}. {other} gives {total - part} more. {asked}",
            f"{name} has {total} {thing} now.",
        )
    return (
        f"{name} has {total} {thing}. {name} gives {part} away. {asked}",
        f"{name} has {total - part} {thing} now.",
    )


def arithmetic_turn(rng: random.Random) -> Turn:
    """Return a sum within 20, a product within 5 x 5, a next number or a word problem, with the answer."""
    roll = rng.random()
    if roll < 0.12:
        return _word_problem(rng)
    if roll < 0.2:
        number = rng.randint(0, 19)
        if rng.random() < 0.5:
            return f"What number comes after {number}?", f"{number + 1} comes after {number}."
        return f"What number comes before {number + 1}?", f"{number} comes before {number + 1}."
    left, sign, word, right, result = _sum(rng)
    if rng.random() < 0.3:
        asked = rng.choice(("What is {}?", "How much is {}?")).format(f"{left} {word} {right}")
        return _as_typed(rng, asked), f"{left} {word} {right} is {result}."
    asked = rng.choice(
        ("What is {}?", "What is {}?", "How much is {}?", "{} =", "{} = ?", "Calculate {}.", "{}")
    )
    expression = f"{left}{sign}{right}" if rng.random() < 0.15 else f"{left} {sign} {right}"
    return _as_typed(rng, asked.format(expression)), f"{left} {sign} {right} = {result}."


def reading_turn(rng: random.Random) -> Turn:
    """Return two sentences with a question that only they answer."""
    one, two = rng.sample([*GIRLS, *BOYS], 2)
    place, place2 = rng.sample(PLACES, 2)
    thing, thing2 = rng.sample([*OBJECTS, *FOODS], 2)
    lines = [f"{one} went to {place} with a {thing}.", f"{two} went to {place2} with a {thing2}."]
    asked, answer = rng.choice((
        (f"Where did {one} go?", f"{one} went to {place}."),
        (f"What did {one} take?", f"{one} took a {thing}."),
        (f"Who had the {thing}?", f"{one} had the {thing}."),
        (f"Who went to {place}?", f"{one} went to {place}."),
    ))  # fmt: skip
    rng.shuffle(lines)
    return fix_articles(f"{' '.join(lines)} {asked}"), fix_articles(answer)


def story_turn(rng: random.Random) -> Turn:
    """Return a request for a story and a story that fits it."""
    story = write_story(rng)
    if rng.random() < 0.25:
        return rng.choice(OPEN_REQUESTS), story.text
    return rng.choice(STORY_REQUESTS).format(rng.choice(story.topics)), story.text


def small_talk_turn(rng: random.Random) -> Turn:
    """Return one line of small talk and its reply."""
    said, reply = rng.choice(SMALL_TALK)
    return _as_typed(rng, rng.choice(said)), reply


def unknown_turn(rng: random.Random) -> Turn:
    """Return a question on a made-up word and the honest answer."""
    word = "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3)))
    name = word.capitalize()
    questions = (
        ("What is a {}?", word), ("What does {} mean?", word), ("How does a {} work?", word), ("What does a {} eat?", word),
        ("What is the capital of {}?", name), ("Who is {}?", name), ("Where is {}?", name), ("When was {} born?", name),
    )  # fmt: skip
    asked, topic = rng.choice(questions)
    return fix_articles(asked.format(topic)), f"I do not know about {topic}. My world is very small."


def _chat(turns: Sequence[Turn], *, system: str) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    for said, reply in turns:
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
    return render_chat(messages)


def _chat_writer(
    write_turn: Callable[[random.Random], Turn], *, max_turns: int
) -> Callable[[random.Random], str]:
    def write(rng: random.Random) -> str:
        turns = [write_turn(rng) for _ in range(rng.randint(1, max_turns))]
        return _chat(turns, system=rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.1 else "")

    return write


def _mixed_turn(rng: random.Random) -> Turn:
    makers = (small_talk_turn, fact_turn, arithmetic_turn, unknown_turn, reading_turn, story_turn)
    return rng.choices(makers, weights=(4, 4, 3, 1, 1, 1))[0](rng)


def _plain_story(rng: random.Random) -> str:
    return write_story(rng).text


def _plain_facts(rng: random.Random) -> str:
    return " ".join(
        fact.answer
        for fact in rng.sample(FACTS, rng.randint(3, 6))
        if not fact.answer.startswith(("Yes", "No"))
    )


WRITERS: dict[str, tuple[float, Callable[[random.Random], str]]] = {
    "story": (14, _plain_story),
    "story request": (12, _chat_writer(story_turn, max_turns=1)),
    "fact": (26, _chat_writer(fact_turn, max_turns=4)),
    "arithmetic": (22, _chat_writer(arithmetic_turn, max_turns=5)),
    "reading": (8, _chat_writer(reading_turn, max_turns=2)),
    "small talk": (5, _chat_writer(small_talk_turn, max_turns=3)),
    "unknown": (3, _chat_writer(unknown_turn, max_turns=2)),
    "mixed": (8, _chat_writer(_mixed_turn, max_turns=4)),
    "plain facts": (2, _plain_facts),
}


def _write(rng: random.Random) -> Document:
    kinds = list(WRITERS)
    kind = rng.choices(kinds, weights=[WRITERS[name][0] for name in kinds])[0]
    return Document(kind, WRITERS[kind][1](rng))


def split_of(text: str) -> Split:
    """Return the split a document belongs to, whatever the seed that drew it."""
    return Split.HELD_OUT if zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0 else Split.TRAIN


def documents(split: Split, *, seed: int) -> Iterator[Document]:
    """Yield the endless, repeatable stream of documents of one split."""
    rng = random.Random(f"{split}:{seed}")  # noqa: S311 - text, not secrets
    while True:
        document = _write(rng)
        # A draw of nothing but yes and no answers leaves a plain-facts document empty.
        if document.text and split_of(document.text) is split:
            yield document
