"""The real store under the requests of many replicas, without models.

    python -m benchmarks.store_load

A process starts the job's store as the trainer does; client processes make the protocol's requests. First as fast as
they can, by kind of request: what one costs the store. Then what benchmarks/simulate.py says that so many replicas ask
in their busiest seconds, each request at its time, on connections of its own, at that speed and faster.
Everything stays on this host. Writes benchmarks/results/store_load.json.
"""

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch.distributed as dist

from benchmarks.replicas import Outcome, Setting
from benchmarks.simulate import claimed
from shardes.world import join_job

OUT = Path("benchmarks/results/store_load.json")
RECORD = 60  # bytes of an iteration's record, per member
KINDS = ("claims", "posts", "looks", "heartbeats", "records")
LIMIT = 120.0  # seconds for clients to end


def serve(pipe: Connection) -> None:
    """Hold the store; answer "cpu" with this process's CPU seconds and resident bytes until told to end."""
    job = join_job(LIMIT)
    pipe.send(int(os.environ["MASTER_PORT"]))
    while pipe.recv() == "cpu":
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        pipe.send((time.process_time(), resident))
    del job


class Server:
    """The store's process."""

    def __init__(self, context):
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        assert self._pipe.poll(LIMIT), "the store did not start"
        self.port = self._pipe.recv()

    def used(self) -> tuple[float, int]:
        self._pipe.send("cpu")
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send("end")
        self._process.join(10)
        self._process.kill()


@contextmanager
def server() -> Iterator[Server]:
    started = Server(multiprocessing.get_context("spawn"))
    try:
        yield started
    finally:
        started.close()


def connect(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=LIMIT), wait_for_workers=False)


def requests(port: int, who: int, record: int) -> dict[str, Callable[[int], object]]:
    """The protocol's requests, by kind, on one connection; the argument numbers them. Kinds of two take turns."""
    store = connect(port)
    iteration = dist.PrefixStore("iteration 0", store)
    if record:
        iteration.set("record", "r" * record)
    return {
        "claims": lambda n: iteration.add("claimed", 1) if n % 2 else iteration.set(f"replica/{who}/{n}", str(who)),
        "posts": lambda n: (
            iteration.add("done", 1) if n % 2 else iteration.compare_set(f"found/{who}/{n}", "", "r" * 60)
        ),
        "looks": lambda n: iteration.add("done", 0),
        "heartbeats": lambda n: store.add(f"alive/{who}", 1),
        "takeovers": lambda n: iteration.compare_set(f"replica/{who}/{n}", str(who), "0"),
        "records": lambda n: iteration.get("record") if record else iteration.add("recorded", 0),
    }


def flood(port: int, who: int, kind: str, record: int, seconds: float, ready, results) -> None:
    """A client process: one kind of request as fast as it can."""
    ask = requests(port, who, record)[kind]
    ready.wait(LIMIT)
    took, end = [], time.perf_counter() + seconds
    while (now := time.perf_counter()) < end:
        ask(len(took))
        took.append(time.perf_counter() - now)
    results.put(took)


def replay(port: int, who: int, trace: list[tuple[float, str]], threads: int, speed: float, ready, results) -> None:
    """A client process: each request at its time; reports how long after that it was answered, and how long it took."""
    stores = [requests(port, who * threads + number, 0) for number in range(threads)]
    found: list[list[tuple[float, float]]] = [[] for _ in stores]
    ready.wait(LIMIT)
    start = time.perf_counter() + 0.2

    def play(number: int) -> None:
        for n, (when, kind) in enumerate(trace[number::threads]):
            due = start + when / speed
            if (early := due - time.perf_counter()) > 0:
                time.sleep(early)
            sent = time.perf_counter()
            stores[number][kind](n)
            now = time.perf_counter()
            found[number].append((now - due, now - sent))

    players = [threading.Thread(target=play, args=(number,)) for number in range(threads)]
    for player in players:
        player.start()
    for player in players:
        player.join()
    results.put([pair for each in found for pair in each])


