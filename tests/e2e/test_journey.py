"""A person without a line of code: a file becomes a dataset, a run, a better run, an adapter that plain PEFT loads."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote
from uuid import uuid4

import pytest
import torch
from peft import PeftModel
from playwright.sync_api import Locator, Page, expect
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import ROOT, TINY
from tests.e2e.disturbed import submitted_steps
from tests.up.instances import Instance

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
PROMPT: Final = "What does a dog say?"
TRAINED_MS: Final = 240_000
BAD_LINES: Final = ('{"messages": [{"role": "user", "content": "no answer"}]}', '{"messages": [')


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT asks for it
def test_from_a_file_to_an_adapter(page: Page, product: Instance, tmp_path: Path) -> None:
    upload_and_skip_bad_rows(page, tmp_path)
    start_a_run(page)
    num_steps = pause_change_and_save(page, product)
    fork(page, num_steps=num_steps + 40)
    answer = last_answer(page)
    adapter = download(page, tmp_path)
    assert answer.startswith("Arr!")
    assert plain_peft_answer(adapter) == answer


def upload_and_skip_bad_rows(page: Page, tmp_path: Path) -> None:
    good = (ROOT / "examples" / "data" / "pirate_qa.jsonl").read_text(encoding="utf-8").splitlines()
    # A file of its own: one that was there before, as when this test is tried again, leads nowhere.
    thanks = [
        {"role": "user", "content": f"Note {uuid4()}."},
        {"role": "assistant", "content": "Arr! That I note, matey."},
    ]
    file = tmp_path / "pirates.jsonl"
    lines = [*good[:20], *BAD_LINES, *good[20:], json.dumps({"messages": thanks})]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    page.get_by_role("link", name="Datasets").click()
    page.wait_for_url("**/datasets/")
    page.locator("[data-upload-files]").set_input_files(file)
    page.wait_for_url(re.compile("/datasets/ds-"))
    problems = page.locator(".problems-table tbody tr")
    expect(problems).to_have_count(2)
    expect(problems.first).to_contain_text("21")
    page.get_by_role("button", name="Skip the 2 bad rows").click()
    trained = page.locator(".piece-trained").filter(has_text="Arr!")
    expect(trained.first).to_be_visible()


def start_a_run(page: Page) -> None:
    page.get_by_role("link", name="New run with this dataset").click()
    page.get_by_label("Run name", exact=True).fill("from a file")
    page.get_by_label("Steps", exact=True).fill("10000")  # more than it can do before it is paused
    page.get_by_label("Another prompt").or_(page.locator("textarea[name='samples.prompts']")).first.fill(
        PROMPT
    )
    expect(page.locator("[data-preview]")).to_contain_text(re.compile(r"10\W?000"))
    page.get_by_role("button", name="Start the run").click()
    page.wait_for_url("**/runs/**:train:*/")
    expect(chart(page, "Loss per token").locator(".chart-summary")).to_contain_text("lowest")


def pause_change_and_save(page: Page, product: Instance) -> int:
    """Shorten the run while it is paused, save it by hand, and let it go on; returns how many steps it has in all."""
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Resume")).to_be_visible()
    run_id = unquote(page.url.rstrip("/").rpartition("/")[2])
    num_steps = max(submitted_steps(product, run_id) + 20, 120)
    page.get_by_role("button", name="Change settings").click()
    dialog = page.locator("#change-dialog")
    dialog.get_by_label("Learning rate").fill("0.002")
    dialog.get_by_label("Steps in all").fill(str(num_steps))
    dialog.get_by_role("button", name="Change", exact=True).click()
    expect(page.locator(".event").filter(has_text="changed")).to_contain_text("learning rate")
    page.get_by_role("button", name="Save checkpoint now").click()
    expect(page.locator("[data-part=checkpoints] tr").filter(has_text="manual-")).to_be_visible()
    page.get_by_role("button", name="Resume", exact=True).click()
    expect(page.get_by_role("button", name="Resume", exact=True)).to_have_count(0)
    return num_steps


def fork(page: Page, *, num_steps: int) -> None:
    """Let the run end, and fork from what was saved by hand."""
    expect(page.locator(".phase")).to_contain_text("Finished", timeout=TRAINED_MS)
    page.get_by_role("button", name="Fork").click()
    page.locator("#fork-dialog tr").filter(has_text="manual-").get_by_role("link").first.click()
    page.get_by_label("Run name", exact=True).fill("forked")
    page.get_by_label("Steps", exact=True).fill(str(num_steps))
    page.get_by_role("button", name="Start the fork").click()
    page.wait_for_url("**/runs/**:train:*/")
    expect(page.locator("[data-part=lineage]")).to_contain_text("Forked from from a file")
    expect(page.locator(".phase")).to_contain_text("Finished", timeout=TRAINED_MS)


def last_answer(page: Page) -> str:
    """Return the newest answer of the film strip, as its text without marks of what changed."""
    cell = page.locator("#film-strip tr[data-key=answers] td").last
    expect(cell).to_have_class(re.compile("film-done"))
    page.locator("[data-film-gone]").set_checked(False)
    return cell.locator(".film-text").inner_text()


def download(page: Page, tmp_path: Path) -> Path:
    row: Locator = page.locator("[data-part=checkpoints] tr").filter(has_text="final")
    with page.expect_download() as waiting:
        row.get_by_role("link", name="Download").click()
    archive = tmp_path / "final.tar"
    waiting.value.save_as(archive)
    with tarfile.open(archive) as content:
        content.extractall(tmp_path / "adapter", filter="data")
    (config,) = (tmp_path / "adapter").rglob("adapter_config.json")
    assert json.loads(config.read_text())["peft_type"] == "LORA"
    return config.parent


def plain_peft_answer(adapter: Path) -> str:
    """Return what transformers and PEFT answer to the prompt, without sampling."""
    base: Any = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    chat = [{"role": "user", "content": PROMPT}]
    tokens = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**tokens, max_new_tokens=64, do_sample=False)
    return str(tokenizer.decode(answer[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def chart(page: Page, title: str) -> Locator:
    return page.locator("figure.chart").filter(has_text=title)
