"""What the server costs: requests over HTTP against the same requests given to the engine itself.

python -m benchmarks.server_overhead WORKDIR [--clients=16] [--requests=4] [--tokens=256] [--rounds=6]

One process serves as `infer.py --serve` does, with as many slots as clients; its engine also takes requests from the
benchmark. Clients are in a process of their own, a connection each; every one makes so many requests, the next when one
has ended, in both ways. Prints, as the median and range of interleaved rounds, tokens a second over HTTP, streamed and
whole, over those of the engine alone.
"""

import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tyro

from benchmarks.interleaved import interleaved, ratio
from dsv3_jax.command_line import run_main
from dsv3_jax.inference.arguments import InferArguments
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Event, Request
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.server.running import Server, bound
from dsv3_jax.inference.server.serving import load_service
from dsv3_jax.runtime import set_up_compiler

PROMPT = 64


def main(
    workdir: tyro.conf.Positional[Path], clients: int = 16, requests: int = 4, tokens: int = 256, rounds: int = 6
) -> None:
    set_up_compiler()
    service, engine = load_service(InferArguments(workdir, (), serve=True, slots=clients))
    listening, stop = bound("127.0.0.1", 0), threading.Event()
    server = Server(service, stop)
    threads = [
        threading.Thread(target=engine.run, args=(stop,)),
        threading.Thread(target=server.run, kwargs={"sockets": [listening]}),
    ]
    for thread in threads:
        thread.start()
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    command = [sys.executable, "-m", "benchmarks.server_overhead", "--client", address]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdin and client.stdout
    words, results = client.stdin, client.stdout
    random = np.random.default_rng(0)

    def prompts() -> list[list[list[int]]]:
        # New ones for every measurement: a prompt that is known costs less.
        return random.integers(10, 200, (clients, requests, PROMPT)).tolist()

    def over_http(stream: bool) -> float:
        print(json.dumps({"prompts": prompts(), "tokens": tokens, "stream": stream}), file=words, flush=True)
        return float(results.readline())

    sides: dict[str, Callable[[], float]] = {
        "engine": lambda: of_engine(engine, prompts(), tokens),
        "streamed": lambda: over_http(True),
        "whole": lambda: over_http(False),
    }
    try:
        for measure in sides.values():
            measure()
        found = interleaved(sides, rounds)
    finally:
        words.close()
        client.wait()
        server.should_exit = True
        stop.set()
        for thread in threads:
            thread.join()
    speed = statistics.median(found["engine"])
    print(f"{workdir}: {clients} clients, {requests} requests of {tokens} tokens each, engine {speed:,.0f} tokens/s")
    for name in ("streamed", "whole"):
        print(f"  {name} / engine {ratio(found[name], found['engine'])}")


def of_engine(engine: Engine, prompts: list[list[list[int]]], tokens: int) -> float:
    """Tokens/s."""
    made, ended = [0] * len(prompts), threading.Semaphore(0)

    def ask(client: int, request: int) -> None:
        def on_event(event: Event) -> None:
            made[client] += len(event.token_ids)
            if event.finish and request + 1 < len(prompts[client]):
                ask(client, request + 1)
            elif event.finish:
                ended.release()

        engine.submit(Request(prompts[client][request], Sampling(temperature=0.0), tokens), on_event)

    start = time.perf_counter()
    for client in range(len(prompts)):
        ask(client, 0)
    for _ in prompts:
        ended.acquire()
    return sum(made) / (time.perf_counter() - start)


def be_clients(address: str) -> None:
    """For every line that comes, all clients make their requests at the same time; answers with tokens/s.

    With as little work of their own as can be: in earnest clients have machines of their own.
    """
    for line in sys.stdin:
        work = json.loads(line)

        def ask(prompts: list[list[int]], work=work) -> int:
            connection = http.client.HTTPConnection(address)
            made = sum(answered(connection, prompt, work["tokens"], work["stream"]) for prompt in prompts)
            connection.close()
            return made

        start = time.perf_counter()
        with ThreadPoolExecutor(len(work["prompts"])) as clients:
            made = sum(clients.map(ask, work["prompts"]))
        print(made / (time.perf_counter() - start), flush=True)


def answered(connection: http.client.HTTPConnection, prompt: list[int], tokens: int, stream: bool) -> int:
    """How many tokens came."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    assert reply.status == 200
    content = reply.read()  # of a stream, chunk by chunk as they come
    if stream:
        content = [line for line in content.splitlines() if line.startswith(b"data: {")][-1].removeprefix(b"data: ")
    return json.loads(content)["usage"]["completion_tokens"]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        be_clients(sys.argv[2])
    else:
        run_main(lambda: tyro.cli(main, use_underscores=True))
