"""Pages that eight fast runs write to at once are never stalled."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from django.db import connections
from playwright.sync_api import Page, expect

from runs.models import TrainingRun, User
from tests.pages import seed
from tests.pages.live.browser import LIVE
from tests.pages.live.run_page import add_steps, expect_values, open_run
from tests.up.instances import wait_for

logger = logging.getLogger(__name__)
pytestmark = LIVE
NUM_VALUES = 10_000
TRACED = ["-*", "toplevel", "devtools.timeline", "disabled-by-default-devtools.timeline"]


class Trainers:
    """Eight runs that commit as fast workers do: together some 2,000 values a second."""

    def __init__(self, runs: Sequence[TrainingRun]) -> None:
        self._runs = runs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.num_values = 0

    def __enter__(self) -> Trainers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait(self, num_values: int) -> None:
        """Return when so many more values are committed."""
        goal = self.num_values + num_values
        wait_for(lambda: self.num_values >= goal, 120)

    def _work(self) -> None:
        step = 1
        while not self._stop.wait(0.2):
            for run in self._runs:
                add_steps(run, range(step, step + 12), step_s=0.02)
                self.num_values += 4 * 12
            step += 12
        connections.close_all()


@dataclass(frozen=True)
class Work:
    """What a page was at: the longest task of its main thread, and the most that it did between two frames.

    Both in milliseconds of processor time, which a busy machine does not make longer.
    """

    task_ms: float
    frame_ms: float


def measure(tab: Page, trainers: Trainers, prepare: Callable[[], Any]) -> Work:
    prepare()
    expect(tab.locator("[data-live-state]")).to_have_attribute("data-state", "live")
    trainers.wait(NUM_VALUES // 10)
    chromium = tab.context.browser
    assert chromium is not None
    chromium.start_tracing(page=tab, categories=TRACED)
    trainers.wait(NUM_VALUES)
    return work_of(json.loads(chromium.stop_tracing())["traceEvents"])


def work_of(trace: Sequence[dict[str, Any]]) -> Work:
    """Return what the busiest page of a trace was at."""
    mains = {
        (event["pid"], event["tid"])
        for event in trace
        if event["name"] == "thread_name" and event["args"]["name"] == "CrRendererMain"
    }
    tasks = defaultdict(list)
    for event in trace:
        if (event["pid"], event["tid"]) in mains and event["name"] in ("RunTask", "FireAnimationFrame"):
            tasks[event["pid"]].append(event)
    page = max(tasks.values(), key=lambda events: sum(event.get("tdur", 0) for event in events))
    frames, frame_us = [0.0], 0.0
    for event in sorted(page, key=lambda event: event["ts"]):
        frame_us = 0.0 if event["name"] == "FireAnimationFrame" else frame_us + event.get("tdur", 0)
        frames.append(frame_us)
    longest = max(event.get("tdur", 0) for event in page if event["name"] == "RunTask")
    return Work(task_ms=longest / 1000, frame_ms=max(frames) / 1000)


def test_eight_fast_runs_do_not_stall_the_pages(tab: Page, alice: User) -> None:
    runs = [seed.make_run(alice, name=f"fast {n}") for n in range(8)]
    with Trainers(runs) as trainers:
        began = time.monotonic()
        on_run = measure(tab, trainers, lambda: open_run(tab, runs[3]))
        on_list = measure(tab, trainers, lambda: tab.goto("/runs/"))
        rate = trainers.num_values / (time.monotonic() - began)
    logger.info("%.0f values/s; run %s, list %s", rate, on_run, on_list)
    for work in (on_run, on_list):
        assert 0 < work.task_ms < 300
        assert 0 < work.frame_ms < 1000
    open_run(tab, runs[3])
    expect_values(tab, runs[3])
