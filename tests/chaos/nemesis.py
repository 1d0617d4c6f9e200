"""Does what the plan says to the stage, and notes when and whom it hit."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import redis

from mintweb import embedded
from tests.chaos.plan import Fault
from tests.chaos.stage import Holding, Process, Stage, StageError

_REACHED_S: Final = 10.0
_SETTLED_S: Final = 120.0


@dataclass(kw_only=True)
class Strike:
    """One fault that has happened: when, to which runs, and whether it came out as planned."""

    fault: Fault
    at: float
    hit: list[Holding] = field(default_factory=list)
    is_as_planned: bool = True
    has_settled: bool = False


class Nemesis:
    """Performs faults one after the other."""

    def __init__(self, stage: Stage) -> None:
        self.strikes: list[Strike] = []
        self._stage = stage
        self._acts: dict[str, Callable[[Fault], Strike]] = {
            "kill_worker": self._kill_worker,
            "kill_at_failpoint": self._kill_at_failpoint,
            "kill_web": self._kill_web,
            "kill_everything": self._kill_everything,
            "freeze_worker": self._freeze_worker,
            "freeze_at_failpoint": self._freeze_at_failpoint,
            "redis_flush": self._redis_flush,
            "redis_kill": lambda fault: self._redis_ends(fault, signal.SIGKILL),
            "redis_restart": lambda fault: self._redis_ends(fault, signal.SIGTERM),
            "postgres_restart": lambda fault: self._postgres_ends(fault, signal.SIGINT),
            "postgres_crash": lambda fault: self._postgres_ends(fault, signal.SIGQUIT),
            "postgres_kill": lambda fault: self._postgres_ends(fault, signal.SIGKILL),
            "postgres_disconnect": self._postgres_disconnect,
        }

    def perform(self, fault: Fault) -> None:
        """Let a fault happen, and wait for its end where the plan says so."""
        self._stage.wait(fault.delay_s)
        strike = self._acts[fault.kind](fault)
        self.strikes.append(strike)
        if fault.settles:
            self._stage.until(
                lambda: self._has_settled(strike), what=f"all goes on after {strike}", patience_s=_SETTLED_S
            )
            strike.has_settled = True

    # Deaths -------------------------------------------------------------------------------------

    def _kill_worker(self, fault: Fault) -> Strike:
        victim, hit = self._victim(fault.rank)
        self._stage.kill(victim)
        return Strike(fault=fault, at=time.time(), hit=hit)

    def _kill_web(self, fault: Fault) -> Strike:
        self._stage.until(lambda: self._stage.web.pid, what="a web server is born")
        self._stage.kill(self._stage.web)
        return Strike(fault=fault, at=time.time())

    def _kill_everything(self, fault: Fault) -> Strike:
        hit = [holding for held in self._stage.holdings().values() for holding in held]
        for process in [self._stage.web, *self._stage.workers]:
            if process.pid:
                self._stage.kill(process)
        return Strike(fault=fault, at=time.time(), hit=hit)

    def _kill_at_failpoint(self, fault: Fault) -> Strike:
        """The holder dies at the point; to die while replaying, it is killed and the others are armed."""
        victim, hit = self._victim(fault.rank)
        armed = [victim]
        if fault.failpoint.startswith("during_replay"):
            armed = [process for process in self._stage.awake_workers() if process is not victim]
        pids = [process.pid for process in armed]
        for process in armed:
            self._stage.arm(process, fault.failpoint)
        if victim not in armed:
            self._stage.kill(victim)
        at = time.time()
        is_as_planned = self._comes_about(
            lambda: any(process.pid != pid for process, pid in zip(armed, pids, strict=True))
        )
        for process, pid in zip(armed, pids, strict=True):
            if process.pid == pid:
                self._stage.arm(process, "")
        if not is_as_planned and victim in armed and victim.pid == pids[0]:
            self._stage.kill(victim)
        return Strike(
            fault=fault, at=time.time() if victim in armed else at, hit=hit, is_as_planned=is_as_planned
        )

    # Freezes ------------------------------------------------------------------------------------

    def _freeze_worker(self, fault: Fault) -> Strike:
        self._let_one_wake()
        victim, hit = self._victim(0)
        self._stage.freeze(victim, lasts_s=fault.lasts_s * self._stage.pace["lease_s"])
        return Strike(fault=fault, at=time.time(), hit=hit)

    def _freeze_at_failpoint(self, fault: Fault) -> Strike:
        self._let_one_wake()
        victim, hit = self._victim(0)
        pid = victim.pid
        self._stage.arm(victim, fault.failpoint)
        is_as_planned = self._comes_about(lambda: victim.pid != pid or _is_stopped(pid))
        if victim.pid == pid:
            self._stage.freeze(victim, lasts_s=fault.lasts_s * self._stage.pace["lease_s"])
        return Strike(fault=fault, at=time.time(), hit=hit, is_as_planned=is_as_planned)

    def _let_one_wake(self) -> None:
        """Leave two workers awake, so that one can take over while the other is killed."""
        limit = max(1, len(self._stage.workers) - 2)
        self._stage.until(lambda: self._stage.num_frozen() < limit, what="a frozen worker wakes")

    # What the product stands on -----------------------------------------------------------------

    def _redis_flush(self, fault: Fault) -> Strike:
        with redis.Redis.from_url(embedded.redis_url(self._stage.folder)) as server:
            server.flushall()
        return Strike(fault=fault, at=time.time())

    def _redis_ends(self, fault: Fault, how: signal.Signals) -> Strike:
        self._stage.end_server("redis", how)
        at = time.time()
        self._stage.wait(fault.lasts_s)
        self._stage.start_redis()
        return Strike(fault=fault, at=at)

    def _postgres_ends(self, fault: Fault, how: signal.Signals) -> Strike:
        self._stage.end_server("postgres", how)
        at = time.time()
        self._stage.wait(fault.lasts_s)
        self._stage.start_postgres()
        return Strike(fault=fault, at=at)

    def _postgres_disconnect(self, fault: Fault) -> Strike:
        self._stage.rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE usename = current_user AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        return Strike(fault=fault, at=time.time())

    # Below --------------------------------------------------------------------------------------

    def _victim(self, rank: int) -> tuple[Process, list[Holding]]:
        """Return an awake worker that holds runs, by the number of them; any if nobody holds one for long."""
        held: dict[int, list[Holding]] = {}

        def somebody_holds() -> bool:
            nonlocal held
            held = self._stage.holdings()
            return any(held.get(process.pid) for process in self._stage.awake_workers())

        self._comes_about(somebody_holds)
        self._stage.until(self._stage.awake_workers, what="a worker is awake")
        order = sorted(self._stage.awake_workers(), key=lambda one: -len(held.get(one.pid, ())))
        holders = [process for process in order if held.get(process.pid)] or order
        victim = holders[min(rank, len(holders) - 1)]
        return victim, held.get(victim.pid, [])

    def _comes_about(self, condition: Callable[[], bool]) -> bool:
        try:
            self._stage.until(condition, what="", patience_s=_REACHED_S)
        except StageError:
            return False
        return True

    def _has_settled(self, strike: Strike) -> bool:
        """Say whether all runs that were hit go on: those of the dead with their next owner, others with any."""
        runs, fences = [one.run_pk for one in strike.hit], [one.fence for one in strike.hit]
        if strike.fault.family == "kill" and strike.hit:
            waiting = self._stage.rows(
                "SELECT 1 FROM unnest(%s::bigint[], %s::bigint[]) AS hit(run_id, fence) WHERE hit.fence >= ("
                "SELECT fence FROM runs_operation o WHERE o.run_id = hit.run_id AND o.state <> 'queued'"
                " ORDER BY seq DESC LIMIT 1)",
                runs,
                fences,
            )
            return not waiting
        ((last,),) = self._stage.rows(
            "SELECT EXTRACT(EPOCH FROM CASE WHEN %s THEN max(last_applied_at) ELSE"
            " min(last_applied_at) FILTER (WHERE id = ANY(%s::bigint[])) END) FROM runs_trainingrun",
            not runs,
            runs,
        )
        return float(last or 0) > strike.at


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
