"""Datasets in a real browser against a real server: uploads that survive everything, and what follows them."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from django.conf import settings
from django.test import Client
from playwright.sync_api import Browser, CDPSession, Locator, Page, expect

from runs.models import Dataset, DatasetVersion, Upload, User
from tests.pages.dataset_seed import HOSTILE, add_checked, add_version, chat_line, chats, checked
from tests.pages.live.browser import LIVE
from tests.pages.live.server import Server

pytestmark = LIVE
State = DatasetVersion.State
BAD = '{"messages": [{"role": "asistant", "content": "hello"}]}\n'
SLOW, FAST = 100_000, -1  # more than a minute for the large file, which no busy machine misses
DATASET = re.compile(r"/datasets/ds-[0-9a-f]{12}/")


@pytest.fixture
def line(tab: Page) -> Iterator[CDPSession]:
    """Return the tab's connection, whose speed can be set."""
    session = tab.context.new_cdp_session(tab)
    session.send("Network.enable")
    yield session
    session.detach()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Return a file that a slow connection is at for a while."""
    path = tmp_path / "large.jsonl"
    path.write_text(chats(30_000))
    return path


def set_speed(line: CDPSession, bytes_per_s: int) -> None:
    values = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": bytes_per_s}
    line.send("Network.emulateNetworkConditions", values)


def choose(tab: Page, *files: Path) -> None:
    tab.locator("[data-upload-files]").set_input_files(list(files))


def begin_slowly(tab: Page, line: CDPSession, file: Path) -> Locator:
    """Begin an upload that is slow; return its line once a part of it is on the server."""
    tab.goto("/datasets/")
    set_speed(line, SLOW)
    choose(tab, file)
    item = tab.locator(".upload")
    expect(item.locator("[data-upload-said]")).to_contain_text("left")
    wait(tab, lambda: part_of(Upload.objects.get()).stat().st_size > 0)
    return item


def wait(tab: Page, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        tab.wait_for_timeout(50)


def share_of(item: Locator) -> float:
    return float(item.get_by_role("progressbar").evaluate("bar => bar.value"))


def part_of(upload: Upload) -> Path:
    return Path(settings.DATA_DIR) / "uploads" / f"{upload.public_id}.part"


def expect_whole(tab: Page, file: Path) -> DatasetVersion:
    """Wait for the dataset's page, and check that every byte is there."""
    tab.wait_for_url(DATASET)
    version = DatasetVersion.objects.get()
    assert version.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    return version


def test_an_upload_goes_on_after_a_reload(tab: Page, line: CDPSession, large: Path) -> None:
    item = begin_slowly(tab, line, large)
    expect(item.locator("[data-upload-said]")).to_contain_text("kB/s")
    tab.reload()
    expect(item).to_contain_text("large.jsonl")
    expect(item).to_contain_text("are here")
    upload = Upload.objects.get()
    size = part_of(upload).stat().st_size
    assert 0 < size < large.stat().st_size
    set_speed(line, FAST)
    sent: list[str] = []
    tab.on("request", lambda request: sent.append(request.headers.get("upload-offset", "")))
    choose(tab, large)
    version = expect_whole(tab, large)
    assert Upload.objects.get().version == version
    offsets = [int(offset) for offset in sent if offset]
    assert offsets
    assert min(offsets) >= size
    expect(tab.get_by_text("Checking the file")).to_be_visible()
    checked(version)
    expect(tab.get_by_text("What was found")).to_be_visible()
    expect(tab.locator(".row-view")).to_have_count(5)


def test_a_file_that_was_changed_since_begins_anew(tab: Page, line: CDPSession, large: Path) -> None:
    item = begin_slowly(tab, line, large)
    tab.reload()
    expect(item).to_contain_text("are here")
    large.write_text(chats(30_000).replace("plus", "PLUS"))
    set_speed(line, FAST)
    with tab.expect_file_chooser() as chooser:
        tab.get_by_role("button", name="Choose the file again to go on").click()
    chooser.value.set_files(large)
    expect(item).to_contain_text("The file was changed since the upload began")
    choose(tab, large)
    version = expect_whole(tab, large)
    assert {upload.version for upload in Upload.objects.all()} == {None, version}


