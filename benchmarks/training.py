"""One training step on cached latents against the same step written with diffusers and peft: same weights and inputs.

    python benchmarks/training.py [--model cogvideox_5b] [--full] [--device cuda] [--dtype bfloat16] [--write]
    python benchmarks/training.py --overhead [--write]

A step is forward, loss of v, backward, clipping and AdamW, on LoRA of the attention projections or on all weights. Both
sides hold the network in `--dtype`, and float32 weights beside it of what is trained. Ours draws latents, timestep and
noise within the step, as it does in training; the other side is given them. First both compute one loss and its
gradients, which must agree; then they take turns, on the same batch.

On a CPU the network keeps its width but loses most of its layers, and the clip is small; on a GPU both are full size,
with random weights. `--overhead` runs the trainer itself, from a cache of generated clips, and tells how much of a step
passes outside of the network's forward and backward pass and the optimizer.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / folder) for folder in ("sat", "tests", "tests/sat", "benchmarks"))]

from harness import (  # noqa: E402
    alternating_medians,
    layer_flops,
    machine,
    markdown_table,
    peak_memories,
    peak_memory,
    synchronize,
    write_results,
)

from cogvideox_sat.commands.flag_spellings import EitherSpellingParser  # noqa: E402
from cogvideox_sat.commands.startup import quiet_libraries  # noqa: E402
from cogvideox_sat.configuration.files import load_configs  # noqa: E402
from cogvideox_sat.latent_geometry import patch_sizes  # noqa: E402
from support import relative_error  # noqa: E402

CPU_LAYERS = 2
CPU_CLIP = (5, 30, 44)  # latent frames, height, width
RANK, LORA_ALPHA = 128, 1
PEFT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
LEARNING_RATE, BETAS, CLIPPING = 1e-4, (0.9, 0.95), 1.0
NEGLIGIBLE = 1e-6  # gradients, beside the largest
AGREEMENT = 1e-4  # of loss and gradients in float32
WARM_UP = 2  # steps of the trainer


def main() -> None:
    args = arguments()
    quiet_libraries()
    if args.overhead:
        title, text = "Time outside of the network and the optimizer", overhead(args)
    elif args.memory_of:
        contender = build(args)[args.memory_of]
        print(json.dumps(peak_memory(lambda: [contender.step() for _ in range(2)], args.device)))  # noqa: T201
        return
    else:
        title, text = "Training step", compare(args)
    text = f"{description(args)}; {machine(args.device)}\n\n{text}"
    print(text)  # noqa: T201
    if args.write:
        checkpointing = ", checkpointing" if args.checkpointing else ""
        write_results(f"{title}, {args.model}, {args.kind}, {args.device.type}, {args.dtype}{checkpointing}", text)


def arguments() -> argparse.Namespace:
    parser = EitherSpellingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cogvideox_2b", help="configuration in configs/, without LoRA")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--lora", dest="kind", action="store_const", const="lora", default="lora", help="the default")
    kind.add_argument("--full", dest="kind", action="store_const", const="full", help="train all weights")
    parser.add_argument("--layers", type=int, help="of the network")
    parser.add_argument("--clip", type=int, nargs=3, metavar=("T", "H", "W"), help="size of the latents")
    parser.add_argument("--batch", type=int, default=1, help="clips of a step")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument(
        "--zero", type=int, choices=[0, 1, 2], default=0, help="stage of DeepSpeed, at least 1 in 16 bit"
    )
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps")
    parser.add_argument("--overhead", action="store_true", help="measure the trainer instead")
    parser.add_argument("--write", action="store_true", help="put the result into benchmarks/RESULTS.md")
    parser.add_argument("--memory-of", choices=["ours", "diffusers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_cpu = args.device.type == "cpu"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses when it is imported, which is why that is done later
    config = load_configs([ROOT / "configs" / f"{args.model}.yaml"])
    args.model_config = config["model"]
    params = args.params = args.model_config["network_config"]["params"]
    args.layers = params["num_layers"] = args.layers or (CPU_LAYERS if on_cpu else params["num_layers"])
    params["transformer_args"]["checkpoint_activations"] = args.checkpointing
    params["modules"].pop("lora_config", None)
    if args.kind == "lora":
        lora = {"r": RANK, "lora_alpha": LORA_ALPHA}
        params["modules"]["lora_config"] = {"target": "sat.model.finetune.lora2.LoraMixin", "params": lora}
    temporal = patch_sizes(params["patch_size"])[0]
    if not args.clip:
        height, width = config["args"]["sampling_image_size"]
        frames = config["args"]["sampling_num_frames"]
        # Networks that patch time get the first latent frame twice; a cache has it once.
        args.clip = CPU_CLIP if on_cpu else (frames - (temporal > 1), height // 8, width // 8)
    args.network_clip = (args.clip[0] + (temporal > 1), *args.clip[1:])
    if params["modules"]["pos_embed_config"]["params"].get("learnable_pos_embed"):
        # diffusers takes learnt positions at their full size only, so they are made for this clip.
        frames, height, width = args.clip
        params |= {"num_frames": 4 * (frames - 1) + 1, "latent_height": height, "latent_width": width}
    return args


def description(args: argparse.Namespace) -> str:
    parts = [
        f"{args.layers} layers, {'LoRA of rank ' + str(RANK) if args.kind == 'lora' else 'all weights'}",
        f"latents {'×'.join(map(str, args.clip))} (frames×height×width), batch {args.batch}, {args.dtype}",
        f"ZeRO {max(args.zero, int(args.dtype != 'float32'))}",
        *(["activation checkpointing"] if args.checkpointing else []),
    ]
    return ", ".join(parts)


# The comparison


class Contender(NamedTuple):
    """One side.

    Args:
        step: a whole step; returns its loss, which stays on the device.
        gradients: forward and backward pass alone; returns the loss and the gradients of what is trained, by the names
            of diffusers.
    """

    step: Callable[[], Tensor]
    gradients: Callable[[], tuple[Tensor, dict[str, Tensor]]]


def compare(args: argparse.Namespace) -> str:
    """Time, memory and agreement of both sides, as Markdown."""
    contenders = build(args)
    agreement = check_agreement(contenders, args.dtype)
    seconds = alternating_medians({name: each.step for name, each in contenders.items()}, args.repeats)
    last = {name: each.step().item() for name, each in contenders.items()}
    del contenders
    memory = peak_memories(seconds, args.device)
    flops = floating_point_operations(args)
    rows = [
        [
            name,
            seconds[name],
            flops / seconds[name] / 1e12,
            f"{memory[name]:.2f}",
            f"{seconds[name] / seconds['diffusers']:.3f}",
            f"{memory[name] / memory['diffusers']:.3f}",
            f"{last[name]:.6f}",
        ]
        for name in seconds
    ]
    header = ["", "s per step", "TFLOP/s", "peak GiB", "time ratio", "memory ratio", f"loss of step {args.repeats + 2}"]
    return f"{markdown_table(header, rows)}\n\n{agreement}"


def check_agreement(contenders: dict[str, Contender], dtype: str) -> str:
    """How far the losses and gradients of the two are apart, before the first step; stops if they are not the same."""
    (loss, gradients), (expected_loss, expected) = (contenders[name].gradients() for name in ("ours", "diffusers"))
    if gradients.keys() != expected.keys():
        raise SystemExit(f"not the same is trained: {sorted(gradients.keys() ^ expected.keys())[:4]}")
    # Some are zero but for rounding: a bias of all keys alike changes no attention.
    largest = max(gradient.norm() for gradient in expected.values())
    compared = [name for name, gradient in expected.items() if gradient.norm() > NEGLIGIBLE * largest]
    worst = max(compared, key=lambda name: relative_error(gradients[name], expected[name]))
    errors = relative_error(loss, expected_loss), relative_error(gradients[worst], expected[worst])
    text = (
        f"Relative difference before the first step: loss {errors[0]:.1e}, gradients at most {errors[1]:.1e} "
        f"(the worst of {len(compared)}: {worst})"
    )
    if dtype == "float32" and max(errors) > AGREEMENT:
        raise SystemExit(text)
    return text


def floating_point_operations(args: argparse.Namespace) -> float:
    """Of a step's matrix products in the layers, without what checkpointing repeats.

    The backward pass of an attention costs twice its forward pass; that of a product with a weight matrix once for its
    input, which in LoRA's first attention needs no gradient, and once for the weight, if it is trained.
    """
    patch, position = patch_sizes(args.params["patch_size"]), args.params["modules"]["pos_embed_config"]["params"]
    tokens = position["text_length"] + math.prod(args.network_clip) // math.prod(patch)
    products, attention = layer_flops(tokens, args.params["hidden_size"])
    if args.kind == "full":
        return args.batch * args.layers * 3 * (products + attention)
    adapter = products * 16 * RANK / (24 * args.params["hidden_size"])
    untouched = products * 6 / 24
    return args.batch * (args.layers * (2 * products + 3 * (attention + adapter)) - untouched)


# The contenders


def build(args: argparse.Namespace) -> dict[str, Contender]:
    """Both contenders; with `--memory-of` that one alone is made."""
    from sgm import randomness

    engine = build_engine(args)
    batch = cached_batch(args, engine)
    seeds = list(range(args.batch))
    # What ours draws in its step, for the other side.
    with randomness.per_sample(seeds):
        image, latents = engine.encode_batch(batch)
        latents = latents.transpose(1, 2).contiguous()
        if engine.is_15:
            latents = torch.cat((latents[:, :1], latents), dim=1)
        timesteps = engine.loss_fn.sigma_sampler(args.batch, return_idx=True)[1].to(args.device)
        noise = engine.loss_fn.noise_like(latents)
    condition = None if image is None else engine.concat_condition(image, latents.shape[1])
    inputs = Inputs(
        latents.float(), noise, timesteps, batch["txt_embedding"], condition, engine.default_ofs(args.batch)
    )

    network = None if args.memory_of == "diffusers" else build_network(args)
    contenders = {}
    if args.memory_of != "ours":
        contenders["diffusers"] = diffusers_step(args, network, inputs)
    if network is not None:
        contenders["ours"] = our_step(args, engine, network, batch, seeds)
    return contenders


def build_engine(args: argparse.Namespace) -> nn.Module:
    """Our engine without its network, conditioned on embeddings that were computed before."""
    from cogvideox_sat.clips.latent_identity import conditioner_for_cache
    from cogvideox_sat.parallel.process_groups import initialize_process_groups
    from diffusion_video import SATVideoDiffusionEngine

    initialize_process_groups()
    model_config = {
        **args.model_config,
        "conditioner_config": conditioner_for_cache(args.model_config["conditioner_config"]),
    }
    engine_args = argparse.Namespace(model_config=model_config, bf16=args.dtype == "bfloat16")
    return SATVideoDiffusionEngine(engine_args, ("conditioner",), args.device)


def build_network(args: argparse.Namespace) -> nn.Module:
    """Our network with random weights, none of them zero, of which what is trained requires gradients."""
    from cogvideox_sat.configuration.meta_device import instantiate_on_meta
    from cogvideox_sat.weights.loading import initialise_missing

    torch.manual_seed(0)
    network = instantiate_on_meta(args.model_config["network_config"]).to(getattr(torch, args.dtype))
    initialise_missing(network, args.device)
    for name, parameter in network.named_parameters():
        if ".matrix_B." in name:
            nn.init.normal_(parameter, std=0.02)
    network.to(args.device)
    network.disable_untrainable_params()
    return network.train()


def cached_batch(args: argparse.Namespace, engine: nn.Module) -> dict[str, Any]:
    """What a loader gives for clips that were encoded before."""
    generator = torch.Generator().manual_seed(0)
    channels = args.params["out_channels"]
    tokens = args.params["modules"]["pos_embed_config"]["params"]["text_length"]
    features = args.params["modules"]["patch_embed_config"]["params"]["text_hidden_size"]
    shapes = {"moments": (2 * channels, *args.clip), "txt_embedding": (tokens, features)}
    if engine.noised_image_input:
        shapes["image_moments"] = (2 * channels, 1, *args.clip[1:])
    batch = {name: torch.randn(args.batch, *shape, generator=generator) for name, shape in shapes.items()}
    return {name: tensor.to(args.device, engine.dtype) for name, tensor in batch.items()}


def our_step(
    args: argparse.Namespace, engine: nn.Module, network: nn.Module, batch: dict[str, Any], seeds: list[int]
) -> Contender:
    """A step as `training.run` does it."""
    from cogvideox_sat.configuration.training_arguments import TrainingArguments
    from cogvideox_sat.training import deepspeed_engine
    from sgm import randomness
    from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper

    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    schedule = {"warmup": 0.0, "auto_warmup_steps": 0, "lr_decay_style": "constant"}
    training_args = TrainingArguments(
        deepspeed_config=deepspeed_config(args, "torch.optim.AdamW", fused=True), **schedule
    )
    wrapper = OpenAIWrapper(network, dtype=engine.dtype)
    runner = deepspeed_engine.initialize(wrapper, training_args, engine.dtype)

    def loss(model: nn.Module) -> Tensor:
        engine.model = model
        with randomness.per_sample(seeds):
            return engine.shared_step(batch, drop=False)[0]

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        value = loss(wrapper)  # DeepSpeed takes no backward pass but its own
        found = torch.autograd.grad(value, list(trained.values()))
        return value.detach(), names_of_diffusers(dict(zip(trained, found, strict=True)))

    def step() -> Tensor:
        value = loss(runner)
        runner.backward(value)
        runner.step()
        return value.detach()

    return Contender(step, gradients)


def deepspeed_config(args: argparse.Namespace, optimizer: str, **options: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_clipping": CLIPPING,
        "zero_optimization": {"stage": args.zero},
        "optimizer": {
            "type": optimizer,
            "params": {"lr": LEARNING_RATE, "betas": list(BETAS), "weight_decay": 0.0, **options},
        },
    }


class Inputs(NamedTuple):
    """What the other side's step is given.

    Args:
        latents, noise: (b, t, c, h, w), float32.
        timesteps: (b,).
        text: embeddings (b, tokens, features).
        condition: latents of the first frame (b, t, c, h, w), for image-to-video.
        ofs: (b,), for 1.5 image-to-video.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: Tensor
    condition: Tensor | None
    ofs: Tensor | None


