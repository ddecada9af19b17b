"""The page of the configuration is what the argument classes say now."""

from cogvideox_sat.clips.options import OPTIONS
from cogvideox_sat.configuration.argument_fields import argument_fields
from cogvideox_sat.configuration.argument_lists import SamplingArguments, TrainingArguments, VaeTrainingArguments
from tools.write_configuration_page import described_arguments, main, page, shown_default


def test_the_page_is_current():
    assert main(["--check"]) == 0, "run: python tools/write_configuration_page.py"


def test_all_arguments_are_on_it():
    sections = page().split("\n## ")
    for title, declared in (
        ("Sampling", SamplingArguments),
        ("Fine-tuning", TrainingArguments),
        ("Training the VAE", VaeTrainingArguments),
    ):
        section = next(part for part in sections if part.startswith(title))
        assert not [name for name in argument_fields(declared) if f"| `{name}` |" not in section]
    clips = next(part for part in sections if part.startswith("Clips"))
    assert not [name for name in OPTIONS if name != "missing_label" and f"| `{name}` |" not in clips]


def test_defaults_are_those_of_a_configuration():
    assert shown_default(None) == shown_default([]) == shown_default("") == ""
    assert shown_default(False) == "`false`"
    assert shown_default([480, 720]) == "`[480, 720]`"


def test_arguments_of_a_docstring():
    doc = "Return it.\n\nArgs:\n    one: what\n        it is.\n    two: another.\n\nRaises:\n    UserError: never."
    assert described_arguments(doc) == {"one": "what it is.", "two": "another."}
    assert described_arguments("Return it.") == {}