def test_another_file_does_not_go_on_with_an_upload(
    tab: Page,
    line: CDPSession,
    large: Path,
    tmp_path: Path,
) -> None:
    item = begin_slowly(tab, line, large)
    tab.reload()
    other = tmp_path / "other.jsonl"
    other.write_text(chats(2))
    with tab.expect_file_chooser() as chooser:
        tab.get_by_role("button", name="Choose the file again to go on").click()
    chooser.value.set_files(other)
    expect(item).to_contain_text("This is other.jsonl with")
    upload = Upload.objects.get()
    assert part_of(upload).stat().st_size < large.stat().st_size
    tab.get_by_role("button", name="Cancel").click()
    expect(item).to_have_count(0)
    assert not Upload.objects.exists()
    assert not part_of(upload).exists()


def test_an_upload_is_paused_resumed_and_cancelled(tab: Page, line: CDPSession, large: Path) -> None:
    item = begin_slowly(tab, line, large)
    item.get_by_role("button", name="Pause").click()
    expect(item).to_contain_text("Paused at")
    paused_at = share_of(item)
    tab.wait_for_timeout(300)
    assert share_of(item) == paused_at
    item.get_by_role("button", name="Resume").click()
    wait(tab, lambda: share_of(item) > paused_at)
    item.get_by_role("button", name="Cancel").click()
    expect(item).to_have_count(0)
    wait(tab, lambda: not Upload.objects.exists())
    assert not Dataset.objects.exists()


def test_an_upload_outlives_a_restart_of_the_server(
    tab: Page,
    server: Server,
    line: CDPSession,
    large: Path,
) -> None:
    item = begin_slowly(tab, line, large)
    server.kill()
    expect(item).to_contain_text("The server does not answer just now")
    size = part_of(Upload.objects.get()).stat().st_size
    assert 0 < size < large.stat().st_size
    set_speed(line, FAST)
    server.start()
    expect_whole(tab, large)


