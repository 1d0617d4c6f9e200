"""How long a request of the REST API may be held: what its parameter allows, for the views and for who holds them."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

MAX_WAIT_S: Final = 30
WaitS = Annotated[
    float, Field(ge=0, le=MAX_WAIT_S, description="Seconds to be held for at most, 0 for none.")
]
