"""A session makes the command's videos as events, loads weights once, survives errors."""

import gc
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arguments import get_args
from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.sampler_knobs import SamplerKnobs, changed_sampler
from cogvideox_sat.engine.parts import PARTS
from cogvideox_sat.media import video_output
from cogvideox_sat.media.image_inputs import load_condition_image
from cogvideox_sat.parallel.process_groups import destroy_process_groups
from cogvideox_sat.sampling import session as sampling_session
from cogvideox_sat.sampling.open_sessions import sessions_of_process
from cogvideox_sat.sampling.requests import Encoded, Frames, Latents, Progress, Result, SampleRequest, SessionSettings
from cogvideox_sat.sampling.session import SamplingCancelled, SamplingSession
from diffusion_video import SATVideoDiffusionEngine
from sample_video import main
from sgm.errors import UserError
from sgm.seeds import derive_seed

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

TEXTS = ("a paper boat on a pond", "a red kite over the hills")
BOAT = SampleRequest(TEXTS[0], seed=1234, size=(32, 48), frames=3, steps=2)
KITE = SampleRequest(TEXTS[1], seed=derive_seed(1234, 1), size=(32, 48), frames=3, steps=2, negative_prompt="blurred")


def settings(tiny, family: str = "5b", **changes) -> SessionSettings:
    config = load_configs([tiny.config(family)])
    return SessionSettings(config["model"], load=config["args"]["load"], sources=config.sources, **changes)


@pytest.fixture(scope="module")
def session(tiny) -> SamplingSession:
    with SamplingSession(settings(tiny)) as session:
        yield session


def sampled(session: SamplingSession, request: SampleRequest = BOAT) -> Result:
    *_, result = session.sample(request)
    return result


def frames(events: list) -> torch.Tensor:
    return torch.cat([event.frames for event in events if isinstance(event, Frames)])


# ---------------------------------------------------------------------------------------------------------------------
# The process, before other tests open a session that they share
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain_process(monkeypatch):
    """Check that no session is open, and remove state of other tests."""
    assert sessions_of_process.count == 0
    destroy_process_groups()
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)


def is_plain() -> bool:
    return not torch.distributed.is_initialized() and not torch.backends.cudnn.deterministic


def test_a_session_that_cannot_be_opened_leaves_the_process_as_it_was(plain_process, tiny, tmp_path):
    for changes, says in (
        ({"load": str(tmp_path / "gone")}, "gone"),
        ({"device": "cuda:99"}, "device"),
        ({"offload": "some"}, "offload: 'some' is unknown"),
        ({"lora_load": "x"}, "the model has no lora_config"),
        ({"fp16": True, "bf16": True}, "both on"),
    ):
        with pytest.raises(UserError, match=says):
            SamplingSession(replace(settings(tiny), **changes))
        assert is_plain()


def test_closing_frees_the_model_and_ends_requests(plain_process, tiny):
    with SamplingSession(settings(tiny)) as session:
        assert torch.backends.cudnn.deterministic
        events = up_to(session, Progress)
        model = weakref.ref(session.engine.model)
    assert all(getattr(session.engine, part) is None for part in PARTS)
    gc.collect()
    assert model() is None and list(events) == []
    assert is_plain()
    with pytest.raises(RuntimeError, match="the session is closed"):
        session.sample(BOAT)
    session.close()
    with SamplingSession(settings(tiny)) as again:
        sampled(again)


def test_sessions_and_commands_share_a_process(plain_process, tiny, tmp_path):
    first, second = (SamplingSession(settings(tiny)) for _ in range(2))
    with first:
        expected = sampled(first).latents
    assert main([*command(tiny, tmp_path, "5b", list(TEXTS[:1])), "--only_save_latents"]) == 0
    with second:
        assert torch.backends.cudnn.deterministic and torch.equal(sampled(second).latents, expected)
    assert is_plain()


# ---------------------------------------------------------------------------------------------------------------------
# The same videos as the command's
# ---------------------------------------------------------------------------------------------------------------------


