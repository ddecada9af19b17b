"""The service of the environment refines prompts, and its key is never shown."""

import pytest

from cogvideox_sat.sampling import prompt_refinement
from cogvideox_sat.web import refining
from sgm.errors import UserError

KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)


def test_it_is_offered_where_it_is_configured(monkeypatch):
    assert not refining.is_configured()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert refining.is_configured()


def test_a_prompt_is_written_out(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    asked = []

    def refine(prompts, endpoint):
        asked.append((prompts[0].text, endpoint.api_key))
        return ["a long text"]

    monkeypatch.setattr(refining, "refine", refine)
    assert refining.refined("a kite", None) == "a long text"
    assert asked == [("a kite", KEY)]


def test_no_answer_is_an_error_without_the_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(refining, "refine", lambda prompts, endpoint: [None])
    with pytest.raises(UserError) as error:
        refining.refined("a kite", None)
    assert KEY not in str(error.value)
    assert prompt_refinement.Endpoint.from_environment().api_key == KEY
