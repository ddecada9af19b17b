"""The functions of the original's `sample_video.py`, with its shapes."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample_video
from sample_video import (
    get_batch,
    get_unique_embedder_keys_from_conditioner,
    read_from_cli,
    read_from_file,
    resize_for_rectangle_crop,
    save_video_as_grid_and_mp4,
)
from sgm.errors import UserError
from videos import read_video

ROOT = Path(__file__).parents[2]


def test_prompts_of_a_file_are_shared_out_by_their_lines(tmp_path, caplog):
    path = tmp_path / "p.txt"
    path.write_text(" a cat \n\ntwo\nthree\n")
    assert list(read_from_file(path)) == [("a cat", 0), ("two", 2), ("three", 3)]
    assert list(read_from_file(p=str(path), rank=1, world_size=2)) == [("three", 3)]
    assert list(read_from_file(path, 0, 2)) == [("a cat", 0), ("two", 2)]
    assert "line 2: skipped, it is empty" in caplog.text


def test_a_prompt_with_an_image_is_one_text(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "p.txt").write_text("a cat@@a.png\n")
    assert list(read_from_file(tmp_path / "p.txt")) == [(f"a cat@@{tmp_path / 'a.png'}", 0)]


def test_typed_prompts(monkeypatch):
    answers = iter([" a cat ", "two", "q"])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    assert list(read_from_cli()) == [("a cat", 0), ("two", 1)]


def test_keys_of_a_conditioner():
    embedders = [SimpleNamespace(input_keys=["txt"]), SimpleNamespace(input_keys=["fps", "txt"])]
    assert get_unique_embedder_keys_from_conditioner(SimpleNamespace(embedders=embedders)) == ["txt", "fps"]


def test_keys_of_our_own_conditioner():
    from sgm.modules import GeneralConditioner

    config = {"target": "sgm.modules.encoders.modules.FrozenT5Embedder", "input_key": "txt"}
    config["params"] = {"model_dir": str(ROOT / "assets" / "tiny" / "t5"), "max_length": 8}
    assert get_unique_embedder_keys_from_conditioner(GeneralConditioner([config])) == ["txt"]


def test_a_batch():
    values = {"prompt": "a cat", "negative_prompt": "", "image": torch.ones(2), "num": 3}
    batch, unconditional = get_batch(["txt", "image", "num"], values, [2], T=5, device="cpu")
    assert batch["txt"] == ["a cat", "a cat"] and unconditional["txt"] == ["", ""]
    assert torch.equal(unconditional["image"], batch["image"]) and unconditional["image"] is not batch["image"]
    assert (batch["num"], batch["num_video_frames"]) == (3, 5)
    assert unconditional.keys() == {"txt", "image"}
    assert get_batch(["txt"], values, [2, 1])[0]["txt"] == [["a cat"], ["a cat"]]
    assert get_batch(["txt"], values, 1) == ({"txt": ["a cat"]}, {"txt": [""]})
    with pytest.raises(UserError, match="value_dict: the key 'motion' is missing"):
        get_batch(["motion"], values, [1])


def test_videos_are_written_by_number(tmp_path):
    videos = torch.zeros(2, 3, 3, 64, 96)
    videos[1] = 1.0
    assert save_video_as_grid_and_mp4(videos, tmp_path / "out", fps=8, args=None, key="x") == [
        tmp_path / "out" / "000000.mp4",
        tmp_path / "out" / "000001.mp4",
    ]
    for number, video in enumerate(videos):
        meta, frames = read_video(tmp_path / "out" / f"00000{number}.mp4")
        assert (meta["fps"], meta["size"], len(frames)) == (8, (96, 64), 3)
        assert (frames.mean() / 2 + 0.5 - video.mean()).abs() < 0.02
    with pytest.raises(UserError, match="video_batch: got the shape"):
        save_video_as_grid_and_mp4(videos[0], tmp_path)


@pytest.mark.parametrize("mode", ["center", "random", "none"])
@pytest.mark.parametrize(("shape", "size"), [((2, 3, 60, 40), (24, 32)), ((2, 3, 30, 90), (24, 32))])
def test_cover_and_crop(mode, shape, size):
    np.random.seed(0)
    frames = torch.rand(shape)
    cut = resize_for_rectangle_crop(frames, size, reshape_mode=mode)
    assert cut.shape == (2, 3, 24, 32)
    whole = (48, 32) if shape[2] == 60 else (24, 72)
    full = torch.nn.functional.interpolate(frames, whole, mode="bicubic", antialias=True)
    room = (whole[0] - 24, whole[1] - 32)
    np.random.seed(0)
    top, left = (side // 2 for side in room) if mode == "center" else (np.random.randint(0, side + 1) for side in room)
    torch.testing.assert_close(cut, full[:, :, top : top + 24, left : left + 32])


def test_cropping_keeps_dtype_and_drops_a_single_frame():
    frames = torch.randint(0, 256, (1, 3, 20, 20), dtype=torch.uint8)
    cut = resize_for_rectangle_crop(frames, [10, 20], "center")
    assert (cut.shape, cut.dtype) == ((3, 10, 20), torch.uint8)
    assert torch.equal(cut, frames[0, :, 5:15])
    with pytest.raises(UserError, match="reshape_mode: got 'left'"):
        resize_for_rectangle_crop(frames, [10, 20], "left")


def test_importing_them_imports_no_pytorch():
    code = f"import sys; sys.path[:0] = [{str(ROOT / 'sat')!r}]; import sample_video; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert set(sample_video.__all__) >= {"sampling_main", "get_batch"}
