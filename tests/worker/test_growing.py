"""What may grow under whoever goes through it."""

from __future__ import annotations

from gpuworker.growing import Growing


def test_whoever_goes_through_it_is_not_disturbed() -> None:
    growing = Growing({"a": 1, "b": 2})
    seen = []
    for name, held in growing.items():
        growing.add({f"after {name}": held})
        seen.append((name, held))
    assert seen == [("a", 1), ("b", 2)]
    assert dict(growing) == {"a": 1, "b": 2, "after a": 1, "after b": 2}
    assert (len(growing), growing.get("c")) == (4, None)
