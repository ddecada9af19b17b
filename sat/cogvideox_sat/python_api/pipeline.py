"""A model that is loaded once and makes a video for each call."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self, cast, overload

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from arguments import SamplingArguments
from cogvideox_sat.configuration.adapter_lists import Adapters, adapter_texts, located_adapters, path_and_weight
from cogvideox_sat.configuration.request_fields import OfferedField, check_argument, offered_fields
from cogvideox_sat.engine.parts import PARTS
from cogvideox_sat.media.video_output import pixels_of
from cogvideox_sat.python_api.call_planning import plan_call
from cogvideox_sat.python_api.call_progress import Update, reporting
from cogvideox_sat.python_api.calls import InMemory, plain, requests_of
from cogvideox_sat.python_api.results import Video
from cogvideox_sat.python_api.video_fields import fields_of
from cogvideox_sat.sampling.planned_videos import PlannedVideo
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from cogvideox_sat.sampling.record_making import Recorder
from cogvideox_sat.sampling.requests import (
    Encoded,
    Frames,
    Latents,
    Progress,
    Result,
    SampleEvent,
    SampleRequest,
    SessionSettings,
)
from cogvideox_sat.sampling.session import SamplingCancelled, SamplingSession
from sgm.errors import UserError, shown

Prompt = str | Mapping[str, Any]


class Pipeline:
    """A model that is loaded once: `pipe("a red kite", seed=1).save("kite.mp4")`.

    `load` creates it. Calls from several threads run one after the other. Its memory is freed at the end of a `with`
    block, or by `close`.

    Attributes:
        args: the arguments with which the command would do the same.
        session: the sampling session; see `sampling.session`.
    """

    def __init__(self, args: SamplingArguments, settings: SessionSettings, kept: ExitStack):
        self.args, self._kept = args, kept
        self._turn = Lock()
        self._cancellations = 0
        self._recorders: dict[tuple[str, ...], Recorder] = {}  # by the adapters in use
        self.session = SamplingSession(settings)

    def load_weights(self) -> None:
        """Read all weights now, instead of in the first call.

        With `offload` other than none, nothing is read.
        """
        if self.args.offload == "none":
            for part in PARTS:
                self.session.load(part)

    @property
    def fields(self) -> dict[str, OfferedField]:
        """Return the fields of a request by name, with type, limits, choices and default."""
        args, limits = self.args, self.session.limits
        usual: dict[str, Any] = {
            "negative_prompt": args.negative_prompt,
            "seed": args.seed,
            "size": None if args.size_from_image else tuple(args.sampling_image_size),
            "frames": limits.video_frames(args.sampling_num_frames),
            "fps": args.sampling_fps,
            "steps": args.sampling_num_steps or getattr(self.session.engine.sampler, "num_steps", None),
            **{name: value for name in ("guidance_scale", "guidance_schedule") if (value := getattr(args, name))},
        }
        return offered_fields(args.model_config, usual)

    @overload
    def __call__(self, prompt: Prompt, **fields: Any) -> Video: ...

    @overload
    def __call__(self, prompt: Sequence[Prompt], **fields: Any) -> list[Video]: ...

    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image: Any = None,
        keyframes: Sequence[Mapping[str, Any]] | None = None,
        video: Any = None,
        strength: float | Sequence[float] | None = None,
        extend: int | Sequence[Any] | None = None,
        seed: int | Sequence[int] | None = None,
        size: Sequence[int] | Sequence[Sequence[int]] | None = None,
        frames: int | Sequence[int] | None = None,
        num_frames: int | Sequence[int] | None = None,
        fps: int | Sequence[int] | None = None,
        steps: int | Sequence[int] | None = None,
        sampler: str | Sequence[str] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_interval: Sequence[float] | Sequence[Sequence[float]] | None = None,
        guidance_schedule: str | Sequence[str] | None = None,
        progress: Callable[[Update], None] | bool | None = None,
        **misspelt: Any,
    ) -> Video | list[Video]:
        """Return the video of a prompt, or the videos of a list of prompts.

        A prompt is a text, or a mapping with the fields of a line of a `.jsonl` file. Each other field is one value, or
        a list with one value per prompt. Defaults are those of the model's configuration; `pipe.fields` shows them, and
        the values that the model takes.

        Args:
            prompt: description of the video.
            negative_prompt: description that guidance steers away from.
            image: the first frame, for image-to-video models: a path, a Pillow picture, an array (h, w, 3) of uint8, or
                a tensor (3, height, width) in [-1, 1] of the video's size.
            keyframes: other frames, for image-to-video models: mappings with `image`, as above, and `at`, the number of
                the frame; -1 is the last frame.
            video: a clip that sampling starts from: a path, an array (t, h, w, 3) of uint8, or a tensor (t, 3, height,
                width) in [-1, 1] of the video's size. Arrays and tensors have the frame rate of the video. With
                `extend` and without `strength`, the clip is kept unchanged and continued.
            strength: share of the steps that is sampled from the noised clip: 0 keeps the clip, 1 keeps nothing of it.
                Default: 0.8.
            extend: number of further windows that continue the last frames, or their prompts.
            seed: seed of the noise. For several prompts, one seed is used as in a run of the command, which derives a
                seed for each prompt; a list gives each prompt its own seed. Default: 1234.
            size: (height, width) in pixels.
            frames: length in frames.
            num_frames: length in latent frames, in place of `frames`.
            fps: frames per second of the file.
            steps: sampling steps.
            sampler: short name or class of the sampler; see docs/sampling.md, "Knobs of the sampler".
            guidance_scale: strength of the prompt's guidance.
            guidance_interval: the part of the steps with guidance, such as (0.2, 0.8).
            guidance_schedule: how guidance changes with the steps: timestep, diffusers, step or constant.
            progress: called with an `Update` after each piece of work; an exception that it raises ends the call. True:
                a bar; False: nothing; None: a bar in a notebook and in a terminal.

        Raises:
            UserError: a field does not exist, or has a value that the model does not take; or memory is full.
            SamplingCancelled: `cancel` was called during the call.
            RuntimeError: the pipeline is closed.
        """
        given = {
            "negative_prompt": negative_prompt,
            "image": image,
            "keyframes": keyframes,
            "video": video,
            "strength": strength,
            "extend": extend,
            "size": size,
            "frames": frames,
            "num_frames": num_frames,
            "fps": fps,
            "steps": steps,
            "sampler": sampler,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "guidance_schedule": guidance_schedule,
            **misspelt,
        }
        args, seed = self.args, plain(seed)
        if not (progress is None or isinstance(progress, bool) or callable(progress)):
            raise UserError(f"progress: got {shown(progress)}; give a function, True for a bar, or False for nothing")
        if isinstance(seed, list | tuple):
            given["seed"] = seed
        elif seed is not None:
            check_argument("seed", seed)
            args = replace(args, seed=int(cast("int", seed)))
        found, several = requests_of(
            prompt,
            {name: value for name, value in given.items() if value is not None},
            self.session.limits.image_to_video,
        )
        jobs = [
            self._planned(request, memory, args, f"prompt {request.index + 1}: " if several else "")
            for request, memory in found
        ]
        cancellations = self._cancellations
        with self._turn, reporting(progress, jobs, self.session) as report:
            args = replace(args, lora=self.args.lora)
            videos = []
            for number, (planned, asked) in enumerate(jobs):
                report_video = partial(report, video=number, videos=len(jobs))
                with closing(self.session.sample(asked)) as events:
                    if self._cancellations != cancellations:  # cancelled while this call waited, or between two videos
                        raise SamplingCancelled("the call is cancelled")
                    videos.append(self._made(events, planned, asked, report_video, args))
        return videos if several else videos[0]

    def _planned(
        self, request: PromptRequest, memory: InMemory, args: SamplingArguments, where: str
    ) -> tuple[PlannedVideo, SampleRequest]:
        """Return the planned video of a request, and its request to the session.

        Args:
            where: beginning of the message of an error.

        Raises:
            UserError: the model cannot make the video, or a picture or clip in memory is of another type.
        """
        planned, asked = plan_call(request, memory, args, self.session.limits, where)
        self.session.steps_of(planned.steps, planned.knobs, f"{where}steps")
        asked.check(self.session.limits)
        return planned, asked

    def _made(
        self,
        events: Iterable[SampleEvent],
        planned: PlannedVideo,
        asked: SampleRequest,
        report: Callable[..., None],
        args: SamplingArguments,
    ) -> Video:
        """Return the video that results from the events of a request.

        Args:
            report: called with the stage, the step and the number of steps; see `Update`.
            args: the arguments of the call, for the video's record.

        Raises:
            UserError, OutOfMemory, SamplingCancelled: see `SamplingSession.sample`.
        """
        frames: list[Tensor] = []
        latents = torch.empty(0)
        steps = self.session.steps_taken(asked)
        report("text", 0, steps)
        for event in events:
            match event:
                case Encoded(what="prompt"):
                    report(asked.shows or "sampling", 0, steps)
                case Encoded():
                    report("sampling", 0, steps)
                case Progress():
                    report("sampling", event.step, event.steps, denoised=event.denoised)
                case Latents():
                    report("decoding", steps, steps)
                case Frames():
                    frames.append(pixels_of(event.frames))
                case Result():
                    latents = event.latents
        report("done", steps, steps)
        pixels: np.ndarray = torch.cat(frames).numpy()
        return Video(
            pixels,
            latents,
            fields_of(planned, asked, self.session.steps_of(planned.steps, planned.knobs)),
            partial(self._record, planned, args),
            partial(self._metadata, planned, args),
        )

    def _record(self, planned: PlannedVideo, args: SamplingArguments, path: Path) -> Mapping[str, Any]:
        return self._recorder_of(args).with_content(planned, path)

    def _metadata(self, planned: PlannedVideo, args: SamplingArguments) -> Mapping[str, str]:
        return self._recorder_of(args).metadata(planned)

    def _recorder_of(self, args: SamplingArguments) -> Recorder:
        """Return the recorder for these adapters; the first record starts hashing the weights."""
        kept = self._recorders.get(tuple(args.lora))
        if kept is None:
            kept = self._recorders[tuple(args.lora)] = Recorder(self.session.engine, args)
        return kept

    @property
    def lora(self) -> dict[str, float]:
        """Return the adapters in use, by path, with their strengths."""
        return {str(path): weight for path, weight in map(path_and_weight, self.args.lora)}

    def set_lora(self, lora: Adapters) -> None:
        """Use exactly these adapters from the next call on, without loading the network again.

        Args:
            lora: as for `load`; {} for none.

        Raises:
            UserError: an adapter does not exist or does not fit, or the model's configuration has its own adapter.
        """
        found = located_adapters(adapter_texts(lora), "lora")
        with self._turn:
            self.session.set_adapters(found)
            self.args = replace(self.args, lora=[f"{path}:{weight!r}" for path, weight in found])

    def preview(self, update: Update) -> np.ndarray | None:
        """Return the first frame as it would be if sampling ended now: (height, width, 3), uint8.

        Call this from `progress`. It decodes one latent frame of `update.denoised`. The result is None if no estimate
        exists, or if the VAE is not loaded, as with `offload` other than none.
        """
        engine = self.session.engine
        if update.denoised is None or engine.first_stage_model is None:
            return None
        with torch.no_grad():
            latents = rearrange(update.denoised[:, :1], "1 t c h w -> 1 c t h w")
            frames = torch.cat(list(engine.decode_stream(latents)), dim=2)
        return pixels_of(rearrange(frames, "1 c t h w -> t c h w"))[0].numpy()

    def cancel(self) -> None:
        """End all calls that run or wait; each ends at its next step with SamplingCancelled.

        Another thread may call this, or `progress`. Later calls are not affected.
        """
        self._cancellations += 1
        self.session.cancel()

    def close(self) -> None:
        """End all calls and free the memory of the model; a second call does nothing."""
        self.cancel()
        self.session.close()
        for recorder in self._recorders.values():
            recorder.close()
        self._kept.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        name = Path(self.args.sources.names[0]).stem if self.args.sources.names else "model"
        engine = self.session.engine
        return f"Pipeline({name}, {engine.device}, {str(engine.dtype).removeprefix('torch.')})"
