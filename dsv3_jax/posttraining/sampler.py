"""Sampling whole groups at once: each prompt read once, all its responses made together, in one compiled loop.

The model is the one that is trained, on the mesh that it is trained on, by the passes that infer.py makes
(inference/decoding.py). What the trainer needs of it is kept: log probabilities at the temperature, and the experts of
every token, those of the prompt included.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from tokenizers import Tokenizer

from dsv3_jax.config import Config
from dsv3_jax.inference.decoding import Rows, Vocabulary, known_logits, next_tokens
from dsv3_jax.inference.placement import EVERYWHERE, ROWS, check_mesh, check_one_process, leaf_specs, over
from dsv3_jax.inference.sampling import Sampling, SamplingInputs, choose_tokens, log_probabilities
from dsv3_jax.inference.weights import unstacked, with_inference_types
from dsv3_jax.model.functional import Tree, abstract_trees, put_together, skeleton_of, to_run
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.posttraining.grpo_batch import Sample
from sharding.collectives import anywhere, spread_like


class Sampled(NamedTuple):
    """What the compiled loop returns; T is the longest response, a group's rows are next to each other."""

    tokens_BT: Array
    count_B: Array
    """int32, tokens of each row, its end token included."""
    logprobs_BT: Array
    experts_BTLK: Array
    """uint16, the experts that made each token: those of the position before it. Of the first token not written."""
    prompt_experts_PSLK: Array
    """uint16, where each token of each prompt was sent."""


class Sampler:
    """Samples `grpo.group_size` responses to each of `grpo.prompts` prompts, as often as it is called.

    A response depends on parameters, prompt and stream alone: not on the mesh, nor on the other rows.
    """

    def __init__(self, config: Config, mesh: Mesh, tokenizer: Tokenizer, end: int):
        """`end`: the token that ends a response.

        Raises:
            PlacementError: a mesh that models cannot generate on.
        """
        check_mesh(mesh)
        check_one_process(mesh)
        self._grpo = config.grpo
        model = config.model.to_run
        skeleton, several = to_run(skeleton_of(model)), mesh if mesh.size > 1 else None
        self.vocabulary = Vocabulary.of(tokenizer, model.vocabulary)._replace(end=jnp.int32(end))
        self.end = end

        def ready(parameters: Tree, router_bias: Tree) -> Transformer:
            whole = put_together(skeleton, parameters, router_bias)
            typed = with_inference_types(lambda array, dtype: array.astype(dtype), whole, model.dtype)
            return unstacked(typed, several)

        leaves, structure = jax.tree.flatten(jax.eval_shape(ready, *abstract_trees(skeleton)))
        places = [NamedSharding(mesh, spec) for spec in leaf_specs(structure, mesh)]
        self._ready = jax.jit(lambda *trees: jax.tree.leaves(ready(*trees)), out_shardings=places)
        longest, group = self._grpo.max_new_tokens, self._grpo.group_size

        def sample(model: Transformer, *arrays: Any) -> Sampled:
            return _sampled(model, *arrays, longest=longest, group=group)

        each = ROWS, ROWS, ROWS, EVERYWHERE
        self._sample = jax.jit(over(several, structure, sample, each, ROWS))

    def __call__(
        self, parameters: Tree, router_bias: Tree, prompts: Sequence[list[int]], temperature: float, stream: int
    ) -> list[list[Sample]]:
        """Responses to each of at most `grpo.prompts` prompts, [prompts][group_size]. Calls differ by `stream`."""
        size, group = self._grpo.prompts, self._grpo.group_size
        tokens_PS = np.zeros((size, self._grpo.prompt_tokens), np.int32)
        lengths_P = np.ones(size, np.int32)
        for row, prompt in enumerate(prompts):
            tokens_PS[row, : len(prompt)], lengths_P[row] = prompt, len(prompt)
        sampling = Sampling(temperature=temperature, top_p=1.0, seed=stream)
        inputs = SamplingInputs.of([sampling] * (size * group), range(size * group))
        leaves = self._ready(parameters, router_bias)
        sampled = jax.device_get(self._sample(leaves, tokens_PS, lengths_P, inputs, self.vocabulary))
        return [
            [_sample(sampled, index, row, prompt) for row in range(index * group, (index + 1) * group)]
            for index, prompt in enumerate(prompts)
        ]


