"""The real store under the requests of many replicas, without models.

    python -m benchmarks.store_load

A process starts the job's store as the trainer does; client processes make the protocol's requests. First as fast as
they can, by kind of request: what one costs the store. Then what benchmarks/simulate.py says that so many replicas ask
in their busiest seconds, each request at its time, on connections of its own, at that speed and faster.
Everything stays on this host. Writes results/scaling/store.json.
"""

import argparse
import json
import multiprocessing
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch.distributed as dist

from benchmarks.replicas import Outcome
from benchmarks.scaling import setting
from benchmarks.simulate import claimed
from shardes.door import Door, enter
from shardes.world import join_job

OUT = Path("results/scaling/store.json")
RECORD = 60  # bytes of an iteration's record, per member
TOKEN = "benchmark"
KINDS = ("claims", "posts", "looks", "heartbeats", "records")
LIMIT = 300.0  # seconds that anyone waits for another
WARM_UP = 4.0  # seconds for clients to connect
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["shardes.door", "benchmarks.scaling"])


def serve(pipe: Connection, door: bool) -> None:
    """Hold the store, and the door if asked; answer "used" with this process's CPU seconds and resident bytes."""
    job = join_job(LIMIT)
    port = int(os.environ["MASTER_PORT"])
    if door:
        opened = Door("127.0.0.1", 0, TOKEN, connect(port, False), "room", 60)
        port = opened.port
    pipe.send(port)
    while pipe.recv() == "used":
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        pipe.send((time.process_time(), resident))
    if door:
        opened.close()
    del job


def connect(port: int, door: bool) -> dist.Store:
    if door:
        return enter(f"127.0.0.1:{port}", TOKEN, LIMIT)
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=LIMIT), wait_for_workers=False)


def requests(port: int, door: bool, record: int) -> dict[str, Callable[[int], object]]:
    """The protocol's requests, by kind, on one connection; the argument numbers them. Kinds of two take turns."""
    store, who = connect(port, door), secrets.token_hex(4)
    iteration = dist.PrefixStore(f"iteration {who}", store)
    if record:
        iteration.set("record", "r" * record)
    return {
        "claims": lambda n: iteration.add("claimed", 1) if n % 2 else iteration.set(f"replica/{n}", who),
        "posts": lambda n: iteration.add("done", 1) if n % 2 else iteration.compare_set(f"found/{n}", "", "r" * 60),
        "looks": lambda n: iteration.add("done", 0),
        "heartbeats": lambda n: store.add(f"alive/{who}", 1),
        "takeovers": lambda n: iteration.compare_set(f"replica/{n}", who, "0"),
        "records": lambda n: iteration.get("record") if record else iteration.add("recorded", 0),
    }


def flood(port: int, door: bool, kind: str, record: int, seconds: float, begin: float) -> np.ndarray:
    """In a client process: one kind of request as fast as it can; [how long each took]."""
    ask = requests(port, door, record)[kind]
    time.sleep(max(0.0, begin - time.time()))
    took, end = [], time.perf_counter() + seconds
    while (now := time.perf_counter()) < end:
        ask(len(took))
        took.append(time.perf_counter() - now)
    return np.array(took)


def replay(
    port: int, door: bool, trace: list[tuple[float, str]], threads: int, speed: float, begin: float
) -> np.ndarray:
    """In a client process: each request at its time; [how long after that it was answered, how long it took]."""
    connections = [requests(port, door, 0) for _ in range(threads)]
    found: list[list[tuple[float, float]]] = [[] for _ in connections]
    start = time.perf_counter() + begin - time.time()

    def play(number: int) -> None:
        for n, (when, kind) in enumerate(trace[number::threads]):
            due = start + when / speed
            if (early := due - time.perf_counter()) > 0:
                time.sleep(early)
            sent = time.perf_counter()
            connections[number][kind](n)
            now = time.perf_counter()
            found[number].append((now - due, now - sent))

    players = [threading.Thread(target=play, args=(number,)) for number in range(threads)]
    for player in players:
        player.start()
    for player in players:
        player.join()
    return np.array([pair for each in found for pair in each])


class Bench:
    """A store's process and its clients'; a context."""

    def __init__(self, processes: int, door: bool):
        self.processes, self.door = processes, door
        self._pipe, theirs = CONTEXT.Pipe()
        self._server = CONTEXT.Process(target=serve, args=(theirs, door), daemon=True)
        self._pool = ProcessPoolExecutor(processes, mp_context=CONTEXT)

    def __enter__(self) -> "Bench":
        self._server.start()
        assert self._pipe.poll(LIMIT), "the store did not start"
        self.port = self._pipe.recv()
        ready = [self._pool.submit(time.sleep, WARM_UP) for _ in range(self.processes)]  # one for each process
        for each in ready:
            each.result(LIMIT)
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._pipe.send("end")
        self._server.join(10)
        self._server.kill()

    def used(self) -> tuple[float, int]:
        """The store's process: CPU seconds and resident bytes."""
        self._pipe.send("used")
        return self._pipe.recv()

    def ask(self, target: Callable, arguments: list[tuple]) -> tuple[np.ndarray, float]:
        """What the clients found, one for each of the arguments, and the store's CPU seconds meanwhile.

        They begin together once all have connected.
        """
        begin = time.time() + WARM_UP
        futures = [self._pool.submit(target, self.port, self.door, *each, begin) for each in arguments]
        time.sleep(max(0.0, begin - time.time()))
        before, _ = self.used()
        found = np.concatenate([future.result(LIMIT) for future in futures])
        return found, self.used()[0] - before


