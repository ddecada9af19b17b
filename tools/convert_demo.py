"""Refine short prompts into the long descriptions that the models were trained on.

  python tools/convert_demo.py --prompt "a fox in the snow"
  python tools/convert_demo.py --prompt "it turns its head" --image_path fox.png
  python tools/convert_demo.py --input_file configs/test.txt --output_file refined.txt

Any endpoint with OpenAI's protocol works: OPENAI_API_KEY is the key, OPENAI_BASE_URL the address (default: OpenAI),
OPENAI_MODEL the model. With an image the model, which must accept images, describes the motion. In a prompt file (.txt,
with or without `prompt@@image`, or .jsonl) only the prompts change. A prompt that cannot be refined stays unchanged,
with a warning. `sat/sample_video.py --refine_prompts` refines prompts before sampling.

Exit codes: 0 done, 2 the arguments, files or endpoint settings are wrong.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.commands.input_paths import tell_places  # noqa: E402
from cogvideox_sat.commands.tool_parser import ToolParser, check_output, locate_image, locate_inputs, positive, run_tool  # noqa: E402
from cogvideox_sat.files.atomic import write_atomically  # noqa: E402
from cogvideox_sat.sampling.prompt_files import read_prompts, replace_prompts  # noqa: E402
from cogvideox_sat.sampling.prompt_refinement import Endpoint, Prompt, refine  # noqa: E402
from sgm.errors import UserError  # noqa: E402

logger = logging.getLogger("convert_demo")


def main(arguments: Sequence[str] | None = None) -> int:
    return run_tool(convert, arguments, logger.name)


def convert(arguments: Sequence[str] | None) -> None:
    options = build_parser().parse_args(arguments)
    check(options)
    if options.input_file:
        image_to_video = {None: None, "t2v": False, "i2v": True}[options.type]
        requests = read_prompts(options.input_file, image_to_video)
        prompts = [Prompt(request.text, request.image) for request in requests]
    else:
        prompts = [Prompt(options.prompt or "", options.image_path)]
    tell_places()
    endpoint = Endpoint.from_environment(
        model=options.model, timeout=options.timeout, tries=options.retry_times + 1, workers=options.workers
    )
    if options.dry_run:
        for prompt in prompts:
            image = f" with {prompt.image}" if prompt.image else ""
            logger.info("would ask %s to refine%s: %s", endpoint.model, image, prompt.text)
        return
    texts = refine_with_bar(prompts, endpoint)
    if options.input_file:
        refined = replace_prompts(options.input_file, texts, options.output_file.parent)
        write_atomically(options.output_file, refined)
        logger.info("refined %d of %d prompts: %s", sum(map(bool, texts)), len(texts), options.output_file)
    else:
        sys.stdout.write(f"{texts[0] or prompts[0].text}\n")


def build_parser() -> argparse.ArgumentParser:
    parser = ToolParser(__doc__)
    parser.add_argument("--prompt", help="one prompt; the refined prompt is written to standard output")
    parser.add_argument("--image_path", type=Path, metavar="FILE", help="the first frame, for image-to-video")
    parser.add_argument("--input_file", type=Path, metavar="FILE", help="prompts: .txt or .jsonl")
    parser.add_argument("--output_file", type=Path, metavar="FILE", help="file for the refined prompts of --input_file")
    parser.add_argument("--type", choices=("t2v", "i2v"), help="require prompts without (t2v) or with (i2v) images")
    parser.add_argument("--model", help="model to ask (default: OPENAI_MODEL, else gpt-4o)")
    parser.add_argument("--retry_times", type=int, default=3, help="further tries after a failure (default: 3)")
    parser.add_argument("--timeout", type=positive, help="seconds to wait for an answer (default: 60)")
    parser.add_argument("--workers", type=int, default=4, help="prompts sent at the same time, 1 to 16 (default: 4)")
    parser.add_writing_arguments()
    return parser


def check(options: argparse.Namespace) -> None:
    """Resolve the input paths and check the arguments.

    Raises:
        UserError: arguments do not fit together, or a file does not exist.
    """
    if options.input_file:
        if options.prompt is not None or options.image_path:
            raise UserError("--prompt and --image_path cannot be used with --input_file; put them into its lines")
        if options.output_file is None:
            raise UserError("--output_file: missing; name the file for the refined prompts")
        if options.output_file.suffix.lower() != options.input_file.suffix.lower():
            raise UserError(
                f"--output_file: {options.output_file} has another suffix than {options.input_file}; name it "
                f"'…{options.input_file.suffix}'"
            )
        locate_inputs(options, "input_file")
        check_output(options.output_file, options)
    else:
        if not (options.prompt or "").strip() and not options.image_path:
            raise UserError("--prompt: missing; give it or --input_file")
        if options.output_file:
            raise UserError("--output_file needs --input_file; a single prompt is written to standard output")
        if options.image_path:
            locate_image(options, "image_path")
        if options.type and (options.type == "i2v") != bool(options.image_path):
            raise UserError(f"--type {options.type} {'needs' if options.type == 'i2v' else 'takes no'} --image_path")
    if options.retry_times < 0:
        raise UserError(f"--retry_times: got {options.retry_times}; it must be at least 0")
    if not 1 <= options.workers <= 16:
        raise UserError(f"--workers: got {options.workers}; it must be between 1 and 16")


def refine_with_bar(prompts: Sequence[Prompt], endpoint: Endpoint) -> list[str | None]:
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with tqdm(total=len(prompts), desc="refining", unit="prompt", leave=False) as bar, logging_redirect_tqdm():
        return refine(prompts, endpoint, done=bar.update)


if __name__ == "__main__":
    sys.exit(main())
