"""Load a real store with the requests of many replicas, without models.

    python -m benchmarks.store_load

One process starts the job's store as the trainer does, and client processes send the requests of
the protocol. The first part sends one kind of request at the highest rate, to measure what each
costs the store. The second part replays the busiest seconds of benchmarks/simulate.py, each request
at its time or several times as fast. Everything stays on this host. Writes
results/scaling/store.json.
"""

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch.distributed as dist

from benchmarks.replicas import Outcome
from benchmarks.scaling import setting
from benchmarks.simulate import simulate
from shardes.distributed.world import join_job
from shardes.replicas import gateway_client
from shardes.replicas.gateway import StoreGateway
from shardes.replicas.protocol import MemberResult, RunStore, Welcome
from shardes.replicas.validation import ResultLimits
from shardes.storage.journal import Header, Journal, Record

OUT = Path("results/scaling/store.json")
RECORD = 60  # bytes of an iteration's record, per member
TOKEN = "token of the benchmark"
LIMITS = ResultLimits(10**9, 32, False, 64, 1, ())
KINDS = ("claims", "posts", "polls", "heartbeats")
LIMIT = 300.0  # seconds that a process waits for another
WARM_UP = 4.0  # seconds for clients to connect
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["shardes.replicas.gateway_client", "benchmarks.scaling"])


def serve(pipe: Connection, through_gateway: bool, records: Sequence[int]) -> None:
    """Hold the store, with records of so many bytes, and a gateway if asked, until told to end.

    Answers "used" with the CPU seconds and resident bytes of this process.
    """
    job = join_job(LIMIT)
    port = int(os.environ["MASTER_PORT"])
    store = connect(port, False)
    begin_run(store, records)
    with ExitStack() as stack:
        if through_gateway:
            directory = stack.enter_context(TemporaryDirectory())
            server = stack.enter_context(closing(open_gateway(store, records, Path(directory))))
            port = server.port
        pipe.send(port)
        page = os.sysconf("SC_PAGE_SIZE")
        while pipe.recv() == "used":
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            pipe.send((time.process_time(), resident))
    del job


def begin_run(store: RunStore, records: Sequence[int]) -> None:
    """Set what the primary rank sets, and for each number of bytes a record that is so long."""
    store.welcome(Welcome(Header("model", {}, {}), 1))
    for iteration, length in enumerate(records):
        store.publish(record_of(iteration, length))


def record_of(iteration: int, length: int) -> Record:
    """A record whose JSON has about so many bytes."""
    return Record(iteration, [1], [0.5], [0.0], 0.1, 0.1, "d" * length)


def open_gateway(store: RunStore, records: Sequence[int], directory: Path) -> StoreGateway:
    """A gateway to a store with records of so many bytes, whose journal is in a new directory."""
    journal = Journal(directory / "journal.jsonl", None)
    journal.append(Header("model", {}, {}))
    for iteration, length in enumerate(records):
        journal.append(record_of(iteration, length))
    journal.close()
    return StoreGateway("127.0.0.1", 0, TOKEN, store, LIMITS, journal.path, 60, print)


def connect(port: int, through_gateway: bool) -> RunStore:
    if through_gateway:
        return gateway_client.connect(f"127.0.0.1:{port}", TOKEN, LIMIT)
    limit = timedelta(seconds=LIMIT)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit, wait_for_workers=False)
    return RunStore(store, "run")


def requests(
    port: int, through_gateway: bool, record: int | None
) -> dict[str, Callable[[int], object]]:
    """The protocol's requests on one connection, by kind; see `shardes.replicas.protocol`.

    The argument numbers the requests of a kind. Two requests that follow each other take turns.

    Args:
        record: the iteration of the record. None: that which is not finished.
    """
    run = connect(port, through_gateway)
    own, unfinished = run.take_replica_number(), run.number_finished()
    store, queue, first = run.keys, f"iteration {unfinished}", own % 900 * 10**6
    result = f"{own}:{MemberResult(0.4375, 800, own, time.time()).to_json()}"
    return {
        "claims": lambda n: (
            store.add(f"{queue}/claimed", 1)
            if n % 2
            else store.set(f"{queue}/claimant/{first + n}", str(own))
        ),
        "posts": lambda n: (
            store.add(f"{queue}/done", 1)
            if n % 2
            else store.compare_set(f"{queue}/result/{first + n}", "", result)
        ),
        "polls": lambda n: store.add(f"{queue}/done", 0),
        "looks": lambda n: run.is_finished(unfinished),
        "heartbeats": lambda n: store.add(f"heartbeat/{own}", 1),
        "takeovers": lambda n: store.compare_set(f"{queue}/claimant/{first + n}", "0", str(own)),
        "records": lambda n: run.is_finished(unfinished) if record is None else run.record(record),
    }


