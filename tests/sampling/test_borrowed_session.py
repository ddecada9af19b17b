"""A session on a user's engine makes the same videos, and leaves the engine unchanged."""

from dataclasses import replace

import pytest
import torch

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.sampling.borrowed_session import BorrowedSession
from cogvideox_sat.sampling.requests import Latents, Result, SampleRequest, SessionSettings
from cogvideox_sat.sampling.session import SamplingSession
from cogvideox_sat.sampling.text_embedding import embedded_texts
from diffusion_video import SATVideoDiffusionEngine

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

BOAT = SampleRequest("a paper boat on a pond", seed=1234, size=(32, 48), frames=3, steps=2)


@pytest.fixture(scope="module")
def settings(tiny) -> SessionSettings:
    config = load_configs([tiny.config("5b")])
    return SessionSettings(config["model"], load=config["args"]["load"], sources=config.sources)


@pytest.fixture
def engine(settings) -> SATVideoDiffusionEngine:
    return SATVideoDiffusionEngine(settings, parts=("conditioner", "model"))


def latents(session: SamplingSession, request: SampleRequest = BOAT) -> torch.Tensor:
    return next(event.latents for event in session.sample(request) if isinstance(event, Latents))


def test_it_samples_as_a_session_of_its_own_and_drops_what_it_loaded(settings, engine):
    with SamplingSession(settings) as own:
        expected = latents(own)
    conditioner, network = engine.conditioner, engine.model
    with BorrowedSession(engine, settings) as session:
        *_, result = session.sample(BOAT)
        assert isinstance(result, Result) and torch.equal(result.latents, expected)
        assert engine.first_stage_model is not None
    assert engine.first_stage_model is None, "it was loaded to decode"
    assert engine.conditioner is conditioner and engine.model is network


def test_known_texts_need_no_conditioner(settings, engine):
    texts = {(BOAT.prompt, "grey"): embedded_texts(engine, BOAT.prompt, "grey")}
    asked = replace(BOAT, negative_prompt="grey")
    with BorrowedSession(engine, settings) as session:
        expected = latents(session, asked)
    engine.conditioner = torch.nn.Identity()  # it returns no embeddings
    with BorrowedSession(engine, settings, texts) as session:
        assert torch.equal(latents(session, asked), expected)


def test_pictures_come_from_the_first_process(settings, engine):
    asked = []

    def from_first(make):
        asked.append(make)
        return make()

    with BorrowedSession(engine, settings, from_first=from_first) as session:
        latents(session, replace(BOAT, video=torch.zeros(9, 3, 32, 48)))
    assert len(asked) == 1