def command(tiny, folder: Path, family: str, prompts: list[str], *flags: str) -> list[str]:
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    given = ["--base", str(tiny.config(family)), "--input_file", str(folder / "prompts.txt"), *flags]
    given += ["--output_dir", str(folder / "videos"), "--sampling_num_steps", "2", "--sampling_image_size", "32", "48"]
    return [*given, "--sampling_num_frames", str(4 if family.startswith("1.5") else 3)]


def test_two_requests_give_what_the_command_writes(tiny, session, tmp_path, monkeypatch):
    """To the bit, the frames too: those that the command hands to its writer of videos."""
    arguments = command(tiny, tmp_path, "5b", list(TEXTS), "--negative_prompt", "blurred")
    assert main([*arguments, "--only_save_latents"]) == 0
    files = sorted((tmp_path / "videos").rglob("*.safetensors"))
    results = [list(session.sample(request)) for request in (replace(BOAT, negative_prompt="blurred"), KITE)]
    for file, events in zip(files, results, strict=True):
        assert torch.equal(load_file(file)["latents"], events[-1].latents)

    written, write = [], video_output.VideoWriter.write
    monkeypatch.setattr(
        video_output.VideoWriter, "write", lambda self, chunk: (written.append(chunk), write(self, chunk))[1]
    )
    assert main(arguments) == 0
    assert torch.equal(torch.cat(written), torch.cat([frames(events) for events in results]))


@pytest.mark.parametrize("family", ["5b_i2v", "1.5_i2v", "1.5"])
def test_other_families_do_too(tiny, tmp_path, family):
    from PIL import Image

    Image.linear_gradient("L").convert("RGB").save(tmp_path / "first.png")
    of_image = family.endswith("i2v")
    prompt = f"{TEXTS[0]}@@{tmp_path / 'first.png'}" if of_image else TEXTS[0]
    assert main([*command(tiny, tmp_path, family, [prompt]), "--only_save_latents"]) == 0
    (file,) = (tmp_path / "videos").rglob("*.safetensors")
    image = load_condition_image(tmp_path / "first.png", (32, 48)) if of_image else None
    request = replace(BOAT, image=image, frames=4 if family.startswith("1.5") else 3)
    with SamplingSession(settings(tiny, family)) as session:
        assert torch.equal(sampled(session, request).latents, load_file(file)["latents"])
        if of_image:
            asked = []
            late = replace(request, image=lambda: asked.append(1) or image)
            events = session.sample(late)
            assert next(events) == Encoded("prompt") and not asked
            *_, result = events
            assert torch.equal(result.latents, load_file(file)["latents"]) and asked == [1]


def test_the_settings_of_the_command(tiny, tmp_path):
    args = get_args([*command(tiny, tmp_path, "5b", [TEXTS[0]]), "--bf16", "--offload", "sequential"])
    found = SessionSettings.from_args(args)
    assert (found.bf16, found.offload, found.load) == (True, "sequential", args.load)
    assert found.arguments is args


# ---------------------------------------------------------------------------------------------------------------------
# Events
# ---------------------------------------------------------------------------------------------------------------------


def test_events_come_in_order_and_as_they_are_made(session):
    events = list(session.sample(replace(BOAT, frames=5)))
    kinds = [type(event) for event in events]
    assert kinds[:4] == [Encoded, Progress, Progress, Latents] and kinds[-1] is Result
    assert set(kinds[4:-1]) == {Frames} and len(kinds[4:-1]) > 1
    assert events[1:3] == [Progress(1, 2), Progress(2, 2)]
    assert frames(events).shape == (17, 3, 32, 48)
    assert torch.equal(events[3].latents, events[-1].latents)


def test_the_result_says_what_made_it(session):
    own_steps = session.engine.sampler.num_steps
    result = sampled(session, replace(BOAT, steps=None, fps=12))
    assert (result.request.steps, result.request.fps, result.request.prompt) == (own_steps, 12, BOAT.prompt)
    assert torch.equal(sampled(session, result.request).latents, result.latents)


