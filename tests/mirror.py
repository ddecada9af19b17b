"""Check that each module has a test file of its name, or an entry in `COVERED_BY`.

    python tests/mirror.py              prints violations, and exits with 1 if there are any

The tests of `sat/cogvideox_sat/clips/sources.py` are in `tests/clips/test_sources.py`; those of the modules in `sat/`
in `tests/sat/`; those of `tool_commands`, which scripts in `tools/` start, in `tests/tools/`; those of `sgm`, whose
folders are deep, in `tests/sgm/` by the last name of the module. Modules that only export names of others need no
tests: see `only_passes_on`. For `benchmarks/`, `tests/benchmarks/test_benchmarks.py` checks that it runs each.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from architecture import ROOT, imports, module_of, places

# Module: the file in tests/ that covers it, and the reason.
COVERED_BY = {
    "clips.latent_dataset": ("clips/test_latent_cache.py", "training data from a cache"),
    "clips.latent_identity": ("clips/test_latent_cache.py", "what a cache depends on"),
    "clips.items_in_processes": ("clips/test_probing.py", "probes clips in processes"),
    "clips.reading_outcomes": ("clips/test_loader.py", "the processes of a loader"),
    "clips.reading_processes": ("clips/test_loader.py", "the processes of a loader"),
    "clips.reading_worker": ("clips/test_loader.py", "the processes of a loader"),
    "clips.samples": ("clips/test_selection.py", "the samples of data sets"),
    "clips.trees": ("clips/test_sources.py", "finds the files of a source"),
    "clips.validation_clips": ("training/test_validation.py", "the clips of a validation"),
    "commands.hub_inputs": ("tools/test_convert_weight_hf2sat.py", "reads pipelines of the hub"),
    "configuration.argument_lists": ("configuration/test_training_arguments.py", "data; its reading is tested"),
    "configuration.argument_fields": ("configuration/test_training_arguments.py", "the lists consist of them"),
    "configuration.argument_limits": ("configuration/test_training_arguments.py", "limits of all commands"),
    "configuration.argument_parser": ("configuration/test_training_arguments.py", "parses the lists of all commands"),
    "configuration.argument_reading": ("configuration/test_training_arguments.py", "reads the lists of all commands"),
    "configuration.argument_values": ("configuration/test_training_arguments.py", "values of the lists"),
    "configuration.shared_arguments": ("configuration/test_training_arguments.py", "data; its reading is tested"),
    "configuration.deepspeed_optimizers": ("configuration/test_deepspeed.py", "a part of the section"),
    "configuration.deepspeed_spellings": ("configuration/test_deepspeed.py", "older sections"),
    "configuration.deepspeed_values": ("configuration/test_deepspeed.py", "mistakes in all parts"),
    "configuration.meta_device": ("weights/test_loading.py", "builds networks that weights are loaded into"),
    "configuration.shipped_configs": ("configuration/test_model_checks.py", "compares with files that are shipped"),
    "configuration.static_signatures": ("configuration/test_targets.py", "signatures of targets"),
    "conversion.assembled_weights": ("tools/test_convert_weight_sat2hf.py", "a part of both conversions"),
    "conversion.config_writing": ("tools/test_convert_weight_hf2sat.py", "a part of the conversion"),
    "conversion.diffusers_configs": ("weights/test_diffusers_names.py", "diffusers builds the same network from them"),
    "conversion.diffusers_folders": ("conversion/test_stored_weights.py", "writes and reads them"),
    "conversion.diffusers_lora_files": ("tools/test_import_hf_lora.py", "what the tool reads"),
    "conversion.lora_files": ("sampling/test_adapters.py", "adapters of both kinds"),
    "conversion.lora_matrices": ("tools/test_export_sat_lora_weight.py", "a part of the export"),
    "conversion.sat_lora_files": ("tools/test_export_sat_lora_weight.py", "what the tool reads"),
    "conversion.lora_merging": ("tools/test_merge_lora.py", "a part of merging"),
    "conversion.model_sizes": ("conversion/test_weight_family.py", "sizes tell the family"),
    "conversion.network_sources": ("conversion/test_zero_checkpoints.py", "reads them from ZeRO's pieces too"),
    "conversion.pipeline_reading": ("tools/test_convert_weight_hf2sat.py", "a part of the conversion"),
    "conversion.pipeline_writing": ("tools/test_convert_weight_sat2hf.py", "a part of the conversion"),
    "conversion.released_models": ("conversion/test_weight_family.py", "a table"),
    "conversion.safetensors_writing": ("conversion/test_stored_weights.py", "writes and compares them"),
    "conversion.stored_checkpoints": ("conversion/test_zero_checkpoints.py", "opens all forms"),
    "conversion.text_encoder_files": ("tools/test_convert_weight_sat2hf.py", "a part of the conversion"),
    "evaluation.inception3d": ("tools/test_evaluate_vae.py", "a part of the report"),
    "evaluation.vae_report": ("tools/test_evaluate_vae.py", "the report of the tool"),
    "evaluation.video_metrics": ("tools/test_evaluate_vae.py", "a part of the report"),
    "files.hub_upload": ("tools/test_convert_weight_sat2hf.py", "the option --push_to_hub"),
    "files.shipped": ("commands/test_input_paths.py", "paths of inputs"),
    "media.video_facts": ("media/test_video_reading.py", "facts, as all readers give them"),
    "sampling.memory_report": ("tools/test_estimate_memory.py", "what that tool tells"),
    "memory.weightless": ("tools/test_estimate_memory.py", "what is measured, by that tool"),
    "network.adaptive_layer": ("sat/test_dit_video_concat.py", "a part of the network"),
    "network.patches": ("sat/test_dit_video_concat.py", "a part of the network"),
    "network.position_embeddings": ("sat/test_dit_video_concat.py", "a part of the network"),
    "network.position_tables": ("sat/test_dit_video_concat.py", "tables of the network"),
    "network.sat_transformer": ("sat/test_dit_video_concat.py", "layers of the network"),
    "parallel.agreement": ("parallel/test_process_groups.py", "agreement of the processes of a group"),
    "network.block": ("network/test_compiled_layers.py", "what is compiled"),
    "python_api.call_planning": ("python_api/test_pipeline.py", "pictures and clips in memory"),
    "python_api.call_progress": ("python_api/test_pipeline.py", "reports of a call"),
    "python_api.calls": ("python_api/test_pipeline.py", "arguments of a call"),
    "python_api.model_places": ("python_api/test_loading.py", "models that are loaded"),
    "python_api.video_fields": ("python_api/test_pipeline.py", "fields of a result"),
    "runs.progress": ("runs/test_metrics.py", "the bar of a run"),
    "runs.step_clock": ("runs/test_metrics.py", "the times of steps"),
    "runs.vae_data": ("vae_training/test_run.py", "the clips of a run"),
    "sampling.kept_latents": ("sat/test_sample_video.py", "latents beside videos, by the command"),
    "sampling.latent_decoding": ("tools/test_decode_latents.py", "the decoding of the tool"),
    "sampling.latent_files": ("tools/test_decode_latents.py", "the files of the tool"),
    "sampling.model_arguments": ("sat/test_bad_input.py", "what the command refuses"),
    "sampling.plan": ("sat/test_bad_input.py", "what is planned, by the command"),
    "sampling.planned_videos": ("configuration/test_frame_sizes.py", "their sizes; the command makes them"),
    "sampling.request_checks": ("configuration/test_frame_sizes.py", "the size of a request"),
    "sampling.open_sessions": ("sampling/test_session.py", "counted by sessions"),
    "sampling.prompt_lines": ("sampling/test_prompt_files.py", "lines of prompt files"),
    "sampling.request_samplers": ("sampling/test_session.py", "samplers of its requests"),
    "sampling.requests": ("sampling/test_session.py", "requests of a session"),
    "sampling.run": ("sat/test_sample_video.py", "the command is its run"),
    "sgm.config_blame": ("sgm/test_util.py", "errors of what instantiate_from_config builds"),
    "sgm.config_places": ("sgm/test_util.py", "errors of what instantiate_from_config builds"),
    "sgm.config_slots": ("sgm/test_util.py", "errors of what instantiate_from_config builds"),
    "sgm.config_values": ("sgm/test_util.py", "errors of what instantiate_from_config builds"),
    "sgm.diffusers_vae_names": ("weights/test_diffusers_names.py", "names of diffusers"),
    "sgm.models.abstract_autoencoder": ("sgm/test_autoencoder.py", "a base of the engines"),
    "sgm.models.autoencoder_optimizers": ("sgm/test_autoencoder.py", "a base of the engines"),
    "sgm.models.autoencoding_engine": ("sgm/test_autoencoder.py", "`autoencoder` passes its names on"),
    "sgm.flash_attention3": ("network/test_attention_choice.py", "one of the kernels to choose from"),
    "sgm.models.frames_at_once": ("vae_modules/test_piecewise.py", "a base of `VideoCoder`"),
    "sgm.models.video_coder": ("vae_modules/test_autoencoder.py", "runs its encoders and decoders"),
    "sgm.models.video_coder_memory": ("memory/test_encoding_memory.py", "estimates of encoding"),
    "sgm.module_aliases": ("configuration/test_targets.py", "a table; targets are looked up in it"),
    "sgm.modules.autoencoding.clip": ("vae_modules/test_autoencoder.py", "chunks of a clip"),
    "sgm.modules.autoencoding.losses.adversary": ("sgm/test_discriminator_loss.py", "a part of that loss"),
    "sgm.modules.autoencoding.regularizers.base": ("sgm/test_regularizers.py", "one set for all"),
    "sgm.modules.autoencoding.regularizers.continuous": ("sgm/test_regularizers.py", "one set for all"),
    "sgm.modules.autoencoding.regularizers.finite_scalar_quantization": ("sgm/test_regularizers.py", "one set for all"),
    "sgm.modules.autoencoding.regularizers.lookup_free_quantization": ("sgm/test_regularizers.py", "one set for all"),
    "sgm.modules.autoencoding.regularizers.quantize": ("sgm/test_regularizers.py", "one set for all"),
    "sgm.modules.autoencoding.temporal_ae": ("sgm/test_video_attention.py", "layers over time"),
    "sgm.modules.autoencoding.meta_device": ("memory/test_encoding_memory.py", "estimates for a CPU"),
    "sgm.modules.autoencoding.tiling": ("vae_modules/test_autoencoder.py", "tiles of the decoder"),
    "sgm.modules.attention_layers": ("sgm/test_attention.py", "`attention` passes its names on"),
    "sgm.modules.checkpoint": ("sgm/test_autoencoder.py", "weights of the engines"),
    "sgm.modules.diffusionmodules.base_sampler": ("sgm/test_sampling.py", "a base of the samplers"),
    "sgm.modules.diffusionmodules.denoiser_scaling": ("sgm/test_denoiser.py", "a part of denoisers"),
    "sgm.modules.diffusionmodules.denoiser_weighting": ("sgm/test_denoiser.py", "a part of denoisers"),
    "sgm.modules.diffusionmodules.sampling_utils": ("sgm/test_sampling.py", "a part of samplers"),
    "sgm.modules.diffusionmodules.sigma_sampling": ("sgm/test_loss.py", "the noise levels of the loss"),
    "sgm.modules.diffusionmodules.wrappers": ("sgm/test_denoiser.py", "what denoisers call"),
    "sgm.modules.transformer_blocks": ("sgm/test_attention.py", "`attention` passes its names on"),
    "sampling.drawing": ("sampling/test_session.py", "the network's part of a request"),
    "shapes.prompted_videos": ("tools/test_evaluate_shapes.py", "a part of the report"),
    "shapes.report": ("tools/test_evaluate_shapes.py", "the report of the tool"),
    "shapes.tiny_text_encoder": ("tools/test_train_text_encoder.py", "what the tool trains"),
    "tools.web": ("web/test_command.py", "starts the command"),
    "web.data_tab": ("web/test_page.py", "a tab, in a browser"),
    "web.gallery_section": ("web/test_page.py", "the gallery, in a browser"),
    "web.making_tab": ("web/test_page.py", "two tabs, in a browser"),
    "web.texts.chinese": ("web/test_texts.py", "compares the languages"),
    "web.texts.english": ("web/test_texts.py", "compares the languages"),
    "web.texts.japanese": ("web/test_texts.py", "compares the languages"),
    "web.training_tab": ("web/test_page.py", "a tab, in a browser"),
    "train_vae": ("vae_training/test_run.py", "the command is its run"),
    "train_video": ("training/test_run.py", "the command is its run"),
    "training.deepspeed_engine": ("training/test_optimizer_state.py", "small engines"),
    "training.engine_loading": ("training/test_run.py", "each run loads its engine"),
    "training.evaluations": ("training/test_prompt_videos.py", "what a run does to be watched"),
    "training.checkpoint_folders": ("training/test_checkpoint_saver.py", "the files that it writes"),
    "training.checkpoint_reading": ("training/test_run.py", "resumed runs read them"),
    "training.checkpoint_tensors": ("training/test_checkpoint_saver.py", "the tensors that it writes"),
    "training.latent_cache_folder": ("clips/test_latent_cache.py", "a cache is made and read"),
    "training.latent_cache_shards": ("clips/test_latent_cache.py", "a cache is made and read"),
    "training.latent_encoding": ("tools/test_precompute_latents.py", "encodes and caches"),
    "training.run_state": ("training/test_run.py", "resumed runs restore it"),
    "training.sample_encoder": ("clips/test_latent_cache.py", "encoded samples equal those of training"),
    "vae_modules.summands": ("vae_modules/test_autoencoder.py", "what layers of the autoencoder pass on"),
    "vae_modules.whole": ("vae_modules/test_autoencoder.py", "runs the layers of the autoencoder"),
    "vae_modules.passes.channel_sums": ("vae_modules/test_passes.py", "passes on a CPU"),
    "vae_modules.passes.gpu_support": ("vae_modules/test_gpu_kernels.py", "passes on a GPU"),
    "vae_modules.passes.gpu_trial": ("vae_modules/test_gpu_kernels.py", "passes on a GPU"),
    "vae_modules.passes.latent_maps": ("vae_modules/test_passes.py", "passes on a CPU"),
    "vae_modules.passes.modulation": ("vae_modules/test_passes.py", "passes on a CPU"),
    "vae_modules.passes.pieces_in_cache": ("vae_modules/test_passes.py", "passes on a CPU"),
    "vae_modules.passes.products": ("vae_modules/test_passes.py", "passes on a CPU"),
    "vae_modules.passes.resized_sums": ("vae_modules/test_passes.py", "passes on a CPU"),
    "vae_modules.passes.triton_kernels": ("vae_modules/test_gpu_kernels.py", "passes on a GPU"),
    "vae_modules.cp_enc_dec": ("vae_modules/test_autoencoder.py", "the coders of the autoencoder"),
    "vae_modules.convolutions": ("vae_modules/test_autoencoder.py", "layers of the autoencoder"),
    "vae_modules.normalization": ("vae_modules/test_autoencoder.py", "layers of the autoencoder"),
    "vae_modules.resampling": ("vae_modules/test_autoencoder.py", "layers of the autoencoder"),
    "vae_modules.residual_block": ("vae_modules/test_autoencoder.py", "layers of the autoencoder"),
    "training.memory_forecast": ("tools/test_estimate_memory.py", "what that tool tells"),
    "vae_training.lightning_trainer": ("vae_training/test_run.py", "a part of the run"),
    "vae_training.plan": ("configuration/test_vae_training_arguments.py", "what is planned from arguments"),
    "vae_training.reconstructions": ("vae_training/test_run.py", "a part of the run"),
    "vae_training.run_keeper": ("vae_training/test_run.py", "a part of the run"),
    "weights.checkpoint_files": ("weights/test_loading.py", "finds the files that are loaded"),
}


def own_test(path: Path, root: Path = ROOT) -> Path:
    """Return the test file of the module at `path`."""
    parts = path.relative_to(root).with_suffix("").parts
    room = parts[2:-1] if parts[:2] == ("sat", "cogvideox_sat") else parts[:1]
    if room == ("tool_commands",):  # started by the scripts in tools/
        room = ("tools",)
    return root.joinpath("tests", *(room or ("sat",)), f"test_{parts[-1]}.py")


def only_passes_on(path: Path) -> bool:
    """Return whether a module only has imports, texts and lists of names."""
    body = ast.parse(path.read_text()).body
    return all(isinstance(node, ast.Import | ast.ImportFrom | ast.Expr | ast.Assign) for node in body) and all(
        isinstance(node.value, ast.Constant | ast.List) for node in body if isinstance(node, ast.Expr | ast.Assign)
    )


class Reach:
    """The modules that test files import, name in a text, or start as a script.

    Args:
        root: of the repository.
    """

    def __init__(self, root: Path):
        self.modules = places(root)
        self.helpers = {path.stem: path for path in (root / "tests").glob("**/*.py") if path.parts[-1] != "conftest.py"}
        self._direct = cache(self._read)

    def _read(self, path: Path) -> tuple[frozenset[str], frozenset[Path]]:
        """Return the modules that a file imports or names, and its imported test helpers."""
        named = {name for _, name in imports(path, everywhere=True)} | set(_texts(path))
        modules = {module for name in named if (module := module_of(name, self.modules))}
        scripts = {module for module, source in self.modules.items() if source.name in named}
        helpers = {self.helpers[first] for name in named if (first := name.partition(".")[0]) in self.helpers}
        return frozenset(modules | scripts), frozenset(helpers - {path})

    def of(self, test: Path) -> set[str]:
        """Return the modules that a test file uses, directly or through two imports.

        Its helpers count too. Two imports lead from a command to its run, and to the parts of the run.
        """
        files, waiting = set(), [test]
        while waiting:
            if (path := waiting.pop()) not in files:
                files.add(path)
                waiting += self._direct(path)[1]
        used = {module for path in files for module in self._direct(path)[0]}
        for _ in range(2):
            used = used.union(*(self._direct(self.modules[module])[0] for module in used))
        return used


def _texts(path: Path) -> Iterator[str]:
    """Yield the texts in a file, and the last part of paths among them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 200:
            yield from (node.value, node.value.rpartition("/")[2])


