"""Checkpoints: what is kept, what survives damage and a full disk, and what is no checkpoint."""

import contextlib
import dataclasses
import os
import pickle
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURE, init
from etils import epath
from flax import serialization
from processes import run_fork

from transformer_lm import models
from transformer_lm.checkpoints import loading, store
from transformer_lm.checkpoints.workdir import check_workdir, write_config
from transformer_lm.errors import UserError
from transformer_lm.tokenizer import Tokenizer


def trees(step):
    """(params, opt_state, progress) that tell the step they belong to."""
    weights = np.random.default_rng(step).normal(size=(64, 64)).astype(np.float32)
    return {"w": jnp.asarray(weights)}, {"m": jnp.asarray(weights[0])}, {"step": jnp.asarray(step)}


def restore(workdir):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), trees(3))
    saved = store.Checkpoints(workdir)
    try:
        return saved.restore(*target)
    finally:
        saved.close()


def save(workdir, *steps, keep=2):
    saved = store.Checkpoints(workdir, keep)
    for step in steps:
        saved.save(step, *trees(step))
    saved.close()


def steps_in(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_restores_what_was_saved(tmp_path):
    assert restore(tmp_path) is None
    save(tmp_path, 3)
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path), trees(3))


@pytest.mark.parametrize(("keep", "kept"), [(1, [4]), (2, [3, 4]), (10, [1, 2, 3, 4])])
def test_keeps_the_latest(tmp_path, keep, kept):
    save(tmp_path, 1, 2, 3, 4, keep=keep)
    assert steps_in(tmp_path) == kept


def test_what_is_saved_is_the_moment_of_the_call(tmp_path):
    """The arrays may be donated to the next step while they are still being written."""
    saved = store.Checkpoints(tmp_path)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = trees(3)
    saved.save(3, *state)
    for _ in range(20):
        state = overwrite(state)
    jax.block_until_ready(state)
    saved.close()
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path), trees(3))


def empty_files(checkpoint):
    for path in checkpoint.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def truncate_arrays(checkpoint):
    for path in (checkpoint / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:10])


def remove_params(checkpoint):
    for path in sorted((checkpoint / "params").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("damage", [empty_files, truncate_arrays, remove_params])
def test_damaged_newest_is_reported_and_the_one_before_used(tmp_path, damage, caplog):
    save(tmp_path, 3, 4)
    damage(tmp_path / "checkpoints" / "4")
    params, _, progress = restore(tmp_path)
    assert int(progress["step"]) == 3
    np.testing.assert_array_equal(params["w"], trees(3)[0]["w"])
    assert "Checkpoint 4 is damaged" in caplog.text
    assert steps_in(tmp_path) == [3]
    assert (tmp_path / "damaged_checkpoints" / "4").exists()
    save(tmp_path, 4)  # the run goes on and comes there again
    assert steps_in(tmp_path) == [3, 4]


@pytest.mark.parametrize("name", ["long_memory", "昔 denied/connection reset"])
def test_a_folder_may_have_any_name(tmp_path, name):
    """Errors name it, and its words are not what they say."""
    save(tmp_path / name, 3, 4)
    truncate_arrays(tmp_path / name / "checkpoints" / "4")
    assert int(restore(tmp_path / name)[2]["step"]) == 3


def test_all_damaged_stay_where_they_are(tmp_path):
    save(tmp_path, 3, 4)
    for step in (3, 4):
        truncate_arrays(tmp_path / "checkpoints" / str(step))
    with pytest.raises(UserError, match=r"None of the checkpoints \[3, 4\] .* can be read"):
        restore(tmp_path)
    assert steps_in(tmp_path) == [3, 4]
    assert not (tmp_path / "damaged_checkpoints").exists()


def test_what_is_set_aside_is_never_overwritten(tmp_path):
    save(tmp_path, 3)
    for _ in range(3):
        save(tmp_path, 4)
        truncate_arrays(tmp_path / "checkpoints" / "4")
        restore(tmp_path)
    assert sorted(path.name for path in (tmp_path / "damaged_checkpoints").iterdir()) == ["4", "4.1", "4.2"]


def test_no_beginning_anew_beside_what_was_set_aside(tmp_path):
    save(tmp_path, 3, 4)
    truncate_arrays(tmp_path / "checkpoints" / "4")
    restore(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    with pytest.raises(UserError, match=r"only damaged ones that were set aside .*\(4\)"):
        restore(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        MemoryError(),
        ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"),
        RuntimeError("std::bad_alloc"),
        ValueError("UNAVAILABLE: connection reset"),
        OSError(5, "Input/output error"),
    ],
)
def test_what_cannot_be_read_now_is_left_as_it_is(tmp_path, monkeypatch, error):
    """Even though the checkpoint before could be read."""
    save(tmp_path, 3, 4)
    handler = store.ocp.PyTreeCheckpointHandler
    whole = handler.restore

    def restore_older_alone(self, folder, **arguments):
        if folder.parent.name == "4":
            raise error
        return whole(self, folder, **arguments)

    monkeypatch.setattr(handler, "restore", restore_older_alone)
    with pytest.raises(UserError, match=r"Checkpoint 4 .* cannot be read now"):
        restore(tmp_path)
    assert steps_in(tmp_path) == [3, 4]


@pytest.mark.parametrize(
    ("said", "is_damage"),
    [
        ("DATA_LOSS: Error decoding manifest", True),
        ("Error reading local file: Invalid JSON", True),
        ("ClientConnectorError Cannot connect to host storage.googleapis.com:443", False),
        ("429 Too Many Requests", False),
        ("Temporary failure in name resolution", False),
        ("NOT_FOUND: UNAUTHENTICATED", False),
    ],
)
def test_elsewhere_only_what_says_so_is_damage(tmp_path, monkeypatch, said, is_damage):
    """What may be the network's fault leaves good checkpoints where they are."""
    save(tmp_path, 3, 4)
    handler = store.ocp.PyTreeCheckpointHandler
    whole = handler.restore

    def restore_older_alone(self, folder, **arguments):
        if folder.parent.name == "4":
            raise ValueError(said)
        return whole(self, folder, **arguments)

    monkeypatch.setattr(handler, "restore", restore_older_alone)
    monkeypatch.setattr(store, "is_remote", lambda path: True)
    if is_damage:
        restore(tmp_path)
    else:
        with pytest.raises(UserError, match=r"Checkpoint 4 .* cannot be read now"):
            restore(tmp_path)
    assert steps_in(tmp_path) == ([3] if is_damage else [3, 4])


@pytest.mark.parametrize("changed", [0, 1])
def test_another_network_or_optimizer(tmp_path, changed):
    save(tmp_path, 3, 4)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = list(trees(3))
    wanted[changed] = {"x": jnp.zeros((3, 3))}
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), wanted)
    with contextlib.closing(store.Checkpoints(tmp_path)) as saved:
        what = ("network", "optimizer")[changed]
        with pytest.raises(
            UserError, match=rf"Checkpoint 4 .* is of another {what}: .* is \(64.*, in this run not there"
        ):
            saved.restore(*target)
    assert steps_in(tmp_path) == [3, 4]