def diffusers_step(args: argparse.Namespace, network: nn.Module | None, inputs: Inputs) -> Contender:
    """The step with diffusers' network and scheduler, peft's adapter and PyTorch's optimizer.

    The weights are those of `network`; without it they are random.
    """
    from diffusers import CogVideoXDPMScheduler
    from peft import LoraConfig

    from diffusers_network import build_diffusers_network, diffusers_rotary

    dtype = getattr(torch, args.dtype)
    twin = build_diffusers_network(args.params, args.device, dtype)
    weights = names_of_diffusers(network.state_dict()) if network else {}
    twin.load_state_dict({name: tensor for name, tensor in weights.items() if name in twin.state_dict()}, strict=False)
    if args.kind == "lora":
        twin.requires_grad_(False)
        twin.add_adapter(LoraConfig(r=RANK, lora_alpha=LORA_ALPHA, target_modules=PEFT_TARGETS))
        twin.load_state_dict({name: tensor for name, tensor in weights.items() if ".lora_" in name}, strict=False)
    if args.checkpointing:
        twin.enable_gradient_checkpointing()
    twin.train()
    trained = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    optimizer = MasterAdamW(list(trained.values()))

    grid = tuple(s // p for s, p in zip(args.network_clip, patch_sizes(args.params["patch_size"]), strict=True))
    rotary = diffusers_rotary(args.params, grid)
    rotary = rotary and tuple(table.to(args.device) for table in rotary)
    discretization = args.model_config["denoiser_config"]["params"]["discretization_config"]["params"]
    scheduler = CogVideoXDPMScheduler(
        rescale_betas_zero_snr=True, snr_shift_scale=discretization["shift_scale"], prediction_type="v_prediction"
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(args.device)

    def loss() -> Tensor:
        noised = scheduler.add_noise(inputs.latents, inputs.noise, inputs.timesteps)
        x = noised.to(dtype)
        if inputs.condition is not None:
            x = torch.cat((x, inputs.condition), dim=2)
        output = twin(x, inputs.text, inputs.timesteps, ofs=inputs.ofs, image_rotary_emb=rotary, return_dict=False)[0]
        denoised = scheduler.get_velocity(output.float(), noised, inputs.timesteps)
        weight = 1 / (1 - scheduler.alphas_cumprod[inputs.timesteps]).view(-1, 1, 1, 1, 1)
        return (weight * (denoised - inputs.latents) ** 2).mean()

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        value = loss()
        return value.detach(), dict(zip(trained, torch.autograd.grad(value, list(trained.values())), strict=True))

    def step() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return Contender(step, gradients)


class MasterAdamW:
    """AdamW after clipping; for 16-bit parameters on float32 copies of them, as DeepSpeed has them."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in parameters]
        self.adam = torch.optim.AdamW(self.masters, LEARNING_RATE, BETAS, weight_decay=0.0, fused=True)

    def step(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, CLIPPING)
        self.adam.step()
        self.adam.zero_grad()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.data.copy_(master)


def names_of_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of our network, which may have an adapter, under the names of diffusers and peft."""
    from diffusers_network import map_weights

    base, adapter = {}, {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"transformer\.layers\.(\d+)\.attention\.(\w+)\.matrix_([AB])\.(\d)", name):
            layer, module, matrix, part = match.groups()
            target = PEFT_TARGETS[int(part)] if module == "query_key_value" else PEFT_TARGETS[-1]
            adapter[f"transformer_blocks.{layer}.attn1.{target}.lora_{matrix}.default.weight"] = tensor
        else:
            base[name.replace(".original.", ".")] = tensor
    return {**map_weights(base), **adapter}


# The trainer


def random_base(args: argparse.Namespace, path: Path) -> Path:
    """A checkpoint of random weights for a run of `args.model`, with or without an adapter on top."""
    from cogvideox_sat.weights.checkpoint_files import is_adapter

    weights = build_network(args).state_dict()
    base = {name.replace(".original.", "."): tensor for name, tensor in weights.items() if not is_adapter(name)}
    torch.save({"module": base}, path)
    return path


def overhead(args: argparse.Namespace) -> str:
    """Where the time of the trainer's steps goes, as Markdown."""
    from cogvideox_sat.parallel.process_groups import destroy_process_groups, initialize_process_groups
    from cogvideox_sat.training.plan import plan_run
    from cogvideox_sat.training.run import Trainer

    with tempfile.TemporaryDirectory() as folder:
        training_args = training_from_cache(args, Path(folder))
        plan = plan_run(training_args)
        initialize_process_groups()
        trainer = Trainer(training_args, plan)
        watch = StepWatch(trainer)
        trainer.train()
        watch.stop()
        destroy_process_groups()
    return watch.table(warm_up=WARM_UP)


def training_from_cache(args: argparse.Namespace, folder: Path) -> Any:
    """Arguments of a run of `args.model` on a cache, made here, of four generated clips.

    The VAE and the text encoder of the tests' small model make it, which is why the network takes texts of their size.
    """
    from build_tiny_model import main as build_tiny_model
    from cogvideox_sat.configuration.training_arguments import get_training_args
    from tools.precompute_latents import main as precompute
    from training_clips import write_dataset

    tiny = load_configs([ROOT / "tests" / "configs" / "5b.yaml"])
    tiny["args"]["load"] = str(folder / "tiny")
    text = tiny["model"]["conditioner_config"]["params"]["emb_models"][0]["params"]
    text["model_dir"] = str(folder / "t5")
    tiny["model"]["first_stage_config"]["params"]["ckpt_path"] = str(folder / "vae.pt")
    modules, tiny_modules = args.params["modules"], tiny["model"]["network_config"]["params"]["modules"]
    modules["pos_embed_config"]["params"]["text_length"] = text["max_length"]
    modules["patch_embed_config"] = tiny_modules["patch_embed_config"]

    frames, height, width = 4 * (args.clip[0] - 1) + 1, 8 * args.clip[1], 8 * args.clip[2]
    clips = write_dataset(folder / "clips", clips=4, frames=frames, sizes=[(height, width)])
    config = {
        "args": {
            "load": str(random_base(args, folder / "base.pt")),
            "save": str(folder / "runs"),
            "train_data": [str(clips)],
            "train_iters": WARM_UP + args.repeats,
            "num_workers": 1,
            "device": args.device.type,
            "bf16": args.dtype == "bfloat16",
        },
        "model": {
            **args.model_config,
            **{part: tiny["model"][part] for part in ("conditioner_config", "first_stage_config")},
        },
        "data": {
            "target": "data_video.SFTDataset",
            "params": {"video_size": [height, width], "fps": 8, "max_num_frames": frames, "skip_frms_num": 0},
        },
        "deepspeed": deepspeed_config(args, "sat.ops.FusedEmaAdam"),
    }
    files = {name: folder / f"{name}.yaml" for name in ("tiny", "training")}
    for file, content in zip(files.values(), (tiny, config), strict=True):
        file.write_text(yaml.safe_dump(content))
    base, latents = ["--base", str(files["training"])], str(folder / "latents")
    if build_tiny_model(["--config", str(files["tiny"])]) or precompute([*base, "--output", latents]):
        raise SystemExit("the cache of latents could not be made")
    return get_training_args([*base, "--train_data", latents])


class StepWatch:
    """Times the calls that a trainer makes in its steps, without a change to it.

    The device is waited for around each call, so that what it still has to do falls on the call that asked for it. In
    an undisturbed run it works while the program goes on: the share of everything else is an upper limit.
    """

    CALLS = ("forward", "backward", "optimizer", "waiting for data")

    def __init__(self, trainer: Any):
        self.steps: list[dict[str, float]] = []
        self.started: float | None = None
        network, batches = trainer.network, trainer.batches
        network.forward = self.timed("forward", network.forward)
        network.backward = self.timed("backward", network.backward)
        network.step = self.timed("optimizer", network.step)
        trainer.batches = iter(self.timed("waiting for data", lambda: next(batches)), None)
        trainer.train_step = self.counted(trainer.train_step)
        trainer.save = lambda: None  # no part of a step

    def timed(self, name: str, call: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            result = call(*args, **kwargs)
            synchronize()
            self.steps[-1][name] = self.steps[-1].get(name, 0.0) + time.perf_counter() - start
            return result

        return run

    def counted(self, train_step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            self.stop()
            self.started = time.perf_counter()
            self.steps.append({})
            train_step()

        return run

    def stop(self) -> None:
        """The step that runs, if there is one, is over; with all that the trainer did after it."""
        if self.started is not None:
            synchronize()
            self.steps[-1]["step"] = time.perf_counter() - self.started

    def table(self, warm_up: int) -> str:
        """Medians of the steps after `warm_up`."""
        steps = self.steps[warm_up:]
        for step in steps:
            step["everything else"] = step["step"] - sum(step[name] for name in self.CALLS)
        seconds = {
            name: statistics.median(step[name] for step in steps) for name in ("step", *self.CALLS, "everything else")
        }
        rows = [[name, f"{1000 * value:.1f}", f"{value / seconds['step']:.2%}"] for name, value in seconds.items()]
        outside = statistics.median(
            (step["waiting for data"] + step["everything else"]) / step["step"] for step in steps
        )
        return (
            f"{markdown_table(['', 'ms', 'share'], rows)}\n\n"
            f"Outside of forward, backward and optimizer: {outside:.2%} of a step (median of {len(steps)})"
        )


if __name__ == "__main__":
    main()
