"""One running mintweb for the end-to-end tests, and the published clients' environments."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.up.instances import Instance

ROOT = Path(__file__).resolve().parent.parent.parent
CHROMIUM = os.environ.get("MINTWEB_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
GUIDE_MODEL = "Qwen/Qwen3-0.6B"
TINY = ROOT / "gpuworker" / "tiny" / "model"
PATIENCE_S = 60

# Five seconds are not enough for a busy machine; a deadline costs nothing where all is well.
expect.set_options(timeout=1000 * PATIENCE_S)


@dataclass(frozen=True)
class Sdk:
    """A client environment: the python of it and, for our own package, where that lies."""

    name: str
    python: Path
    source: Path | None = None

    def run(
        self, script: Path, *args: str, env: dict[str, str], timeout_s: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run a script in the environment."""
        paths = {"PYTHONPATH": str(self.source)} if self.source else {}
        return subprocess.run(
            [str(self.python), str(script), *args],
            env={**os.environ, **env, **paths},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def facts(self, *scenarios: str, env: dict[str, str]) -> dict[str, dict[str, Any]]:
        """Run scenarios of `sdk_scenarios` and return what each found."""
        done = self.run(Path(__file__).with_name("sdk_scenarios"), *scenarios, env=env, timeout_s=600)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        failed = {line["scenario"]: line["failed"] for line in lines if "failed" in line}
        assert not failed, "\n".join(f"{name}: {text}" for name, text in failed.items())
        assert done.returncode == 0, done.stderr[-2000:]
        return {line["scenario"]: line for line in lines}


MINT022 = Sdk("mint 0.2.0 (tinker 0.22)", ROOT / ".venv-mint022" / "bin" / "python")
TINKER038 = Sdk("tinker 0.38", ROOT / ".venv-tinker038" / "bin" / "python")
OWN022 = Sdk("our mint on tinker 0.22", MINT022.python, ROOT / "sdk" / "src")
OWN038 = Sdk("our mint on tinker 0.38", TINKER038.python, ROOT / "sdk" / "src")


@pytest.fixture(scope="session")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """A running mintweb that also serves its tiny model under the name MinT's guide uses."""
    instance = Instance(
        tmp_path_factory.mktemp("product") / "data", MINTWEB_BASE_MODELS=f"{GUIDE_MODEL}={TINY}"
    )
    instance.start()
    yield instance
    assert instance.stop() == 0


@pytest.fixture(scope="session")
def sdk_env(product: Instance) -> dict[str, str]:
    """The variables that `make up` tells people to paste."""
    exports = dict(re.findall(r"((?:MINT|TINKER)_[A-Z_]+)=(\S+)", product.output))
    assert exports.keys() == {"MINT_BASE_URL", "MINT_API_KEY", "TINKER_BASE_URL", "TINKER_API_KEY"}
    return {**exports, "HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0"}


@pytest.fixture(scope="session")
def login(product: Instance) -> dict[str, str]:
    """The cookies of whoever opened the login link that `make up` prints."""
    link = re.search(r"http://\S+/login/\S+", product.output)
    assert link is not None
    with httpx.Client(timeout=PATIENCE_S) as client:
        client.get(link[0]).raise_for_status()
        data = {"csrfmiddlewaretoken": client.cookies["csrftoken"]}
        assert client.post(link[0], data=data, headers={"Origin": product.address}).status_code == 302
        return dict(client.cookies)


@pytest.fixture
def page(product: Instance, login: dict[str, str]) -> Iterator[Page]:
    """A signed-in tab; an error or a violation of the content policy fails the test."""
    with pytest.MonkeyPatch.context() as environment, sync_playwright() as playwright:
        environment.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")  # Playwright keeps an event loop in this thread
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        context = browser.new_context(base_url=product.address)
        context.set_default_timeout(1000 * PATIENCE_S)
        context.add_cookies(
            [{"name": name, "value": value, "url": product.address} for name, value in login.items()]
        )
        tab = context.new_page()
        problems: list[str] = []
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.goto("/runs/")
        yield tab
        browser.close()
    assert problems == []
