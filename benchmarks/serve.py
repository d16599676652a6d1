"""What a server of OpenAI's API can do for 1, 8 and 64 clients at once: ours, or any other by its address.

python -m transformer_lm.serve --workdir=logs/demo &
python benchmarks/serve.py                                   # asks http://127.0.0.1:8000/v1
python benchmarks/serve.py --url=http://127.0.0.1:9000/v1    # vLLM, `transformers serve`, ...

Each client asks for one text after the other, streamed: 64 tokens behind the prompt, at temperature 0.6. Servers are
told to ignore the end of a text; where one does not know `ignore_eos`, say --noignore_eos. Tokens are as the server
counts them.
"""

import asyncio
import logging
import statistics
import time

import openai
import rich.console
from absl import app, flags
from rich.table import Table

URL = flags.DEFINE_string("url", "http://127.0.0.1:8000/v1", "Where the server is.")
PROMPT = flags.DEFINE_string("prompt", "昔々あるところに", "What texts begin with.")
TOKENS = flags.DEFINE_integer("tokens", 64, "Length of a text.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Texts for each client.")
CLIENTS = flags.DEFINE_list("clients", ["1", "8", "64"], "How many clients there are at once.")
IGNORE_EOS = flags.DEFINE_bool("ignore_eos", True, "Whether texts go on behind their end.")


async def write(client: openai.AsyncOpenAI, model: str) -> tuple[float, int]:
    """Seconds to the first part of a text, and its tokens."""
    start, first, tokens = time.perf_counter(), 0.0, 0
    stream = await client.completions.create(
        model=model, prompt=PROMPT.value, max_tokens=TOKENS.value, temperature=0.6, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True} if IGNORE_EOS.value else {},
    )  # fmt: skip
    async for chunk in stream:
        first = first or time.perf_counter() - start
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return first, tokens


async def measure(clients: int) -> list[str]:
    """A row of the table."""
    async with openai.AsyncOpenAI(base_url=URL.value, api_key="none", max_retries=0, timeout=3600) as client:
        model = (await client.models.list()).data[0].id
        await write(client, model)  # compiles what this prompt needs

        async def ask_again_and_again():
            return [await write(client, model) for _ in range(ROUNDS.value)]

        start = time.perf_counter()
        found = await asyncio.gather(*(ask_again_and_again() for _ in range(clients)))
        seconds = time.perf_counter() - start
    texts = [text for of_client in found for text in of_client]
    firsts = sorted(first for first, _ in texts)
    return [
        str(clients), f"{len(texts) / seconds:.2f}", f"{sum(tokens for _, tokens in texts) / seconds:.0f}",
        f"{1e3 * statistics.median(firsts):.0f}", f"{1e3 * firsts[-1]:.0f}",
    ]  # fmt: skip


def main(_):
    """Prints the table."""
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    table = Table("clients", "texts a second", "tokens a second", "first part, median (ms)", "first part, longest (ms)")
    for clients in CLIENTS.value:
        table.add_row(*asyncio.run(measure(int(clients))))
    rich.console.Console().print(table)


if __name__ == "__main__":
    app.run(main)
