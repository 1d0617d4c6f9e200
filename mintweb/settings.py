"""Every setting of mintweb, read once from the environment; nothing else reads the environment.

A wrong value raises ImproperlyConfigured with the variable's name in one sentence; `manage.py` prints that
sentence alone. Secrets may also come from a file: NAME_FILE=/run/secrets/name.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import re
import secrets
import socket
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, unquote, urlencode, urlsplit

from csp.constants import NONE, SELF
from django.core.exceptions import ImproperlyConfigured

from mintweb import embedded

BASE_DIR = Path(__file__).resolve().parent.parent


# Readers -----------------------------------------------------------------------------------------------------


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


def env_base_models(name: str) -> dict[str, str]:
    """Return base model name -> directory, or -> name where no directory is given."""
    models: dict[str, str] = {"mintweb/tiny": str(BASE_DIR / "gpuworker" / "tiny" / "model")}
    for item in env_list(name):
        model, equals, directory = (part.strip() for part in item.partition("="))
        if not model or (equals and not directory):
            raise ImproperlyConfigured(f"{name} has the item {item!r}; each item is name or name=directory.")
        if equals and not Path(directory).expanduser().is_dir():
            raise ImproperlyConfigured(
                f"{name} gives {model} the directory {directory}, which does not exist."
            )
        models[model] = str(Path(directory).expanduser().resolve()) if equals else model
    return models


# Addresses of the databases ----------------------------------------------------------------------------------


def parse_database_url(url: str) -> dict[str, Any]:
    """Return Django's DATABASES entry for postgresql://user:password@host:port/name?option=value.

    A unix socket is given as ?host=/directory; other query items become libpq options (sslmode, ...).
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ImproperlyConfigured(f"DATABASE_URL cannot be parsed: {error}.") from None
    if parts.scheme not in {"postgres", "postgresql"}:
        raise ImproperlyConfigured(
            f"DATABASE_URL starts with {parts.scheme or 'nothing'}://; only postgresql:// is supported."
        )
    name = unquote(parts.path.removeprefix("/"))
    if not name:
        raise ImproperlyConfigured("DATABASE_URL names no database; use postgresql://user@host/name.")
    options: dict[str, Any] = {"connect_timeout": "5", **dict(parse_qsl(parts.query))}
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": name,
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": options.pop("host", "") or unquote(parts.hostname or ""),
        "PORT": str(options.pop("port", "") or port or ""),
        "OPTIONS": options,
        "CONN_MAX_AGE": None,
        "CONN_HEALTH_CHECKS": True,
        "ATOMIC_REQUESTS": False,
    }


def redis_database(url: str, offset: int) -> str:
    """Return the same Redis address with its database number raised by offset."""
    try:
        parts = urlsplit(url)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        number = int(query.pop("db", "") or (parts.path.strip("/") if parts.scheme != "unix" else "") or 0)
    except ValueError:
        raise ImproperlyConfigured(
            "REDIS_URL cannot be parsed; use redis://host:6379/0 or unix:///path?db=0."
        ) from None
    if parts.scheme == "unix":
        return f"unix://{parts.netloc}{parts.path}?{urlencode({**query, 'db': number + offset})}"
    if parts.scheme in {"redis", "rediss"}:
        return parts._replace(path=f"/{number + offset}", query=urlencode(query)).geturl()
    raise ImproperlyConfigured(
        f"REDIS_URL starts with {parts.scheme or 'nothing'}://; use redis://, rediss:// or unix://."
    )


def broker_address(url: str) -> str:
    """Return a redis-py address in kombu's spelling, which has its own scheme for sockets."""
    parts = urlsplit(url)
    if parts.scheme != "unix":
        return url
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    number = query.pop("db", "0")
    user_info, at, _ = parts.netloc.rpartition("@")
    return f"redis+socket://{user_info}{at}{parts.path}?{urlencode({'virtual_host': number, **query})}"


# Places ------------------------------------------------------------------------------------------------------


def private_data_dir(name: str) -> Path:
    """Return the data folder, made with mode 0700 if it was missing."""
    path = Path(env_str(name, str(BASE_DIR / "data"))).expanduser().resolve()
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


DATA_DIR = private_data_dir("MINTWEB_DATA_DIR")
LOG_DIR = DATA_DIR / "logs"


# Who may connect ---------------------------------------------------------------------------------------------

LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]"]


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def names_of(host: str) -> list[str]:
    """Return the Host headers a server bound to this address is reached by."""
    if host not in {"0.0.0.0", "::"}:  # noqa: S104 - compared, not bound
        return [f"[{host}]" if ":" in host else host]
    machine = socket.gethostname()
    try:
        return [machine, *socket.gethostbyname_ex(machine)[2]]
    except OSError:
        return [machine]


HOST = env_str("MINTWEB_HOST", "127.0.0.1").strip("[]")
PORT = env_int("MINTWEB_PORT", 8000, minimum=1, maximum=65535)
# Behind a proxy with TLS: the address that people type, for instance https://mint.example.org
PUBLIC_URL = env_str("MINTWEB_PUBLIC_URL", pattern=r"|https?://[^/?#]+/?").rstrip("/")
ALLOW_PUBLIC = env_bool("MINTWEB_ALLOW_PUBLIC", default=False)
if not is_loopback(HOST) and not ALLOW_PUBLIC:
    raise ImproperlyConfigured(
        f"MINTWEB_HOST is {HOST}, which other machines can reach; set MINTWEB_ALLOW_PUBLIC=1 to allow that."
    )
ALLOWED_HOSTS = env_list("MINTWEB_ALLOWED_HOSTS", ",".join([*LOOPBACK_NAMES, *names_of(HOST)]))
if PUBLIC_URL:
    ALLOWED_HOSTS = [*ALLOWED_HOSTS, urlsplit(PUBLIC_URL).hostname or ""]
    CSRF_TRUSTED_ORIGINS = [PUBLIC_URL]
    if PUBLIC_URL.startswith("https://"):
        SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")

DEBUG = False
SECRET_KEY = env_secret("MINTWEB_SECRET_KEY") or lasting_secret(DATA_DIR / "secret_key")
# If set, this key exists for the user `admin` from the first start on.
API_KEY = env_secret("MINTWEB_API_KEY")
if API_KEY and not re.fullmatch(r"(tml-|sk-mint-)[!-~]{8,}", API_KEY):
    raise ImproperlyConfigured("MINTWEB_API_KEY must be tml- or sk-mint- and at least 8 further characters.")

SESSION_COOKIE_NAME = "mintweb_session"
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
SESSION_COOKIE_SECURE = PUBLIC_URL.startswith("https://")
CSRF_COOKIE_SAMESITE = "Lax"
CSRF_COOKIE_SECURE = SESSION_COOKIE_SECURE
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": [SELF],
        "script-src": [SELF],
        "style-src": [SELF],
        "img-src": [SELF, "data:"],
        "connect-src": [SELF],
        "form-action": [SELF],
        "object-src": [NONE],
        "base-uri": [NONE],
        "frame-ancestors": [NONE],
    }
}

# Application -------------------------------------------------------------------------------------------------

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "channels",
    "ninja",  # serves the REST documentation page from here instead of from a CDN
    "runs",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
ROOT_URLCONF = "mintweb.urls"
ASGI_APPLICATION = "mintweb.asgi.application"
AUTH_USER_MODEL = "runs.User"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LOGIN_URL = "/login/"
LOGIN_REDIRECT_URL = "/runs/"
LANGUAGE_CODE = "en"
USE_I18N = False
USE_TZ = True
TIME_ZONE = "UTC"

STATIC_URL = "/static/"
STATICFILES_DIRS = [BASE_DIR / "static"]
WHITENOISE_USE_FINDERS = True
WHITENOISE_AUTOREFRESH = False
WHITENOISE_MAX_AGE = 0  # file names carry no hash, so browsers ask again and mostly hear 304

# Databases ---------------------------------------------------------------------------------------------------

DATABASE_URL = env_secret("DATABASE_URL")
REDIS_URL = env_secret("REDIS_URL")
EMBEDDED_POSTGRES = not DATABASE_URL
EMBEDDED_REDIS = not REDIS_URL
DATABASE_URL = DATABASE_URL or embedded.database_url(DATA_DIR)
REDIS_URL = REDIS_URL or embedded.redis_url(DATA_DIR)

DATABASES = {"default": parse_database_url(DATABASE_URL)}

CHANNEL_LAYERS = {
    "default": {
        "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
        "CONFIG": {"hosts": [redis_database(REDIS_URL, 1)], "prefix": "mintweb"},
    }
}

# Celery: messages are doorbells, the rows are the truth ------------------------------------------------------

