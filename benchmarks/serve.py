"""What a server of OpenAI's API can do for 1, 8 and 64 clients at once: ours, and `transformers serve` beside it.

python benchmarks/serve.py --workdir=logs/demo               # starts serve.py, then transformers with that model
python benchmarks/serve.py --url=http://127.0.0.1:9000/v1    # asks a server that runs already: vLLM, llama.cpp, ...

Each client asks for one text after the other, streamed: 64 tokens behind the prompt, at temperature 0.6. A text may end
sooner by itself, for all servers alike: transformers cannot be told to ignore that. Tokens are as the server counts
them. transformers is measured without and with its continuous batching; it needs the extra interop. Where other work
runs on the same machine, the processor time that a server takes for a token says more than its speed.
"""

import asyncio
import contextlib
import logging
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import openai
import psutil
import rich.console
from absl import app, flags
from rich.table import Table

WORKDIR = flags.DEFINE_string("workdir", "logs/demo", "Model to serve.")
URL = flags.DEFINE_string("url", None, "Where a server is; unset to start those that are compared.")
PROMPT = flags.DEFINE_string("prompt", "昔々あるところに", "What texts begin with.")
TOKENS = flags.DEFINE_integer("tokens", 64, "Length of a text.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Texts for each client.")
CLIENTS = flags.DEFINE_list("clients", ["1", "8", "64"], "How many clients there are at once.")
SLOTS = flags.DEFINE_integer("slots", 8, "serve.py's --slots.")
START_SECONDS = 300


async def write(client: openai.AsyncOpenAI, model: str) -> tuple[float, int]:
    """Seconds to the first part of a text, and its tokens."""
    start, first, tokens = time.perf_counter(), 0.0, 0
    stream = await client.completions.create(
        model=model, prompt=PROMPT.value, max_tokens=TOKENS.value, temperature=0.6, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].text:
            first = first or time.perf_counter() - start
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return first, tokens


async def measure(url: str, model: str | None, clients: int, server: psutil.Process | None) -> list[str]:
    """A row of the table; without a model's name, of the first that the server has."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600) as client:
        model = model or (await client.models.list()).data[0].id
        await write(client, model)  # loads, and compiles what this prompt needs

        async def ask_again_and_again():
            return [await write(client, model) for _ in range(ROUNDS.value)]

        start, processor = time.perf_counter(), processor_seconds(server)
        found = await asyncio.gather(*(ask_again_and_again() for _ in range(clients)))
        seconds, processor = time.perf_counter() - start, processor_seconds(server) - processor
    texts = [text for of_client in found for text in of_client]
    firsts, tokens = sorted(first for first, _ in texts), sum(tokens for _, tokens in texts)
    return [
        str(clients), f"{len(texts) / seconds:.2f}", f"{tokens / seconds:.0f}",
        f"{1e3 * statistics.median(firsts):.0f}", f"{1e3 * firsts[-1]:.0f}", f"{1e3 * processor / tokens:.1f}",
    ]  # fmt: skip


def processor_seconds(server: psutil.Process | None) -> float:
    """Processor time of a server that was started here."""
    return sum(server.cpu_times()[:2]) if server else 0.0


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a server, which is started and stopped, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"does not start: {' '.join(command)}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def servers(exported: str) -> Iterator[tuple[str, list[str], str | None]]:
    """Names, commands, and what the model is called there."""
    ours = [sys.executable, "-m", "transformer_lm.serve", f"--workdir={WORKDIR.value}", f"--slots={SLOTS.value}"]
    yield f"serve.py, {SLOTS.value} slots", ours, None
    export = [sys.executable, "-m", "transformer_lm.export_huggingface", f"--workdir={WORKDIR.value}"]
    subprocess.run([*export, f"--output={exported}"], check=True, stderr=subprocess.DEVNULL)
    theirs = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", exported]
    theirs += ["--host", "127.0.0.1", "--device", "cpu"]
    yield "transformers serve", theirs, exported
    yield "with continuous batching", [*theirs, "--continuous-batching"], exported


def main(_):
    """Prints the table."""
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    table = Table("server", "clients", "texts a second", "tokens a second", "first part, median (ms)")
    table.add_column("first part, longest (ms)")
    table.add_column("processor time a token (ms)")
    with tempfile.TemporaryDirectory() as folder:
        for name, command, model in [(URL.value, [], None)] if URL.value else servers(f"{folder}/model"):
            with contextlib.nullcontext((URL.value, None)) if URL.value else running(command) as (url, server):
                for clients in CLIENTS.value:
                    row = asyncio.run(measure(url, model, int(clients), server))
                    table.add_row(name, *row)
                    print(name, *row, sep="\t", file=sys.stderr, flush=True)  # the whole takes its time
    rich.console.Console(width=150).print(table)


if __name__ == "__main__":
    app.run(main)
