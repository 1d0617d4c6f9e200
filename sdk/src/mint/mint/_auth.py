"""Lets keys that begin with `sk-` through tinker's check of the prefix."""

from __future__ import annotations

import math
import os

from tinker.lib import _auth_token_provider, internal_client_holder
from tinker.lib._auth_token_provider import ApiKeyAuthProvider

MINT_API_KEY_PREFIX = "sk-"


class MintApiKeyAuthProvider(ApiKeyAuthProvider):
    """Sends an API key: one that begins with `sk-` as it is, any other by tinker's rules."""

    def __init__(self, api_key: str | None = None) -> None:
        key = api_key or os.environ.get("TINKER_API_KEY") or ""
        if key.startswith(MINT_API_KEY_PREFIX):
            self._token = key
            self._expires_at = math.inf
        else:
            super().__init__(api_key)


def apply_auth_patch() -> None:
    """Make all tinker clients of this process accept `sk-` keys."""
    # Both modules look the class up by name: one to pick a credential, one for servers without
    # token exchange.
    _auth_token_provider.ApiKeyAuthProvider = MintApiKeyAuthProvider
    internal_client_holder.ApiKeyAuthProvider = MintApiKeyAuthProvider
