"""Samples and sessions go when nobody will read them: never what a client or a run's page still may."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
from django.core.files.storage import default_storage
from django.db.models.functions import Now
from pytest_django.fixtures import DjangoCaptureOnCommitCallbacks, Settings

from runs.models import (
    Checkpoint,
    FixedSample,
    Operation,
    SamplingSession,
    ServerClock,
    Session,
    TrainingRun,
    User,
)
from runs.services import expired_samples, payload_files, sessions
from runs.services.expired_operations import KEEP_RESULTS
from tests.services import rows

LATER = KEEP_RESULTS + timedelta(minutes=1)


def asked(owner: User, checkpoint: Checkpoint | None = None, *, is_answered: bool = True) -> Operation:
    """Return a sample in a session of its own, answered more than a day ago."""
    pk = rows.sample(rows.make_sampling_session(owner, checkpoint), 0)
    if is_answered:
        rows.answer_sample(pk)
        Operation.objects.filter(pk=pk).update(finished_at=Now() - LATER)
    return Operation.objects.select_related("sampling_session__session").get(pk=pk)


def session_of(sample: Operation) -> Session:
    assert sample.sampling_session is not None
    return sample.sampling_session.session


def close(sample: Operation, ago: timedelta = LATER) -> None:
    """Let the client have closed its session."""
    Session.objects.filter(pk=session_of(sample).pk).update(finished_at=Now() - ago)


def be_silent(sample: Operation, time: timedelta) -> None:
    """Let the client have been silent for so long."""
    ServerClock.objects.update_or_create(pk=1, defaults={"uptime_s": 1e9})
    Session.objects.update(heard_uptime_s=1e9)
    Session.objects.filter(pk=session_of(sample).pk).update(heard_uptime_s=1e9 - time.total_seconds())


def left_of(sample: Operation) -> str:
    """Return what is left: everything, rows without content, or nothing, the session included."""
    session, row = session_of(sample), Operation.objects.filter(pk=sample.pk).first()
    if row is None:
        assert not SamplingSession.objects.filter(session=session).exists()
        return "rows" if Session.objects.filter(pk=session.pk).exists() else "nothing"
    has_payload, has_result = row.payload is not None or row.payload_file != "", row.result is not None
    assert has_payload == has_result or row.state != Operation.State.DONE
    return "all" if has_payload else "rows"


def test_of_a_closed_session_nothing_is_left_after_a_day(alice: User) -> None:
    sample, fresh, open_one = asked(alice), asked(alice), asked(alice)
    close(sample)
    close(fresh)
    Operation.objects.filter(pk=fresh.pk).update(finished_at=Now() - LATER / 2)
    expired_samples.forget()
    assert [left_of(one) for one in (sample, fresh, open_one)] == ["nothing", "all", "all"]


def test_a_silent_client_may_come_back_to_its_sampling_session(alice: User) -> None:
    sample = asked(alice)
    be_silent(sample, timedelta(seconds=sessions.SILENT_S - 1))
    expired_samples.forget()
    assert left_of(sample) == "all"
    be_silent(sample, timedelta(seconds=sessions.SILENT_S + 1))
    expired_samples.forget()
    assert left_of(sample) == "rows"
    be_silent(sample, expired_samples.KEEP_SILENT + timedelta(seconds=1))
    expired_samples.forget()
    assert left_of(sample) == "nothing"


def test_what_waits_stays(alice: User) -> None:
    sample = asked(alice, is_answered=False)
    close(sample)
    expired_samples.forget()
    assert left_of(sample) == "all"


def test_what_a_runs_page_shows_goes_with_the_run(alice: User, run: TrainingRun) -> None:
    drawn, fixed = asked(alice, rows.make_checkpoint(run)), asked(alice)
    FixedSample.objects.create(run=run, prompt="Who?", operation=fixed)
    Session.objects.update(finished_at=Now() - LATER)
    expired_samples.forget()
    assert [left_of(drawn), left_of(fixed)] == ["all", "all"]
    assert Session.objects.filter(pk=run.session_id).exists()


def test_samples_of_somebody_elses_weights_go(alice: User, run: TrainingRun) -> None:
    sample = asked(rows.make_user("bob"), rows.make_checkpoint(run, is_public=True))
    close(sample)
    expired_samples.forget()
    assert left_of(sample) == "nothing"


def test_a_session_with_a_run_stays_and_its_samples_of_the_base_model_go(
    alice: User, run: TrainingRun
) -> None:
    sample = asked(alice)
    SamplingSession.objects.filter(session=session_of(sample)).update(session=run.session)
    Session.objects.update(finished_at=Now() - LATER)
    expired_samples.forget()
    assert not Operation.objects.filter(pk=sample.pk).exists()
    assert not SamplingSession.objects.filter(session=run.session).exists()
    assert Session.objects.filter(pk=run.session_id).exists()


def test_a_payload_file_goes_too(
    alice: User, settings: Settings, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    settings.INLINE_PAYLOAD_BYTES = 4
    sample = asked(alice)
    close(sample)
    os.utime(default_storage.path(sample.payload_file), (0, 0))
    with django_capture_on_commit_callbacks(execute=True):
        expired_samples.forget()
    assert not default_storage.exists(sample.payload_file)
    assert left_of(sample) == "nothing"


def test_a_payload_file_that_cannot_be_deleted_holds_up_nothing(
    alice: User,
    settings: Settings,
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings.INLINE_PAYLOAD_BYTES = 4
    sample = asked(alice)
    close(sample)
    path = Path(default_storage.path(sample.payload_file))
    os.utime(path, (0, 0))
    in_the_way = path.with_name(f".old-{path.name}")
    in_the_way.mkdir()
    with django_capture_on_commit_callbacks(execute=True):
        expired_samples.forget()
    assert f"{sample.payload_file} could not be deleted" in caplog.text
    assert left_of(sample) == "nothing"
    in_the_way.rmdir()
    assert payload_files.delete_orphans(minute=int(path.name[:2], 16) // 8) >= 1
    assert not path.exists()


def test_many_go_in_batches(alice: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expired_samples, "_BATCH", 2)
    monkeypatch.setattr(expired_samples, "_BATCHES_AT_ONCE", 2)
    samples = [asked(alice) for _ in range(6)]
    for sample in samples:
        close(sample)
    expired_samples.forget()
    assert [left_of(one) for one in samples].count("nothing") == 4
    expired_samples.forget()
    assert {left_of(one) for one in samples} == {"nothing"}
