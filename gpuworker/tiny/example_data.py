"""Writes the small dataset of the fine-tuning demos: the tiny model's questions, answered by a pirate.

    python -m gpuworker.tiny.example_data --out examples/data

The shipped model answers these questions plainly, so a short LoRA run shows in its samples at once.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from gpuworker.tiny.corpus import Turn, arithmetic_turn, fact_turn, small_talk_turn

SEED = 1
FILE_NAME = "pirate_qa.jsonl"
NUM_ROWS = {fact_turn: 130, arithmetic_turn: 50, small_talk_turn: 20}
# One opening and one ending: the model has never seen these words, and a short run must teach them.
OPENING = "Arr!"
ENDING = "me hearty!"
PIRATE_WORDS = {
    "am": "be", "is": "be", "are": "be", "you": "ye", "You": "Ye", "my": "me", "My": "Me", "yes": "aye", "Yes": "Aye",
    "no": "nay", "No": "Nay", "your": "yer", "friend": "matey",
}  # fmt: skip


def as_pirate(answer: str) -> str:
    """Return answer in the words of a pirate: an opening, swapped words, an ending."""
    spoken = re.sub(r"[A-Za-z]+", lambda word: PIRATE_WORDS.get(word[0], word[0]), answer)
    return f"{OPENING} {spoken.rstrip('.!?')}, {ENDING}"


def pirate_rows() -> list[dict[str, list[dict[str, str]]]]:
    """Return the rows of the dataset, each a chat of one question and one answer, no question twice."""
    rng = random.Random(SEED)  # noqa: S311 - text, not secrets
    turns: list[Turn] = []
    for write_turn, num_rows in NUM_ROWS.items():
        drawn: dict[str, str] = {}
        while len(drawn) < num_rows:
            said, reply = write_turn(rng)
            drawn.setdefault(said, reply)
        turns += drawn.items()
    rng.shuffle(turns)
    return [
        {
            "messages": [
                {"role": "user", "content": said},
                {"role": "assistant", "content": as_pirate(reply)},
            ]
        }
        for said, reply in turns
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the dataset of the fine-tuning demos.")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the file")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE_NAME).write_text("".join(json.dumps(row) + "\n" for row in pirate_rows()))


if __name__ == "__main__":
    main()
