"""Report the memory that sampling takes on a device, for each policy, as lines of text."""

from dataclasses import replace

from arguments import SamplingArguments
from cogvideox_sat.configuration.model_limits import OFFLOAD_POLICIES
from cogvideox_sat.files.sizes import GIB, in_words
from cogvideox_sat.latent_geometry import TIME_FACTOR, Bucket
from cogvideox_sat.memory.sampling_peaks import LIBRARIES, NETWORK, TEXT, VIDEO, MemoryPolicy, SamplingMemory
from cogvideox_sat.memory.weightless import module_bytes, short_count
from cogvideox_sat.sampling.fitting import choose, device_budget, gib_up, memory_of, policies, video_sizes

CARDS = (6, 8, 10, 12, 16, 24, 32, 48, 80)  # GB


def report(args: SamplingArguments) -> list[str]:
    """Return the lines of the report for a video of the size in the arguments.

    The lines give the weights of each part, the memory of the device for each `--offload`, and the choice of `--fit`:
    for the given value, or for common sizes of GPU memory.

    Raises:
        UserError: a part of the model cannot be built, or the memory that `fit` allows is too small for every policy.
    """
    (size,) = video_sizes(args)
    memory = memory_of(args, [size])
    frames = (size.latent_frames - int(memory.engine.is_15) - 1) * TIME_FACTOR + 1
    clip = Bucket(frames, size.height, size.width)
    lines = [
        *weight_lines(memory),
        f"GiB of the device for {clip}, {LIBRARIES / GIB:g} of them for CUDA itself:",
        *table(memory, args),
    ]
    candidates = list(policies(args, memory.takes_pieces))
    if args.fit is not None:
        _, reason = choose(memory, candidates, device_budget(args.fit, args.device), args.fit)
        return [*lines, f"--fit {args.fit} picks {reason}"]
    least = memory.peak(min(candidates, key=memory.peak))
    return [*lines, f"--fit can be {gib_up(least)}GB or more, and picks", *fit_lines(memory, candidates)]


def weight_lines(memory: SamplingMemory) -> list[str]:
    """Return a line for each part of a model with the size of its weights."""
    engine, lines = memory.engine, []
    for name, part in ((NETWORK, engine.network), (VIDEO, memory.vae), (TEXT, engine.conditioner)):
        count = sum(parameter.numel() for parameter in part.parameters())
        lines.append(f"{name}: {in_words(module_bytes(part))} of weights ({short_count(count)} parameters)")
    if engine.unknown:
        lines[-1] += f", taken to be T5 v1.1 XXL: {engine.unknown}"
    return lines


def table(memory: SamplingMemory, args: SamplingArguments) -> list[str]:
    """Return a table in GiB: the stages for each `--offload`, then each further option.

    The row of an option shows only the stages that the option changes.
    """
    rows: list[tuple[str, dict[str, int]]] = []
    for offload in OFFLOAD_POLICIES if "offload" not in args.given else (args.offload,):
        found = list(policies(replace(args, offload=offload, given=args.given | {"offload"}), memory.takes_pieces))
        fastest = found[0]
        rows.append((f"--offload {offload}", memory.stages(fastest)))
        for policy in found[1:]:
            changed = {name: value for name, value in policy._asdict().items() if value != getattr(fastest, name)}
            if len(changed) == 1:
                ((name, value),) = changed.items()
                rows.append((f"  with --{name} {value}", differences(memory.stages(policy), memory.stages(fastest))))
    stages = list(rows[0][1])
    width = max(len(title) for title, _ in rows)
    lines = [" " * width + "".join(f"  {stage}" for stage in stages)]
    for title, taken in rows:
        cells = (f"{taken[stage] / GIB:.1f}" if stage in taken else "" for stage in stages)
        columns = (f"  {cell:>{len(stage)}}" for cell, stage in zip(cells, stages, strict=True))
        lines.append((f"{title:{width}}" + "".join(columns)).rstrip())
    return lines


def differences(stages: dict[str, int], others: dict[str, int]) -> dict[str, int]:
    """Return the stages whose memory differs from that in `others`."""
    return {stage: taken for stage, taken in stages.items() if taken != others[stage]}


def fit_lines(memory: SamplingMemory, candidates: list[MemoryPolicy]) -> list[str]:
    """Return the choices of `--fit` for common GPUs, one line per choice."""
    picked: dict[MemoryPolicy, list[int]] = {}
    for card in CARDS:
        fitting = (policy for policy in candidates if memory.peak(policy) <= card * GIB)
        if policy := next(fitting, None):
            picked.setdefault(policy, []).append(card)
    return [f"--fit {cards_in_words(cards)}: {policy}" for policy, cards in reversed(picked.items())]


def cards_in_words(cards: list[int]) -> str:
    """Return sizes of memory in words, such as `6GB` or `16GB to 80GB`."""
    return f"{cards[0]}GB" if len(cards) == 1 else f"{cards[0]}GB to {cards[-1]}GB"
