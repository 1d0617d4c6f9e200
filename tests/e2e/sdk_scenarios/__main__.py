"""What a client does with a live server, run inside a client environment.

    python sdk_scenarios NAME [NAME ...]     or     python sdk_scenarios all     or     python sdk_scenarios list

Every scenario prints one JSON line of facts; what they should be is for the caller to judge. One that
raises prints its traceback as "failed", and the exit status is 1. The
server and the key come from MINT_BASE_URL, MINT_API_KEY, TINKER_BASE_URL and TINKER_API_KEY. Runs with the
published mint, this project's mint and tinker 0.38.
"""
# mypy: ignore-errors

from __future__ import annotations

import json
import sys
import time
import traceback

import checkpoints
import crowds
import sampling
import training
from client import sdk

SCENARIOS = {
    scenario.__name__: scenario
    for module in (training, checkpoints, sampling, crowds)
    for scenario in module.SCENARIOS
}


def main(names):
    if names == ["list"]:
        sys.stdout.write("\n".join(SCENARIOS) + "\n")
        return 0
    num_failed = 0
    for name in SCENARIOS if names == ["all"] else names:
        line = {"scenario": name, "sdk": f"{sdk.__name__} {sdk.__version__}"}
        started_at = time.monotonic()
        try:
            line |= SCENARIOS[name]()
        except Exception:  # noqa: BLE001 - the others are to run all the same
            line["failed"] = traceback.format_exc()
            num_failed += 1
        line["took_s"] = round(time.monotonic() - started_at, 3)
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
