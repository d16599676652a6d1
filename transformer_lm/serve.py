"""Serve a trained model to everything that speaks with OpenAI's API.

python3 serve.py --workdir=logs/japanese_0.1b_v1 --port=8000
curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \
    -d '{"prompt": "夏目漱石は、", "max_tokens": 64, "temperature": 0.6, "top_k": 20}'

--workdir is all that generate_text.py takes: a workdir, an original checkpoint, an exported folder, hf://OWNER/NAME.
Of the recipe only use_bfloat16 counts; how a text is written each request says itself. docs/serving.md has the rest.

On SIGTERM what has begun is finished, for --grace_seconds at most, and the exit status is 0.
"""

import ipaddress
import os
import signal
import socket

from absl import flags, logging
from ml_collections import ConfigDict

from transformer_lm import cli, recipe
from transformer_lm.checkpoints import hub
from transformer_lm.errors import UserError, stage
from transformer_lm.extras import optional_import
from transformer_lm.fields import LARGEST
from transformer_lm.files import allow_open_files
from transformer_lm.generation import language_model
from transformer_lm.generation.choosing import Settings
from transformer_lm.generation.engine import CHUNK_SIZES, Engine
from transformer_lm.generation.scheduler import Request, Scheduler
from transformer_lm.tokenizer import START_ID

# A connection of which nothing is heard for two minutes is asked whether it is still there, and else let go. So is one
# whose client takes nothing of its answer for so long (Linux): the answer would be kept for it for ever.
KEEP_ALIVE = (
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 120),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 30),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 4),
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 120_000),  # milliseconds
)

_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all of this machine's.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0 for any that is free.", 0, 65535)
_SLOTS = flags.DEFINE_integer("slots", 8, "Texts that are written at once.", 1, 4096)
_CONTEXT = flags.DEFINE_integer(
    "context", None, "Tokens of a prompt and its text together; unset for the model's own.", 2, 2**20
)
_QUEUE = flags.DEFINE_integer("queue", 256, "Texts that may wait for a slot; for more the answer is 429.", 0, LARGEST)
_MAX_BODY_BYTES = flags.DEFINE_integer("max_body_bytes", 1 << 20, "Size of the largest request.", 1, 1 << 30)
_GRACE_SECONDS = flags.DEFINE_integer("grace_seconds", 30, "How long SIGTERM waits for what has begun.", 0, LARGEST)
_NAME = flags.DEFINE_string("model_name", None, "Name of the model to clients; unset for the last part of --workdir.")
_API_KEY = flags.DEFINE_string(
    "api_key",
    None,
    "Key that clients must send; unset for none. The environment's TRANSFORMER_LM_API_KEY says it, too.",
)
_CORS_ORIGINS = flags.DEFINE_list("cors_origins", [], "Origins whose web pages may ask, like https://example.com; *.")


def main(config: ConfigDict, workdir: str):
    """Serves the workdir's model until a signal comes."""
    for name in ("starlette", "uvicorn", "pydantic", "prometheus_client"):
        optional_import(name, "serve", "serve.py")
    chosen = recipe.read(config)
    allow_open_files()
    with stage(f"listening on {_HOST.value}:{_PORT.value}"):
        listener = _listen(_HOST.value, _PORT.value)
    model = language_model.load(workdir, dtype=chosen.network.dtype)
    with stage("making room for texts", lower="--slots or --context"):
        context = _CONTEXT.value or model.network.context
        engine = Engine(model.network, model.params, slots=_SLOTS.value, context=context)
        scheduler = Scheduler(engine, model.tokenizer)
        turns = model.turns
        del model  # its parameters lie in the engine as it needs them
        _warm_up(scheduler)
    is_local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    key = os.environ.get("TRANSFORMER_LM_API_KEY", "") if _API_KEY.value is None else _API_KEY.value
    _serve(
        scheduler, listener, name=_NAME.value or _name(workdir), api_key=key, max_body_bytes=_MAX_BODY_BYTES.value,
        is_local=is_local, cors_origins=tuple(_CORS_ORIGINS.value), openings=tuple(chosen.prompts),
        sampling=chosen.sampling, turns=turns, is_mukashi=chosen.data.dataset_name in ("mukashi", "mukashi_chat"),
    )  # fmt: skip


def _listen(host: str, port: int) -> socket.socket:
    """A socket that connections wait at; raises UserError if the port is taken."""
    if not host:
        raise UserError("--host= names no address: 127.0.0.1 for this machine alone, 0.0.0.0 for all networks.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
        for level, name, value in KEEP_ALIVE:
            if hasattr(socket, name):
                listener.setsockopt(level, getattr(socket, name), value)  # its connections inherit it
        return listener
    except (OSError, OverflowError) as error:
        raise UserError(f"Cannot listen on {host}:{port} ({error}); choose others by --host and --port.") from error


def _name(workdir: str) -> str:
    return workdir.removeprefix("hf://") if hub.is_address(workdir) else os.path.basename(os.path.abspath(workdir))


def _warm_up(scheduler: Scheduler):
    """Compiles what texts need, before anybody waits for it: prompts of all sizes, read, taken over and scored."""
    most = scheduler.engine.context - 2
    for size in CHUNK_SIZES:
        for scored in (False, True, False):
            prompt = [START_ID] * min(size, most)
            scheduler.submit(Request(prompt, Settings(), max_tokens=2, echo=scored, log_probs=scored))
    while not scheduler.is_idle:
        scheduler.advance()


def _serve(scheduler: Scheduler, listener: socket.socket, **options):
    """Answers until a signal comes, and then what has begun; `options` are those of `ServerConfig`."""
    import uvicorn

    from transformer_lm.serving.app import ServerConfig, make_app
    from transformer_lm.serving.worker import Worker

    worker = Worker(scheduler, limit=scheduler.engine.slots + _QUEUE.value)
    config = ServerConfig(**options)
    app = make_app(scheduler, worker, config)
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=_GRACE_SECONDS.value
        )
    )

    def end(number, frame):  # before uvicorn minds signals itself, and when it raises them again at its end
        server.should_exit = True

    signal.signal(signal.SIGTERM, end)
    host, port = listener.getsockname()[:2]
    logging.info("Serving %s at http://%s:%d.", config.name, f"[{host}]" if ":" in host else host, port)
    server.run(sockets=[listener])
    worker.stop()


if __name__ == "__main__":
    cli.run(main, needs_config=False)
