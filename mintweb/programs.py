"""The programs that make up a running mintweb, and the configuration by which supervisord keeps them running."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from configparser import RawConfigParser
from dataclasses import dataclass, field
from pathlib import Path

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from mintweb import embedded

# A worker finishes its current operation before it stops; one operation is at most a slice of 20 s and a snapshot.
WORKER_STOP_TIMEOUT_S = 60
# A program that ended starts again at once; one that never becomes steady, after 1, 2, 3 and 4 seconds, then not again.
NUM_RETRIES = 4
DATABASE_STEADY_AFTER_S, SERVICE_STEADY_AFTER_S = 1, 10
# OpenMP threads of a worker spin for a while before they sleep: by default so long that beside a busy process a step
# takes a multiple of its time; so short that they sleep between two products, each of these waits for a wake-up.
SPIN_COUNT = "2500"


@dataclass(frozen=True)
class Program:
    """One program to keep running."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout_s: int = 10


def control_socket() -> Path:
    """Return where supervisord answers; only its owner can reach it."""
    return embedded.socket_dir(settings.DATA_DIR) / "up.sock"


def supervisord() -> tuple[str, ...]:
    """Write supervisord's configuration and return its command line.

    Raises:
        EmbeddedServerError: a database cannot be set up.
    """
    folder = settings.DATA_DIR / "run"
    folder.mkdir(mode=0o700, exist_ok=True)
    settings.LOG_DIR.mkdir(mode=0o700, exist_ok=True)
    settings.TEMP_DIR.mkdir(mode=0o700, exist_ok=True)
    sections: dict[str, dict[str, object]] = {
        "supervisord": {
            "nodaemon": "true",
            "silent": "true",
            "nocleanup": "true",
            "logfile": "%(here)s/../logs/supervisord.log",
            "pidfile": "%(here)s/supervisord.pid",
        },
        "rpcinterface:supervisor": {
            "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
        },
    }
    for name, members, group in (
        (
            "databases",
            databases(),
            {"priority": 1, "autostart": "true", "startsecs": DATABASE_STEADY_AFTER_S},
        ),
        ("services", services(), {"priority": 2, "autostart": "false", "startsecs": SERVICE_STEADY_AFTER_S}),
    ):
        if members:
            sections[f"group:{name}"] = {"programs": ",".join(program.name for program in members), **group}
        sections |= {f"program:{program.name}": {**_section(program), **group} for program in members}
    control_socket().unlink(missing_ok=True)
    sections["unix_http_server"] = {"file": str(control_socket()).replace(str(folder), "%(here)s")}
    config = RawConfigParser()
    config.read_dict(sections)
    file = folder / "supervisord.conf"
    file.touch(mode=0o600)
    with file.open("w", encoding="utf-8") as output:
        config.write(output)
    return _python("supervisor.supervisord", "--configuration", str(file))


def databases() -> list[Program]:
    """Return the database servers that run from wheels; none when DATABASE_URL and REDIS_URL are given."""
    programs = []
    redis = embedded.prepare_redis(settings.DATA_DIR)  # makes the folder of the sockets in any case
    if settings.EMBEDDED_REDIS:
        programs.append(Program("redis", tuple(redis)))
    if settings.EMBEDDED_POSTGRES:
        programs.append(
            Program(
                "postgres",
                tuple(embedded.prepare_postgres(settings.DATA_DIR)),
                stop_signal=signal.SIGINT,
                stop_timeout_s=int(embedded.STOP_TIMEOUT_S),
            )
        )
    return programs


def services() -> list[Program]:
    """Return the web server, a worker for each GPU (one without a GPU), the CPU workers and the clock."""
    return [*gpu_workers(), web(), recipes(), cpu_worker(), beat()]


def web() -> Program:
    """Return the one process that answers HTTP and websockets."""
    # Without a proxy whoever runs a program on this machine could say to come from anywhere, and guess passwords for ever.
    proxy = ("--forwarded-allow-ips", "127.0.0.1") if settings.PUBLIC_URL else ("--no-proxy-headers",)
    server = _python(
        *("uvicorn", "mintweb.asgi:application", "--host", settings.HOST, "--port", str(settings.PORT)),
        *("--loop", "uvloop", "--http", "httptools", "--ws", "websockets-sansio", "--lifespan", "on"),
        *("--no-access-log", "--no-server-header", "--timeout-graceful-shutdown", "3"),
        *("--log-level", settings.LOG_LEVEL.lower(), "--no-use-colors"),
        *(*proxy, "--backlog", "4096", "--ws-max-size", str(1024**2)),
    )
    # Django keeps large bodies in temporary files, and /tmp may be memory. In the command, where any path can be quoted.
    return Program("web", ("env", f"TMPDIR={settings.TEMP_DIR}", *server), env={"OMP_NUM_THREADS": "1"})


