"""Send one signed message to an address of a user's, and never into the server's own network.

A name is resolved here and the connection made to the address that was checked, so that an answer of
the DNS cannot change in between. Redirects are not followed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import socket
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

import httpx
from django.conf import settings

from runs.exceptions import RequestInvalid

logger = logging.getLogger(__name__)

TIMEOUT_S: Final = 10
_MAX_ANSWER_BYTES: Final = 500
_PORTS: Final = {"http": 80, "https": 443}
# IPv6 spellings of IPv4 addresses, beside the mapped ones: where the last 32 bits count.
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True, kw_only=True)
class Message:
    """What goes to one address."""

    url: str
    secret: str
    event: str
    delivery_id: str
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Whether the address took the message, and what it said."""

    is_delivered: bool
    answer: str


class _Refused(Exception):
    """The address is none that a message may go to."""


def check_url(url: str) -> None:
    """Check an address as far as that is possible without asking the DNS.

    Raises:
        RequestInvalid: it is no http(s) address, or one inside the server's network.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise RequestInvalid(f"is no web address: {error}", place="url") from None
    host = _host_of(parsed)
    if parsed.scheme not in _PORTS or not host:
        raise RequestInvalid("must begin with http:// or https:// and a host", place="url")
    if parsed.userinfo or parsed.fragment:
        raise RequestInvalid("must hold no user name and no fragment", place="url")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return
    if not _may_go_to(host, str(address)):
        raise RequestInvalid(
            f"{host} is inside the server's network; the setting MINTWEB_WEBHOOK_HOSTS can allow it",
            place="url",
        )


def _host_of(url: httpx.URL) -> str:
    """Return the host as the resolver takes it."""
    try:
        url.host.encode("idna")
    except UnicodeError:
        raise RequestInvalid(
            f"{url.raw_host.decode()!r} is no host name: each part between dots has 1 to 63 valid characters",
            place="url",
        ) from None
    if url.port is not None and not 1 <= url.port <= 65_535:
        raise RequestInvalid(f"the port must be 1 to 65535, got {url.port}", place="url")
    return url.host


def signature(secret: str, body: bytes, *, timestamp: int) -> str:
    """Return the header by which a receiver knows that a message is ours and fresh."""
    mac = hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256)
    return f"t={timestamp},v1={mac.hexdigest()}"


def send_all(messages: Sequence[Message]) -> list[Outcome]:
    """Send messages side by side; each takes at most ten seconds."""
    # A thread for each: the loop's own are few, and names without an answer would use up the others' time in a queue.
    # Not made the loop's own either: at its end that waits for threads, and a lookup cannot be cut off.
    lookups = ThreadPoolExecutor(max(1, len(messages)), thread_name_prefix="webhook-dns")
    try:
        return asyncio.run(_send_all(messages, lookups))
    finally:
        lookups.shutdown(wait=False, cancel_futures=True)


async def _send_all(messages: Sequence[Message], lookups: Executor) -> list[Outcome]:
    return await asyncio.gather(*(_send(message, lookups) for message in messages))


async def _send(message: Message, lookups: Executor) -> Outcome:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await _exchange(message, lookups)
    except TimeoutError:
        return Outcome(is_delivered=False, answer=f"no answer within {TIMEOUT_S} s")
    except _Refused as error:
        return Outcome(is_delivered=False, answer=f"refused: {error}")
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ssl.SSLError) as error:
        return _failure(error)
    except Exception as error:  # or the others' outcomes would be lost, and what arrived sent again for ever
        logger.exception("a message could not be sent", extra={"delivery": message.delivery_id})
        return _failure(error)


def _failure(error: Exception) -> Outcome:
    return Outcome(is_delivered=False, answer=f"{type(error).__name__}: {error}"[:_MAX_ANSWER_BYTES])


async def _exchange(message: Message, lookups: Executor) -> Outcome:
    url = httpx.URL(message.url)
    address = await _checked_address(url, lookups)
    headers = {
        "Host": url.netloc.decode(),
        "Content-Type": "application/json",
        "User-Agent": "mintweb-webhooks",
        "Mintweb-Event": message.event,
        "Mintweb-Delivery": message.delivery_id,
        "Mintweb-Signature": signature(message.secret, message.body, timestamp=int(time.time())),
    }
    async with (
        httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=TIMEOUT_S) as client,
        client.stream(
            "POST",
            url.copy_with(host=address),
            content=message.body,
            headers=headers,
            extensions={"sni_hostname": url.host},  # certificates are for the name
        ) as response,
    ):
        text = await _beginning(response)
    return Outcome(is_delivered=response.is_success, answer=f"{response.status_code} {text}".strip())


async def _beginning(response: httpx.Response) -> str:
    content = b""
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) >= _MAX_ANSWER_BYTES:
            break
    text = content[:_MAX_ANSWER_BYTES].decode(errors="replace")
    return "".join(character for character in text if character.isprintable())


async def _checked_address(url: httpx.URL, lookups: Executor) -> str:
    port = url.port or _PORTS[url.scheme]
    lookup = partial(socket.getaddrinfo, url.host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(lookups, lookup)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses:
        raise _Refused(f"{url.host} has no address")
    for address in addresses:
        if not _may_go_to(url.host, address):
            raise _Refused(f"{url.host} is {address}, inside the server's network")
    return addresses[0]


def _may_go_to(host: str, address: str) -> bool:
    if host.lower() in settings.WEBHOOK_HOSTS or address in settings.WEBHOOK_HOSTS:
        return True
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return inner.is_global and not inner.is_multicast
    return ip.is_global and not ip.is_multicast
