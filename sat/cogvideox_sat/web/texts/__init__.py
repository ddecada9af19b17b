"""The words of the page, in the languages that it speaks."""

from collections.abc import Mapping
from typing import TypeAlias

from cogvideox_sat.web.texts.chinese import CHINESE
from cogvideox_sat.web.texts.english import ENGLISH
from cogvideox_sat.web.texts.japanese import JAPANESE

Texts: TypeAlias = Mapping[str, str]

LANGUAGES: Mapping[str, Texts] = {"en": ENGLISH, "zh": CHINESE, "ja": JAPANESE}
USUAL = "en"


def preferred(accepted: str) -> str:
    """Return the language of the page that suits an Accept-Language header best."""
    wishes: list[tuple[float, int, str]] = []
    for part in accepted.split(","):
        name, _, quality = part.strip().partition(";q=")
        try:
            weight = float(quality) if quality else 1.0
        except ValueError:
            weight = 0.0
        if weight > 0:
            wishes.append((-weight, len(wishes), name.strip().lower().partition("-")[0]))
    return next((name for _, _, name in sorted(wishes) if name in LANGUAGES), USUAL)
