"""Test that clips are probed once, and the results are kept as long as they do not change."""

import errno
import fcntl
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cogvideox_sat.clips import probing as clip_probing
from cogvideox_sat.clips.probing import INDEX, probe_clips
from cogvideox_sat.clips.sources import search
from training_clips import truncate, write_clip, write_dataset, write_tar


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "set", clips=3, frames=9)


class Names:
    """List of names in a file, so that processes can append to it."""

    def __init__(self, file: Path):
        self.file = file
        self.clear()

    def clear(self) -> None:
        self.file.write_text("")

    def append(self, name: str) -> None:
        with self.file.open("a") as file:
            file.write(f"{name}\n")

    def __iter__(self):
        return iter(self.file.read_text().splitlines())

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __eq__(self, names: object) -> bool:
        return list(self) == names


@pytest.fixture
def probed(monkeypatch, tmp_path) -> Names:
    """Return the names of the clips that are probed."""
    names = Names(tmp_path / "probed.txt")
    probe = clip_probing.probe

    def recorded(source):
        names.append(Path(source.name).name)
        return probe(source)

    monkeypatch.setattr(clip_probing, "probe", recorded)
    return names


def test_a_second_run_takes_the_index(folder, probed):
    sources = search(str(folder)).clips
    first, problems = probe_clips(sources, folder)
    assert first == [(96, 64, 9, 1.0)] * 3
    assert problems == []
    assert sorted(probed) == ["000.mp4", "001.mp4", "002.mp4"]
    probed.clear()
    written = (folder / INDEX).stat().st_mtime_ns
    assert probe_clips(sources, folder) == (first, [])
    assert probed == []
    assert (folder / INDEX).stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_clip_that_came_late_spoils_no_index(folder, probed, monkeypatch):
    sources = search(str(folder)).clips
    stamp = clip_probing._stamp
    missing = sources[1].name
    with monkeypatch.context() as patch:
        patch.setattr(
            clip_probing,
            "_stamp",
            lambda source, root: (stamp(source, root)[0], None) if source.name == missing else stamp(source, root),
        )
        infos, _ = probe_clips(sources, folder)
    assert None not in infos
    probed.clear()
    assert probe_clips(sources, folder) == (infos, [])
    assert probed == [Path(missing).name]


@pytest.mark.slow
def test_changed_new_and_moved_clips(folder, probed, tmp_path):
    probe_clips(search(str(folder)).clips, folder)
    probed.clear()
    write_clip(folder / "videos" / "001.mp4", frames=13)
    write_clip(folder / "videos" / "003.mp4", frames=5)
    infos, _ = probe_clips(search(str(folder)).clips, folder)
    assert [info.frames for info in infos] == [9, 13, 9, 5]
    assert sorted(probed) == ["001.mp4", "003.mp4"]
    probed.clear()
    moved = folder.rename(tmp_path / "moved")  # names in the index do not depend on where the folder is
    assert probe_clips(search(str(moved)).clips, moved)[0] == infos
    assert probed == []


def test_unreadable_clips_are_told_and_looked_at_again(folder, probed):
    path = folder / "videos" / "001.mp4"
    whole = path.read_bytes()
    truncate(path, path)
    infos, problems = probe_clips(search(str(folder)).clips, folder)
    assert [info is None for info in infos] == [False, True, False]
    (problem,) = problems
    assert problem.startswith(f"{path}: cut off")
    path.write_bytes(whole)
    infos, problems = probe_clips(search(str(folder)).clips, folder)
    assert infos[1].frames == 9
    assert not problems


def test_members_of_tar_files_are_kept_too(folder, tmp_path, probed):
    videos = {f"{path.stem}.mp4": path.read_bytes() for path in (folder / "videos").iterdir()}
    write_tar(tmp_path / "a.tar", videos)
    sources = search(str(tmp_path / "a.tar")).clips
    infos, _ = probe_clips(sources, tmp_path)
    assert [info.frames for info in infos] == [9, 9, 9]
    probed.clear()
    assert probe_clips(sources, tmp_path)[0] == infos
    assert probed == []


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, "not JSON", '{"version": 0, "clips": {}}', '{"version": 2, "clips": [3]}'])
def test_an_index_that_cannot_be_used_or_written_is_no_obstacle(folder, content):
    if content is None:
        (folder / INDEX).mkdir()
    else:
        (folder / INDEX).write_text(content)
    infos, problems = probe_clips(search(str(folder)).clips, folder)
    assert [info.frames for info in infos] == [9, 9, 9]
    assert problems == []
    if content is not None:
        assert len(json.loads((folder / INDEX).read_text())["clips"]) == 3
    assert sorted(path.name for path in folder.iterdir()) == [INDEX, "labels", "videos"]


def test_a_folder_that_does_not_exist_has_no_index(folder):
    infos, _ = probe_clips(search(str(folder)).clips, folder / "set-*")
    assert [info.frames for info in infos] == [9, 9, 9]


def test_of_processes_that_start_together_the_first_probes(folder, probed):
    sources = search(str(folder)).clips
    with ThreadPoolExecutor(4) as threads:  # each opens the folder itself, so they wait as processes would
        results = list(threads.map(lambda _: probe_clips(sources, folder), range(4)))
    assert all(result == results[0] for result in results)
    assert len(probed) == 3


def test_a_full_disk_is_no_obstacle(folder, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    infos, problems = probe_clips(search(str(folder)).clips, folder)
    assert [info.frames for info in infos] == [9, 9, 9] and problems == []
    assert not (folder / INDEX).exists()


@pytest.mark.parametrize("info", [[96, 64, 9, None], [96, "64", 9, 1.0], [96, 64, 0, 1.0], [96, 64, 9, -1.0]])
def test_an_entry_of_the_index_that_fits_no_clip_is_replaced(folder, probed, info):
    sources = search(str(folder)).clips
    first, _ = probe_clips(sources, folder)
    probed.clear()
    content = json.loads((folder / INDEX).read_text())
    content["clips"]["videos/001.mp4"][1] = info
    (folder / INDEX).write_text(json.dumps(content))
    assert probe_clips(sources, folder) == (first, [])
    assert probed == ["001.mp4"]


def test_a_process_that_cannot_be_killed_does_not_keep_the_lock(folder):
    with clip_probing._taking_turns(folder):
        child = os.fork()
        if not child:
            signal.pause()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
