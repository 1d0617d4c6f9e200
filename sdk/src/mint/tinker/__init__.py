"""Everything that tinker exports, with this package's clients: `from mint import tinker`."""

from __future__ import annotations

import tinker as _tinker

from mint import rest, sampling, service, training

TINKER_COMPAT_EXPORTS = [str(name) for name in _tinker.__all__]

globals().update({name: getattr(_tinker, name) for name in TINKER_COMPAT_EXPORTS})

RestClient = rest.RestClient
SamplingClient = sampling.SamplingClient
ServiceClient = service.ServiceClient
TrainingClient = training.TrainingClient

__all__ = list(dict.fromkeys([*TINKER_COMPAT_EXPORTS, "RestClient"]))
