"""`manage.py up` as a whole: start, second start, faults of its parts, stop. The tests share one instance in order."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

import pytest

from mintweb.programs import WORKER_STOP_TIMEOUT_S
from runs.services import lockout

from .instances import ROOT, Instance, all_processes, clean_environment, command, wait_for

pytestmark = pytest.mark.e2e
MakeInstance = Callable[..., Instance]
PATIENCE_S = 100


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Hands redirects to the caller."""

    def redirect_request(self, *args: object, **kwargs: object) -> None:
        """Follow nothing."""


def get(url: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    """Return status, body and headers of a GET, whatever the status."""
    request = urllib.request.Request(
        url, headers={name.replace("_", "-"): text for name, text in headers.items()}
    )
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=60) as response:
            return (
                response.status,
                response.read().decode(),
                {name.lower(): text for name, text in response.headers.items()},
            )
    except urllib.error.HTTPError as error:
        with error:
            return (
                error.code,
                error.read().decode(),
                {name.lower(): text for name, text in error.headers.items()},
            )


def is_ready(instance: Instance) -> bool:
    try:
        return get(f"{instance.address}/health/ready")[0] == HTTPStatus.OK
    except OSError:
        return False


def manage(instance: Instance, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=ROOT,
        env=instance.env,
        capture_output=True,
        text=True,
        check=False,
    )


def shown(instance: Instance, pattern: str) -> str:
    found = re.search(pattern, instance.output)
    assert found, instance.output
    return found[1]


# One running instance ----------------------------------------------------------------------------------------


def test_it_says_where_it_is_and_how_to_connect(up: Instance) -> None:
    assert f"mintweb is ready at {up.address}\n" in up.output
    mint = shown(up, rf"export MINT_BASE_URL={up.address} MINT_API_KEY=sk-mint-(\S+)")
    tinker = shown(up, rf"export TINKER_BASE_URL={up.address} TINKER_API_KEY=tml-(\S+)")
    assert mint == tinker
    assert is_ready(up)


def test_the_login_link_works_once(up: Instance) -> None:
    link = shown(up, r"Log in once with\s+(\S+)")
    wait_for(lambda: is_ready(up), PATIENCE_S)
    assert (up.data_dir / "api_key").stat().st_mode & 0o777 == 0o600
    status, body, headers = get(link)
    if status == HTTPStatus.OK:  # a page with a button, so that link previews do not spend the link
        assert "<form" in body
    else:
        assert status == HTTPStatus.FOUND
        assert "mintweb_session" in headers["set-cookie"]
        assert get(link)[0] != HTTPStatus.FOUND


def test_pages_carry_the_security_headers(up: Instance) -> None:
    _, _, headers = get(f"{up.address}/login/")
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert get(f"{up.address}/login/", Host="evil.example")[0] == HTTPStatus.BAD_REQUEST


def test_a_made_up_address_is_no_way_round_the_lock_of_wrong_passwords(up: Instance) -> None:
    token = "a" * 32
    form = urllib.parse.urlencode({"csrfmiddlewaretoken": token, "username": "nobody", "password": "no"})
    statuses = []
    for number in range(lockout.MAX_TRIES + 1):
        headers = {"Cookie": f"csrftoken={token}", "X-Forwarded-For": f"192.0.2.{number}"}
        request = urllib.request.Request(f"{up.address}/login/", data=form.encode(), headers=headers)
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(request, timeout=60)
        with refusal.value as error:
            statuses.append(error.code)
    assert statuses == [HTTPStatus.FORBIDDEN] * lockout.MAX_TRIES + [HTTPStatus.TOO_MANY_REQUESTS]


def test_static_files_are_served_and_asked_for_again_cheaply(up: Instance) -> None:
    status, body, headers = get(f"{up.address}/static/js/chart.js")
    assert status == HTTPStatus.OK
    assert len(body) == int(headers["content-length"])
    assert headers["content-type"].startswith("text/javascript")
    again = get(f"{up.address}/static/js/chart.js", If_None_Match=headers["etag"])
    assert again[:2] == (HTTPStatus.NOT_MODIFIED, "")
    assert get(f"{up.address}/static/../manage.py")[0] == HTTPStatus.NOT_FOUND


