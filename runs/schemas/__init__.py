"""The wire: what clients send and what they get back, checked once and turned into one inside form.

JSON (SDK 0.22) and protobuf (SDK 0.38) meet here. Nothing here knows rows, HTTP or settings;
views, services and the worker's payload decoder call it.
"""