def test_several_files_come_in_one_after_the_other(tab: Page, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.jsonl" for number in range(3)]
    for number, file in enumerate(files):
        file.write_text(chats(5) + chat_line("which?", str(number)))
    tab.goto("/datasets/")
    tab.get_by_text("Name and description").click()
    section = tab.get_by_role("region", name="Upload")
    section.get_by_label("Name", exact=True).fill("one of many")
    section.get_by_label("Description").fill(HOSTILE)
    choose(tab, *files)
    tab.wait_for_url(DATASET)
    assert sorted(Dataset.objects.values_list("name", flat=True)) == ["0", "1", "2"]
    assert set(Dataset.objects.values_list("description", flat=True)) == {HOSTILE}
    expect(tab.locator(".dataset-description")).to_have_text(HOSTILE)
    assert tab.locator("img").count() == 0


def test_a_refusal_among_several_files_stays_to_be_read(tab: Page, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.jsonl" for number in range(2)]
    for number, file in enumerate(files):
        file.write_text(chats(5) + chat_line("which?", str(number)))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    tab.goto("/datasets/")
    tab.evaluate("window.isSamePage = true")
    choose(tab, empty, *files)
    for file in files:
        expect(tab.locator(".upload", has_text=file.name)).to_contain_text("see what was found in it")
    # The list below is read again after the last one, in place of leaving for it.
    expect(tab.locator(".dataset-row")).to_have_count(2)
    expect(tab.locator(".upload", has_text="empty.jsonl")).to_contain_text("The file is empty.")
    assert tab.evaluate("window.isSamePage") is True


def test_a_file_is_dropped_anywhere_on_the_page(tab: Page) -> None:
    tab.goto("/datasets/")
    tab.get_by_text("Name and description").click()
    tab.get_by_role("region", name="Upload").get_by_label("Name", exact=True).fill("dropped")
    drag = """([type, content]) => {
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([content], "rows.jsonl"));
        const event = new DragEvent(type, {dataTransfer, bubbles: true, cancelable: true});
        return document.querySelector("h1").dispatchEvent(event);
    }"""
    assert tab.evaluate(drag, ["dragover", chats(3)]) is False, "the browser would open the file itself"
    expect(tab.locator(".drop")).to_have_class("drop is-over")
    assert tab.evaluate(drag, ["drop", chats(3)]) is False
    tab.wait_for_url(DATASET)
    expect(tab.get_by_role("heading", level=1)).to_have_text("dropped")


def test_a_file_that_is_refused_says_why(
    tab: Page,
    tmp_path: Path,
    alice: User,
) -> None:
    known = tmp_path / "known.jsonl"
    known.write_text(chats(4))
    version = add_version(alice, known.read_bytes())
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    tab.goto("/datasets/")
    choose(tab, empty)
    expect(tab.locator(".upload")).to_contain_text("The file is empty.")
    tab.locator(".upload").get_by_role("button", name="Cancel").click()
    tab.evaluate("document.querySelector('[data-uploads]').dataset.maxBytes = '10'")
    choose(tab, known)
    expect(tab.locator(".upload")).to_contain_text("was uploaded before")
    tab.get_by_role("link", name="see it").click()
    tab.wait_for_url(f"**/datasets/{version.dataset.public_id}/?version=1")
    assert Dataset.objects.count() == 1


def test_a_new_version_is_uploaded_on_the_datasets_page(
    tab: Page,
    tmp_path: Path,
    alice: User,
) -> None:
    dataset = add_checked(alice, chats(3), name="kept").dataset
    file = tmp_path / "second.jsonl"
    file.write_text(chats(8))
    tab.goto(f"/datasets/{dataset.public_id}/")
    choose(tab, file)
    tab.wait_for_url("**/?version=2")
    assert list(dataset.versions.values_list("number", "filename")) == [
        (2, "second.jsonl"),
        (1, "rows.jsonl"),
    ]
    checked(dataset.versions.get(number=2))
    expect(tab.get_by_role("heading", name="Rows, as they are trained on")).to_be_visible()
    expect(tab.get_by_role("link", name="New run with this dataset")).to_have_attribute(
        "href", f"/runs/new/?dataset={dataset.public_id}%402"
    )


def test_a_file_that_the_dataset_reads_as_another_type_names_the_way_out(
    tab: Page,
    tmp_path: Path,
    alice: User,
) -> None:
    row = '{"prompt": "a", "completion": "b"}\n'
    known = add_checked(alice, row, filename="data.txt").dataset
    file = tmp_path / "data.jsonl"
    file.write_text(row)
    tab.goto(f"/datasets/{known.public_id}/")
    choose(tab, file)
    told = tab.get_by_role("alert")
    expect(told).to_contain_text(f"The same content is here as {known.public_id}@1")
    expect(told).to_contain_text("upload it as a dataset of its own.")
    told.get_by_role("link", name="Go to the datasets").click()
    choose(tab, file)
    tab.wait_for_url(DATASET)
    assert sorted(Dataset.objects.values_list("versions__filename", flat=True)) == ["data.jsonl", "data.txt"]


def test_bad_rows_are_skipped_without_leaving_the_page(tab: Page, alice: User) -> None:
    version = add_checked(alice, chats(3) + BAD + chat_line(HOSTILE, HOSTILE))
    tab.goto(f"/datasets/{version.dataset.public_id}/")
    tab.evaluate("window.isSamePage = true")
    expect(tab.get_by_role("cell", name="messages[0].role")).to_be_visible()
    tab.get_by_role("button", name="Skip the 1 bad row").click()
    expect(tab.get_by_text("Checking the file")).to_be_visible()
    checked(version)
    expect(tab.locator(".row-view")).to_have_count(4)
    expect(tab.locator(".row-view").nth(3).locator(".piece-trained").first).to_contain_text(HOSTILE)
    assert tab.locator("img").count() == 0
    assert tab.evaluate("window.isSamePage") is True


def test_columns_are_named_and_a_wrong_choice_is_explained(tab: Page, alice: User) -> None:
    version = add_checked(alice, "nr,frage,antwort\n1,Was?,Das.\n2,Wo?,Hier.\n", filename="rows.csv")
    tab.goto(f"/datasets/{version.dataset.public_id}/")
    tab.get_by_label("nr holds").select_option("prompt")
    tab.get_by_role("button", name="Use these columns").click()
    expect(tab.get_by_role("alert")).to_contain_text("Prompt is given to two columns")
    expect(tab.get_by_label("nr holds")).to_have_value("prompt")
    tab.get_by_label("nr holds").select_option("")
    tab.get_by_role("button", name="Use these columns").click()
    expect(tab.get_by_text("Checking the file")).to_be_visible()
    version = checked(version)
    assert version.mapping == {"prompt": "frage", "completion": "antwort"}
    expect(tab.locator(".row-view").first).to_contain_text("Das.")


def test_rows_are_read_in_another_way_without_leaving_the_page(tab: Page, alice: User) -> None:
    turns = [("user", "First?"), ("assistant", "Alpha."), ("user", "Second?"), ("assistant", "Omega.")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    version = add_checked(alice, json.dumps(row) + "\n" + chats(11))
    tab.goto(f"/datasets/{version.dataset.public_id}/")
    tab.evaluate("window.isSamePage = true")
    first = tab.locator(".row-view").first
    answers = first.locator(".piece-trained", has_text="Alpha.")
    expect(answers).to_have_count(1)
    tab.get_by_label("Train on").select_option("last")
    expect(answers).to_have_count(0)
    expect(first.locator(".piece-trained", has_text="Omega.")).to_have_count(1)
    tab.get_by_label("Cut at").fill("12")
    tab.get_by_label("Cut at").press("Enter")
    expect(first.locator(".cut-line")).to_have_text("cut here, at 12 tokens")
    expect(first).to_contain_text("nothing of it is trained on")
    tab.get_by_label("From row").fill("2")
    tab.get_by_label("From row").press("Enter")
    expect(first).to_contain_text("Row 2")
    tab.get_by_role("link", name="Next rows").click()
    expect(first).to_contain_text("Row 7")
    expect(tab.get_by_label("From row")).to_have_value("7")
    expect(tab.get_by_label("Train on")).to_have_value("last")
    tab.go_back()
    expect(first).to_contain_text("Row 2")
    expect(tab.get_by_label("From row")).to_have_value("2")
    assert tab.evaluate("window.isSamePage") is True


def test_a_dataset_is_renamed_and_deleted(tab: Page, alice: User) -> None:
    version = add_checked(alice, chats(3), name="old")
    tab.goto(f"/datasets/{version.dataset.public_id}/")
    tab.get_by_role("button", name="Edit").click()
    dialog = tab.get_by_role("dialog", name="Edit dataset")
    dialog.get_by_label("Name").fill("\u200b")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog.get_by_role("alert")).to_contain_text("at least one character")
    dialog.get_by_label("Name").fill(HOSTILE)
    dialog.get_by_role("button", name="Save").click()
    expect(tab.get_by_role("heading", level=1)).to_have_text(HOSTILE)
    tab.get_by_role("button", name="Delete").click()
    dialog = tab.get_by_role("dialog", name="Delete this dataset?")
    expect(dialog).to_contain_text("No run uses")
    tab.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    tab.get_by_role("button", name="Delete").click()
    dialog.get_by_role("button", name="Delete").click()
    tab.wait_for_url("**/datasets/")
    expect(tab.get_by_text("was deleted")).to_be_visible()
    assert not Dataset.objects.exists()


def test_an_upload_without_a_sign_in_says_so(
    browser: Browser,
    server: Server,
    alice: User,
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(chats(3))
    client = Client()
    client.force_login(alice)
    context = browser.new_context(base_url=server.address)
    value = client.cookies["mintweb_session"].value
    context.add_cookies([{"name": "mintweb_session", "value": value, "url": server.address}])
    page = context.new_page()
    page.goto("/datasets/")
    context.clear_cookies()
    choose(page, file)
    expect(page.locator(".upload")).to_contain_text("You are signed out")
    assert not Upload.objects.exists()
    context.close()
