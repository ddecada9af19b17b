"""Background checkpoints equal the others, one at a time, or fail cleanly."""

import errno
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cogvideox_sat.runs import staging
from cogvideox_sat.training import checkpoint_folders
from cogvideox_sat.training.checkpoint_saver import CheckpointSaver
from distributed import run_distributed
from long_cases import others_long
from sgm.errors import UserError
from small_engines import arguments, build, linear_as_before  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("linear_as_before")


def saver(engine, folder, **options):
    folder.mkdir(exist_ok=True)
    return CheckpointSaver(folder, engine, **{"full": True, "keep_last": None, "background": True, **options})


def step(engine):
    engine.backward(engine(torch.ones(2, 7)).float().square().mean())
    engine.step()


@contextmanager
def held_writing(fail=None):
    """Hold the writing of weights until an event is set, then fail with the error `fail`."""
    write, go = torch.save, threading.Event()

    def late(content, path):
        assert go.wait(60)
        if fail:
            Path(path).write_bytes(b"half")
            raise fail
        write(content, path)

    checkpoint_folders.torch.save = late
    try:
        yield go
    finally:
        go.set()
        checkpoint_folders.torch.save = write


def files_of(run):
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def stages_written_both_ways(folder, stages):
    """Save at every stage between the steps, and behind two more steps."""
    for stage in stages:
        engine = build(arguments(stage))
        step(engine)
        before, behind = (Path(folder, f"{name}-{stage}") for name in ("before", "behind"))
        saver(engine, before, background=False).save(1, {"losses": [1.0]}, wait=False)
        late = saver(engine, behind)
        with held_writing() as go:
            late.save(1, {"losses": [1.0]}, wait=False)
            for _ in range(2):
                step(engine)
            dist.barrier()
            assert not (behind / "latest").exists() and not (behind / "1").exists()
            dist.barrier()  # another rank may write once all have looked
            go.set()
            late.finish()
        late.save(3, {}, wait=True)
    return True


def check_both_ways(folder, stages):
    for stage in stages:
        before, behind = (files_of(folder / f"{name}-{stage}") for name in ("before", "behind"))
        assert {name: content for name, content in behind.items() if name.partition("/")[0] in ("1", "1-ema")} == {
            name: content for name, content in before.items() if name != "latest"
        }
        assert {name.partition("/")[0] for name in behind} == {"latest", "1", "1-ema", "3", "3-ema"}
        assert behind["3/mp_rank_00_model_states.pt"] != behind["1/mp_rank_00_model_states.pt"]
        assert (before["latest"], behind["latest"]) == (b"1", b"3")


@pytest.mark.parametrize("stage", [0, 2])
def test_the_bytes_are_those_of_the_moment_of_saving(tmp_path, stage):
    stages_written_both_ways(tmp_path, [stage])
    check_both_ways(tmp_path, [stage])


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.long
def test_every_stage_on_two_processes(tmp_path):
    run_distributed(stages_written_both_ways, 2, str(tmp_path), [1, 2, 3])
    check_both_ways(tmp_path, [1, 2, 3])


def failing_behind(folder, failing_rank, model_parallel):
    """Return the last line of each process if a writing one finds the disk full."""
    engine = build(arguments(1), model_parallel_size=1 + model_parallel)
    step(engine)
    late = saver(engine, Path(folder))
    late.save(1, {}, wait=True)
    step(engine)
    fails = OSError(errno.ENOSPC, "No space left on device") if dist.get_rank() == failing_rank else None
    with held_writing(fails) as go:
        late.save(2, {}, wait=False)
        step(engine)
        go.set()
        with pytest.raises(UserError) as caught:
            late.finish()
    assert not late.failed
    late.finish()  # is over
    return str(caught.value)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("failing_rank", "model_parallel"), others_long((1, True), (0, False)))
def test_all_processes_end_with_the_line_of_the_one_that_fails(tmp_path, failing_rank, model_parallel):
    first, second = run_distributed(failing_behind, 2, str(tmp_path), failing_rank, model_parallel)
    assert first == second
    assert first.startswith(f"cannot write {tmp_path}/2: the disk is full: ") and "is kept" in first
    assert (tmp_path / "latest").read_text() == "1"
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "1", "1-ema"}
    assert len(list((tmp_path / "1").glob("*.pt"))) == 1 + model_parallel


def settled(folder):
    """Return whether each process finds the settled checkpoint while the first one writes."""
    engine = build(arguments(2))
    step(engine)
    late = saver(engine, Path(folder))
    with held_writing() as go:
        late.save(1, {}, wait=False)
        threading.Timer(1, go.set).start()
        assert not Path(folder, "1").exists()
        late.settle()
        return Path(folder, "1").exists()


@pytest.mark.distributed
@pytest.mark.slow
def test_a_process_that_fails_waits_for_the_one_that_writes(tmp_path):
    assert run_distributed(settled, 2, str(tmp_path)) == [True, True]
    assert (tmp_path / "latest").read_text() == "1"


def test_one_at_a_time_and_the_ones_before_stay_until_it_is_there(tmp_path):
    engine = build(arguments(0))
    step(engine)
    late = saver(engine, tmp_path, keep_last=1)
    late.save(1, {}, wait=False)
    late.finish()
    with held_writing() as go:
        late.save(2, {}, wait=False)
        assert {path.name for path in tmp_path.iterdir()} == {"latest", "1", "1-ema", ".2.part", ".2-ema.part"}
        assert (tmp_path / "latest").read_text() == "1"
        threading.Timer(0.2, go.set).start()
        late.save(3, {}, wait=False)  # waits for the second
        assert (tmp_path / "2" / "mp_rank_00_model_states.pt").exists()
    late.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "3", "3-ema"}


def test_an_error_is_known_at_the_next_step_and_raised_once(tmp_path):
    engine = build(arguments(0))
    step(engine)
    late = saver(engine, tmp_path)
    with held_writing(OSError(errno.EACCES, "Permission denied")) as go:
        late.save(1, {}, wait=False)
        assert not late.failed
        go.set()
        late.thread._thread.join(60)
        assert late.failed
        with pytest.raises(UserError, match=r"^cannot write .*/1: .*Permission denied; the previous checkpoint is"):
            late.save(2, {}, wait=False)
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_waits_for_what_is_being_written(tmp_path, caplog):
    engine = build(arguments(0))
    step(engine)
    late = saver(engine, tmp_path)
    with held_writing() as go:
        late.save(1, {}, wait=False)
        threading.Timer(0.2, go.set).start()
        late.settle()
    assert (tmp_path / "latest").read_text() == "1"
    assert "the run ends when the checkpoint of step 1 is written" in caplog.text


def test_without_room_in_memory_it_is_written_between_steps(tmp_path, monkeypatch, caplog):
    engine = build(arguments(0))
    step(engine)
    monkeypatch.setattr(staging, "free_host_memory", lambda: 2**10)
    late = saver(engine, tmp_path)
    for number in (1, 2):
        late.save(number, {}, wait=False)
        assert (tmp_path / "latest").read_text() == str(number)
    lines = [record.getMessage() for record in caplog.records if "background_checkpoints" in record.getMessage()]
    assert len(lines) == 1 and "written between steps" in lines[0]
