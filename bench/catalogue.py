"""Times what people and clients do with runs and checkpoints when there are few and when there are very many.

`python -m bench.catalogue [--rows 1000 1000000] [--repeats 15]` starts an instance, fills its tables with as many
runs, each with one checkpoint, asks over HTTP, and prints one JSON line: median milliseconds of each request.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import django
import httpx

from bench.instance import API_KEY, Instance

_FILL: Final = """
WITH run AS (
  INSERT INTO runs_trainingrun (public_id, owner_id, session_id, model_seq_id, name, source, state, error,
    user_metadata, created_at, base_model, lora_rank, lora_alpha, lora_seed, train_attn, train_mlp, train_unembed, fence,
    applied_seq, num_replayed, num_to_replay, payloads_gone_seq, results_gone_seq, parent_path, step, num_tokens)
  SELECT %(session_id)s || ':train:' || n, %(owner)s, %(session)s, n, 'run ' || n, 'sdk', 'open', '', '{}',
    now() - n * interval '1 second', 'mintweb/tiny', 1, 32, n, true, true, true, 0, -1, 0, 0, -1, -1, '', n %% 977, 0
  FROM generate_series(%(first)s::int, %(last)s::int) n RETURNING id, owner_id, model_seq_id)
INSERT INTO runs_checkpoint (owner_id, run_id, kind, name, is_ephemeral, directory, size_bytes, seq, step, is_public,
  user_metadata, created_at)
SELECT owner_id, id, 'weights', 'end', false, 'checkpoints/' || id || '/filled', 1000 + model_seq_id %% 1009, 1,
  model_seq_id %% 977, false, '{}', now() - model_seq_id * interval '1 second' FROM run
"""
_FIRST_FILLED: Final = 1000
_PIECE: Final = 100_000


class Catalogue:
    """An instance's runs and checkpoints, all of one person and one session."""

    def __init__(self, instance: Instance) -> None:
        from runs.services import accounts, sessions

        self._owner = accounts.ensure_admin()
        self._session = sessions.create_session(self._owner)
        self._num_rows = 0
        headers = {"Authorization": f"Bearer {API_KEY}", "X-API-Key": API_KEY}
        self._http = httpx.Client(base_url=instance.address, headers=headers, timeout=60)
        self._browser = httpx.Client(base_url=instance.address, timeout=60, follow_redirects=True)
        link = f"/login/{accounts.create_login_link(self._owner)}/"
        page = self._browser.get(link)
        token = self._browser.cookies.get("csrftoken", "")
        self._browser.post(
            page.url, data={"csrfmiddlewaretoken": token}, headers={"Referer": instance.address}
        )

    def fill(self, num_rows: int) -> None:
        """Have so many runs and checkpoints."""
        from django.db import connection

        from runs.services import tallies

        with connection.cursor() as cursor:
            while self._num_rows < num_rows:
                first = _FIRST_FILLED + self._num_rows
                self._num_rows = min(num_rows, self._num_rows + _PIECE)
                values = {
                    "session_id": self._session.public_id,
                    "session": self._session.pk,
                    "owner": self._owner.pk,
                    "first": first,
                    "last": _FIRST_FILLED + self._num_rows - 1,
                }
                cursor.execute(_FILL, values)
            cursor.execute("VACUUM ANALYZE runs_checkpoint")
            cursor.execute("VACUUM ANALYZE runs_trainingrun")
        tallies.add_up()  # as housekeeping does within a minute

    def measure(self, num_repeats: int) -> dict[str, float]:
        """Return the median milliseconds of each request."""
        figures = {}
        for name, action in self._actions().items():
            seconds = []
            for number in range(num_repeats):
                started_at = time.perf_counter()
                action(number)
                seconds.append(time.perf_counter() - started_at)
            figures[name] = round(statistics.median(seconds) * 1000, 1)
        return figures

    def _actions(self) -> dict[str, Callable[[int], object]]:
        from runs.services import claims

        run = f"/rest/v1/runs/{self._run_id(self._num_rows // 2)}/checkpoints"
        runs = self._new_run()
        return {
            "SDK: list checkpoints": lambda _: self._get("/api/v1/checkpoints?limit=100"),
            "SDK: list runs": lambda _: self._get("/api/v1/training_runs?limit=20"),
            "REST: first page": lambda _: self._get("/rest/v1/checkpoints"),
            "REST: page in the middle": lambda _: self._get(f"/rest/v1/checkpoints?cursor={self._middle()}"),
            "REST: first page by size": lambda _: self._get("/rest/v1/checkpoints?sort=size_bytes"),
            "REST: runs": lambda _: self._get("/rest/v1/runs"),
            "REST: one checkpoint": lambda _: self._get(f"{run}/weights/end"),
            "REST: checkpoints of a run": lambda _: self._get(run),
            "REST: disk usage": lambda _: self._get("/rest/v1/me/usage"),
            "page of checkpoints": lambda _: self._page("/checkpoints/"),
            "page of runs": lambda _: self._page("/runs/"),
            "save": lambda number: self._save(runs, number),
            "name exists": lambda _: claims.checkpoint_exists(runs.runs[0].pk, kind="weights", name="save-0"),
            "REST: delete": lambda number: self._delete(self._num_rows // 3 + number),
        }

    def _run_id(self, number: int) -> str:
        return f"{self._session.public_id}:train:{_FIRST_FILLED + number}"

    def _get(self, path: str) -> None:
        self._http.get(path).raise_for_status()

    def _page(self, path: str) -> None:
        reply = self._browser.get(path).raise_for_status()
        if "/login" in reply.url.path:
            raise RuntimeError("the page asks to sign in")

    def _middle(self) -> str:
        from runs.models import Checkpoint
        from runs.rest import paging

        row = Checkpoint.objects.get(run__public_id=self._run_id(self._num_rows // 2), name="end")
        return paging.pack([row.created_at.isoformat(), row.pk], scope="checkpoints -created_at")

    def _delete(self, number: int) -> None:
        self._http.delete(f"/rest/v1/runs/{self._run_id(number)}/checkpoints/weights/end").raise_for_status()

    def _new_run(self) -> Any:
        from bench import fleet

        return fleet.Fleet(1)

    def _save(self, runs: Any, number: int) -> None:
        runs.save([0], f"save-{number}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    figures: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, Instance(Path(folder) / "data") as instance:
        os.environ |= {
            "MINTWEB_DATA_DIR": str(instance.data_dir),
            "DJANGO_SETTINGS_MODULE": "mintweb.settings",
        }
        for name in ("DATABASE_URL", "REDIS_URL"):
            os.environ.pop(name, None)
        django.setup()
        logging.getLogger("httpx").setLevel(logging.WARNING)
        catalogue = Catalogue(instance)
        for num_rows in sorted(options.rows):
            started_at = time.monotonic()
            catalogue.fill(num_rows)
            print(f"{num_rows} rows are there after {time.monotonic() - started_at:.0f} s", file=sys.stderr)
            figures[num_rows] = catalogue.measure(options.repeats)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
