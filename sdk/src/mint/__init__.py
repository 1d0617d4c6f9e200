"""The mint client: the tinker SDK with futures that are submitted first and awaited later."""

from __future__ import annotations

import sys as _sys

from . import mint as mint
from .mint import MINT_VERSION, apply_mint_patches

apply_mint_patches()

from . import tinker as tinker  # noqa: E402 - clients are imported once the environment is set
from .future import Future as Future  # noqa: E402

_TOP_LEVEL_REEXPORTS = [name for name in tinker.__all__ if name != "__version__"]

globals().update({name: getattr(tinker, name) for name in _TOP_LEVEL_REEXPORTS})

# So that `import mint.types` works as well as `from mint import types`.
_sys.modules[f"{__name__}.types"] = tinker.types

__version__ = MINT_VERSION
__tinker_version__ = tinker.__version__

__all__ = ["Future", "__tinker_version__", "__version__", "mint", "tinker", *_TOP_LEVEL_REEXPORTS]
