"""Typed readers of environment variables; a wrong value raises ImproperlyConfigured with the variable's name."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from django.core.exceptions import ImproperlyConfigured


def env_str(name: str, default: str = "", *, pattern: str = "") -> str:
    """Return the variable without surrounding blanks, or the default when it is unset or empty."""
    value = os.environ.get(name, "").strip() or default
    if pattern and not re.fullmatch(pattern, value):
        raise ImproperlyConfigured(f"{name} is {value!r}; it must match {pattern}.")
    return value


def env_int(name: str, default: int, *, minimum: int, maximum: int) -> int:
    """Return the variable as a whole number between minimum and maximum."""
    text = env_str(name, str(default))
    try:
        value = int(text)
    except ValueError:
        raise ImproperlyConfigured(f"{name} is {text!r}; it must be a whole number.") from None
    if not minimum <= value <= maximum:
        raise ImproperlyConfigured(f"{name} is {value}; it must be between {minimum} and {maximum}.")
    return value


def env_bool(name: str, *, default: bool) -> bool:
    """Return the variable as a truth value (1, true, yes, on / 0, false, no, off)."""
    text = env_str(name, "1" if default else "0").lower()
    if text in {"1", "true", "yes", "on"}:
        return True
    if text in {"0", "false", "no", "off"}:
        return False
    raise ImproperlyConfigured(f"{name} is {text!r}; it must be 1 or 0.")


def env_list(name: str, default: str = "") -> list[str]:
    """Return the comma-separated items of the variable."""
    return [item.strip() for item in env_str(name, default).split(",") if item.strip()]


def env_secret(name: str, default: str = "") -> str:
    """Return the variable, or the content of the file that NAME_FILE points to."""
    file_name = os.environ.get(f"{name}_FILE", "").strip()
    if not file_name:
        return env_str(name, default)
    try:
        return Path(file_name).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ImproperlyConfigured(f"{name}_FILE cannot be read: {error}.") from error


def env_private_dir(name: str, default: Path) -> Path:
    """Return the folder, made with mode 0700 if it was missing."""
    path = Path(env_str(name, str(default))).expanduser().resolve()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ImproperlyConfigured(f"{name} is {path}, which cannot be created: {error.strerror}.") from error
    return path


def lasting_secret(path: Path) -> str:
    """Return the secret kept in the file, which is written once (mode 0600) by whichever process is first."""
    if not path.exists():
        draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            draft.touch(mode=0o600)
            draft.write_text(secrets.token_urlsafe(50), encoding="ascii")
            try:
                os.link(draft, path)  # fails if another process was first, whose secret then stands
            except FileExistsError:
                pass
            finally:
                draft.unlink()
        except OSError as error:
            raise ImproperlyConfigured(
                f"MINTWEB_DATA_DIR is {path.parent}, which cannot be written: {error.strerror}."
            ) from error
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ImproperlyConfigured(f"{path} cannot be read: {error.strerror}.") from error
