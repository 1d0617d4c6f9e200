"""Uploaded training files: what they hold, what is wrong with them, and the canonical rows made from them.

Nothing here knows Django, rows or storage. `checking.run` is what the rest of mintweb calls.
"""
