"""The socket of pages that talk to weights: questions in, text out while it is drawn.

From the page: `{"ask": id, "messages" or "prompt", "targets": [...], "max_tokens", "temperature", "seed"}`,
`{"stop": id}`, or anything else to hear `{"ready": true}`. To the page, each with the ask's id and the
target's number: `{"made_by", "step"}`, `{"more": text}` to be added (or `{"text"}` in place of all so far),
`{"waiting": why}`, and last `{"text", "done": true, ...}` or `{"error"}`. What is shown while tokens are
drawn may stop short; the result in the row replaces it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from django.db import DatabaseError, InterfaceError

from runs import events
from runs.consumers import BAD_MESSAGE, TRY_AGAIN, LiveConsumer, in_thread
from runs.exceptions import MintError, RateLimited
from runs.models import SamplingSession, Session
from runs.recipes import rendering
from runs.recipes.rendering import Renderer
from runs.schemas.parsing import validate_object
from runs.schemas.playground import Ask, Target
from runs.services import playground
from runs.services.playground import Answer, Weights

logger = logging.getLogger(__name__)

MAX_OPEN: Final = 16
WAITING_AFTER_S: Final = 2.0
_MAX_MESSAGE_CHARS: Final = 1_000_000
_COMMIT_S: Final = 5.0
_INCOMPLETE: Final = "\ufffd"


@dataclass
class _Talk:
    """One target's answer on its way: the tokens so far and the text of them that the page has."""

    ask: str
    target: int
    renderer: Renderer
    asked_at: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(default_factory=list)
    shown: str = ""
    waiting: str = ""
    waiting_at: float = 0.0
    ended_at: float = 0.0
    has_news: bool = False

    def take(self, start: int, tokens: list[int]) -> None:
        """Take tokens; those after a gap are left to the result."""
        if start <= len(self.tokens):
            self.tokens[start:] = tokens
            self.has_news = True

    def message(self, **content: Any) -> dict[str, Any]:
        """Return a message about this answer."""
        return {"ask": self.ask, "target": self.target, **content}

    def news(self) -> dict[str, Any]:
        """Return what the page lacks of the text so far, without the halves of a character."""
        text = self.renderer.answer(self.tokens).rstrip(_INCOMPLETE)
        shown, self.shown, self.has_news = self.shown, text, False
        if text.startswith(shown):
            return self.message(more=text[len(shown) :])
        return self.message(text=text)