def clients(target: Callable, arguments: list[tuple]) -> list[list]:
    """What one process for each of the arguments found; they start together."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(len(arguments)), context.Queue()
    processes = [context.Process(target=target, args=(*each, ready, results), daemon=True) for each in arguments]
    for process in processes:
        process.start()
    try:
        return [results.get(timeout=LIMIT) for _ in processes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def quantiles(took: np.ndarray) -> dict[str, float]:
    return {"median_ms": 1e3 * float(np.median(took)), "p99_ms": 1e3 * float(np.quantile(took, 0.99))}


def capacity(kind: str, processes: int, seconds: float, record: int = 0, idle: int = 0) -> dict:
    """What requests of a kind cost the store where clients ask as fast as they can, beside `idle` connections."""
    with server() as store:
        before = store.used()
        held = [connect(store.port) for _ in range(idle)]
        after = store.used()
        per_connection = (after[1] - before[1]) / idle if idle else None
        # The store's CPU time over the whole life of the clients: connecting is some milliseconds of it.
        found = clients(flood, [(store.port, who, kind, record, seconds) for who in range(processes)])
        cpu = store.used()[0] - after[0]
        del held
    took = np.concatenate(found)
    return {
        "kind": kind, "clients": processes, "idle_connections": idle, "bytes": record, "requests": len(took),
        "per_second": len(took) / seconds, "store_cpu_us": 1e6 * cpu / len(took), "store_cpu_share": cpu / seconds,
        "bytes_per_connection": per_connection, **quantiles(took),
    }  # fmt: skip


def busiest(outcome: Outcome, seconds: float) -> list[tuple[float, str]]:
    """The requests within the window of so many whole seconds that has the most, by their time in it."""
    times = np.concatenate(list(outcome.requests.values()))
    counts = np.bincount(times.astype(int))
    first = int(np.convolve(counts, np.ones(int(seconds), int), "valid").argmax())
    window = [
        (float(when) - first, kind)
        for kind, when_all in outcome.requests.items()
        for when in when_all[(when_all >= first) & (when_all < first + seconds)]
    ]
    return sorted(window)


def under_load(trace: list[tuple[float, str]], speed: float, processes: int, threads: int, seconds: float) -> dict:
    """The trace played on the store, `speed` times as fast as it was."""
    with server() as store:
        before = store.used()[0]
        shares = [(store.port, who, trace[who::processes], threads, speed) for who in range(processes)]
        found = clients(replay, shares)
        cpu = store.used()[0] - before
    late, took = np.array([pair for each in found for pair in each]).T
    # Until the last answer: where that comes after its time, the offered rate was not reached.
    lasted = max(seconds / speed, float((np.array([when for when, _ in trace]).max() / speed) + late.max()))
    return {
        "speed": speed, "requests": len(trace), "offered_per_second": len(trace) * speed / seconds,
        "reached_per_second": len(trace) / lasted, "store_cpu_us": 1e6 * cpu / len(trace),
        "store_cpu_share": cpu / lasted, "request": quantiles(took), "after_its_time": quantiles(late),
    }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.store_load", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=5, help="of each measurement; default: %(default)s")
    parser.add_argument("--processes", type=int, default=4, help="clients; default: %(default)s")
    parser.add_argument("--threads", type=int, default=16, help="connections of each; default: %(default)s")
    parser.add_argument("--replicas", type=int, nargs="*", default=[100, 1000, 10_000], help="default: %(default)s")
    parser.add_argument("--per-replica", type=int, default=4, help="members of each; default: %(default)s")
    parser.add_argument("--speeds", type=float, nargs="*", default=[1, 2, 4], help="default: %(default)s")
    parser.add_argument("--idle", type=int, default=2000, help="connections beside; default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    options = parser.parse_args(argv)
    report = {"command": f"python -m benchmarks.store_load {' '.join(argv)}".strip(), "capacity": [], "load": []}

    cases = [(kind, 0, 0) for kind in KINDS[:-1]] + [("looks", 0, options.idle)]
    cases += [("records", RECORD * options.per_replica * count, 0) for count in options.replicas]
    for kind, record, idle in cases:
        row = capacity(kind, options.processes, options.seconds, record, idle)
        report["capacity"].append(row)
        print(
            f"{kind:<11} {record:>8} bytes, {idle} idle connections: {row['per_second']:.0f}/s, the store takes "
            f"{row['store_cpu_us']:.1f} µs each, {100 * row['store_cpu_share']:.0f} % of a core", flush=True
        )  # fmt: skip
    for count in options.replicas:
        setting = simulated(count, options.per_replica)
        trace = busiest(claimed(setting), options.seconds)
        for speed in options.speeds:
            row = under_load(trace, speed, options.processes, options.threads, options.seconds)
            report["load"].append({"replicas": count, "members": setting.members} | row)
            print(
                f"{count} replicas × {speed:g}: {row['offered_per_second']:.0f}/s asked, "
                f"{row['reached_per_second']:.0f} reached, {row['request']['median_ms']:.2f} ms, 99 %: "
                f"{row['request']['p99_ms']:.1f} ms; store {100 * row['store_cpu_share']:.0f} % of a core", flush=True
            )  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def simulated(replicas: int, per_replica: int) -> Setting:
    from benchmarks.scaling import setting

    return setting(replicas, per_replica, iterations=2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
