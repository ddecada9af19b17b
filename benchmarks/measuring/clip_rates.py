"""Measure clips read and files probed per second, for `data_loading.py`."""

import argparse
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from harness import alternating_medians, machine, markdown_table
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from cogvideox_sat.clips.attempts import Mark, serve_as_reader
from cogvideox_sat.clips.probing import probe_clips
from cogvideox_sat.clips.reading import FrameSampling, probe, read_clip
from cogvideox_sat.clips.sources import READERS, ClipSource
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.media.frame_times import nearest_frames
from cogvideox_sat.media.video_reading import open_video

Frames = list[np.ndarray]  # each (height, width, 3), uint8, RGB

MARGIN = 4  # seconds by which a source is longer than a clip, so that clips may start anywhere


def serve(threads: int) -> None:
    """Let this process read clips as a reader process of training."""
    torch.set_num_threads(threads)
    serve_as_reader(Mark(), threads)


def write_videos(args: argparse.Namespace, folder: Path, size: tuple[int, int]) -> list[ClipSource]:
    """Write videos that are longer than a clip, in which the camera pans over a picture."""
    height, width = size
    seconds = (args.frames - 1) / args.fps + MARGIN
    sources = []
    for number in range(args.clips):
        still, path = folder / "still.png", folder / f"{height}x{width}-{number}.mp4"
        Image.fromarray(picture(2 * height, 2 * width, seed=number)).save(still)
        pan = f"crop={width}:{height}:'iw/4+iw/5*sin(t)':'ih/4+ih/5*cos(0.7*t)'"
        command = [get_ffmpeg_exe(), "-loglevel", "error", "-loop", "1", "-framerate", str(args.source_fps)]
        # Tagged, since decord treats untagged video of any size as BT.601.
        tagged = f"{pan},scale=out_color_matrix=bt709,format=yuv420p,setparams=colorspace=bt709"
        command += ["-i", str(still), "-t", str(seconds), "-vf", tagged, "-colorspace", "bt709", str(path)]
        subprocess.run(command, check=True)
        sources.append(ClipSource(str(path), None))
    return sources


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """Return noise with a spectrum like that of photographs: uint8 (height, width, 3).

    Its amplitude is 1 / frequency.
    """
    chance = np.random.RandomState(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    frequency[0, 0] = np.inf
    noise = [np.exp(2j * np.pi * chance.random_sample(frequency.shape)) / frequency**1.3 for _ in range(3)]
    light, red, blue = (each / each.std() for each in (np.fft.irfft2(n, s=(height, width)) for n in noise))
    return (128 + 50 * np.stack([light + 0.3 * red, light, light + 0.3 * blue], -1)).clip(0, 255).astype(np.uint8)


def reading(args: argparse.Namespace, videos: dict[tuple[int, int], list[ClipSource]]) -> str:
    """Return the table of clips per second."""
    rows = [measure_reading(args, size, sources) for size, sources in videos.items()]
    header = ["source", "ours, clips/s", "decord, clips/s", "window by decord, clips/s", "window by PyAV, clips/s"]
    header += ["ours / decord", "ours / window by decord", "ours / window by PyAV"]
    header += [f"ours at {args.height}x{args.width}, clips/s"]
    clip = f"{args.frames} frames at {args.fps:g} fps out of H.264 of {args.source_fps:g} fps, {args.clips} clips"
    per = "of processor time" if args.threads == 1 else "of time"
    how = f"one process, threads that decode: {args.threads}, seconds {per}"
    return f"{clip}, {how}; {machine(torch.device('cpu'))}\n\n{markdown_table(header, rows)}"


def measure_reading(args: argparse.Namespace, size: tuple[int, int], sources: list[ClipSource]) -> list[object]:
    """Return the row of the table for sources of one size."""
    sampling = FrameSampling(args.fps, args.frames)
    bucket = Bucket(args.frames, args.height, args.width)
    infos = [probe(source) for source in sources]
    if any(sampling.num_frames(info) != args.frames for info in infos):
        raise SystemExit(f"--frames must be 4k + 1, got {args.frames}")
    times = [sampling.times(info, args.frames, seed) for seed, info in enumerate(infos)]

    def read(backend: str) -> list[Frames]:
        return [chosen(source, when, backend, args.threads) for source, when in zip(sources, times, strict=True)]

    def window(read_window: Callable[[ClipSource, np.ndarray, int], Frames]) -> list[Frames]:
        return [read_window(source, when, args.threads) for source, when in zip(sources, times, strict=True)]

    def clips() -> list[torch.Tensor]:
        every = zip(sources, infos, strict=True)
        return [read_clip(source, bucket, sampling, seed, info=info) for seed, (source, info) in enumerate(every)]

    contenders: dict[str, Callable[[], list[Any]]] = {
        "ours": lambda: read("pyav"),
        "decord": lambda: read("decord"),
        "window by decord": lambda: window(window_by_decord),
        "window by PyAV": lambda: window(window_by_pyav),
        "clips": clips,
    }
    expected = read("pyav")
    for name in ("decord", "window by decord", "window by PyAV"):
        if not all(map(np.array_equal, expected, contenders[name]())):
            raise SystemExit(f"{name} gives other frames")
    clock = time.process_time if args.threads == 1 else time.perf_counter
    seconds = alternating_medians(contenders, args.repeats, clock)
    ours, *peers, resized = (args.clips / seconds[name] for name in contenders)
    return [f"{size[0]}x{size[1]}", ours, *peers, *(f"{ours / peer:.2f}×" for peer in peers), resized]


def chosen(source: ClipSource, times: np.ndarray, backend: str, threads: int) -> Frames:
    """Return the frames nearest to `times`."""
    with open_video(source.path, threads, backend) as video:
        return list(video.frames_at(times))


def window_by_decord(source: ClipSource, times: np.ndarray, threads: int) -> Frames:
    """Return the frames nearest to `times`, from decord's read of the whole window.

    The original trainer reads clips in this way.
    """
    import decord

    reader = decord.VideoReader(source.path, num_threads=threads)
    numbers = nearest_frames(reader.get_frame_timestamp(range(len(reader)))[:, 0], times)
    first, last = numbers[0], numbers[-1]
    frames = reader.get_batch(np.arange(first, last + 1)).asnumpy()
    return [frames[number - first] for number in numbers]


def window_by_pyav(source: ClipSource, times: np.ndarray, threads: int) -> Frames:
    """Return the frames nearest to `times`, from PyAV's read of the whole window."""
    frames, shown = [], []
    with av.open(source.path) as container:
        stream = container.streams.video[0]
        stream.thread_count = threads
        container.seek(int(times[0] / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time > times[0] - 0.5 / stream.average_rate:
                frames.append(frame.to_ndarray(format="rgb24", threads=threads))
                shown.append(frame.time)
            if frame.time > times[-1]:
                break
    return [frames[number] for number in nearest_frames(np.array(shown), times)]


def probing(args: argparse.Namespace, folder: Path, sources: list[ClipSource]) -> str:
    """Return the table of files per second.

    The files are copies of `sources`; `args` has their number.
    """
    folder.mkdir()
    files = []
    for number in range(args.files):
        files.append(ClipSource(str(folder / f"{number:06d}.mp4"), None))
        try:
            os.link(sources[number % len(sources)].path, files[-1].path)
        except OSError:  # a file system without links
            shutil.copyfile(sources[number % len(sources)].path, files[-1].path)

    def ours() -> None:
        infos, problems = probe_clips(files, folder)
        assert len(infos) == args.files and not problems

    def decord() -> None:
        def look(source: ClipSource) -> None:
            with open_video(source.path, 1, "decord") as video:
                assert video.facts.frames

        with ThreadPoolExecutor(READERS) as threads:
            list(threads.map(look, files))

    rates = []
    for look in (ours, decord):
        start = time.perf_counter()
        look()
        rates.append(args.files / (time.perf_counter() - start))
    size = "x".join(map(str, args.sources[0]))
    what = f"files of {size}, in the system's cache, {READERS} at a time; {machine(torch.device('cpu'))}"
    header = ["files", "ours, files/s", "decord, files/s", "ours / decord"]
    return f"{what}\n\n{markdown_table(header, [[args.files, *rates, f'{rates[0] / rates[1]:.2f}×']])}"