class PlaygroundConsumer(LiveConsumer):
    """Talks for one open page, with a session of its own."""

    interval_s = 0.05
    look_s: ClassVar[float] = 0.5
    # A page that hears nothing for long takes the socket for dead, and asks everything anew on another.
    longest_silence_s: ClassVar[float] = 4.0

    def _open(self) -> str:
        self._session: Session | None = None
        self._samplings: dict[tuple[str, int], tuple[SamplingSession, int]] = {}
        self._talks: dict[int, _Talk] = {}
        self._early: dict[int, list[tuple[int, list[int]]]] = {}
        self._num_submitting = 0
        self._looks_now = False
        self._said_at = 0.0
        return ""

    async def disconnect(self, code: int) -> None:
        """End the loops, and what nobody will read."""
        await super().disconnect(code)
        session = getattr(self, "_session", None)
        if session is not None:
            talks = list(self._talks)
            try:
                await in_thread(lambda: playground.close_session(session, talks))
            except (DatabaseError, InterfaceError) as error:
                logger.warning("a page's samples go on, the database does not answer: %s", error)

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        """Take a question, a stop or a greeting."""
        if not self._tasks:  # turned away
            return
        try:
            message = json.loads((text_data or "")[:_MAX_MESSAGE_CHARS])
        except (ValueError, RecursionError):
            await self.close(BAD_MESSAGE)
            return
        try:
            await self._take_one(message if isinstance(message, dict) else {})
        except (DatabaseError, InterfaceError) as error:
            logger.warning("a talking page lost the database: %s", error)
            await self.close(TRY_AGAIN)
            return
        if len(self._tasks) == 1:
            self._start(self._pump())

    async def _take_one(self, message: dict[str, Any]) -> None:
        if "stop" in message:
            await self._stop(str(message["stop"]))
        elif "ask" in message:
            try:
                await self._ask(validate_object(Ask, message))
            except MintError as error:
                await self._say({"ask": str(message["ask"])[:64], "error": str(error), "place": error.place})
        else:
            await self._say({"ready": True})

    # -- questions ---------------------------------------------------------------------------------------

    async def _ask(self, ask: Ask) -> None:
        if len(self._talks) + len(ask.targets) > MAX_OPEN:
            raise RateLimited(f"{MAX_OPEN} answers are on their way already; wait for them or stop them")
        seed = secrets.randbits(31) if ask.seed is None else ask.seed
        for number, target in enumerate(ask.targets):
            try:
                await self._ask_one(ask, number, target, seed)
            except MintError as error:
                problem = {"error": error.message, "place": error.place}
                await self._say({"ask": ask.ask, "target": number, **problem})

    async def _ask_one(self, ask: Ask, number: int, target: Target, seed: int) -> None:
        weights, renderer, prompt = await in_thread(lambda: self._prepare(ask, target))
        sampling, seq = await self._sampling_of(weights)
        made_by = {"made_by": weights.label, "step": weights.step, "seed": seed}
        await self._say({"ask": ask.ask, "target": number, **made_by})
        self._num_submitting += 1
        try:
            operation_pk = await in_thread(
                lambda: playground.submit(
                    sampling,
                    prompt,
                    seq=seq,
                    max_tokens=ask.max_tokens,
                    temperature=ask.temperature,
                    seed=seed,
                    stop_tokens=renderer.stop_tokens,
                )
            )
            talk = self._talks[operation_pk] = _Talk(ask=ask.ask, target=number, renderer=renderer)
            for start, tokens in self._early.get(operation_pk, []):
                talk.take(start, tokens)
        finally:
            self._num_submitting -= 1
            self._early.clear()
        self._news.set()

    def _prepare(self, ask: Ask, target: Target) -> tuple[Weights, Renderer, list[int]]:
        weights = playground.weights_of(self.user, target)
        renderer = rendering.renderer_of(weights.base_model)
        if ask.messages is None:
            return weights, renderer, renderer.prompt(ask.prompt or "", as_chat=False)
        return weights, renderer, renderer.prompt([message.model_dump() for message in ask.messages])

    async def _sampling_of(self, weights: Weights) -> tuple[SamplingSession, int]:
        """Return the page's sampling session on the weights and the next number in it; the page hears of it."""
        sampling, seq = self._samplings.get(weights.key, (None, 0))
        if sampling is None:
            sampling = await in_thread(lambda: self._open_sampling(weights))
            await self._listener.join(events.sampling_group(sampling.pk))
        self._samplings[weights.key] = (sampling, seq + 1)
        return sampling, seq

    def _open_sampling(self, weights: Weights) -> SamplingSession:
        if self._session is None:
            self._session = playground.open_session(self.user)
        return playground.open_sampling(self._session, weights, seq_id=len(self._samplings))

    async def _stop(self, ask: str) -> None:
        stopped = [pk for pk, talk in self._talks.items() if talk.ask == ask]
        await in_thread(lambda: playground.stop(stopped))
        self._looks_now = True
        self._news.set()

    # -- answers -----------------------------------------------------------------------------------------

    async def _wait(self) -> bool:
        try:
            await asyncio.wait_for(self._news.wait(), self.look_s if self._talks else self.self_check_s)
        except TimeoutError:
            return False
        return True

    async def _send_news(self, hinted: set[str], *, is_self_check: bool) -> None:
        for talk in self._talks.values():
            if talk.has_news:
                await self._say(talk.news())
        if self._talks and (is_self_check or self._looks_now):
            await self._look()
        if is_self_check and time.monotonic() - self._said_at > self.longest_silence_s:
            await self._say({"ready": True})

    async def _look(self) -> None:
        """Tell which answers are there, and why the others are not."""
        open_pks = list(self._talks)
        for answer in await in_thread(lambda: playground.answers_of(open_pks)):
            await self._say(_last_words(self._talks.pop(answer.operation_pk), answer))
        await self._explain_waiting()
        # A sample says that it is done a moment before its row does.
        since = time.monotonic() - _COMMIT_S
        self._looks_now = any(talk.ended_at > since for talk in self._talks.values())
        if self._looks_now:
            self._news.set()

    async def _explain_waiting(self) -> None:
        now = time.monotonic()
        for pk, talk in list(self._talks.items()):
            if talk.tokens or now - talk.asked_at < WAITING_AFTER_S or now - talk.waiting_at < 1.0:
                continue
            talk.waiting_at = now
            words = await in_thread(lambda pk=pk: playground.waiting_words(self.user, pk))  # type: ignore[misc]
            if words != talk.waiting:
                talk.waiting = words
                await self._say(talk.message(waiting=words))

    async def _say(self, message: dict[str, Any]) -> None:
        self._said_at = time.monotonic()
        await self.send(json.dumps(message, separators=(",", ":")))

    # -- tokens while they are drawn -----------------------------------------------------------------------

    def _hear(self, hint: dict[str, Any]) -> None:
        talk = self._talks.get(hint["operation"])
        if hint["is_last"]:
            self._looks_now = True
            if talk is not None:
                talk.ended_at = time.monotonic()
        elif talk is not None:
            talk.take(hint["start"], hint["tokens"])
        elif self._num_submitting:
            # The worker may be at work before this page knows the operation's number.
            self._early.setdefault(hint["operation"], []).append((hint["start"], hint["tokens"]))
        self._news.set()


def _last_words(talk: _Talk, answer: Answer) -> dict[str, Any]:
    if answer.error:
        return talk.message(error=answer.error, place="")
    text = talk.renderer.answer(answer.tokens)
    facts = {"stop_reason": answer.stop_reason, "num_tokens": len(answer.tokens), "seconds": answer.seconds}
    return talk.message(text=text, done=True, **facts)
