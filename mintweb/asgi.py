"""The one entry for HTTP and websockets.

The SDK's endpoints are lean ASGI handlers beside the Django application: a Django view costs some
milliseconds of thread hops a request, and these endpoints decide how long the GPU waits. Uploads are
too: Django would keep a copy of each body in a temporary file first.
"""

from __future__ import annotations

import os
from typing import Any, cast

from channels.auth import AuthMiddlewareStack
from channels.routing import ProtocolTypeRouter, URLRouter
from channels.security.websocket import AllowedHostsOriginValidator
from django.core.asgi import get_asgi_application
from django.urls import path, re_path

from runs import heap

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mintweb.settings")
with heap.lasting():
    django_application = get_asgi_application()

    from mintweb.origins import SameOrigin  # reads settings
    from runs import urls  # models exist only once Django is set up
    from runs.api.clock import lifespan
    from runs.api.rest_waits import RestWaits
    from runs.rest.body_guard import BodyGuard

# Django's types know views only, Channels' router calls ASGI applications.
_sdk: Any = URLRouter(cast(Any, urls.sdk_routes))
_uploads: Any = URLRouter(cast(Any, urls.upload_routes))
_pages: Any = BodyGuard(cast(Any, RestWaits(cast(Any, django_application))))
_sockets: Any = AuthMiddlewareStack(URLRouter(cast(Any, urls.socket_routes)))

_lean = [path("api/v1/", _sdk), path("datasets/uploads/", _uploads), path("rest/v1/uploads/", _uploads)]

application = ProtocolTypeRouter(
    {
        "http": URLRouter(cast(Any, [*_lean, re_path("", _pages)])),
        "lifespan": cast(Any, lifespan),
        "websocket": AllowedHostsOriginValidator(SameOrigin(_sockets)),
    }
)
