"""The parts of the device check in their order, and the units of each part.

Units run in their own processes. PyTorch is not imported.
"""

from dataclasses import dataclass, field
from typing import Any

PARTS = {  # seconds of the budget for each part; unused seconds go to later parts
    "attention": 25,
    "layer": 30,
    "networks": 150,
    "vae": 35,
    "training": 80,
    "commands": 140,
}
FULL_BUDGET = sum(PARTS.values())
FIVE_B, TWO_B, ONE_FIVE = "5B", "2B", "1.5, 81 frames"
CONFIGURATIONS = {FIVE_B: "cogvideox_5b", TWO_B: "cogvideox_2b", ONE_FIVE: "cogvideox1.5_5b"}


@dataclass(frozen=True)
class Unit:
    """A measurement in its own process.

    Attributes:
        name: the name in the results.
        part: one of `PARTS`.
        target: the function that measures, as `module.function`, called with a recorder and `options`.
        cost: estimated seconds on one H100; the unit is skipped if less time is left.
        options: keywords of the function.
    """

    name: str
    part: str
    target: str
    cost: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def most(self) -> float:
        """Return the seconds after which the unit counts as hanging."""
        return 3 * self.cost + 30


def units_of(size: str) -> list[Unit]:
    """Return the units of a size, "full" or "toy", in their order."""
    return full_units() if size == "full" else toy_units()


def full_units() -> list[Unit]:
    """Return the units of the released sizes.

    Within a part the most reliable and most important units come first.
    """
    networks = [(TWO_B, 30), (FIVE_B, 36), (ONE_FIVE, 62)]
    training = [(TWO_B, 30, 50), (FIVE_B, 50, 80)]
    units = [
        Unit("attention", "attention", "attention.measure", 20),
        Unit("layer", "layer", "layer.measure", 28, {"model": FIVE_B}),
    ]
    for whose, function in (("", "measure"), (", diffusers", "measure_diffusers")):
        units += [
            Unit(f"networks, {name}{whose}", "networks", f"networks.{function}", cost, {"model": name})
            for name, cost in networks
        ]
    units.append(Unit("vae", "vae", "autoencoder.measure", 35))
    for number, compiled in ((1, False), (2, True)):
        units += [
            Unit(
                f"training, {each[0]}{', compiled' if compiled else ''}",
                "training",
                "fine_tuning.measure",
                each[number],
                {"model": each[0], "compiled": compiled},
            )
            for each in training
        ]
    # The first unit of a model also makes its weights; the very first one also makes those of the text encoder.
    sampling = [(FIVE_B, "none", 70), (FIVE_B, "stage", 37), (FIVE_B, "sequential", 37)]
    sampling += [(TWO_B, "none", 35), (TWO_B, "stage", 30), (TWO_B, "sequential", 30)]
    commands = [
        Unit(f"sample {name}, {offload}", "commands", "commands.sample", cost, {"model": name, "offloads": [offload]})
        for name, offload, cost in sampling
    ]
    commands.insert(1, Unit(f"train {FIVE_B}", "commands", "commands.train", 45, {"model": FIVE_B}))
    return units + commands


def toy_units() -> list[Unit]:
    """Return the same measurements for networks that a CPU computes in a moment.

    The measurements start fewer processes.
    """
    model = {"model": "toy"}
    return [
        Unit("attention", "attention", "attention.measure", 1),
        Unit("layer", "layer", "layer.measure", 1, model),
        Unit("networks, toy", "networks", "networks.measure_all", 1, model),
        Unit("vae", "vae", "autoencoder.measure", 1),
        Unit("training, toy", "training", "fine_tuning.measure_all", 1, model),
        Unit("commands, toy", "commands", "commands.measure_all", 1, model),
    ]