@pytest.mark.parametrize("name", ["a[1]", "a*b", "a?", "back\\slash", b"\x8e\x86", "{a} % #b", "改行\nあり"])
def test_whatever_the_workdir_is_called(tmp_path, name):
    (tmp_path / "aXb" / "checkpoints").mkdir(parents=True)  # which a*b names, too
    workdir = tmp_path / os.fsdecode(name)
    save(workdir, 3)
    jax.tree.map(np.testing.assert_array_equal, restore(workdir), trees(3))
    assert steps_in(workdir) == [3]


def test_a_save_that_cannot_be_read_back_is_an_error(tmp_path):
    saved = store.Checkpoints(tmp_path)
    saved.save(3, *trees(3))
    saved._manager.wait_until_finished()
    (tmp_path / "checkpoints" / "3" / "params" / "manifest.ocdbt").unlink()
    with pytest.raises(UserError, match="could not be written"):
        saved.close()


def test_full_disk_harms_no_earlier_checkpoint(tmp_path):
    """In a process that may not write a file of more than 4 kB, which fails as a full disk does."""
    code = (
        "import resource, sys\n"
        f"sys.path[:0] = {sys.path}\n"
        "from test_store import UserError, save, store, trees\n"
        "save(sys.argv[1], 3)\n"
        "saved = store.Checkpoints(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    saved.save(4, *trees(4))\n"
        "    saved.wait()\n"
        "except UserError as error:\n"
        "    print('told:', error)\n"
    )
    done = run_fork([sys.executable, "-c", code, tmp_path])
    assert "told: A checkpoint could not be written" in done.stdout, done.stderr
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path), trees(3))


