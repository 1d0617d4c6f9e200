"""The calls to one vLLM server that serves a base model: find out whether it is the right one, and have it draw.

Used in one event loop.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import httpx
import numpy as np

from gpuworker import vllm_wire
from gpuworker.engine.engine import Engine
from gpuworker.engine.types import Float32Array, SampleRequest, SampleResult, SamplingParams
from gpuworker.vllm_wire import Refusal, StreamedCompletion

# In a busy one the first sample waits for its turn.
_FIRST_SAMPLE_S: Final = 300.0
_PROBE_TOKENS: Final = 16
# Other weights are nats away, another dtype or quantization a few hundredths.
_MEAN_DIFFERENCE: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What a server must serve: its answer to `probe` must be about `probe_logprobs`, which are the engine's."""

    name: str
    directory: str
    max_context: int
    end_tokens: tuple[int, ...]
    probe: SampleRequest
    probe_logprobs: Float32Array

    def max_new(self, request: SampleRequest) -> int:
        """Return the most tokens that a sample gets."""
        return min(request.params.max_tokens, self.max_context - len(request.prompt))


def served_model(name: str, directory: str, engine: Engine) -> ServedModel:
    """Return what a server of this base model must serve; draws one token with an engine that has nothing else to do.

    Raises:
        EngineError: the engine itself cannot.
    """
    probe = SampleRequest(
        request_id="probe",
        sampler_id=None,
        prompt=np.linspace(
            0, engine.vocab_size // 2, min(_PROBE_TOKENS, engine.max_context // 2), dtype=np.int64
        ),
        params=SamplingParams(max_tokens=1, seed=0, temperature=0.0, stop_tokens=()),
        prompt_logprobs=True,
    )
    engine.sampler.submit(probe)
    outcomes = dict(engine.sampler.step())
    result = outcomes[probe.request_id]
    if not isinstance(result, SampleResult):
        raise result
    assert result.prompt_logprobs is not None
    return ServedModel(
        name=name,
        directory=directory,
        max_context=engine.max_context,
        end_tokens=engine.end_tokens,
        probe=probe,
        probe_logprobs=result.prompt_logprobs,
    )


class Server(NamedTuple):
    """A server that can be asked; `model` is its own name of the base model."""

    model: str
    version: str
    max_model_len: int


class Unfit(Exception):
    """What answers is not the server that is needed."""


class VllmClient:
    """Speaks to the server at one address."""

    def __init__(self, url: str, model: ServedModel, *, api_key: str, silence_s: float) -> None:
        self.address = urlsplit(url).netloc.rpartition("@")[2]
        self.http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(None, connect=silence_s),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )
        self._model = model
        self._silence_s = silence_s

    async def attach(self) -> Server:
        """Return the server once it is known to serve the base model.

        Raises:
            Unfit: it serves something else.
            httpx.HTTPError: nothing answers, or nothing that can be read.
        """
        try:
            models = (await self._get("/v1/models")).json()["data"]
            version = (await self._get("/version")).json()["version"]
            card = self._card(models)
            server = Server(str(card["id"]), str(version), int(str(card["max_model_len"])))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Unfit(f"does not answer as vLLM does ({type(error).__name__})") from error
        difference = await self._first_difference(server)
        if not difference <= _MEAN_DIFFERENCE:
            raise Unfit(
                f"gives log-probabilities {difference:.2f} away from the engine's: it has other weights"
            )
        return server

    async def ping(self) -> None:
        """Make sure that the server still answers.

        Raises:
            Unfit: it says that it does not work any more.
            httpx.TransportError: it does not answer.
        """
        try:
            await self._get("/health")
        except httpx.TimeoutException:
            await self._get("/health")

    async def has_own_weights(self, server: Server) -> bool:
        """Say whether samples of the base model are still that: not so in every build, once adapters are loaded."""
        return await self._difference(server) <= _MEAN_DIFFERENCE

    async def complete(
        self, request: SampleRequest, model: str, stream: StreamedCompletion | None = None
    ) -> SampleResult:
        """Return a request's samples; a stream is filled meanwhile.

        Raises:
            Refusal: the answer is not whole.
            httpx.HTTPStatusError: the server answers with an error.
            httpx.TransportError: it does not answer, or no more.
        """
        max_new, end_tokens = self._model.max_new(request), self._model.end_tokens
        body = vllm_wire.completion_body(
            request, model=model, max_new=max_new, end_tokens=end_tokens, is_streamed=stream is not None
        )
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            if stream is None or answer.is_error:
                content = await answer.aread()
                answer.raise_for_status()
                return vllm_wire.read_completion(content, request, max_new=max_new, end_tokens=end_tokens)
            async for line in answer.aiter_lines():
                stream.take(line)
            return stream.result(request, max_new=max_new, end_tokens=end_tokens)

    def _card(self, models: list[dict[str, object]]) -> dict[str, object]:
        served = [card for card in models if not card.get("parent")]  # adapters have one
        wanted = {self._model.name, self._model.directory}
        for card in served:
            if {card["id"], card.get("root")} & wanted:
                return card
        names = ", ".join(repr(card["id"]) for card in served)
        raise Unfit(f"serves {names}, not {self._model.name!r}; see its --served-model-name")

    async def _first_difference(self, server: Server) -> float:
        try:
            async with asyncio.timeout(_FIRST_SAMPLE_S):
                return await self._difference(server)
        except Refusal as refusal:
            raise Unfit(f"does not score a prompt: {refusal}") from refusal
        except httpx.HTTPStatusError as error:
            reason = vllm_wire.reason_of(error.response.content)
            raise Unfit(f"does not score a prompt: {reason}") from error
        except TimeoutError:
            raise Unfit(f"does not score a prompt within {_FIRST_SAMPLE_S:.0f} s") from None

    async def _difference(self, server: Server) -> float:
        """Return how far the server's log-probabilities of a prompt are from the engine's, on average."""
        result = await self.complete(self._model.probe, server.model)
        assert result.prompt_logprobs is not None
        return float(np.nanmean(np.abs(result.prompt_logprobs - self._model.probe_logprobs)))

    async def _get(self, path: str) -> httpx.Response:
        answer = await self.http.get(path, timeout=self._silence_s)
        if answer.status_code != httpx.codes.OK:
            raise Unfit(f"answers {path} with {answer.status_code}")
        return answer
