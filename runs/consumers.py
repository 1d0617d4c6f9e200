"""Websockets that tell open pages which rows are new."""
