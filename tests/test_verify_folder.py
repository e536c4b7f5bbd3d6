"""`stillhouse verify` finds every change in every file that a run wrote."""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

import stillhouse
from stillhouse.checksums import SUMS, seal_broken, sealed, write_sums
from stillhouse.commands import find_predictor
from stillhouse.errors import ModelError, RunError
from stillhouse.generation.journal import Journal
from stillhouse.runfolder import RunFolder
from stillhouse.training.checkpoints import Meter, seal
from stillhouse.training.rollouts import Rollout, save_rollouts, window_folder
from stillhouse.verify_folder import Verified, verify_folder
from tests import tiny
from tests.classify import toys
from tests.test_cli import call


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a signal store, and a journal next to it."""
    folder = tmp_path_factory.mktemp("verify")
    encoding = {"kind": "threshold", "bytes": 60}
    raw = tiny.recipe(folder, signals={"encoding": encoding}, folder=str(folder / "runs" / "tiny"))
    stillhouse.run(raw)
    Journal(folder / "runs" / "answers.sqlite").close()
    return folder / "runs" / "tiny"


def problems(path: Path) -> list[Verified]:
    return [found for found in verify_folder(path) if found.problems]


@pytest.mark.run
def test_a_finished_run_is_sound_and_so_is_a_copy_of_it(finished: Path, tmp_path: Path) -> None:
    result = call("verify", str(finished))
    assert result.exit_code == 0, result.output
    kinds = [line.split()[1] for line in result.output.splitlines() if line.startswith("sound")]
    assert kinds == ["stage"] * (len(kinds) - 1) + ["journal"]
    shutil.copytree(finished.parent, tmp_path / "moved", symlinks=True)
    assert not problems(tmp_path / "moved" / "tiny")
    for part in ("model", "report.html", "stages"):
        assert (finished / part).exists()
    assert not problems(finished / "model")
    assert not problems(finished / "report.html")


@pytest.mark.run
def test_every_flipped_bit_is_found(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    chance = random.Random(0)
    files = [path for path in sorted((run / "stages").rglob("*")) if path.is_file()]
    assert len(files) > 20
    for file in files:
        before = file.read_bytes()
        if not before:
            continue
        changed = bytearray(before)
        changed[chance.randrange(len(before))] ^= 1 << chance.randrange(8)
        for content in (bytes(changed), before[:-1]):
            file.write_bytes(content)
            (found,) = problems(run)
            assert found.path == next(p for p in file.parents if p.parent.name == "stages")
            assert file.name in found.problems[0]
        file.write_bytes(before)
    assert not problems(run)


@pytest.mark.run
def test_checkpoints_of_unfinished_stages_are_verified(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    place = run / "stages" / ".train-0123456789ab.partial" / "checkpoints"
    for step in (1, 2, 3):
        folder = place / f"checkpoint-{step}" / "sharded"
        folder.mkdir(parents=True)
        (folder / "__0_0.distcp").write_bytes(bytes(range(100)))
        if step < 3:  # the last one was cut off
            seal(folder.parent, Meter(step, 10, 1.0))
    assert not problems(run)
    (place / "checkpoint-1" / "sharded" / "__0_0.distcp").write_bytes(bytes(100))
    (found,) = problems(run)
    assert (found.path, found.kind) == (place / "checkpoint-1", "checkpoint")
    assert found.problems == ["sharded/__0_0.distcp is missing or has changed"]
    assert problems(found.path) == problems(place.parent) == [found]
    (place / "checkpoint-2" / "complete.json").write_text("{}")
    assert ["complete.json has changed"] in [each.problems for each in problems(run)]
    save_rollouts(window_folder(place.parent, 4), [Rollout(0, (1, 2, 3), 1, 1, "stop")], "")
    (place.parent / "rollouts" / "step-old").mkdir()
    own = place.parent / "rollouts" / "step-00000004"
    assert [v.kind for v in verify_folder(run) if v.path == own] == ["rollouts"]
    assert own not in [found.path for found in problems(run)]
    (own / "tokens.npy").write_bytes((own / "tokens.npy").read_bytes()[:-1] + b"\7")
    assert own in [found.path for found in problems(run)]
    with RunFolder(run).locked():
        assert not problems(run), "checkpoints come and go while a run trains"


@pytest.mark.run
def test_an_export_can_also_be_verified_with_sha256sum(finished: Path, tmp_path: Path) -> None:
    export = tmp_path / "shipped"
    shutil.copytree(finished / "model", export)
    assert not problems(export)
    done = subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=export, check=False)
    assert done.returncode == 0
    weights = export / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    (found,) = problems(export)
    assert found.problems == ["model.safetensors is missing or has changed"]
    assert call("verify", str(export)).exit_code == 1


@pytest.mark.run
def test_damage_in_a_store_is_found(finished: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    (stage,) = (finished / "stages").glob("signals-*")
    shutil.copytree(next(stage.glob("*/settings.json")).parent, store)
    assert not problems(store)
    (shard,) = (store / "shards").iterdir()
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in problems(store)[0].problems[0]


def test_a_damaged_journal_is_reported_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    Journal(path).close()
    assert not problems(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    before = path.read_bytes()
    assert problems(path)
    assert path.read_bytes() == before


def test_a_folder_with_other_content_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing here to verify"):
        list(verify_folder(tmp_path))


def test_a_file_that_the_sums_do_not_list_is_reported(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_sums(tmp_path)
    (tmp_path / ".DS_Store").write_bytes(b"")
    assert not problems(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(b"more")
    assert problems(tmp_path)[0].problems == ["SHA256SUMS does not list adapter.safetensors"]
    (tmp_path / SUMS).write_text("")
    assert len(problems(tmp_path)[0].problems) == 2


@pytest.mark.run
def test_predict_rejects_a_damaged_model(tmp_path: Path) -> None:
    result = stillhouse.run(toys.recipe(tmp_path))
    assert result is not None
    weights = result.model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    for folder in (result.folder, result.model):
        with pytest.raises(ModelError, match=r"damaged: model\.safetensors"):
            find_predictor(folder)


@pytest.mark.parametrize("hidden", [".git/HEAD", ".cache/huggingface/download/config.json.lock"])
def test_files_of_git_and_the_hub_are_not_part_of_an_export(tmp_path: Path, hidden: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_sums(tmp_path)
    (tmp_path / hidden).parent.mkdir(parents=True)
    (tmp_path / hidden).write_text("")
    assert not problems(tmp_path)


def test_a_missing_seal_is_damage() -> None:
    facts = sealed({"files": {"a": {"bytes": 1}}})
    assert not seal_broken(facts)
    assert seal_broken({"files": facts["files"]})