def test_nothing_is_printed_or_written(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with SamplingSession(settings(tiny)) as session:
        sampled(session)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("offload", ["none", "stage", "sequential"])
def test_weights_are_loaded_once_unless_parts_take_turns(tiny, session, monkeypatch, offload):
    built, build = [], SATVideoDiffusionEngine.build

    def count(self, part, device=None):
        if getattr(self, part) is None:
            built.append(part)
        return build(self, part, device)

    monkeypatch.setattr(SATVideoDiffusionEngine, "build", count)
    with SamplingSession(settings(tiny, offload=offload)) as other:
        assert built == []  # a part is read when its turn comes
        found = [sampled(other, request).latents for request in (BOAT, KITE)]
        for mine, expected in zip(found, (BOAT, KITE), strict=True):
            assert torch.equal(mine, sampled(session, expected).latents)
        once = ["conditioner", "model", "first_stage_model"]
        there = [part for part in PARTS if getattr(other.engine, part) is not None]
        if offload == "none":
            assert [part for part in built if part in once][:3] == once and len(there) == 3
        elif offload == "stage":
            assert built == once * 2 and there == ["first_stage_model"]
        else:
            assert built.count("model") == 1 and there == ["first_stage_model", "model"]


def test_the_same_prompt_again_is_not_encoded_again(tiny):
    with SamplingSession(settings(tiny, offload="stage")) as session:
        first = sampled(session)
        session.engine.conditioner = None
        events = session.sample(replace(BOAT, seed=5))
        next(events)
        assert session.engine.conditioner is None
        *_, second = events
        assert not torch.equal(first.latents, second.latents)


def test_random_numbers_of_the_program_and_of_requests_are_apart(session):
    """Random numbers drawn between the events of a request change nothing in it."""
    expected = sampled(session).latents
    torch.manual_seed(0)
    undisturbed = torch.rand(20)
    torch.manual_seed(0)
    drawn, steps = [], 0
    for event in session.sample(BOAT):
        drawn.append(torch.rand(1))
        steps += isinstance(event, Progress)
    assert steps == 2 and torch.equal(event.latents, expected)
    assert torch.equal(torch.cat(drawn), undisturbed[: len(drawn)])


def test_noise_within_the_steps_is_the_requests_own(tiny, tmp_path):
    sampler = {"target": "sgm.modules.diffusionmodules.sampling.VPSDEDPMPP2MSampler"}
    path = tiny.variant("5b", tmp_path / "sde.yaml", model={"sampler_config": sampler})
    config = load_configs([path])
    with SamplingSession(SessionSettings(config["model"], load=config["args"]["load"])) as session:
        alone = sampled(session, replace(BOAT, steps=4)).latents
        events = session.sample(replace(BOAT, steps=4))
        *_, result = ((torch.rand(7), event)[1] for event in events)
        assert torch.equal(result.latents, alone)


# ---------------------------------------------------------------------------------------------------------------------
# Knobs
# ---------------------------------------------------------------------------------------------------------------------

KNOBS = SamplerKnobs("ddim", 3.0, (0.0, 0.5), "step")


def test_knobs_are_the_keys_of_the_configuration_and_load_nothing(tiny, session, monkeypatch):
    """To the bit; the request without knobs that follows is what it was."""
    expected = sampled(session).latents
    other = settings(tiny)
    changed = dict(other.model_config)
    changed["sampler_config"] = changed_sampler(changed["sampler_config"], KNOBS)
    with SamplingSession(replace(other, model_config=changed)) as configured:
        by_configuration = sampled(configured).latents
    monkeypatch.setattr(SATVideoDiffusionEngine, "_build_network", None)
    assert torch.equal(sampled(session, replace(BOAT, knobs=KNOBS)).latents, by_configuration)
    assert not torch.equal(by_configuration, expected)
    assert torch.equal(sampled(session).latents, expected)


def test_knobs_that_do_not_go_with_the_model(session):
    with pytest.raises(UserError, match="sampler is 'HeunEDMSampler', which needs a noise schedule of sigma"):
        session.sample(replace(BOAT, knobs=SamplerKnobs("heun")))
    with pytest.raises(UserError, match="sampling_num_steps"):
        session.sample(replace(BOAT, steps=1001, knobs=KNOBS))


def test_progress_has_the_clean_estimate(tiny, session):
    """The estimate is a tensor of the sampler, without the leading frame of 1.5 models.

    After the last step it is the latents themselves.
    """
    with SamplingSession(settings(tiny, "1.5")) as of_15:
        for own, frames in ((session, 3), (of_15, 4)):
            events = list(own.sample(replace(BOAT, frames=frames, knobs=SamplerKnobs("dpmpp_2m"))))
            estimates = [event.denoised for event in events if isinstance(event, Progress)]
            assert len(estimates) == 2 and all(estimate.shape == events[-1].latents.shape for estimate in estimates)
            assert torch.equal(estimates[-1], events[-1].latents)


# ---------------------------------------------------------------------------------------------------------------------
# Requests that end early
# ---------------------------------------------------------------------------------------------------------------------


def up_to(session: SamplingSession, kind: type, request: SampleRequest = BOAT):
    """Return a request's iterator after its first event of a kind."""
    events = session.sample(request)
    for event in events:
        if isinstance(event, kind):
            return events
    raise AssertionError("no such event")


@pytest.mark.parametrize("kind", [Encoded, Progress, Latents, Frames])
@pytest.mark.parametrize("way", ["close", "cancel"])
def test_a_request_that_ends_early_leaves_a_usable_session(session, kind, way):
    expected = sampled(session, KITE).latents
    threads = threading.active_count()
    calls, denoise = [], session.engine.denoiser.forward
    session.engine.denoiser.forward = lambda *args, **kwargs: calls.append(1) or denoise(*args, **kwargs)
    try:
        events = up_to(session, kind)
        if way == "close":
            events.close()
        else:
            session.cancel()
            with pytest.raises(SamplingCancelled):
                next(events)
    finally:
        session.engine.denoiser.forward = denoise
    assert len(calls) == {Encoded: 0, Progress: 1}.get(kind, 2)
    assert list(events) == [] and threading.active_count() == threads
    assert torch.equal(sampled(session, KITE).latents, expected)


def test_cancelling_from_another_thread(session):
    many = replace(BOAT, steps=500)
    steps = []

    def consume() -> None:
        with pytest.raises(SamplingCancelled):
            for event in session.sample(many):
                if isinstance(event, Progress):
                    steps.append(event.step)
                    started.set()
        ended.set()

    started, ended = threading.Event(), threading.Event()
    threading.Thread(target=consume, daemon=True).start()
    assert started.wait(60)
    session.cancel()
    assert ended.wait(60) and len(steps) < 500
    sampled(session)


def test_closing_waits_for_the_step_of_another_thread(tiny):
    """The network is not taken away from it."""
    session = SamplingSession(settings(tiny))
    started, found = threading.Event(), []

    def consume() -> None:
        try:
            for event in session.sample(replace(BOAT, steps=500)):
                if isinstance(event, Progress):
                    started.set()
        except Exception as error:
            found.append(type(error))

    thread = threading.Thread(target=consume, daemon=True)
    thread.start()
    assert started.wait(60)
    session.close()
    thread.join(60)
    assert found in ([SamplingCancelled], [])  # its iterator is closed, if that was between two steps
    assert all(getattr(session.engine, part) is None for part in PARTS)


def test_one_request_at_a_time_is_within_a_stage(session):
    first = up_to(session, Progress)
    with pytest.raises(RuntimeError, match="another request is within a stage"):
        next(session.sample(KITE))
    *_, result = first
    expected = sampled(session).latents
    assert torch.equal(result.latents, expected)
    # Between stages they take turns, as the videos of the command do.
    both = [session.sample(request) for request in (BOAT, KITE)]
    for kind in (Encoded, Latents, Result):
        last = [next(event for event in events if isinstance(event, kind)) for events in both]
    assert torch.equal(last[0].latents, expected)
    assert torch.equal(last[1].latents, sampled(session, KITE).latents)


def test_an_interruption_ends_the_step_that_is_computed(session, monkeypatch):
    """Ctrl+C reaches the thread of the caller, which waits, and not that of the sampler."""
    from cogvideox_sat.sampling import turns

    class Interrupted(turns.SimpleQueue):
        """The second time that the caller waits it is interrupted, when the step is on its way."""

        waits = 0

        def get(self):
            if threading.current_thread() is threading.main_thread():
                Interrupted.waits += 1
                if Interrupted.waits == 2:
                    assert within_step.wait(60)
                    raise KeyboardInterrupt
            return super().get()

    def never_ends(*_, **__):
        within_step.set()
        while True:
            pass

    monkeypatch.setattr(turns, "SimpleQueue", Interrupted)
    within_step = threading.Event()
    events = up_to(session, Progress)
    monkeypatch.setattr(session.engine.denoiser, "forward", never_ends)
    with pytest.raises(KeyboardInterrupt):
        next(events)
    monkeypatch.undo()
    sampled(session)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["conditioner", "denoiser", "decode_stream", "sample"])