def _sample(sampled: Sampled, prompt_row: int, row: int, prompt: list[int]) -> Sample:
    count = int(sampled.count_B[row])
    experts = sampled.prompt_experts_PSLK[prompt_row, : len(prompt)], sampled.experts_BTLK[row, 1:count]
    return Sample(
        np.array(prompt, np.int32),
        np.asarray(sampled.tokens_BT[row, :count]),
        np.asarray(sampled.logprobs_BT[row, :count]),
        np.concatenate(experts),
    )


def _sampled(
    model: Transformer,
    prompts_PS: Array,
    lengths_P: Array,
    inputs: SamplingInputs,
    vocabulary: Vocabulary,
    *,
    longest: int,
    group: int,
) -> Sampled:
    prompts, prompt_length = prompts_PS.shape
    temperature_B1 = jnp.where(inputs.temperature_B > 0, inputs.temperature_B, 1.0)[:, None]

    def of_group(array: Array) -> Array:
        return jnp.repeat(array, group, axis=0)

    def logprobs(logits_BW: Array, tokens_B: Array) -> Array:
        return log_probabilities(logits_BW / temperature_B1, tokens_B, 0)[0]

    hidden_PSD, cache, prompt_experts_PSLK = model.prefill(
        prompts_PS, model.empty_cache(prompts, prompt_length + longest)
    )
    last_P1D = jnp.take_along_axis(hidden_PSD, (lengths_P - 1)[:, None, None], axis=1)
    logits_BW = of_group(known_logits(model, model.norm(last_P1D), vocabulary)[:, 0])
    positions_B = of_group(lengths_P)
    tokens_B = choose_tokens(logits_BW, inputs, positions_B)
    rows = Rows(jax.tree.map(of_group, cache), tokens_B, positions_B, None, None, None)
    batch, (layers, chosen) = prompts * group, prompt_experts_PSLK.shape[2:]
    start = (
        jnp.zeros((batch, longest), jnp.int32),
        jnp.ones(batch, jnp.int32),
        jnp.zeros((batch, longest), jnp.float32),
        jnp.zeros((batch, longest, layers, chosen), jnp.uint16),
    )
    tokens_BT, count_B, logprobs_BT, experts_BTLK = (spread_like(array, tokens_B) for array in start)
    first_B = logprobs(logits_BW, tokens_B)
    made = Sampled(
        tokens_BT.at[:, 0].set(tokens_B),
        count_B,
        logprobs_BT.at[:, 0].set(first_B),
        experts_BTLK,
        prompt_experts_PSLK.astype(jnp.uint16),
    )

    def goes_on(carry: tuple[Array, Rows, Sampled]) -> Array:
        step, rows, _ = carry
        return (step < longest) & anywhere(rows.tokens_B != vocabulary.end)

    def one_token(carry: tuple[Array, Rows, Sampled]) -> tuple[Array, Rows, Sampled]:
        # A row that has ended goes on being computed; nothing of it is kept.
        step, rows, made = carry
        going_B = rows.tokens_B != vocabulary.end
        next_B1, _, logits_B1W, experts_B1LK, rows = next_tokens(model, 0, rows, inputs, vocabulary)
        next_B = jnp.where(going_B, next_B1[:, 0], vocabulary.end)
        made = made._replace(
            tokens_BT=made.tokens_BT.at[:, step].set(next_B),
            count_B=made.count_B + going_B,
            logprobs_BT=made.logprobs_BT.at[:, step].set(logprobs(logits_B1W[:, 0], next_B)),
            experts_BTLK=made.experts_BTLK.at[:, step].set(experts_B1LK[:, 0].astype(jnp.uint16)),
        )
        return step + 1, rows._replace(tokens_B=next_B, positions_B=rows.positions_B + 1), made

    return jax.lax.while_loop(goes_on, one_token, (jnp.int32(1), rows, made))[2]
