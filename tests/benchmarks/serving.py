"""What recording, authentication and metrics cost: our server beside a bare `vllm serve` of the same model.

Both servers run; `vllm bench serve` loads one and then the other, in turn, several times, the order changing:
16 requests at once for the throughput, then one at a time for the time to the first token (TTFT). Each
figure is a median over the rounds. The CPU time of a token is that of a server with its engine's processes;
its ratio holds on a machine that is busy otherwise too. Run it with `make bench-serving`: under ten minutes
on two cores. Prints a table, and fails where a bound is missed.
"""

import argparse
import statistics
import sys

from tests.benchmarks.serving_load import Load, Server, bare_server, our_server, run, table

LEAST_THROUGHPUT = 0.97
MOST_TTFT_SECONDS = 0.003


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64, help="of a round's throughput")
    parser.add_argument("--first-tokens", type=int, default=40, help="requests of a round's TTFT")
    options = parser.parse_args()
    with our_server() as (ours, _), bare_server() as bare:
        rows: list[list[object]] = [
            ["round", "server", "tokens/s", "cpu ms/token", "TTFT ms", "TTFT ms (16)"]
        ]
        found: dict[str, list[list[float]]] = {"ours": [], "bare": []}
        for number in range(options.rounds + 1):
            for server in (ours, bare) if number % 2 else (bare, ours):
                figures = measured(server, options.requests, options.first_tokens, seed=number)
                # The first round warms up.
                if number:
                    found[server.name].append(figures)
                    rows.append([number, server.name, *figures])
    print(table(rows))
    throughput, cpu = (
        statistics.median(a[i] / b[i] for a, b in zip(found["ours"], found["bare"], strict=True))
        for i in (0, 1)
    )
    ttft, loaded = (
        statistics.median(a[i] - b[i] for a, b in zip(found["ours"], found["bare"], strict=True))
        for i in (2, 3)
    )
    print(f"throughput, ours / bare: {throughput:.3f} (at least {LEAST_THROUGHPUT})")
    print(f"CPU time of a token, ours / bare: {cpu:.3f}")
    print(
        f"median TTFT, ours - bare: {ttft:.2f} ms (at most {1000 * MOST_TTFT_SECONDS:.0f}); "
        f"among 16 requests {loaded:.2f} ms"
    )
    sys.exit(throughput < LEAST_THROUGHPUT or ttft > 1000 * MOST_TTFT_SECONDS)


def measured(server: Server, requests: int, first_tokens: int, *, seed: int) -> list[float]:
    """Tokens a second, CPU ms a token, and the median TTFT in ms, alone and among 16."""
    before = server.cpu_seconds()
    loaded = whole(run(server, requests=requests, concurrency=16, prompt=64, answer=64, seed=seed))
    cpu = (server.cpu_seconds() - before) / loaded.tokens
    alone = whole(run(server, requests=first_tokens, concurrency=1, prompt=64, answer=2, seed=seed))
    ttfts = [1000 * statistics.median(load.ttfts) for load in (alone, loaded)]
    return [loaded.tokens_per_second, 1000 * cpu, *ttfts]


def whole(load: Load) -> Load:
    """Raise RuntimeError if a request failed or a stream was cut."""
    if load.failed or load.cut:
        raise RuntimeError(f"{load.failed} requests failed, {load.cut} streams were cut")
    return load


if __name__ == "__main__":
    main()