def test_an_error_in_one_request_leaves_a_usable_session(session, monkeypatch, broken):
    expected = sampled(session, KITE).latents

    def fail(*_, **__):
        raise ValueError("planted")

    if broken == "conditioner":
        monkeypatch.setattr(session.engine.conditioner, "forward", fail)
    elif broken == "denoiser":
        monkeypatch.setattr(session.engine.denoiser, "forward", fail)
    else:
        monkeypatch.setattr(session.engine, broken, fail)
    with pytest.raises(ValueError, match="planted"):
        list(session.sample(replace(BOAT, prompt=f"never seen, {broken}")))
    monkeypatch.undo()
    assert torch.equal(sampled(session, KITE).latents, expected)


def test_a_failed_step_keeps_no_tensors(session, monkeypatch):
    """Else the video after one that ran out of memory would run out of it too."""
    found = []

    def fail(network, x, *_, **__):
        tensor = x + 1
        found.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(session.engine.denoiser, "forward", fail)
    gc.disable()  # cycles must not be needed to free memory
    try:
        with pytest.raises(UserError, match="sampling: the memory of the GPU is full"):
            list(session.sample(BOAT))
        assert found[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": None}, "prompt: got null; expected text|prompt: got None; expected text"),
        ({"seed": -1}, "seed: got -1; expected a whole number from 0"),
        ({"seed": 2**63}, "expected a whole number from 0 to"),
        ({"seed": True}, "seed: got "),
        ({"steps": 0}, "steps: got 0; expected a whole number of at least 1"),
        ({"steps": 10**6}, "steps"),
        ({"fps": 0}, "fps: got 0"),
        ({"size": (32,)}, "expected \\(height, width\\) in pixels"),
        ({"size": (33, 48)}, "size: height 33 does not fit"),
        ({"frames": 2}, "frames: got 2; this model takes an odd number of latent frames"),
        ({"image": torch.zeros(3, 32, 48)}, "this is a text-to-video model; leave out the first frame"),
    ],
)
def test_requests_that_the_model_cannot_do_are_refused_at_once(session, changes, says):
    with pytest.raises(UserError, match=says):
        session.sample(replace(BOAT, **changes))


