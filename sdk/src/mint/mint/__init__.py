"""What MinT adds to tinker: its endpoints, its keys, its environment variables."""

from __future__ import annotations

import os

import tinker

from ._auth import MintApiKeyAuthProvider, apply_auth_patch
from ._endpoints import (
    ForwardBackwardReverseKLRequest,
    ForwardBackwardReverseKLResponse,
    InterpolateCheckpointsRequest,
    InterpolateCheckpointsResponse,
    ReverseKLDatum,
    ReverseKLItemOutput,
    forward_backward_reverse_kl,
    forward_backward_reverse_kl_async,
    interpolate_checkpoints,
    interpolate_checkpoints_async,
)

MINT_VERSION = "0.2.0"
EXPECTED_TINKER_VERSION = tinker.__version__
DEFAULT_BASE_URL = "http://127.0.0.1:8000"


def sync_env() -> None:
    """Copy the MINT_ variables over tinker's, and default to a server on this machine."""
    if "MINT_API_KEY" in os.environ:
        os.environ["TINKER_API_KEY"] = os.environ["MINT_API_KEY"]
    if "MINT_BASE_URL" in os.environ:
        os.environ["TINKER_BASE_URL"] = os.environ["MINT_BASE_URL"]
    os.environ.setdefault("TINKER_BASE_URL", DEFAULT_BASE_URL)


def apply_mint_patches() -> None:
    """Prepare tinker for a MinT server. Importing `mint` does it."""
    sync_env()
    apply_auth_patch()


__all__ = [
    "DEFAULT_BASE_URL",
    "EXPECTED_TINKER_VERSION",
    "MINT_VERSION",
    "ForwardBackwardReverseKLRequest",
    "ForwardBackwardReverseKLResponse",
    "InterpolateCheckpointsRequest",
    "InterpolateCheckpointsResponse",
    "MintApiKeyAuthProvider",
    "ReverseKLDatum",
    "ReverseKLItemOutput",
    "apply_auth_patch",
    "apply_mint_patches",
    "forward_backward_reverse_kl",
    "forward_backward_reverse_kl_async",
    "interpolate_checkpoints",
    "interpolate_checkpoints_async",
    "sync_env",
]
