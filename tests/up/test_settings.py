"""Settings: what the environment means, and the one sentence for each mistake."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.core.files.base import ContentFile
from storages.backends.s3 import S3Storage

from mintweb import addresses, environment, settings
from tests.e2e.bucket import KEYS, Bucket, address

from .instances import ROOT, clean_environment

TELL_OF_SETTINGS = (
    "README.md",
    "docs/architecture.md",
    "docs/operations.md",
    "docs/recipes.md",
    "docs/rest.md",
    "docs/sdk.md",
)
OF_EXAMPLES = {"MINTWEB_URL"}
OF_TESTS = {"MINTWEB_CHROMIUM"}
# Set by `mintweb/programs.py` for its workers, and by tests.
NOT_FOR_PEOPLE = {"MINTWEB_NUM_LOCAL_WORKERS", "MINTWEB_FAILPOINTS"}


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("MINTWEB_PORT", "http", "MINTWEB_PORT is 'http'; it must be a whole number."),
        ("MINTWEB_PORT", "70000", "MINTWEB_PORT is 70000; it must be between 1 and 65535."),
        ("MINTWEB_HOST", "0.0.0.0", "set MINTWEB_ALLOW_PUBLIC=1 to allow that."),
        ("MINTWEB_ALLOW_PUBLIC", "maybe", "MINTWEB_ALLOW_PUBLIC is 'maybe'; it must be 1 or 0."),
        ("MINTWEB_DEVICE", "tpu", "MINTWEB_DEVICE is 'tpu'"),
        ("MINTWEB_DEVICE", "mps", "MINTWEB_DEVICE is 'mps'"),
        ("MINTWEB_DEVICES", "cpu,tpu", "MINTWEB_DEVICES has 'tpu'; each item is cpu or cuda:0, cuda:1, ..."),
        ("MINTWEB_TENSOR_PARALLEL", "0", "MINTWEB_TENSOR_PARALLEL is 0; it must be between 1 and 64."),
        ("MINTWEB_DTYPE", "int8", "MINTWEB_DTYPE is 'int8'"),
        ("MINTWEB_DTYPE", "float16", "MINTWEB_DTYPE is 'float16'; it must match auto|float32|bfloat16."),
        ("MINTWEB_BASE_MODELS", "a=/nowhere", "the directory /nowhere, which does not exist."),
        ("MINTWEB_BASE_MODELS", "=x", "each item is name or name=directory."),
        (
            "MINTWEB_VLLM",
            "a=http://x:1",
            "MINTWEB_VLLM names the base model 'a'; MINTWEB_BASE_MODELS has mintweb/tiny.",
        ),
        (
            "MINTWEB_VLLM",
            "mintweb/tiny=x:1",
            "gives mintweb/tiny the address 'x:1'; each item is name=http://host:port.",
        ),
        ("MINTWEB_API_KEY", "secret", "MINTWEB_API_KEY must be tml- or sk-mint-"),
        ("MINTWEB_STORAGE_URL", "ftp://x", "use s3://bucket/prefix"),
        ("MINTWEB_SECRET_KEY_FILE", "/nowhere", "MINTWEB_SECRET_KEY_FILE cannot be read"),
        ("MINTWEB_DATA_DIR", "/dev/null/x", "MINTWEB_DATA_DIR is /dev/null/x, which cannot be created"),
        ("DATABASE_URL", "mysql://x/y", "only postgresql:// is supported."),
        ("DATABASE_URL", "postgresql://host", "DATABASE_URL names no database"),
        ("REDIS_URL", "http://x", "use redis://, rediss:// or unix://."),
    ],
)
def test_a_wrong_value_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    monkeypatch.setattr(os, "environ", clean_environment(**{"MINTWEB_DATA_DIR": str(tmp_path), name: value}))
    with pytest.raises(ImproperlyConfigured) as caught:
        runpy.run_path(settings.__file__)
    assert sentence in str(caught.value)


def test_devices_that_do_not_make_up_groups_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = {"MINTWEB_DEVICES": "cuda:0,cuda:1,cuda:2", "MINTWEB_TENSOR_PARALLEL": "2"}
    monkeypatch.setattr(os, "environ", clean_environment(MINTWEB_DATA_DIR=str(tmp_path), **devices))
    with pytest.raises(ImproperlyConfigured, match="names 3 devices; MINTWEB_TENSOR_PARALLEL is 2"):
        runpy.run_path(settings.__file__)


def test_the_command_line_shows_the_sentence_alone(tmp_path: Path) -> None:
    env = clean_environment(MINTWEB_DATA_DIR=str(tmp_path), MINTWEB_PORT="http")
    done = subprocess.run(
        [sys.executable, "manage.py", "up"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "mintweb: MINTWEB_PORT is 'http'; it must be a whole number.\n"
    assert done.stdout == ""


def test_the_table_of_settings_is_complete() -> None:
    section = (ROOT / "docs/operations.md").read_text().partition("\n## Settings\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", "".join(cells))) == sorted(settings_read() - NOT_FOR_PEOPLE)


@pytest.mark.parametrize("path", TELL_OF_SETTINGS)
def test_no_text_names_a_setting_that_is_none(path: str) -> None:
    named = set(re.findall(r"MINTWEB_[A-Z_]*[A-Z]", (ROOT / path).read_text()))
    assert {name.removesuffix("_FILE") for name in named} <= settings_read() | OF_EXAMPLES | OF_TESTS


def settings_read() -> set[str]:
    """Return the variables that settings.py reads: its strings that are a name and nothing else."""
    tree = ast.parse(Path(settings.__file__).read_text())
    texts = (str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {text for text in texts if re.fullmatch(r"MINTWEB_\w+|(DATABASE|REDIS)_URL", text)}


def test_a_secret_may_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("s3cret\n")
    monkeypatch.setenv("SOME_SECRET_FILE", str(tmp_path / "secret"))
    assert environment.env_secret("SOME_SECRET") == "s3cret"


def test_the_secret_key_is_made_once_and_private(tmp_path: Path) -> None:
    first = environment.lasting_secret(tmp_path / "secret_key")
    assert len(first) > 40
    assert environment.lasting_secret(tmp_path / "secret_key") == first
    assert (tmp_path / "secret_key").stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["secret_key"]


def test_the_tiny_model_is_always_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", f"Qwen/Qwen3-0.6B, mine={tmp_path}")
    models = settings.env_base_models("MODELS")
    assert list(models) == ["mintweb/tiny", "Qwen/Qwen3-0.6B", "mine"]
    assert models["Qwen/Qwen3-0.6B"] == "Qwen/Qwen3-0.6B"
    assert models["mine"] == str(tmp_path)


def test_a_database_address_becomes_djangos_settings() -> None:
    entry = addresses.parse_database_url("postgres://u:p%40ss@db.example:5433/mint?sslmode=require")
    assert (entry["USER"], entry["PASSWORD"], entry["HOST"], entry["PORT"], entry["NAME"]) == (
        *("u", "p@ss", "db.example", "5433", "mint"),
    )
    assert entry["OPTIONS"] == {
        "connect_timeout": "5",
        "keepalives_idle": "5",
        "keepalives_interval": "2",
        "keepalives_count": "3",
        "tcp_user_timeout": "10000",
        "options": "-c idle_in_transaction_session_timeout=30s",
        "sslmode": "require",
    }
    assert addresses.parse_database_url("postgresql://u@/mint?host=/run/pg")["HOST"] == "/run/pg"


@pytest.mark.parametrize(
    ("address", "broker", "layer"),
    [
        ("redis://h:6379/3", "redis://h:6379/3", "redis://h:6379/4"),
        ("redis://:pw@h", "redis://:pw@h/0", "redis://:pw@h/1"),
        (
            "rediss://h/1?ssl_cert_reqs=none",
            "rediss://h/1?ssl_cert_reqs=none",
            "rediss://h/2?ssl_cert_reqs=none",
        ),
        ("unix:///a%20b?db=2", "redis+socket:///a%20b?virtual_host=2", "unix:///a%20b?db=3"),
    ],
)
def test_broker_and_channel_layer_use_two_redis_databases(address: str, broker: str, layer: str) -> None:
    assert addresses.broker_address(addresses.redis_database(address, 0)) == broker
    assert addresses.redis_database(address, 1) == layer


def test_large_objects_of_a_bucket_are_read_by_way_of_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    bucket = Bucket()
    try:
        monkeypatch.setenv("SOME_STORAGE", address(bucket.port, prefix="x"))
        storage = S3Storage(**settings.default_storage("SOME_STORAGE")["OPTIONS"])
        storage.save("weights", ContentFile(bytes(9 << 20)))
        with storage.open("weights") as file:
            assert len(file.read(1 << 20)) == 1 << 20
            assert file.file._rolled
            place = os.readlink(f"/proc/self/fd/{file.file.fileno()}")
        storage.connection.meta.client.close()
    finally:
        bucket.close()
    assert place.startswith(str(settings.TEMP_DIR))
