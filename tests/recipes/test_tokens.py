"""Token stores: written once, whole or absent, read back exactly, and removed when the cache is full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from django.utils import timezone
from pytest_django.fixtures import Settings

from runs.exceptions import RequestInvalid
from runs.models import DatasetVersion
from runs.recipes import tokens
from runs.recipes.rendering import Renderer, Row
from runs.recipes.tokens import TokenStore
from tests.recipes.chat_models import ROOT, chat, renderer_in

TINY = ROOT / "gpuworker" / "tiny" / "model"


class ListRows(list[Row]):
    """Rows in memory."""

    def slice(self, start: int, end: int, /) -> list[Row]:
        return self[start:end]

    def __enter__(self) -> ListRows:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Stop(Exception):
    """the person has stopped the run"""


@pytest.fixture(scope="module")
def tiny() -> Renderer:
    return renderer_in(TINY)


@pytest.fixture
def cache(settings: Settings, tmp_path: Path) -> Path:
    settings.DATA_DIR = tmp_path / "data"
    return tmp_path / "data" / "cache" / "tokens"


def ignore(share: float) -> None:
    """Take progress and do nothing."""


def many(count: int) -> ListRows:
    return ListRows(chat(f"What is {number}?", f"Arr, {number}! " * (number % 7)) for number in range(count))


def prepare_at(
    folder: Path,
    rows: ListRows,
    renderer: Renderer,
    *,
    max_length: int = 40,
    progress: Callable[[float], None] = ignore,
) -> TokenStore:
    return tokens.prepare_at(
        folder, lambda: rows, renderer, train_on="assistant", max_length=max_length, progress=progress
    )


def test_a_store_gives_each_row_as_the_renderer_does(cache: Path, tiny: Renderer) -> None:
    rows = many(1200)
    shares: list[float] = []
    store = prepare_at(cache / "aa", rows, tiny, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(shares) > 1
    assert len(store) == len(rows)
    for number in (0, 1, 511, 512, 1199):
        row = tiny.row(rows[number], train_on="assistant", max_length=40)
        assert store[number].tokens.dtype == row.tokens.dtype
        assert store[number].tokens.tolist() == row.tokens.tolist()
        assert store[number].mask.tolist() == row.mask.tolist()
        assert store[number].num_truncated == row.num_truncated
        assert store.lengths[number] == len(row.tokens)
        assert store.num_trained[number] == row.mask.sum()
    assert store.counts.num_rows == 1200
    assert store.counts.num_tokens == store.lengths.sum()
    assert store.counts.num_trained_tokens == store.num_trained.sum()
    assert 0 < store.counts.num_truncated_rows == sum(store[n].num_truncated > 0 for n in range(1200))
    assert store.counts.num_failed_rows == 0
    with pytest.raises(IndexError):
        store[1200]


def test_equal_rows_have_equal_digests_wherever_they_are_cut(cache: Path, tiny: Renderer) -> None:
    rows = ListRows([chat("a", "b" * 90), chat("c", "d"), chat("a", "b" * 90), chat("a", "b" * 91)])
    digests = prepare_at(cache / "aa", rows, tiny).digests.tolist()
    assert digests[0] == digests[2]
    assert len(set(digests)) == 3
    assert prepare_at(cache / "bb", rows, tiny, max_length=10).digests.tolist() == digests


def test_rows_that_cannot_be_rendered_keep_their_places(cache: Path, tiny: Renderer) -> None:
    rows = ListRows([chat("a", "b"), {"messages": []}, chat("only a question"), chat("c", "d")])
    store = prepare_at(cache / "aa", rows, tiny)
    assert store.num_trained.tolist() == [2, 0, 0, 2]
    assert store[1].tokens.tolist() == []
    assert store.counts.num_failed_rows == 1
    assert store.counts.num_untrained_rows == 2
    assert [(problem.row, problem.reason) for problem in store.problems] == [
        (1, "messages must be a list with at least one message")
    ]


def test_a_dataset_of_which_no_row_can_be_rendered_is_an_error(cache: Path, tiny: Renderer) -> None:
    with pytest.raises(
        RequestInvalid, match="none of the 2 rows can be rendered; row 1: this row has the fields x"
    ):
        prepare_at(cache / "aa", ListRows([{"x": 1}, {"x": 2}]), tiny)
    assert [file.name for file in cache.iterdir()] == ["locks"]


def test_no_rows_make_an_empty_store(cache: Path, tiny: Renderer) -> None:
    store = prepare_at(cache / "aa", ListRows(), tiny)
    assert len(store) == 0
    assert store.lengths.tolist() == []


def test_a_store_is_made_once(cache: Path, tiny: Renderer) -> None:
    first = prepare_at(cache / "aa", many(10), tiny)
    again = prepare_at(cache / "aa", ListRows(), tiny)
    assert again.counts == first.counts


def test_an_error_of_progress_ends_the_work_and_leaves_nothing(cache: Path, tiny: Renderer) -> None:
    def stop(share: float) -> None:
        raise Stop

    with pytest.raises(Stop):
        prepare_at(cache / "aa", many(10), tiny, progress=stop)
    assert [file.name for file in cache.iterdir()] == ["locks"]


KILLED = """
import os, signal, sys
from pathlib import Path
import django
django.setup()
from runs.recipes import tokens
from tests.recipes.test_tokens import TINY, many, renderer_in
def die(share): os.kill(os.getpid(), signal.SIGKILL)
tokens.prepare_at(
    Path(sys.argv[1]), lambda: many(2000), renderer_in(TINY), train_on="assistant", max_length=40, progress=die
)
"""


def test_a_killed_process_leaves_no_store_and_the_next_begins_anew(cache: Path, tiny: Renderer) -> None:
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "mintweb.settings", "PYTHONWARNINGS": "ignore"}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(cache / "aa")], cwd=ROOT, env=env, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(file.name for file in cache.iterdir()) == ["aa.draft", "locks"]
    store = prepare_at(cache / "aa", many(2000), tiny)
    assert store.counts.num_rows == 2000
    assert sorted(file.name for file in cache.iterdir()) == ["aa", "locks"]


def test_one_writes_while_the_others_wait(cache: Path, tiny: Renderer) -> None:
    num_opened = 0
    count_lock = threading.Lock()
    together = threading.Barrier(4)

    def open_rows() -> ListRows:
        nonlocal num_opened
        with count_lock:
            num_opened += 1
        return many(3000)

    def prepare(_: int) -> TokenStore:
        together.wait(timeout=30)
        return tokens.prepare_at(
            cache / "aa", open_rows, tiny, train_on="last", max_length=40, progress=ignore
        )

    with ThreadPoolExecutor(max_workers=4) as threads:
        stores = list(threads.map(prepare, range(4)))
    assert num_opened == 1
    assert {store.counts.num_tokens for store in stores} == {stores[0].counts.num_tokens}


def test_who_waits_can_be_stopped(cache: Path, tiny: Renderer) -> None:
    is_writing, may_end = threading.Event(), threading.Event()

    def hold(share: float) -> None:
        is_writing.set()
        assert may_end.wait(timeout=60)

    def stop(share: float) -> None:
        raise Stop

    with ThreadPoolExecutor(max_workers=1) as threads:
        writing = threads.submit(prepare_at, cache / "aa", many(10), tiny, progress=hold)
        assert is_writing.wait(timeout=60)
        with pytest.raises(Stop):
            prepare_at(cache / "aa", many(10), tiny, progress=stop)
        assert tokens.remove_unused(0) == 0
        may_end.set()
        assert len(writing.result()) == 10


def test_rows_are_read_a_few_at_a_time(cache: Path, tiny: Renderer) -> None:
    class LongRows:
        """Rows made as they are read; remembers how many were read before each report of progress."""

        num_read = 0

        def __len__(self) -> int:
            return 320

        def slice(self, start: int, end: int, /) -> Iterator[Row]:
            for number in range(start, end):
                self.num_read += 1
                yield chat("q", f"{number} " + "word " * 20_000)

    rows = LongRows()
    ahead: list[int] = []

    def report(share: float) -> None:
        ahead.append(rows.num_read - round(share * len(rows)))

    tokens.prepare_at(
        cache / "aa", lambda: nullcontext(rows), tiny, train_on="last", max_length=8, progress=report
    )
    assert len(ahead) >= 32
    assert max(ahead) == 0


def test_stores_opened_longest_ago_go_first(cache: Path, tiny: Renderer) -> None:
    for place, name in enumerate(["aa", "bb", "cc"]):
        prepare_at(cache / name, many(100), tiny)
        os.utime(cache / name / "store.json", (1000 + place, 1000 + place))
    (cache / "dd.draft").mkdir()
    (cache / "dd.draft" / "tokens.bin").write_bytes(b"x" * 50)
    opened = prepare_at(cache / "aa", ListRows(), tiny)
    size = sum(file.stat().st_size for file in (cache / "aa").iterdir())
    assert tokens.remove_unused(size * 5 // 2) == size + 50
    assert sorted(file.name for file in cache.iterdir()) == ["aa", "cc", "locks"]
    tokens.remove_unused(0)
    assert [file.name for file in cache.iterdir()] == ["locks"]
    assert opened[0].mask.sum() == opened.num_trained[0]


def test_the_limit_is_the_setting(cache: Path, tiny: Renderer, settings: Settings) -> None:
    assert tokens.remove_unused() == 0
    prepare_at(cache / "aa", many(5), tiny)
    settings.CACHE_BYTES = 10**6
    assert tokens.remove_unused() == 0
    settings.CACHE_BYTES = 0
    assert tokens.remove_unused() > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("digest", "other"),
        ("mapping", {"prompt": "q"}),
        ("skip_bad_rows", True),
        ("kind", "text"),
        ("checked_at", timezone.now()),
    ],
)
def test_what_changes_the_rows_makes_another_store(tiny: Renderer, field: str, value: Any) -> None:
    def key(version: DatasetVersion, max_length: int = 40) -> str:
        return tokens.key_of(version, tiny, train_on="last", max_length=max_length)

    version = DatasetVersion(digest="0" * 64, kind="chat", num_rows=3)
    other = DatasetVersion(digest="0" * 64, kind="chat", num_rows=3)
    assert key(version) == key(other)
    assert key(version) != key(other, 41)
    setattr(other, field, value)
    assert key(version) != key(other)


def test_a_version_is_prepared_and_opened(
    base_model: str, add_dataset: Callable[..., DatasetVersion], cache: Path
) -> None:
    version = add_dataset([chat(f"What is {number}?", f"Arr, {number}!") for number in range(30)])
    options: dict[str, Any] = {"train_on": "assistant", "max_length": 64}
    assert tokens.open_store(version, base_model, **options) is None
    store = tokens.prepare(version, base_model, **options, progress=ignore)
    assert len(store) == version.num_rows == 30
    assert (store.num_trained > 0).all()
    opened = tokens.open_store(version, base_model, **options)
    assert opened is not None
    assert opened.counts == store.counts
    assert tokens.open_store(version, base_model, train_on="last", max_length=64) is None
