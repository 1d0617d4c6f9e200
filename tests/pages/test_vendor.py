"""The files copied from other projects are the ones the README names."""

from __future__ import annotations

import hashlib
import re

from django.conf import settings

FOLDER = settings.BASE_DIR / "static" / "vendor"


def test_vendored_files_have_the_hashes_of_the_readme() -> None:
    rows = re.findall(r"\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|", (FOLDER / "README.md").read_text())
    listed = {name for name, _ in rows}
    shipped = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.suffix in {".js", ".css"}}
    assert listed == shipped
    for name, expected in rows:
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == expected, name


def test_our_scripts_build_no_markup_from_text() -> None:
    for path in (settings.BASE_DIR / "static" / "js").glob("*.js"):
        text = path.read_text()
        for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert forbidden not in text, (path.name, forbidden)


def test_our_templates_trust_no_data() -> None:
    for path in (settings.BASE_DIR / "templates").rglob("*.html"):
        text = path.read_text()
        for forbidden in ("|safe", "autoescape off", " style=", "<script>"):
            assert forbidden not in text, (path.name, forbidden)