class TestCheckWorkdir:
    def claim(self, workdir, model, tokenizer):
        check_workdir(epath.Path(workdir), {"seed": 0}, model, tokenizer, [])
        write_config(epath.Path(workdir), {"seed": 0}, model, tokenizer, [], {})

    @pytest.fixture
    def claimed(self, tmp_path, tiny, tales_tokenizer):
        self.claim(tmp_path, tiny, tales_tokenizer)
        save(tmp_path, 3)
        return tmp_path

    def test_same_again(self, claimed, tiny, tales_tokenizer):
        self.claim(claimed, dataclasses.replace(tiny, dropout_rate=0.0, dtype="bfloat16"), tales_tokenizer)

    @pytest.mark.parametrize("field", ["emb_dim", "num_layers", "vocab_size"])
    def test_another_network(self, claimed, tiny, tales_tokenizer, field):
        other = dataclasses.replace(tiny, **{field: 2 * getattr(tiny, field)})
        before = (claimed / "config.json").read_bytes()
        with pytest.raises(UserError, match=f"holds a model with {field}={getattr(tiny, field)}"):
            self.claim(claimed, other, tales_tokenizer)
        assert (claimed / "config.json").read_bytes() == before

    @pytest.mark.parametrize("lost", [None, "config.json"])
    def test_another_tokenizer(self, claimed, tiny, original, tales_tokenizer, lost):
        spm = Tokenizer.load(original.path / "sentencepiece_model")
        if lost:
            (claimed / lost).unlink()
        with pytest.raises(UserError, match="another tokenizer"):
            self.claim(claimed, tiny, spm)
        self.claim(claimed, tiny, tales_tokenizer)

    def test_what_has_saved_nothing_holds_no_model(self, tmp_path, tiny, tales_tokenizer, original):
        self.claim(tmp_path, tiny, tales_tokenizer)
        (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
        self.claim(
            tmp_path, dataclasses.replace(tiny, num_layers=7), Tokenizer.load(original.path / "sentencepiece_model")
        )


class TestLoadModel:
    @pytest.mark.parametrize("lost", [(), ("opt_state", "progress")])
    def test_workdir(self, tmp_path, tiny, tales_tokenizer, lost):
        """Also without what only training needs, two thirds of a checkpoint."""
        params = init(tiny)
        write_config(epath.Path(tmp_path), {}, tiny, tales_tokenizer, [], {})
        saved = store.Checkpoints(tmp_path)
        saved.save(7, params, {"m": jnp.zeros(3)}, {"step": jnp.asarray(7)})
        saved.close()
        for name in lost:
            shutil.rmtree(tmp_path / "checkpoints" / "7" / name)
        loaded = loading.load_model(tmp_path)
        assert (loaded.step, loaded.config) == (7, tiny)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
        assert loaded.tokenizer_path.read_bytes() == tales_tokenizer.model

    def test_original_file_or_folder(self, original):
        by_folder, by_file = loading.load_model(original.path), loading.load_model(original.checkpoint)
        assert by_folder.step == by_file.step == 499999
        jax.tree.map(np.testing.assert_array_equal, by_folder.params, by_file.params)
        # Every array of the file, read by Flax's own reader, is among ours.
        theirs = serialization.msgpack_restore(original.checkpoint.read_bytes())["params"]["decoder"]
        assert sum(x.size for x in jax.tree.leaves(theirs)) == models.count_params(by_folder.config)
        np.testing.assert_array_equal(
            by_folder.params["blocks"]["mlp"]["wo"]["kernel"][1],
            theirs["encoderdecoderblock_1"]["MlpBlock_0"]["Dense_1"]["kernel"],
        )

    def test_newest_of_several_originals(self, tmp_path):
        for step in (9, 10, 100):
            (tmp_path / f"checkpoint_{step}").write_bytes((FIXTURE / "checkpoint_499999").read_bytes())
        assert loading.load_model(tmp_path).step == 100

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9])
    def test_truncated_original(self, tmp_path, share):
        content = (FIXTURE / "checkpoint_499999").read_bytes()
        (tmp_path / "checkpoint_1").write_bytes(content[: int(share * len(content))])
        with pytest.raises(UserError, match="truncated"):
            loading.load_model(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [
            b"hello",
            bytes(range(256)),
            serialization.msgpack_serialize([1, 2, 3]),
            serialization.msgpack_serialize({"step": 1, "opt_state": {}}),
            serialization.msgpack_serialize({"params": {"decoder": {"Dense_0": {"kernel": np.zeros((2, 2))}}}}),
            serialization.msgpack_serialize({"params": {"decoder": {"Embed_0": {"embedding": "text"}}}}),
            serialization.msgpack_serialize({"params": 3}),
        ],
    )
    def test_foreign_file(self, tmp_path, content):
        (tmp_path / "checkpoint_1").write_bytes(content)
        with pytest.raises(UserError, match=r"checkpoint_1|is a str"):
            loading.load_model(tmp_path)

    def test_pickle_is_not_executed(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return (open, (str(tmp_path / "sprung"), "w"))

        (tmp_path / "checkpoint_1").write_bytes(pickle.dumps({"params": Trap()}))
        with pytest.raises(UserError):
            loading.load_model(tmp_path)
        assert not (tmp_path / "sprung").exists()

    def test_arrays_that_do_not_belong_together(self, tmp_path):
        tree = serialization.msgpack_restore((FIXTURE / "checkpoint_499999").read_bytes())
        tree["params"]["decoder"]["logitdense"]["bias"] = np.zeros(7, np.float32)
        (tmp_path / "checkpoint_1").write_bytes(serialization.msgpack_serialize(tree))
        with pytest.raises(UserError, match="do not belong together"):
            loading.load_model(tmp_path)

    @pytest.mark.parametrize(("name", "words"), [("nothing", "no such file"), ("empty", "No model in")])
    def test_nothing_there(self, tmp_path, name, words):
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match=words):
            loading.load_model(tmp_path / name)

    def test_foreign_config(self, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
        with pytest.raises(UserError, match=r"config\.json does not describe a network"):
            loading.load_model(tmp_path)
