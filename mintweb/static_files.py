"""WhiteNoise for an ASGI server: a static file is small, so it is answered whole instead of as a sync stream."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from whitenoise.middleware import WhiteNoiseMiddleware
from whitenoise.responders import StaticFile


class StaticFiles(WhiteNoiseMiddleware):  # type: ignore[misc] # whitenoise carries no types
    """Answers requests below STATIC_URL."""

    @staticmethod
    def serve(static_file: StaticFile, request: HttpRequest) -> HttpResponse:
        """Return the file, or 304 when the browser has it."""
        found = static_file.get_response(request.method, request.META)
        with_body = found.file is not None
        response = HttpResponse(found.file.read() if with_body else b"", status=int(found.status))
        if with_body:
            found.file.close()
        del response["Content-Type"]
        for name, value in found.headers:
            response[name] = value
        return response
