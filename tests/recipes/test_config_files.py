"""Settings as YAML, Python and curl: read back as they were, and nothing hostile gets through."""

from __future__ import annotations

import ast
import json
import shlex
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runs.exceptions import RequestInvalid
from runs.recipes import config_files
from runs.recipes.config_files import MAX_CHARS, from_yaml, to_curl, to_python, to_yaml
from runs.schemas.recipes import SftConfig

CONFIG = SftConfig.model_validate(
    {
        "base_model": "mintweb/tiny",
        "dataset": "ds-0123456789ab@2",
        "num_steps": 120,
        "learning_rate": 1e-4,
        "lora": {"rank": 8},
        "samples": {"prompts": ["yes", "no: a # b", "two\nlines", "- 1", "\u00e9\u4e2d\U0001f98a", "'\"\\"]},
    }
)
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60).filter(str.strip)


@st.composite
def configs(draw: st.DrawFn) -> SftConfig:
    """Draw settings with everything that a person may type."""
    values: dict[str, Any] = {
        "base_model": draw(st.sampled_from(["mintweb/tiny", "null", "1e5", "~"])),
        "dataset": "ds-" + draw(st.text("0123456789abcdef", min_size=12, max_size=12)),
        "seed": draw(st.integers(0, 2**31 - 1)),
        "learning_rate": draw(st.none() | st.floats(1e-300, 1.0)),
        "warmup_share": draw(st.floats(0, 1)),
        "samples": {"prompts": draw(st.lists(TEXTS, max_size=4))},
    }
    return SftConfig.model_validate(values)


def refused(text: str) -> str:
    with pytest.raises(RequestInvalid) as caught:
        from_yaml(text)
    return str(caught.value.message)


@given(config=configs(), name=st.just("") | TEXTS)
def test_a_file_reads_back_to_the_same_settings_and_name(config: SftConfig, name: str) -> None:
    file = from_yaml(to_yaml(config, name=name))
    assert file.name == name
    assert SftConfig.model_validate(file.values) == config


def test_settings_that_a_rule_decides_are_left_out() -> None:
    text = to_yaml(CONFIG, name="night run")
    assert text.startswith("name: night run\nrecipe: sft\nbase_model: mintweb/tiny\n")
    assert "eval_every" not in text
    assert "num_epochs" not in text


def test_json_is_read_too() -> None:
    assert from_yaml(json.dumps(config_files.as_values(CONFIG))).values == config_files.as_values(CONFIG)


def test_each_place_has_its_line() -> None:
    file = from_yaml("name: x\nlora:\n  rank: 8\nsamples:\n  prompts:\n    - a\n    - b\n")
    places = ("name", "lora", "lora.rank", "samples.prompts[0]", "samples.prompts[1]")
    assert [file.line_of(place) for place in places] == [1, 2, 3, 6, 7]
    assert file.line_of("lora.alpha") == 2  # what it is in
    assert file.line_of("samples.prompts[5]") == 5
    assert file.line_of("dataset") is None
    problems = [("lora.rank", "is wrong"), ("dataset", "is missing"), ("", "all of it is wrong")]
    assert file.told(problems) == ["line 3, lora.rank: is wrong", "dataset: is missing", "all of it is wrong"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file must hold settings, one 'name: value' a line, got null"),
        ("- a\n- b", "the file must hold settings, one 'name: value' a line, got a list of 2"),
        ("just words", "the file must hold settings, one 'name: value' a line, got 'just words'"),
        ("name: [1", "line 1, column 9: "),
        ("a: 1\nb: {", "line 2, column 5: "),
        ("a: 1\n\tb: 2", "line 2, column 1: found character '\\t' that cannot start any token"),
        ("seed: 1\nseed: 2", "line 2, column 1: 'seed' comes twice"),
        ("lora: {rank: 1, rank: 2}", "line 1, column 17: 'rank' comes twice"),
        ("? [a]\n: 1", "line 1, column 3: a name must be text"),
        ("name: 5", "line 1: name must be text, got 5"),
        ("a: 1\n---\nb: 2", "line 2, column 1: "),
        ("seed: 2026-13-45", "not valid YAML: "),
        ("seed: !!int x", "not valid YAML: "),
        ("a: \x00", "not valid YAML: "),
    ],
)
def test_what_is_no_file_of_settings_is_refused_with_its_line(text: str, message: str) -> None:
    assert refused(text).startswith(message)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch /tmp/owned']",
        "!!python/name:os.system",
        "!!python/object/new:tuple [[1]]",
        "!custom 1",
        "!!python/module:os",
    ],
)
def test_a_tag_builds_nothing(tag: str) -> None:
    assert "could not determine a constructor for the tag" in refused(f"name: {tag}")


def test_a_bomb_of_anchors_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    began = time.process_time()
    assert refused("\n".join(lines)) == "line 2, column 10: an alias (*) is not taken here"
    assert refused("base: &b {seed: 1}\nlora:\n  <<: *b").startswith("line 3, column 7: an alias")
    assert time.process_time() - began < 1


def test_a_deep_or_large_file_is_refused() -> None:
    assert refused("a: " + "[" * 5_000).startswith("line 1, column 11: nested more than 8 levels deep")
    assert refused("a" * (MAX_CHARS + 1)) == "the file has 100001 characters, the limit is 100000"


def test_python_and_curl_send_the_same_settings() -> None:
    python = to_python(CONFIG, name="it's mine", base_url="https://mint.example")
    assigned = next(node for node in ast.parse(python).body if isinstance(node, ast.Assign))
    body = ast.literal_eval(assigned.value)
    assert body == {"name": "it's mine", **config_files.as_values(CONFIG)}
    assert "'https://mint.example/rest/v1/runs'" in python
    curl = to_curl(CONFIG, name="it's mine", base_url="https://mint.example")
    head, _, rest = curl.partition("<<'JSON'\n")
    assert json.loads(rest.removesuffix("\nJSON\n")) == body
    assert shlex.split(head)[2] == "https://mint.example/rest/v1/runs"


def test_no_prompt_ends_the_here_document() -> None:
    config = CONFIG.model_copy(
        update={"samples": CONFIG.samples.model_copy(update={"prompts": ["a\nJSON\nrm -rf ~"]})}
    )
    assert to_curl(config, name="", base_url="http://x").split("\n").count("JSON") == 1
