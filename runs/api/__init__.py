"""The endpoints of the client SDKs, exactly as they expect them. Thin: check, parse, call a service, reply."""