def test_each_process_logs_to_its_file(up: Instance) -> None:
    names = {log.name for log in (up.data_dir / "logs").iterdir()}
    assert {"web.log", "gpu.log", "recipes.log", "cpu.log", "beat.log", "postgres.log", "redis.log"} <= names


def test_a_second_instance_on_the_same_data_is_refused(up: Instance) -> None:
    done = manage(up, "up")
    assert done.returncode == 2
    assert done.stderr.startswith(f"mintweb: mintweb is already running on {up.data_dir} (process ")
    assert done.stderr.count("\n") == 1


def test_doctor_finds_everything_well(up: Instance) -> None:
    done = manage(up, "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line[:5] for line in done.stdout.splitlines()} == {"ok   "}


def test_create_api_key_prints_both_spellings(up: Instance) -> None:
    tinker, mint = manage(up, "create_api_key", "--user", "admin", "--name", "test").stdout.split()
    assert tinker.removeprefix("tml-") == mint.removeprefix("sk-mint-")


@pytest.mark.parametrize(
    "part",
    [
        "--queues=gpu",
        "--queues=recipes",
        "--queues=cpu",
        "celery --app mintweb --skip-checks beat",
        "uvicorn",
    ],
)
def test_a_killed_process_is_replaced(up: Instance, part: str) -> None:
    old = up.processes(part)
    assert old
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: set(up.processes(part)) - set(old), PATIENCE_S, up.describe)
    wait_for(lambda: is_ready(up), PATIENCE_S, up.describe)
    wait_for(lambda: "(terminated by SIGKILL; not expected)" in up.output, PATIENCE_S, up.describe)


@pytest.mark.parametrize("part", ["bin/postgres", "redis-server"])
def test_a_killed_database_is_replaced(up: Instance, part: str) -> None:
    old = up.processes(part)
    assert old
    os.kill(old[0], signal.SIGKILL)
    wait_for(lambda: set(up.processes(part)) - set(old), PATIENCE_S, up.describe)
    wait_for(lambda: is_ready(up), PATIENCE_S, up.describe)


def test_term_stops_everything_and_a_new_start_keeps_the_rows(up: Instance) -> None:
    key, link = shown(up, r"TINKER_API_KEY=(\S+)"), shown(up, r"Log in once with\s+(\S+)")
    assert up.stop(signal.SIGTERM) == 0
    assert up.processes() == []
    up.start()
    assert shown(up, r"TINKER_API_KEY=(\S+)") == key
    assert shown(up, r"Log in once with\s+(\S+)") != link
    assert up.stop(signal.SIGINT) == 0
    assert up.processes() == []


# Instances of their own --------------------------------------------------------------------------------------


def test_nothing_outlives_a_killed_up(make_instance: MakeInstance) -> None:
    instance = make_instance()
    instance.launch()
    wait_for(lambda: instance.processes("--queues=gpu"), PATIENCE_S, instance.describe)
    instance.stop(signal.SIGKILL)
    wait_for(
        lambda: not instance.processes(),
        PATIENCE_S,
        lambda: str([command(pid) for pid in instance.processes()]),
    )
    instance.start()
    assert instance.stop() == 0


def test_nothing_outlives_a_killed_supervisord(make_instance: MakeInstance) -> None:
    instance = make_instance()
    instance.start()
    os.kill(int((instance.data_dir / "run" / "supervisord.pid").read_text()), signal.SIGKILL)
    wait_for(lambda: instance.returncode == 2, PATIENCE_S, instance.describe)
    assert "mintweb: supervisord does not answer" in instance.output
    assert "Traceback" not in instance.output
    wait_for(
        lambda: not instance.processes(),
        PATIENCE_S,
        lambda: str([command(pid) for pid in instance.processes()]),
    )


