"""The folders of adapters that a vLLM server has forgotten are given back, but not while somebody needs them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx

from gpuworker.vllm_adapters import Folders, ServerAdapters

ADAPTER = "checkpoints/1/one"
TAKES_S = 0.05


def with_adapters(check: Callable[[ServerAdapters, list[str]], Awaitable[None]]) -> None:
    """Run a check with a server that takes every adapter, and the adapters whose folders were given back."""
    given_back: list[str] = []

    def take_back(sampler_id: str) -> None:
        time.sleep(TAKES_S)
        given_back.append(sampler_id)

    folders = Folders(lend=Path, take_back=take_back)

    async def run() -> None:
        server = httpx.MockTransport(lambda _: httpx.Response(httpx.codes.OK))
        async with (
            httpx.AsyncClient(transport=server, base_url="http://server") as client,
            asyncio.timeout(30),
        ):
            await check(ServerAdapters(client, folders), given_back)

    asyncio.run(run())


async def settled(adapters: ServerAdapters) -> None:
    """Wait until nothing goes on."""
    while adapters._tasks:
        await asyncio.sleep(TAKES_S)


def test_a_folder_stays_until_the_last_request_that_uses_it_has_ended() -> None:
    async def check(adapters: ServerAdapters, given_back: list[str]) -> None:
        async with adapters.used(ADAPTER):
            async with adapters.used(ADAPTER):
                adapters.forget(ADAPTER)
            await settled(adapters)
            assert not given_back
        await settled(adapters)
        assert given_back == [ADAPTER]

    with_adapters(check)


def test_a_folder_that_was_lent_anew_stays() -> None:
    async def check(adapters: ServerAdapters, given_back: list[str]) -> None:
        async with adapters.used(ADAPTER):
            adapters.forget_all()
            async with adapters.used(ADAPTER):
                pass
        await settled(adapters)
        assert not given_back
        adapters.drop(ADAPTER)
        await settled(adapters)
        assert given_back == [ADAPTER]

    with_adapters(check)


def test_a_folder_is_lent_again_after_it_was_given_back() -> None:
    async def check(adapters: ServerAdapters, given_back: list[str]) -> None:
        async with adapters.used(ADAPTER):
            pass
        adapters.forget(ADAPTER)
        async with adapters.used(ADAPTER):
            assert given_back == [ADAPTER]
        await settled(adapters)
        assert given_back == [ADAPTER]

    with_adapters(check)
