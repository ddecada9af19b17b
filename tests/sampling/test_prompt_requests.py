"""Seeds do not depend on other prompts."""

from cogvideox_sat.sampling.prompt_requests import PromptRequest, request_seed


def test_seeds_are_fixed_distinct_and_can_be_overridden():
    # The numbers are part of the interface: a change would change every video sampled with a given --seed.
    assert request_seed(42, PromptRequest(0, "a")) == 42
    assert request_seed(42, PromptRequest(1, "any text")) == 7003778869905922103
    assert request_seed(42, PromptRequest(1, "any other")) == 7003778869905922103
    assert request_seed(42, PromptRequest(7, "a", seed=5)) == 5
    seeds = {request_seed(base, PromptRequest(index, "a")) for base in range(50) for index in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)
