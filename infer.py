"""Continue text with a trained model: `python infer.py --checkpoint=runs/tiny --prompt="def main("`.

`--temperature=0` is greedy. `--serve` answers requests over HTTP instead. `--help` lists every option.
"""

import dataclasses
import json
import sys

from tokenizers import Tokenizer

from dsv3_jax.command_line import run_main
from dsv3_jax.convert.opening import OpenedModel, open_model
from dsv3_jax.data.errors import DataError
from dsv3_jax.data.tokenizer import encode
from dsv3_jax.inference.arguments import InferArguments, parse_infer
from dsv3_jax.inference.chat import chat_template
from dsv3_jax.inference.completion import complete
from dsv3_jax.inference.weights import ready_to_decode
from dsv3_jax.layout import mesh_to_run
from dsv3_jax.loading import load_opened
from dsv3_jax.runtime import set_up_compiler, use_one_thread
from dsv3_jax.training.progress import note


def main() -> None:
    arguments = parse_infer(sys.argv[1:])
    set_up_compiler()
    if arguments.serve:
        from dsv3_jax.inference.server.serving import serve  # the web framework, that nothing else needs

        serve(arguments)
    else:
        infer(arguments)


def infer(arguments: InferArguments) -> None:
    """Load, generate, print: one prompt as it comes, several as one batch and one after the other."""
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in arguments.prompt]
    opened = open_model(arguments.checkpoint)
    use_one_thread(opened.config.model)
    model, _, tokenizer = load_opened(opened, mesh=mesh_to_run(arguments.mesh), weights=arguments.weights)
    if tokenizer is None:
        raise DataError(f"{opened.path} has no tokenizer.json: text cannot be read or written without one")
    warn_beyond_training(prompts, opened, tokenizer)
    model = ready_to_decode(model)  # so that nothing keeps the layers as they were read
    stream = len(prompts) == 1 and not arguments.json
    if stream and not arguments.chat:
        show(prompts[0])
    completions = complete(
        model,
        tokenizer,
        prompts,
        arguments.sampling,
        arguments.max_new_tokens,
        on_piece=(lambda _, text: show(text)) if stream else None,
        speculative=arguments.speculative,
        stop=arguments.stop,
        chat=chat_template((opened.hugging_face or {}).get("files"), tokenizer) if arguments.chat else None,
    )
    if stream:
        show("\n")
    if arguments.speculative and not arguments.json:
        stays = ", ".join(f"{share:.0%}" for share in completions[0].acceptance)
        note(f"{completions[0].tokens_per_pass:.2f} tokens a pass; drafts that stay: {stays}")
    for number, completion in enumerate(completions, start=1):
        if arguments.json:
            print(json.dumps(dataclasses.asdict(completion)))
        elif not stream:
            before = "" if arguments.chat else completion.prompt
            print(f"=== prompt {number} of {len(prompts)} ===\n{before}{completion.text}")


def warn_beyond_training(prompts: list[str], opened: OpenedModel, tokenizer: Tokenizer) -> None:
    """A note where a prompt is longer than the rows that the model was trained on."""
    trained = opened.config.training.sequence_length
    longest = max(len(encode(tokenizer, prompt)) for prompt in prompts)
    # How long a released model's rows were is not in its files.
    if opened.hugging_face is None and longest > trained:
        note(
            f"a prompt of {longest} tokens, and the model was trained on rows of {trained}: positions beyond them "
            "promise nothing, with YaRN (model.yarn_factor) or without, unless trained at that length"
        )


def show(text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    run_main(main)
