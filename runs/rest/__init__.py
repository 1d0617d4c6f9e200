"""The REST API for scripts under /rest/v1/: Ninja routers, thin over services; `boundary` holds what all share."""