CELERY_BROKER_URL = broker_address(redis_database(REDIS_URL, 0))
CELERY_BROKER_TRANSPORT_OPTIONS = {
    "socket_connect_timeout": 1,
    "socket_timeout": 1,
    "max_retries": 0,  # of a publisher; a worker reconnects by broker_connection_max_retries
}
CELERY_BROKER_CONNECTION_TIMEOUT = 1
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_CONNECTION_MAX_RETRIES = None
CELERY_TASK_PUBLISH_RETRY = False  # a lost doorbell costs two seconds, a blocked request costs more
CELERY_TASK_SERIALIZER = "json"
CELERY_RESULT_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_TASK_IGNORE_RESULT = True
CELERY_RESULT_BACKEND = None
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_WORKER_DISABLE_PREFETCH = True
CELERY_WORKER_SEND_TASK_EVENTS = False
CELERY_TIMEZONE = TIME_ZONE
CELERY_TASK_DEFAULT_QUEUE = "cpu"
CELERY_TASK_ROUTES = {"gpuworker.tasks.*": {"queue": "gpu"}}
CELERY_BEAT_SCHEDULE = {
    "housekeeping": {"task": "runs.tasks.housekeeping", "schedule": 60.0, "options": {"expires": 55}}
}

# Files -------------------------------------------------------------------------------------------------------


def default_storage(name: str) -> dict[str, Any]:
    """Return the STORAGES entry: a local folder, or s3://bucket/prefix?endpoint=https://host&region=name."""
    url = env_secret(name)
    if not url:
        return {
            "BACKEND": "django.core.files.storage.FileSystemStorage",
            "OPTIONS": {
                "location": DATA_DIR / "storage",
                "base_url": None,
                "file_permissions_mode": 0o600,
                "directory_permissions_mode": 0o700,
            },
        }
    parts = urlsplit(url)
    if parts.scheme != "s3" or not parts.hostname:
        raise ImproperlyConfigured(f"{name} is {url!r}; use s3://bucket/prefix?endpoint=https://host.")
    if importlib.util.find_spec("boto3") is None:
        raise ImproperlyConfigured(f"{name} asks for S3, which needs boto3: pip install boto3.")
    query = dict(parse_qsl(parts.query))
    return {
        "BACKEND": "storages.backends.s3.S3Storage",
        "OPTIONS": {
            "bucket_name": parts.netloc,
            "location": parts.path.strip("/"),
            "endpoint_url": query.get("endpoint"),
            "region_name": query.get("region"),
            "default_acl": None,
            "file_overwrite": True,
        },
    }


STORAGES = {
    "default": default_storage("MINTWEB_STORAGE_URL"),
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
}

# Larger request bodies are refused while they arrive; larger operation payloads go to storage, not into a row.
MAX_BODY_BYTES = env_int("MINTWEB_MAX_BODY_BYTES", 64 * 1024**2, minimum=1024, maximum=64 * 1024**3)
INLINE_PAYLOAD_BYTES = 256 * 1024
DATA_UPLOAD_MAX_MEMORY_SIZE = MAX_BODY_BYTES

# Models and devices (read by the worker) ---------------------------------------------------------------------

BASE_MODELS = env_base_models("MINTWEB_BASE_MODELS")
DEVICE = env_str("MINTWEB_DEVICE", "auto", pattern=r"auto|cpu|mps|cuda(:\d+)?")
DTYPE = env_str("MINTWEB_DTYPE", "auto", pattern=r"auto|float32|bfloat16|float16")

# Logs --------------------------------------------------------------------------------------------------------

LOG_LEVEL = env_str("MINTWEB_LOG_LEVEL", "INFO", pattern=r"(?i:debug|info|warning|error)").upper()


def is_worth_a_line(record: logging.LogRecord) -> bool:
    """Leave out Django's lines for refused requests and for "not ready yet"; keep our own faults."""
    return getattr(record, "status_code", 500) >= 500 and getattr(record, "status_code", 500) != 503


LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"faults": {"()": "django.utils.log.CallbackFilter", "callback": is_worth_a_line}},
    "formatters": {"plain": {"format": "{asctime} {levelname} {name}: {message}", "style": "{"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "root": {"handlers": ["stderr"], "level": LOG_LEVEL},
    "loggers": {
        "django.request": {"filters": ["faults"]},
        "celery.worker.strategy": {"level": "WARNING"},  # one line for every doorbell
        "celery.app.trace": {"level": "WARNING"},
    },
}