def gpu_workers() -> list[Program]:
    """Return one solo worker per GPU, which sees only its own device, or one per item of MINTWEB_DEVICES.

    With MINTWEB_TENSOR_PARALLEL each has so many devices.

    Raises:
        ImproperlyConfigured: there are fewer GPUs than one worker is to have.
    """
    if settings.TENSOR_PARALLEL > 1:
        return _groups(settings.TENSOR_PARALLEL)
    if settings.DEVICES:
        return [
            _gpu_worker(f"gpu{index}", {"MINTWEB_DEVICE": device}, share=len(settings.DEVICES))
            for index, device in enumerate(settings.DEVICES)
        ]
    gpus = visible_gpus() if settings.DEVICE in {"auto", "cuda"} else []
    if len(gpus) < 2:
        return [_gpu_worker("gpu", {})]
    return [
        _gpu_worker(f"gpu{index}", {"CUDA_VISIBLE_DEVICES": gpu}, share=len(gpus))
        for index, gpu in enumerate(gpus)
    ]


def cpu_worker() -> Program:
    """Return the worker for exports, dataset checks and housekeeping; all of it can be killed and begun again."""
    return Program(
        "cpu",
        # Two checks of datasets run at once at most, each for as long as an hour; the third is for all the rest.
        # They take from the queues in turn, so that no number of messages in one holds up another.
        _celery(
            *("worker", "--pool=prefork", "--concurrency=3", "--queues=cpu,webhooks,housekeeping"),
            *("--hostname=cpu@%h", *_QUIET),
        ),
        env={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )


def recipes() -> Program:
    """Return the worker that trains runs without a client by submitting their operations."""
    return Program(
        "recipes",
        _celery(
            *("worker", "--pool=solo", "--concurrency=1", "--queues=recipes", "--hostname=recipes@%h"),
            *("--include=runs.recipes.process", *_QUIET),
        ),
        env={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )


def beat() -> Program:
    """Return the clock of the periodic tasks."""
    return Program("beat", _celery("beat", f"--schedule={settings.DATA_DIR / 'beat'}", "--pidfile="))


def visible_gpus() -> list[str]:
    """Return the ids of the GPUs that a worker may use, without loading torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [item.strip() for item in chosen.split(",") if item.strip() and item.strip() != "-1"]
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return []
    try:
        listed = subprocess.run(
            [nvidia_smi, "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return []
    return listed.stdout.split() if listed.returncode == 0 else []


# Neither is of use to workers that never speak to each other, and looking for neighbours costs a second.
_QUIET = ("--without-mingle", "--without-gossip", "--without-heartbeat")


def _groups(size: int) -> list[Program]:
    """Return a worker for each group of so many devices; GPUs that are left over stay idle."""
    devices = settings.DEVICES
    if not devices:
        is_cpu = settings.DEVICE == "cpu"
        devices = ["cpu"] * size if is_cpu else [f"cuda:{index}" for index in range(len(visible_gpus()))]
    groups = [devices[first : first + size] for first in range(0, len(devices) - size + 1, size)]
    if not groups:
        raise ImproperlyConfigured(
            f"MINTWEB_TENSOR_PARALLEL is {size}, but only {len(devices)} GPUs are visible"
        )
    return [
        _gpu_worker(
            f"gpu{index}" if len(groups) > 1 else "gpu",
            {"MINTWEB_DEVICE": group[0], "MINTWEB_DEVICES": ",".join(group)},
            share=len(groups) * size,
        )
        for index, group in enumerate(groups)
    ]


def _gpu_worker(name: str, env: dict[str, str], *, share: int = 1) -> Program:
    threads = max(1, len(os.sched_getaffinity(0)) // share) if hasattr(os, "sched_getaffinity") else 1
    return Program(
        name,
        _celery(
            *("worker", "--pool=solo", "--concurrency=1", "--queues=gpu", f"--hostname={name}@%h"),
            *("--include=gpuworker.tasks", *_QUIET),
        ),
        env={
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", SPIN_COUNT),
            "MINTWEB_NUM_LOCAL_WORKERS": str(share),
            **env,
        },
        stop_timeout_s=WORKER_STOP_TIMEOUT_S,
    )


def _celery(command: str, *options: str) -> tuple[str, ...]:
    # `manage.py up` has run Django's checks; in each worker they would load every view again.
    return _python("celery", "--app", "mintweb", "--skip-checks", command, *options)


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    # The kernel ends it when the process that started it ends, however that happens.
    setpriv = shutil.which("setpriv")
    dying = (setpriv, "--pdeathsig", "KILL") if setpriv else ()
    return (*dying, sys.executable, "-m", module, *arguments)


def _section(program: Program) -> dict[str, object]:
    # supervisord expands %, and takes a # or ; after a blank for a comment even between quotes.
    command = shlex.join(program.command).replace("%", "%%").replace(" #", " ''#").replace(" ;", " '';")
    return {
        "command": command,
        "environment": ",".join(f'{name}="{value}"' for name, value in program.env.items()),
        "autorestart": "true",
        "startretries": NUM_RETRIES,
        "stopsignal": program.stop_signal.name,
        "stopwaitsecs": program.stop_timeout_s,
        "killasgroup": "true",
        "redirect_stderr": "true",
        "stdout_logfile": f"%%(here)s/../logs/{program.name}.log",  # this option is expanded twice
        "stdout_logfile_maxbytes": "32MB",
        "stdout_logfile_backups": 1,
    }
