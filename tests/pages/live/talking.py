"""Talking to a checkpoint in a browser, and the worker that answers."""

from __future__ import annotations

import numpy as np
from playwright.sync_api import Locator, Page

from runs.models import Operation
from runs.recipes import rendering
from runs.schemas import results
from runs.services import commits
from runs.services.commits import Result
from tests.worker.conftest import wait_for

MODEL = "mintweb/tiny"


def box(tab: Page) -> Locator:
    return tab.locator("[data-talk]")


def say(tab: Page, text: str) -> None:
    message = box(tab).get_by_label("Message", exact=True)
    message.fill(text)
    message.press("Control+Enter")


def answer(text: str) -> None:
    """Answer the waiting sample as a worker would."""
    row = wait_for(lambda: Operation.objects.filter(kind="sample", state="queued").first(), what="a question")
    tokens = rendering.renderer_of(MODEL).prompt(text, as_chat=False)
    sequence = results.SampledSequence(
        tokens=np.array(tokens), logprobs=np.zeros(len(tokens), np.float32), stop_reason="stop"
    )
    body = results.encode_sample(results.SampleOutput(sequences=(sequence,)))
    commits.commit_samples({row.pk: Result(body=body, is_proto=True)})
