"""Measures a newcomer's wait: a fresh clone, `make up`, and then a run by "Try it".

`python -m bench.first_run` prints one JSON line; pip's cache is used as it is.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from bench.companion import ROOT
from bench.instance import free_port

_READY_LINE = "Ctrl-C stops everything."
_FINISHED = re.compile(r'class="phase">.{0,80}Finished', re.DOTALL)
_TIMEOUT_S = 900


def main() -> None:
    """Clone, start, press the button, wait for the end of the run."""
    with tempfile.TemporaryDirectory(prefix="mintweb-bench-") as folder:
        Path(folder).chmod(0o755)  # root's PostgreSQL runs as another user, from the clone
        clone = Path(folder) / "mintweb"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        port, output = free_port(), Path(folder) / "output"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MINTWEB_")}
        begin = time.monotonic()
        with output.open("wb") as file:
            up = subprocess.Popen(
                ["make", "up"],
                cwd=clone,
                env={**kept, "MINTWEB_PORT": str(port)},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            wait_until(lambda: _READY_LINE in output.read_text(), up, output)
            ready_s = time.monotonic() - begin
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                run = try_it(client, output.read_text())
                wait_until(lambda: _FINISHED.search(client.get(run).text) is not None, up, output)
            total_s = time.monotonic() - begin
        finally:
            if up.poll() is None:
                os.killpg(up.pid, signal.SIGINT)
                up.wait(60)
    print(json.dumps({"ready_s": round(ready_s, 1), "try_it_finished_s": round(total_s, 1)}))


def try_it(client: httpx.Client, output: str) -> str:
    """Log in by the printed link and press "Try it"; return the address of the run's page."""
    (link,) = re.findall(r"http://\S+/login/\S+", output)
    client.get(link).raise_for_status()
    form = {"csrfmiddlewaretoken": client.cookies["csrftoken"]}
    headers = {"Origin": str(client.base_url).rstrip("/")}
    client.post(link, data=form, headers=headers)
    form = {"csrfmiddlewaretoken": client.cookies["csrftoken"]}
    return client.post("/runs/try", data=form, headers=headers).headers["Location"]


def wait_until(condition: Callable[[], bool], up: subprocess.Popen[bytes], output: Path) -> None:
    """Return once the condition holds; fail when mintweb ended or nothing came in a long time."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        if up.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"it did not come so far:\n{output.read_text()[-3000:]}")
        time.sleep(0.5)


if __name__ == "__main__":
    main()
