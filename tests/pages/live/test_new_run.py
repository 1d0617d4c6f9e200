"""The form of a new run in a real browser: previewed while it is typed, refused at its fields, started by a key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from runs.models import DatasetVersion, Recipe, TrainingRun, User
from runs.recipes import trial
from tests.pages import recipe_seed, seed
from tests.pages.live.browser import LIVE
from tests.pages.live.new_run_page import card, choose, field
from tests.pages.live.server import Server
from tests.pages.new_run_form import NEW, make_dataset, ref
from tests.up.instances import wait_for

pytestmark = [*LIVE, pytest.mark.usefixtures("form_base_model")]


def test_a_run_is_filled_in_and_started_by_a_key(tab: Page, dataset: DatasetVersion) -> None:
    held_out = make_dataset(dataset.dataset.owner, number=2)
    tab.goto(NEW)
    choose(tab, dataset)
    field(tab, "Run name").fill("typed by hand")
    field(tab, "Another prompt").fill("Who are you?")
    field(tab, "Another prompt").fill("And who am I?")
    expect(tab.locator("textarea[name='samples.prompts']")).to_have_count(3)
    tab.locator("select[name='validation.datasets']").first.select_option(ref(held_out))
    expect(tab.locator("select[name='validation.datasets']")).to_have_count(2)
    tab.get_by_text("More settings").click()
    field(tab, "Train MLP").uncheck()
    field(tab, "Schedule").select_option("linear")
    expect(tab.get_by_text("2 changed")).to_be_visible()
    field(tab, "LoRA rank").fill("4")
    tab.keyboard.press("Control+Enter")
    tab.wait_for_url("**/runs/**:train:*/")
    run = TrainingRun.objects.get()
    assert run.name == "typed by hand"
    config = run.recipe.config
    assert config["samples"]["prompts"] == ["Who are you?", "And who am I?"]
    assert config["lora"] == {"rank": 4, "train_attn": True, "train_mlp": False, "train_unembed": False}
    assert (config["schedule"], config["validation"]["datasets"]) == ("linear", [ref(held_out)])


def test_a_dataset_that_becomes_ready_meanwhile_can_be_chosen(tab: Page, dataset: DatasetVersion) -> None:
    tab.clock.install()
    tab.goto(NEW)
    choose(tab, dataset)
    field(tab, "Run name").fill("typed by hand")
    expect(card(tab, "Steps")).to_be_visible()
    fresh = make_dataset(dataset.dataset.owner, number=2)
    DatasetVersion.objects.filter(pk=fresh.pk).update(state="checking")
    with tab.expect_response("**/preview"):
        tab.clock.fast_forward(15_000)
    offered = field(tab, "Dataset").locator(f"option[value='{ref(fresh)}']")
    expect(offered).to_have_count(0)
    DatasetVersion.objects.filter(pk=fresh.pk).update(state="ready")
    with tab.expect_response("**/preview"):
        tab.clock.fast_forward(2_000)  # sooner while something is being checked
    expect(offered).to_have_count(1)
    expect(field(tab, "Dataset")).to_have_value(ref(dataset))
    choose(tab, fresh)
    expect(field(tab, "Run name")).to_have_value("typed by hand")
    expect(tab.locator("select[name='validation.datasets'] option")).to_have_count(3)


def test_the_card_follows_what_is_typed(tab: Page, dataset: DatasetVersion) -> None:
    tab.goto(NEW)
    expect(tab.get_by_text("Choose a dataset to see steps")).to_be_visible()
    expect(field(tab, "Learning rate")).to_have_attribute("placeholder", "0.0012")
    choose(tab, dataset)
    expect(card(tab, "Steps")).to_contain_text("143")
    expect(card(tab, "Time")).to_contain_text("unknown until the first run")
    expect(card(tab, "Memory")).to_contain_text("fits")
    expect(card(tab, "Starts")).to_contain_text("at once")
    expect(field(tab, "Steps")).to_have_value("143")
    field(tab, "Batch size").fill("16")
    expect(card(tab, "Steps")).to_contain_text("72")
    expect(field(tab, "Steps")).to_have_value("72")
    field(tab, "Steps").fill("48")  # now the steps hold, and the epochs follow
    expect(field(tab, "Epochs")).to_have_value("2.02")
    field(tab, "Batch size").fill("8")
    expect(field(tab, "Epochs")).to_have_value("1.01")
    expect(field(tab, "Steps")).to_have_value("48")


def test_two_presses_start_one_run(tab: Page, dataset: DatasetVersion) -> None:
    tab.goto(NEW)
    choose(tab, dataset)
    expect(card(tab, "Steps")).to_contain_text("143")
    tab.evaluate("for (let n = 0; n < 3; n += 1) document.querySelector('[data-start]').click()")
    tab.wait_for_url("**/runs/**:train:*/")
    assert Recipe.objects.count() == 1


def test_who_comes_back_to_the_form_starts_another_run(tab: Page, dataset: DatasetVersion) -> None:
    tab.goto(NEW)
    choose(tab, dataset)
    expect(card(tab, "Steps")).to_contain_text("143")
    tab.route("**/runs/*:train:*/", lambda route: route.fulfill(status=204))  # the form stays where it is
    for number in (1, 2):
        tab.locator("[data-start]").click()
        wait_for(lambda number=number: Recipe.objects.count() == number, 60)  # type: ignore[misc]
        tab.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")


def test_what_was_typed_is_back_after_a_reload_until_it_is_discarded(
    tab: Page,
    dataset: DatasetVersion,
) -> None:
    tab.goto(NEW)
    choose(tab, dataset)
    field(tab, "Another prompt").fill("Who are you?")
    field(tab, "Batch size").fill("32")
    tab.reload()
    expect(tab.get_by_text("What you had typed before is back.")).to_be_visible()
    expect(field(tab, "Batch size")).to_have_value("32")
    expect(field(tab, "Dataset")).to_have_value(ref(dataset))
    tab.get_by_role("button", name="Discard draft").click()
    expect(field(tab, "Batch size")).to_have_value("8")
    expect(tab.locator("textarea[name='samples.prompts']")).to_have_count(1)
    tab.reload()
    expect(field(tab, "Dataset")).to_have_value("")
    expect(tab.get_by_text("What you had typed before is back.")).to_be_hidden()


def test_a_file_fills_the_form(tab: Page, dataset: DatasetVersion, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("base_model: mintweb/tiny\nlora:\n  rank: many\n")
    tab.goto(NEW)
    tab.get_by_role("button", name="Import YAML").click()
    dialog = tab.get_by_role("dialog", name="Import settings")
    dialog.get_by_label("or a file").set_input_files(file)
    expect(dialog.get_by_label("YAML", exact=True)).to_have_value(file.read_text())
    dialog.get_by_role("button", name="Fill the form").click()
    expect(dialog.get_by_role("alert")).to_contain_text(
        "Line 3, lora.rank: must be a valid integer, got 'many'."
    )
    expect(dialog.get_by_role("alert")).to_contain_text("Dataset: is missing.")
    text = f"name: from a file\nbase_model: mintweb/tiny\ndataset: {ref(dataset)}\nnum_steps: 40\nlora: {{rank: 2}}\n"
    dialog.get_by_label("YAML", exact=True).fill(f"{text}samples: {{prompts: [one, two]}}\n")
    dialog.get_by_role("button", name="Fill the form").click()
    expect(dialog).to_be_hidden()
    expect(field(tab, "Run name")).to_have_value("from a file")
    expect(field(tab, "LoRA rank")).to_have_value("2")
    expect(card(tab, "Steps")).to_contain_text("40")
    expect(tab.locator("textarea[name='samples.prompts']")).to_have_count(3)
    tab.get_by_role("button", name="Start the run").click()
    tab.wait_for_url("**/runs/**:train:*/")
    config = Recipe.objects.get().config
    assert (config["num_steps"], config["lora"]["rank"]) == (40, 2)
    assert config["samples"]["prompts"] == ["one", "two"]


def test_the_form_is_shown_and_saved_as_a_file(tab: Page, dataset: DatasetVersion) -> None:
    tab.goto(NEW)
    tab.get_by_role("button", name="Export").click()
    dialog = tab.get_by_role("dialog", name="This run as text")
    expect(dialog.get_by_role("alert")).to_contain_text("Dataset: choose one.")
    dialog.get_by_role("button", name="Close").click()
    choose(tab, dataset)
    field(tab, "Run name").fill("<b>kept</b>")
    tab.get_by_role("button", name="Export").click()
    expect(dialog.get_by_role("tabpanel")).to_contain_text(f"dataset: {ref(dataset)}")
    dialog.get_by_role("tab", name="Show as curl").click()
    expect(dialog.get_by_role("tabpanel")).to_contain_text("/rest/v1/runs")
    tab.keyboard.press("ArrowLeft")
    expect(dialog.get_by_role("tab", name="Show as Python")).to_be_focused()
    expect(dialog.get_by_role("tabpanel")).to_contain_text("requests.post(")
    with tab.expect_download() as download:
        dialog.get_by_role("button", name="Download run.yaml").click()
    assert download.value.suggested_filename == "run.yaml"
    assert Path(download.value.path()).read_text().startswith("name: <b>kept</b>\n")


def test_a_fork_marks_what_is_changed_and_follows_its_optimizer(tab: Page, alice: User) -> None:
    run = seed.make_run(alice, name="first", lora_rank=4)
    seed.add_values(run, seed.curve(100))
    recipe_seed.make_recipe(run, num_steps=400, state=Recipe.State.STOPPED)
    seed.add_checkpoint(run, "step-000100", step=100)
    tab.goto(f"{NEW}?fork=tinker://{run.public_id}/weights/step-000100")
    expect(field(tab, "LoRA rank")).to_be_disabled()
    expect(field(tab, "LoRA rank")).to_have_value("4")
    expect(card(tab, "Steps")).to_contain_text("300")
    expect(tab.locator(".setting.is-changed")).to_have_count(0)
    field(tab, "Learning rate").fill("1e-5")
    expect(tab.locator(".setting.is-changed")).to_have_count(1)
    field(tab, "Keep optimizer state").uncheck()
    expect(card(tab, "Steps")).to_contain_text("400")
    tab.get_by_role("button", name="Start the fork").click()
    tab.wait_for_url(re.compile(rf"/runs/(?!{re.escape(run.public_id)}).*:train:\d+/$"))
    fork = TrainingRun.objects.get(parent=run)
    assert (fork.recipe.first_step, fork.recipe.config["learning_rate"]) == (0, 1e-5)


def test_a_checkpoint_that_is_gone_meanwhile_is_named_where_the_text_would_be(
    tab: Page,
    server: Server,
    alice: User,
) -> None:
    run = seed.make_run(alice, name="first", lora_rank=4)
    recipe_seed.make_recipe(run, state=Recipe.State.STOPPED)
    checkpoint = seed.add_checkpoint(run, "step-000100", step=100)
    tab.goto(f"{NEW}?fork=tinker://{run.public_id}/weights/step-000100")
    expect(card(tab, "Steps")).to_be_visible()
    server.refused = ("status of 404",)
    checkpoint.delete()
    tab.get_by_role("button", name="Export").click()
    alert = tab.get_by_role("dialog", name="This run as text").get_by_role("alert")
    expect(alert).to_contain_text("There is no checkpoint")


@pytest.mark.parametrize("address", ["/runs/", NEW])
def test_one_click_tries_it(tab: Page, alice: User, address: str) -> None:
    tab.goto(address)
    tab.get_by_role("button", name="Try it").click()
    tab.wait_for_url("**/runs/**:train:*/")
    expect(tab.get_by_role("heading", name=trial.NAME)).to_be_visible()
    assert Recipe.objects.get().config["dataset"].startswith("ds-")


def test_everything_fits_on_a_phone(tab: Page, dataset: DatasetVersion) -> None:
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.goto(NEW)
    choose(tab, dataset)
    tab.get_by_text("More settings").click()
    expect(tab.locator(".start-summary")).to_contain_text("143 steps")
    expect(tab.get_by_role("button", name="Start the run")).to_be_in_viewport()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