def wrong(root: Path = ROOT, covered_by: dict[str, tuple[str, str]] | None = None) -> list[str]:
    """Return a line for each module without tests or entry, and for each wrong entry."""
    covered_by = COVERED_BY if covered_by is None else covered_by
    reach, lines = Reach(root), []
    for module, path in sorted(reach.modules.items()):
        if path.name == "__init__.py" or only_passes_on(path) or module.startswith("benchmarks."):
            if module in covered_by:
                lines.append(f"{module}: holds nothing to test; take it out of COVERED_BY")
            continue
        own = own_test(path, root)
        has_own = own.is_file() and module in reach.of(own)
        if module not in covered_by:
            if not has_own:
                lines.append(f"{module}: has no tests in {own.relative_to(root)}, and no entry in COVERED_BY")
            continue
        test = root / "tests" / covered_by[module][0]
        if has_own:
            lines.append(f"{module}: has tests in {own.relative_to(root)}; take it out of COVERED_BY")
        elif not test.is_file():
            lines.append(f"{module}: {test.relative_to(root)} does not exist")
        elif module not in reach.of(test):
            lines.append(f"{module}: {test.relative_to(root)} does not use it")
    return lines + [
        f"{module}: does not exist; take it out of COVERED_BY" for module in covered_by.keys() - reach.modules
    ]


def main() -> int:
    lines = wrong()
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
