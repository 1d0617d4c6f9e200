"""Uploads a file, trains a LoRA adapter on it, prints the losses, and downloads the adapter into a folder.

Set MINTWEB_URL and MINTWEB_API_KEY; needs Python alone. `python rest_train.py --help` lists what can be chosen.
"""

import argparse
import io
import json
import os
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

PIRATES = Path(__file__).parent / "data" / "pirate_qa.jsonl"
AGAIN = (409, 429, 502, 503, 504)  # the server asks to come back in a moment


class Refused(Exception):
    """What the server did not do, in its own words."""


class Rest:
    """The REST API with a key."""

    def __init__(self, url, key):
        self.base = url.rstrip("/") + "/rest/v1/"
        self.key = key

    def send(self, method, path, body=None, *, content_type="application/json", headers=None, patience_s=60):
        """Return status, headers and content; sends again while the server is away or busy."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        sent = {"X-API-Key": self.key, **(headers or {})} | ({"Content-Type": content_type} if data else {})
        if method == "POST":
            sent["Idempotency-Key"] = uuid.uuid4().hex  # sent again it still happens once
        request = urllib.request.Request(self.base + path, data, sent, method=method)
        deadline = time.monotonic() + patience_s
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    return reply.status, reply.headers, reply.read()
            except urllib.error.HTTPError as error:
                if error.code == 304:
                    return 304, error.headers, b""
                if error.code not in AGAIN or time.monotonic() > deadline:
                    raise Refused(f"{method} {path}: {explained(error)}") from None
                time.sleep(float(error.headers.get("Retry-After", "1")))
            except OSError as error:
                if time.monotonic() > deadline:
                    raise Refused(f"no answer from {self.base}: {error}") from None
                time.sleep(1)

    def ask(self, method, path, body=None, **options):
        """Return the value of a JSON answer."""
        return json.loads(self.send(method, path, body, **options)[2])

    def changes(self, path, *, every_s=0.5):
        """Yield the value at a path, and again whenever it is another."""
        tag = None
        while True:
            status, headers, content = self.send("GET", path, headers={"If-None-Match": tag} if tag else None)
            if status != 304:
                tag = headers["ETag"]
                yield json.loads(content)
            time.sleep(every_s)


def explained(error):
    """Return what an error says: every problem with its place."""
    content = error.read()
    try:
        told = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {content[:200].decode(errors='replace')}"
    problems = [": ".join(filter(None, (one["place"], one["message"]))) for one in told["problems"]]
    return f"{error.code} {'; '.join(problems)}" + (f" ({told['hint']})" if told["hint"] else "")


def upload(rest, file):
    """Upload a file and wait for the doctor; return what names its version."""
    query = urllib.parse.urlencode({"filename": file.name})
    made = rest.ask(
        "POST",
        f"datasets?{query}",
        file.read_bytes(),
        content_type="application/octet-stream",
        patience_s=600,
    )
    path = f"datasets/{made['id']}/versions/{made['version']['number']}"
    version = made["version"]
    while version["state"] == "checking":
        version = rest.ask("GET", f"{path}?wait_s=30")
    if version["state"] != "ready":
        raise Refused(
            f"{file} is no dataset yet, it {version['state'].replace('_', ' ')}: {version['error']}"
        )
    print(f"{version['num_rows']} rows of the kind {version['kind']} as {version['ref']}")
    return version["ref"]


def watch(rest, run_id):
    """Print the losses of a run until it is over; return its last status."""
    cursor = ""
    for status in rest.changes(f"runs/{run_id}/status"):
        has_more = True
        while has_more:
            page = rest.ask("GET", f"runs/{run_id}/metrics/values?limit=200{cursor}")
            cursor, has_more = f"&cursor={page['cursor']}", page["has_more"]
            for value in page["items"]:
                if value["name"] in ("loss", "validation_loss"):
                    print(f"step {value['step']:5}  {value['name']} {value['value']}", flush=True)
        if status["is_over"]:
            return status
        print(status["phase"], flush=True)


def download(rest, run_id, folder):
    """Unpack the newest weights of a run into a folder."""
    path = f"runs/{run_id}/checkpoints?kind=weights&sort=-step&limit=1"
    newest = rest.ask("GET", path)["items"]
    if not newest:
        raise Refused("the run has no checkpoint")
    name = newest[0]["name"]
    content = rest.send("GET", f"runs/{run_id}/checkpoints/weights/{name}/download")[2]
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")
    print(f"{name} (step {newest[0]['step']}) is in {folder}: {', '.join(sorted(os.listdir(folder)))}")


def arguments():
    """Return what was chosen on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", nargs="?", type=Path, default=PIRATES, help="rows to train on (default: pirates)"
    )
    parser.add_argument("--out", type=Path, default=Path("adapter"), help="folder for the adapter")
    parser.add_argument("--model", help="base model (default: the first that is offered)")
    parser.add_argument("--steps", type=int, default=60, help="steps to train (default: 60)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter (default: 16)")
    parser.add_argument("--learning-rate", type=float, help="(default: by a rule)")
    parser.add_argument("--name", default="rest_train", help="name of the run")
    return parser.parse_args()


def main():
    """Do it all; returns the exit status."""
    chosen = arguments()
    url, key = os.environ.get("MINTWEB_URL", "http://127.0.0.1:8000"), os.environ.get("MINTWEB_API_KEY", "")
    if not key:
        print("set MINTWEB_API_KEY to a key of yours (settings page, or printed by make up)", file=sys.stderr)
        return 2
    rest = Rest(url, key)
    try:
        model = chosen.model or rest.ask("GET", "base-models")["items"][0]["name"]
        body = {
            "base_model": model,
            "dataset": upload(rest, chosen.file),
            "num_steps": chosen.steps,
            "lora": {"rank": chosen.rank},
            "name": chosen.name,
        }
        if chosen.learning_rate is not None:
            body["learning_rate"] = chosen.learning_rate
        run_id = rest.ask("POST", "runs", body)["id"]
        print(f"run {run_id} of {model}: {url}/runs/{run_id}/")
        status = watch(rest, run_id)
        if status["state"] != "finished":
            raise Refused(f"the run is {status['state']}: {status['phase']}")
        download(rest, run_id, chosen.out)
    except (Refused, OSError) as error:
        print(f"rest_train: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
