"""Environments to run clients in, and a tokenizer for them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.sdk.sdk_paths import ROOT, RunClient

KEYS = {"tml": "tml-test-key", "sk": "sk-mint-test-key"}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte tokenizer with a chat template, in a directory as a client reads it."""
    directory = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=bytes_only)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(params=["mint022", "tinker038"])
def client_env(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run_client(client_env: str) -> RunClient:
    """Run a script in the client environment and return the finished process."""
    env_dir = ROOT / f".venv-{client_env}"
    wanted = ROOT / "tests" / "sdk" / f"requirements-{client_env}.txt"
    stamp = env_dir / "requirements.stamp"
    if not stamp.exists() or stamp.read_bytes() != wanted.read_bytes():
        pytest.fail(f"{env_dir.name} is missing or out of date: run tests/sdk/make_envs.sh")

    def run(
        script: str | Path,
        *arguments: str,
        url: str,
        own_mint: bool = True,
        key: str = "tml",
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        environment |= {"TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
        # tinker leaves its sockets open at exit.
        environment["PYTHONWARNINGS"] = "error,ignore::ResourceWarning"
        environment |= {f"{name}_BASE_URL": url for name in ("MINT", "TINKER")}
        environment |= {f"{name}_API_KEY": KEYS[key] for name in ("MINT", "TINKER")}
        environment |= {"PYTHONPATH": str(ROOT / "sdk" / "src")} if own_mint else {}
        return subprocess.run(
            [env_dir / "bin" / "python", str(script), *arguments],
            env=environment | variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run