def flood(
    port: int, through_gateway: bool, kind: str, record: int | None, seconds: float, begin: float
) -> np.ndarray:
    """In a client process: send one kind of request at the highest rate; the seconds of each."""
    request = requests(port, through_gateway, record)[kind]
    time.sleep(max(0.0, begin - time.time()))
    times, end = [], time.perf_counter() + seconds
    while (now := time.perf_counter()) < end:
        request(len(times))
        times.append(time.perf_counter() - now)
    return np.array(times)


def replay(
    port: int,
    through_gateway: bool,
    trace: list[tuple[float, str]],
    threads: int,
    speed: float,
    begin: float,
) -> np.ndarray:
    """In a client process: send each request at its time.

    Returns for each request the seconds from its time, and from its start, to the answer.
    """
    connections = [requests(port, through_gateway, None) for _ in range(threads)]
    times: list[list[tuple[float, float]]] = [[] for _ in connections]
    start = time.perf_counter() + begin - time.time()

    def play(number: int) -> None:
        for n, (when, kind) in enumerate(trace[number::threads]):
            due = start + when / speed
            if (early := due - time.perf_counter()) > 0:
                time.sleep(early)
            sent = time.perf_counter()
            connections[number][kind](n)
            now = time.perf_counter()
            times[number].append((now - due, now - sent))

    players = [threading.Thread(target=play, args=(number,)) for number in range(threads)]
    for player in players:
        player.start()
    for player in players:
        player.join()
    return np.array([pair for each in times for pair in each])


class Bench:
    """The process of a store and those of its clients; a context."""

    def __init__(self, processes: int, through_gateway: bool, records: Sequence[int]):
        self.processes, self.through_gateway, self.records = processes, through_gateway, records
        self._pipe, server_pipe = CONTEXT.Pipe()
        arguments = server_pipe, through_gateway, records
        self._server = CONTEXT.Process(target=serve, args=arguments, daemon=True)
        self._pool = ProcessPoolExecutor(processes, mp_context=CONTEXT)

    def __enter__(self) -> "Bench":
        self._server.start()
        assert self._pipe.poll(LIMIT), "the store did not start"
        self.port = self._pipe.recv()
        # Starts each of the pool's processes.
        started = [self._pool.submit(time.sleep, WARM_UP) for _ in range(self.processes)]
        for future in started:
            future.result(LIMIT)
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._pipe.send("end")
        self._server.join(10)
        self._server.kill()

    def used(self) -> tuple[float, int]:
        """The CPU seconds and resident bytes of the store's process."""
        self._pipe.send("used")
        return self._pipe.recv()

    def measure(self, target: Callable, arguments: list[tuple]) -> tuple[np.ndarray, float]:
        """Call `target` in a client process for each of the arguments, all at the same time.

        Returns the concatenated results, and the CPU seconds of the store meanwhile.
        """
        begin = time.time() + WARM_UP
        futures = [
            self._pool.submit(target, self.port, self.through_gateway, *each, begin)
            for each in arguments
        ]
        time.sleep(max(0.0, begin - time.time()))
        before, _ = self.used()
        results = np.concatenate([future.result(LIMIT) for future in futures])
        return results, self.used()[0] - before


def capacity(
    bench: Bench, kind: str, seconds: float, record: int | None = None, idle: int = 0
) -> dict:
    """The cost of one kind of request at the highest rate, beside `idle` other connections."""
    _, before = bench.used()
    connections = [connect(bench.port, bench.through_gateway) for _ in range(idle)]
    per_connection = (bench.used()[1] - before) / idle if idle else None
    times, cpu = bench.measure(flood, [(kind, record, seconds)] * bench.processes)
    del connections
    return {
        "kind": kind,
        "clients": bench.processes,
        "idle_connections": idle,
        "bytes": 0 if record is None else bench.records[record],
        "requests": len(times),
        "per_second": len(times) / seconds,
        "store_cpu_us": 1e6 * cpu / len(times),
        "store_cpu_share": cpu / seconds,
        "bytes_per_connection": per_connection,
        **quantiles(times),
    }