def capacity(bench: Bench, kind: str, seconds: float, record: int = 0, idle: int = 0) -> dict:
    """What requests of a kind cost the store where clients ask as fast as they can, beside `idle` connections."""
    _, before = bench.used()
    held = [connect(bench.port, bench.door) for _ in range(idle)]
    per_connection = (bench.used()[1] - before) / idle if idle else None
    took, cpu = bench.ask(flood, [(kind, record, seconds)] * bench.processes)
    del held
    return {
        "kind": kind, "clients": bench.processes, "idle_connections": idle, "bytes": record, "requests": len(took),
        "per_second": len(took) / seconds, "store_cpu_us": 1e6 * cpu / len(took), "store_cpu_share": cpu / seconds,
        "bytes_per_connection": per_connection, **quantiles(took),
    }  # fmt: skip


def under_load(bench: Bench, trace: list[tuple[float, str]], speed: float, threads: int, seconds: float) -> dict:
    """The trace played on the store, `speed` times as fast as it was."""
    shares = [(trace[who :: bench.processes], threads, speed) for who in range(bench.processes)]
    found, cpu = bench.ask(replay, shares)
    late, took = found.T
    # Until the last answer: where that comes after its time, the offered rate was not reached.
    lasted = max(seconds / speed, trace[-1][0] / speed + float(late.max()))
    return {
        "speed": speed, "requests": len(trace), "offered_per_second": len(trace) * speed / seconds,
        "reached_per_second": len(trace) / lasted, "store_cpu_us": 1e6 * cpu / len(trace),
        "store_cpu_share": cpu / lasted, "request": quantiles(took), "after_its_time": quantiles(late),
    }  # fmt: skip


def quantiles(took: np.ndarray) -> dict[str, float]:
    return {"median_ms": 1e3 * float(np.median(took)), "p99_ms": 1e3 * float(np.quantile(took, 0.99))}


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


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.store_load", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=3, help="of each measurement; default: %(default)s")
    parser.add_argument("--processes", type=int, default=4, help="clients; default: %(default)s")
    parser.add_argument("--threads", type=int, default=16, help="connections of each; default: %(default)s")
    parser.add_argument("--replicas", type=int, nargs="*", default=[100, 1000, 10_000], help="default: %(default)s")
    parser.add_argument("--per-replica", type=int, default=4, help="members of each; default: %(default)s")
    parser.add_argument("--speeds", type=float, nargs="*", default=[1, 2, 4], help="default: %(default)s")
    parser.add_argument("--idle", type=int, default=1000, help="connections beside; default: %(default)s")
    parser.add_argument("--door", action="store_true", help="through the door, as replicas that joined")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    options = parser.parse_args(argv)
    report = {"command": f"python -m benchmarks.store_load {' '.join(argv)}".strip(), "capacity": [], "load": []}

    with Bench(options.processes, options.door) as bench:
        measure(bench, options, report)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(bench: Bench, options: argparse.Namespace, report: dict) -> None:
    cases = [(kind, 0, 0) for kind in KINDS[:-1]] + [("looks", 0, options.idle)]
    cases += [("records", RECORD * options.per_replica * count, 0) for count in options.replicas]
    for kind, record, idle in cases:
        row = capacity(bench, kind, options.seconds, record, idle)
        report["capacity"].append(row)
        print(
            f"{kind:<11} {record:>8} bytes, {idle} idle connections: {row['per_second']:.0f}/s, the store takes "
            f"{row['store_cpu_us']:.1f} µs each, {100 * row['store_cpu_share']:.0f} % of a core", flush=True
        )  # fmt: skip
    for count in options.replicas:
        at = setting(count, options.per_replica, iterations=2)
        trace = busiest(claimed(at), options.seconds)
        for speed in options.speeds:
            row = under_load(bench, trace, speed, options.threads, options.seconds)
            report["load"].append({"replicas": count, "members": at.members} | row)
            print(
                f"{count} replicas × {speed:g}: {row['offered_per_second']:.0f}/s asked, "
                f"{row['reached_per_second']:.0f} reached, {row['request']['median_ms']:.2f} ms, 99 %: "
                f"{row['request']['p99_ms']:.1f} ms; store {100 * row['store_cpu_share']:.0f} % of a core", flush=True
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
