"""Every setting of mintweb, read once from the environment (by `environment.py`); nothing else reads it.

A wrong value raises ImproperlyConfigured with the variable's name in one sentence; `manage.py` prints that
sentence alone. Secrets may also come from a file: NAME_FILE=/run/secrets/name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import logging
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from csp.constants import NONE, SELF
from django.core.exceptions import ImproperlyConfigured

from mintweb import embedded
from mintweb.addresses import broker_address, parse_database_url, redis_database
from mintweb.environment import (
    env_bool,
    env_int,
    env_list,
    env_private_dir,
    env_secret,
    env_str,
    lasting_secret,
)

BASE_DIR = Path(__file__).resolve().parent.parent

DATA_DIR = env_private_dir("MINTWEB_DATA_DIR", BASE_DIR / "data")
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

SESSION_ENGINE = "mintweb.sessions"
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
    "runs",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "mintweb.static_files.StaticFiles",
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
WHITENOISE_ALLOW_ALL_ORIGINS = False
WHITENOISE_MAX_AGE = 0  # file names carry no hash, so browsers ask again and mostly hear 304

# Databases ---------------------------------------------------------------------------------------------------

DATABASE_URL = env_secret("DATABASE_URL")
REDIS_URL = env_secret("REDIS_URL")
EMBEDDED_POSTGRES = not DATABASE_URL
EMBEDDED_REDIS = not REDIS_URL
DATABASE_URL = DATABASE_URL or embedded.database_url(DATA_DIR)
REDIS_URL = REDIS_URL or embedded.redis_url(DATA_DIR)

DATABASES = {"default": parse_database_url(DATABASE_URL)}

# Without the limits a page hint would wait for ever for a server that a network swallowed, and all later ones with it.
_HINTS_REDIS = {"address": redis_database(REDIS_URL, 1), "socket_connect_timeout": 5, "socket_timeout": 5}
CHANNEL_LAYERS = {
    "default": {
        "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
        "CONFIG": {"hosts": [_HINTS_REDIS], "prefix": "mintweb"},
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
CELERY_TASK_PUBLISH_RETRY = False  # a lost doorbell costs two seconds at most, a blocked request costs more
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
CELERY_TASK_ROUTES = {
    "gpuworker.tasks.*": {"queue": "gpu"},
    "runs.tasks.deliver_webhooks": {"queue": "webhooks"},
    "runs.tasks.housekeeping": {"queue": "housekeeping"},
}
CELERY_BEAT_SCHEDULE = {
    "housekeeping": {"task": "runs.tasks.housekeeping", "schedule": 60.0, "options": {"expires": 55}},
    "webhooks": {"task": "runs.tasks.deliver_webhooks", "schedule": 15.0, "options": {"expires": 14}},
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
        raise ImproperlyConfigured(f"{name} asks for S3, which needs boto3: .venv/bin/pip install boto3.")
    query = dict(parse_qsl(parts.query))
    from botocore.config import Config

    # A bucket that swallows everything is away after so long: what waits for it holds up the answers to other runs.
    patience = Config(
        connect_timeout=3, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 2}
    )
    return {
        "BACKEND": "storages.backends.s3.S3Storage",
        "OPTIONS": {
            "bucket_name": parts.netloc,
            "location": parts.path.strip("/"),
            "endpoint_url": query.get("endpoint"),
            "region_name": query.get("region"),
            "default_acl": None,
            "file_overwrite": True,
            "client_config": patience,
            # A larger object is read by way of a file in TEMP_DIR; without a limit it would be whole in memory.
            "max_memory_size": 8 << 20,
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

# Beside the storage, so that a finished file is moved and not copied.
TEMP_DIR = DATA_DIR / "tmp"
with contextlib.suppress(OSError):  # what needs the folder says why it cannot be made
    TEMP_DIR.mkdir(mode=0o700, exist_ok=True)
FILE_UPLOAD_TEMP_DIR = TEMP_DIR
# Datasets come in by pieces, so they may be far larger than other request bodies; disk space is checked first.
MAX_UPLOAD_BYTES = env_int("MINTWEB_MAX_UPLOAD_BYTES", 50 * 1024**3, minimum=1024, maximum=1024**5)
# An upload that nobody goes on with is deleted after this time.
UPLOAD_EXPIRES_S = env_int("MINTWEB_UPLOAD_EXPIRES_S", 7 * 86_400, minimum=60, maximum=365 * 86_400)
# A dataset is checked in a process of its own, with these limits.
DOCTOR_MEMORY_MB = env_int("MINTWEB_DOCTOR_MEMORY_MB", 1024, minimum=128, maximum=1024**2)
DOCTOR_TIMEOUT_S = env_int("MINTWEB_DOCTOR_TIMEOUT_S", 3600, minimum=10, maximum=86_400)

# Hosts (names or addresses) inside the own network that webhooks may go to; public ones always may.
WEBHOOK_HOSTS: list[str] = [host.lower().strip("[]") for host in env_list("MINTWEB_WEBHOOK_HOSTS")]

# Runs without code -------------------------------------------------------------------------------------------

# Runs of recipes that train at once; they share each pass of the worker, the others wait in a queue.
CONCURRENT_RUNS = env_int("MINTWEB_CONCURRENT_RUNS", 4, minimum=1, maximum=1000)
# Datasets as tokens, kept for the next run on the same rows; what was used longest ago goes first.
CACHE_BYTES = env_int("MINTWEB_CACHE_BYTES", 20 * 1024**3, minimum=0, maximum=1024**5)

# Models and devices (read by the worker) ---------------------------------------------------------------------


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


BASE_MODELS = env_base_models("MINTWEB_BASE_MODELS")
DEVICE = env_str("MINTWEB_DEVICE", "auto", pattern=r"auto|cpu|cuda(:\d+)?")
# One worker for each of these in the place of one for each GPU, for instance cuda:0,cuda:1 or cpu,cpu.
DEVICES = env_list("MINTWEB_DEVICES")
for device in DEVICES:
    if not re.fullmatch(r"cpu|cuda:\d+", device):
        raise ImproperlyConfigured(f"MINTWEB_DEVICES has {device!r}; each item is cpu or cuda:0, cuda:1, ...")
# One worker for so many of these, or of the GPUs, in their order: each base model is split over them.
TENSOR_PARALLEL = env_int("MINTWEB_TENSOR_PARALLEL", 1, minimum=1, maximum=64)
if len(DEVICES) % TENSOR_PARALLEL:
    raise ImproperlyConfigured(
        f"MINTWEB_DEVICES names {len(DEVICES)} devices; MINTWEB_TENSOR_PARALLEL is {TENSOR_PARALLEL}, so it must be a "
        "multiple of that."
    )
# How many workers of this machine share its memory; `mintweb/programs.py` tells them.
NUM_LOCAL_WORKERS = env_int("MINTWEB_NUM_LOCAL_WORKERS", 1, minimum=1, maximum=1024)
# 0: one thread for small models, whose matrix products are too short to share, its share of the cores for others.
THREADS = env_int("MINTWEB_THREADS", 0, minimum=0, maximum=1024)
DTYPE = env_str("MINTWEB_DTYPE", "auto", pattern=r"auto|float32|bfloat16")
# Device memory for adapters and sampler weights, and host memory for adapters that have no room there; 0: measured.
# Runs beyond both are kept on the disk until their turn. Without a GPU only the first counts.
ADAPTER_MEMORY_MB = env_int("MINTWEB_ADAPTER_MEMORY_MB", 0, minimum=0, maximum=1024**3)
ADAPTER_HOST_MEMORY_MB = env_int("MINTWEB_ADAPTER_HOST_MEMORY_MB", 0, minimum=0, maximum=1024**3)


def env_vllm(name: str) -> dict[str, str]:
    """Return base model name -> address of the vLLM server that draws its samples."""
    servers: dict[str, str] = {}
    for item in env_list(name):
        model, _, url = (part.strip() for part in item.partition("="))
        if model not in BASE_MODELS:
            offered = ", ".join(BASE_MODELS)
            raise ImproperlyConfigured(
                f"{name} names the base model {model!r}; MINTWEB_BASE_MODELS has {offered}."
            )
        if not re.fullmatch(r"https?://[^/?#]+/?", url):
            raise ImproperlyConfigured(
                f"{name} gives {model} the address {url!r}; each item is name=http://host:port."
            )
        servers[model] = url.rstrip("/")
    return servers


# vLLM servers that draw samples in the place of the engine; what they do not draw, or cannot, the engine does.
VLLM = env_vllm("MINTWEB_VLLM")
VLLM_API_KEY = env_secret("MINTWEB_VLLM_API_KEY")

# A run that is brought back must give the same bits (exact) or numbers within a tolerance (fast); empty: exact on
# a CPU, fast elsewhere.
REPLAY = env_str("MINTWEB_REPLAY", pattern=r"|exact|fast")
# An optimizer step on a gradient that is not finite changes nothing: it is passed over (skip) or fails (fail).
NONFINITE = env_str("MINTWEB_NONFINITE", "skip", pattern=r"skip|fail")

# A worker that is at one operation for longer than this ends itself, so that another takes its runs.
HANG_S = env_int("MINTWEB_HANG_S", 900, minimum=10, maximum=86_400)
# For tests: where a worker kills or freezes itself, see `gpuworker/failpoints.py`.
FAILPOINTS = env_str("MINTWEB_FAILPOINTS", pattern=r"|[a-z_]+:[a-z]+@\d+(,[a-z_]+:[a-z]+@\d+)*")

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
        "httpx": {"level": "WARNING"},  # one line for every call
        "celery.app.trace": {"level": "WARNING"},
        "celery.worker.request": {"level": "WARNING"},  # a doorbell that came too late is no news
    },
}
