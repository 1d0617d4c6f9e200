"""Messages side by side: what one address lacks costs the others nothing."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest
from pytest_django import Settings

from runs.services import webhook_sender
from runs.services.webhook_sender import Message
from tests.rest.receiver import receiving

MORE_THAN_ASYNCIO_HAS_THREADS = 40


def message(url: str) -> Message:
    return Message(url=url, secret="whsec_1", event="run.failed", delivery_id="whd-1", body=b"{}")


def test_names_that_no_dns_answers_for_hold_up_nobody_else(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, is_over, real = [], threading.Event(), socket.getaddrinfo

    def getaddrinfo(host: str, *arguments: Any, **options: Any) -> Any:
        if host == "dead.example":
            answers.append(is_over.wait(60))
            raise socket.gaierror("no answer")
        return real("127.0.0.1" if host == "good.example" else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(webhook_sender, "TIMEOUT_S", 3)
    settings.WEBHOOK_HOSTS = ["good.example"]
    dead = [message("http://dead.example/")] * MORE_THAN_ASYNCIO_HAS_THREADS
    begin = time.monotonic()
    with receiving() as receiver:
        *failed, last = webhook_sender.send_all([*dead, message(f"http://good.example:{receiver.port}/hook")])
    assert (last.is_delivered, last.answer) == (True, "200 thanks")
    assert {outcome.answer for outcome in failed} == {"no answer within 3 s"}
    assert time.monotonic() - begin < 50
    assert answers == []  # the call has not waited for them
    is_over.set()
