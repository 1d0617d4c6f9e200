"""Measures an upload by pieces and the pages' patience during the check that follows.

`python -m bench.dataset_upload [--megabytes 2048]` prints one JSON line: seconds, growth of the web server's
memory, and how long the list of datasets took to answer while the file was checked.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx

from bench.instance import API_KEY, Instance

_PIECE_BYTES = 16 * 2**20
_CHAT = {"messages": [{"role": "user", "content": "q " * 120}, {"role": "assistant", "content": "a " * 380}]}


def main() -> None:
    """Start an instance, upload, wait for the check."""
    parser = argparse.ArgumentParser(prog="python -m bench.dataset_upload", description="Measure an upload.")
    parser.add_argument("--megabytes", type=int, default=2048)
    num_pieces = max(1, parser.parse_args().megabytes * 2**20 // _PIECE_BYTES)
    with (
        tempfile.TemporaryDirectory(prefix="mintweb-bench-") as folder,
        Instance(Path(folder) / "data") as instance,
        httpx.Client(base_url=instance.address, headers={"X-API-Key": API_KEY}, timeout=60) as client,
    ):
        (server,) = re.findall(
            r"server process \[(\d+)\]", (instance.data_dir / "logs" / "web.log").read_text()
        )
        before = memory_mb(server)
        begin = time.monotonic()
        size_bytes, peak = upload(client, num_pieces, server)
        uploaded_s = time.monotonic() - begin
        answers = answers_while_checked(client)
    figures = {
        "gigabytes": round(size_bytes / 1e9, 2),
        "upload_s": round(uploaded_s, 1),
        "memory_growth_mb": round(peak - before, 1),
        "check_s": round(sum(answers), 1),
        "answer_median_ms": round(1000 * median(answers), 1),
        "answer_slowest_ms": round(1000 * max(answers), 1),
    }
    print(json.dumps(figures))


def upload(client: httpx.Client, num_pieces: int, server: str) -> tuple[int, float]:
    """Upload so many pieces by tus; return their bytes and the server's largest memory in MB."""
    row = (json.dumps(_CHAT) + "\n").encode()
    piece = row * (_PIECE_BYTES // len(row))
    headers = {
        "Tus-Resumable": "1.0.0",
        "Upload-Length": str(len(piece) * num_pieces),
        "Upload-Metadata": f"filename {base64.b64encode(b'rows.jsonl').decode()}",
    }
    address = client.post("/rest/v1/uploads/", headers=headers).raise_for_status().headers["Location"]
    peak = 0.0
    for number in range(num_pieces):
        headers = {
            "Tus-Resumable": "1.0.0",
            "Upload-Offset": str(number * len(piece)),
            "Content-Type": "application/offset+octet-stream",
        }
        client.patch(address, content=piece, headers=headers).raise_for_status()
        peak = max(peak, memory_mb(server))
    return len(piece) * num_pieces, peak


def answers_while_checked(client: httpx.Client) -> list[float]:
    """Ask for the list of datasets until the newest is ready; return the seconds of each answer."""
    answers: list[float] = []
    while True:
        begin = time.monotonic()
        version = client.get("/rest/v1/datasets").raise_for_status().json()["items"][0]["newest"]
        answers.append(time.monotonic() - begin)
        if version["state"] == "ready":
            return answers
        if version["state"] != "checking":
            raise RuntimeError(f"the check ended {version['state']}: {version['error']}")


def memory_mb(pid: str) -> float:
    """Return what a process holds in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1000


if __name__ == "__main__":
    main()