def test_a_program_that_keeps_ending_is_named_with_its_last_line(make_instance: MakeInstance) -> None:
    instance = make_instance()
    instance.env["UVICORN_SSL_CERTFILE"] = "/nowhere/cert.pem"
    instance.launch()
    wait_for(lambda: instance.returncode == 2, 2 * PATIENCE_S, instance.describe)
    sentence = "mintweb: web ended 5 times soon after its start, at last with: FileNotFoundError"
    assert sentence in instance.output, instance.describe()
    assert instance.output.count("exited: web (exit status 1; not expected)") >= 5
    assert instance.processes() == []


def test_a_program_that_dies_again_and_again_later_on_takes_nothing_down(make_instance: MakeInstance) -> None:
    instance = make_instance()
    instance.start()
    killed: set[int] = set()

    def kill_and_look() -> bool:
        pids = set(instance.processes("--queues=recipes"))
        for pid in pids - killed:
            os.kill(pid, signal.SIGKILL)
        killed.update(pids)
        return "recipes ended 5 times soon after its start" in instance.output

    wait_for(kill_and_look, 2 * PATIENCE_S, instance.describe)
    wait_for(lambda: set(instance.processes("--queues=recipes")) - killed, PATIENCE_S, instance.describe)
    assert instance.returncode is None
    assert instance.stop() == 0


def test_a_second_interrupt_ends_a_worker_that_does_not_stop(make_instance: MakeInstance) -> None:
    instance = make_instance()
    instance.start()
    (worker,) = instance.processes("--queues=gpu")
    os.kill(worker, signal.SIGSTOP)
    assert instance.process is not None
    instance.process.send_signal(signal.SIGINT)
    wait_for(lambda: not instance.processes("uvicorn"), PATIENCE_S, instance.describe)
    assert instance.stop(signal.SIGINT, timeout_s=WORKER_STOP_TIMEOUT_S / 2) == 0
    assert instance.processes() == []


@pytest.mark.parametrize("part", ["bin/initdb", "bin/postgres -D", "--queues=gpu"])
def test_an_interrupt_while_starting_stops_what_has_begun(make_instance: MakeInstance, part: str) -> None:
    instance = make_instance()
    instance.launch()
    wait_for(lambda: instance.processes(part), PATIENCE_S, instance.describe)
    assert instance.stop(signal.SIGINT) == 0
    assert instance.processes() == []


def test_a_port_in_use_is_named(make_instance: MakeInstance) -> None:
    instance = make_instance()
    with socket.socket() as other:
        other.bind(("127.0.0.1", instance.port))
        other.listen()
        refused = manage(instance, "up")
    assert refused.returncode == 2
    assert f"port {instance.port} on 127.0.0.1 is in use" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"DATABASE_URL": "postgresql://u:secretword@127.0.0.1:1/x"},
            "the PostgreSQL of DATABASE_URL does not answer",
        ),
        ({"REDIS_URL": "redis://127.0.0.1:1/0"}, "the Redis of REDIS_URL does not answer"),
    ],
)
def test_a_database_that_does_not_answer_is_named(
    make_instance: MakeInstance, settings: dict[str, str], sentence: str
) -> None:
    instance = make_instance(**settings)
    refused = manage(instance, "up")
    assert refused.returncode == 2
    assert sentence in refused.stderr
    assert "secretword" not in refused.stderr
    assert "Traceback" not in refused.stderr
    assert instance.processes() == []


def test_a_folder_that_cannot_be_written_is_named(make_instance: MakeInstance) -> None:
    env = clean_environment(MINTWEB_DATA_DIR="/proc", MINTWEB_SECRET_KEY="x" * 40)
    refused = subprocess.run(
        [sys.executable, "manage.py", "up"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "the data folder /proc cannot be written" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_databases_given_by_address_are_used(make_instance: MakeInstance, tmp_path: Path) -> None:
    from mintweb import embedded

    with embedded.running(tmp_path / "elsewhere") as (database_url, redis_url):
        instance = make_instance(DATABASE_URL=database_url, REDIS_URL=redis_url)
        instance.start()
        assert not instance.processes("bin/postgres")
        assert not instance.processes("redis-server")
        assert instance.stop() == 0
    assert instance.processes() == []
    assert not [pid for pid in all_processes() if str(instance.data_dir).encode() in command(pid)]
