"""Starts the doctor in a process of its own, with limits on memory and time, and reads its report.

The file is hostile input for C and Rust parsers: a crash, a bomb or an endless loop ends that process
and becomes a failed report here, never an error of the caller.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import orjson

from runs.datasets.report import Outcome, Report

__all__ = ["Outcome", "Progress", "Report", "run"]

DEFAULT_MEMORY_MB: Final = 1024
DEFAULT_TIMEOUT_S: Final = 3600.0
_ROOT: Final = Path(__file__).parents[2]
_STDERR_BYTES: Final = 4_000
_MEMORY_SIGNS: Final = ("MemoryError", "memory allocation", "bad_alloc", "malloc", "Out of memory")
# Single threads: each further thread costs a stack and an arena of the memory limit.
_ENVIRONMENT: Final = {
    "PATH": os.defpath,
    "PYTHONUTF8": "1",
    "MALLOC_ARENA_MAX": "2",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a check is: share of the input's bytes (0 to 1), good rows and problems so far."""

    share: float
    num_rows: int
    num_problems: int


def _ignore(progress: Progress) -> None:
    """Take no notice."""


def run(
    input: Path,
    filename: str,
    output: Path,
    *,
    mapping: Mapping[str, str] | None = None,
    skip_bad: bool = False,
    encoding: str = "",
    tokenizers: Mapping[str, Path] | None = None,
    memory_mb: int = DEFAULT_MEMORY_MB,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    on_progress: Callable[[Progress], None] = _ignore,
) -> Report:
    """Check a file and return the report; never raises for what is wrong with the file.

    Args:
        filename: the name it was uploaded under; only a hint where the content leaves a choice.
        output: folder (made if absent) for rows.jsonl, rows.idx, bad.jsonl and report.json.
        mapping: canonical name to column, such as {"prompt": "Frage", "completion": "Antwort"}.
        skip_bad: leave bad rows out instead of asking what to do.
        encoding: convert from this instead of UTF-8, such as the `encoding` of an earlier report.
        tokenizers: base model to its tokenizer.json; lengths in tokens are estimated for each.
        on_progress: called at most four times a second; what it raises ends the check and comes through.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.json").unlink(missing_ok=True)
    command = _command(input, filename, output, mapping or {}, tokenizers or {}, encoding, memory_mb)
    if skip_bad:
        command.append("--skip-bad")
    with (output / "doctor.log").open("w+b") as log:
        code, is_late = _follow(command, log, timeout_s, on_progress)
        log.seek(max(0, log.tell() - _STDERR_BYTES))
        said = log.read().decode("utf-8", "replace")
    (output / "doctor.log").unlink()
    return _outcome(output, code, said, is_late=is_late, timeout_s=timeout_s, memory_mb=memory_mb)


def _command(
    input: Path,
    filename: str,
    output: Path,
    mapping: Mapping[str, str],
    tokenizers: Mapping[str, Path],
    encoding: str,
    memory_mb: int,
) -> list[str]:
    command = [sys.executable, "-m", "runs.datasets.doctor"]
    name = filename.replace("\0", "").encode("utf-8", "replace").decode()
    command += [f"--input={input.absolute()}", f"--filename={name}", f"--output={output.absolute()}"]
    command += [f"--memory-mb={memory_mb}", f"--encoding={encoding}"]
    command.append(f"--mapping={orjson.dumps(dict(mapping)).decode()}")
    return command + [f"--tokenizer={name}={path.absolute()}" for name, path in tokenizers.items()]


def _follow(
    command: list[str], log: IO[bytes], timeout_s: float, on_progress: Callable[[Progress], None]
) -> tuple[int, bool]:
    """Return how the process ended, and whether the time limit ended it."""
    process = subprocess.Popen(
        command, cwd=_ROOT, env=_ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
    )
    is_late = threading.Event()

    def end() -> None:
        is_late.set()
        process.kill()

    timer = threading.Timer(timeout_s, end)
    timer.start()
    try:
        with process:
            try:
                _read_progress(process, on_progress)
            except BaseException:
                process.kill()
                raise
    finally:
        timer.cancel()
    log.seek(0, os.SEEK_END)
    return process.returncode, is_late.is_set()


def _read_progress(process: subprocess.Popen[bytes], on_progress: Callable[[Progress], None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.endswith(b"\n"):
            on_progress(Progress(**orjson.loads(line)))


def _outcome(
    output: Path, code: int, said: str, *, is_late: bool, timeout_s: float, memory_mb: int
) -> Report:
    path = output / "report.json"
    if code == 0 and path.exists():
        return Report.from_dict(orjson.loads(path.read_bytes()))
    for name in ("rows.jsonl", "rows.idx", "rows.jsonl.part", "rows.idx.part"):
        (output / name).unlink(missing_ok=True)
    error, fix = _why(code, said, is_late=is_late, timeout_s=timeout_s, memory_mb=memory_mb)
    return Report(outcome=Outcome.FAILED, error=error, fix=fix)


def _why(code: int, said: str, *, is_late: bool, timeout_s: float, memory_mb: int) -> tuple[str, str]:
    if is_late:
        return (
            f"checking the file took longer than {timeout_s:g} seconds and was ended",
            "split the file into smaller ones, or check it again when the machine is less busy",
        )
    if code == -signal.SIGKILL or any(sign in said for sign in _MEMORY_SIGNS):
        return (
            f"checking the file needed more than {memory_mb} MB of memory and was ended",
            "write it again with smaller rows or smaller row groups, or save it as JSONL",
        )
    last = said.strip().splitlines()[-1:] or ["it said nothing"]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return (
        f"the check ended unexpectedly ({how}): {last[0][:200]}",
        "the file may be damaged: write it again, best as JSONL, and upload that",
    )