def test_images_that_do_not_fit_are_refused(tiny):
    good = replace(BOAT, image=torch.zeros(3, 32, 48))
    with SamplingSession(settings(tiny, "5b_i2v")) as session:
        for image, says in (
            (None, "this is an image-to-video model; give the first frame"),
            (torch.zeros(3, 48, 32), "expected floating-point numbers of shape"),
            (torch.zeros(3, 32, 48, dtype=torch.uint8), "image: got uint8"),
            (torch.full((3, 32, 48), 200.0), "outside \\[-1, 1\\]"),
            (torch.full((3, 32, 48), torch.nan), "outside \\[-1, 1\\]"),
        ):
            with pytest.raises(UserError, match=says):
                session.sample(replace(good, image=image))
        with pytest.raises(UserError, match="expected floating-point"):
            list(session.sample(replace(good, image=lambda: torch.zeros(1))))


def test_the_engine_is_chosen_as_for_the_command(tiny, monkeypatch):
    class Mine(SATVideoDiffusionEngine):
        pass

    seen, build = [], sampling_session.build_engine
    monkeypatch.setattr(
        sampling_session, "build_engine", lambda args, *rest: (seen.append(args), build(args, *rest))[1]
    )
    chosen = settings(tiny, model_cls=Mine)
    with SamplingSession(chosen) as session:
        assert isinstance(session.engine, Mine) and seen == [chosen]