def under_load(
    bench: Bench, trace: list[tuple[float, str]], speed: float, threads: int, seconds: float
) -> dict:
    """Replay a trace of `seconds` seconds, `speed` times as fast."""
    count = bench.processes
    shares = [(trace[number::count], threads, speed) for number in range(count)]
    times, cpu = bench.measure(replay, shares)
    late, duration = times.T
    # If the last answer comes late, the offered rate was not reached.
    lasted = max(seconds / speed, trace[-1][0] / speed + float(late.max()))
    return {
        "speed": speed,
        "requests": len(trace),
        "offered_per_second": len(trace) * speed / seconds,
        "reached_per_second": len(trace) / lasted,
        "store_cpu_us": 1e6 * cpu / len(trace),
        "store_cpu_share": cpu / lasted,
        "request": quantiles(duration),
        "after_its_time": quantiles(late),
    }


def quantiles(times: np.ndarray) -> dict[str, float]:
    return {
        "median_ms": 1e3 * float(np.median(times)),
        "p99_ms": 1e3 * float(np.quantile(times, 0.99)),
    }


def busiest(outcome: Outcome, seconds: float) -> list[tuple[float, str]]:
    """The requests in the busiest window of `seconds` whole seconds: (time in the window, kind)."""
    times = np.concatenate(list(outcome.requests.values()))
    counts = np.bincount(times.astype(int))
    first = int(np.convolve(counts, np.ones(int(seconds), int), "valid").argmax())
    window = [
        (float(when) - first, kind)
        for kind, times in outcome.requests.items()
        for when in times[(times >= first) & (times < first + seconds)]
    ]
    return sorted(window)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.store_load", description=__doc__.splitlines()[0]
    )

    def add_number(flag: str, default: int, unit: str) -> None:
        parser.add_argument(flag, type=int, default=default, help=f"{unit}; default: %(default)s")

    add_number("--seconds", 3, "per measurement")
    add_number("--processes", 4, "clients")
    add_number("--threads", 16, "connections per client")
    add_number("--per-replica", 4, "members per replica")
    add_number("--idle", 1000, "idle connections")
    parser.add_argument(
        "--replicas", type=int, nargs="*", default=[100, 1000, 10_000], help="default: %(default)s"
    )
    parser.add_argument(
        "--speeds", type=float, nargs="*", default=[1, 2, 4], help="default: %(default)s"
    )
    parser.add_argument(
        "--door",
        dest="through_gateway",
        action="store_true",
        help="connect through the gateway, as replicas that joined do",
    )
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    command = f"python -m benchmarks.store_load {' '.join(argv)}".strip()
    report = {"command": command, "capacity": [], "load": []}
    records = [RECORD * options.per_replica * count for count in options.replicas]
    with Bench(options.processes, options.through_gateway, records) as bench:
        measure(bench, options, report)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(bench: Bench, options: argparse.Namespace, report: dict) -> None:
    cases: list[tuple[str, int | None, int]] = [(kind, None, 0) for kind in KINDS]
    cases += [("polls", None, options.idle)]
    cases += [("records", iteration, 0) for iteration in range(len(bench.records))]
    for kind, record, idle in cases:
        row = capacity(bench, kind, options.seconds, record, idle)
        report["capacity"].append(row)
        print(
            f"{kind:<11} {row['bytes']:>8} bytes, {idle} idle connections: "
            f"{row['per_second']:.0f}/s, "
            f"{row['store_cpu_us']:.1f} µs of the store's CPU each, "
            f"{100 * row['store_cpu_share']:.0f} % of a core",
            flush=True,
        )
    for count in options.replicas:
        simulated = setting(count, options.per_replica, iterations=2)
        trace = busiest(simulate(simulated), options.seconds)
        for speed in options.speeds:
            row = under_load(bench, trace, speed, options.threads, options.seconds)
            report["load"].append({"replicas": count, "members": simulated.members} | row)
            print(
                f"{count} replicas × {speed:g}: {row['offered_per_second']:.0f}/s offered, "
                f"{row['reached_per_second']:.0f} reached, {row['request']['median_ms']:.2f} ms, "
                f"99 %: {row['request']['p99_ms']:.1f} ms; "
                f"store {100 * row['store_cpu_share']:.0f} % of a core",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
