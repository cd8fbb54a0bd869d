"""The baseline: transformers' DeepSeek-V3 in PyTorch on this CPU, training steps and greedy decoding.

python -m benchmarks.transformers_baseline CONFIG train|decode

CONFIG names a file in configs/. Prints the tokens/s of each way transformers can run its experts, in float32 and
bfloat16, and the fastest. The model has no MTP module: transformers leaves it out.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dsv3_jax.command_line import load_config
from dsv3_jax.model_config import ModelConfig

IMPLEMENTATIONS = ("default", "eager", "grouped_mm", "batched_mm")
PRECISIONS = (torch.float32, torch.bfloat16)
PROMPT, NEW = 64, 128


def transformers_config(model: ModelConfig) -> DeepseekV3Config:
    """The same shape, for speed only: numerics such as YaRN are left at their defaults."""
    return DeepseekV3Config(
        vocab_size=model.vocabulary,
        hidden_size=model.width,
        num_hidden_layers=model.layers,
        first_k_dense_replace=model.dense_layers,
        intermediate_size=model.dense_ffn_width,
        moe_intermediate_size=model.expert_ffn_width,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads,
        q_lora_rank=model.query_latent,
        kv_lora_rank=model.key_value_latent,
        qk_nope_head_dim=model.nope_head_dim,
        qk_rope_head_dim=model.rope_head_dim,
        v_head_dim=model.value_head_dim,
        n_routed_experts=model.experts,
        num_experts_per_tok=model.experts_per_token,
        n_shared_experts=model.shared_experts,
        n_group=model.expert_groups,
        topk_group=model.groups_per_token,
        max_position_embeddings=model.maximum_positions,
        eos_token_id=None,
        pad_token_id=None,
    )


def build(model: ModelConfig, implementation: str, precision: torch.dtype) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    network = DeepseekV3ForCausalLM(transformers_config(model)).to(precision)
    if implementation != "default":
        network.set_experts_implementation(implementation)
    return network


def trainer(network: DeepseekV3ForCausalLM, batch: int, sequence: int) -> Callable[[int], float]:
    """A function that makes so many AdamW steps and returns the median step's tokens/s."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def train(steps: int) -> float:
        seconds = []
        for _ in range(steps):
            tokens = torch.randint(0, network.config.vocab_size, (batch, sequence))
            start = time.perf_counter()
            network(input_ids=tokens, labels=tokens).loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - start)
        return batch * sequence / statistics.median(seconds)

    return train


@torch.no_grad()
def decode(network: DeepseekV3ForCausalLM, batch: int = 1) -> float:
    """Greedy tokens/s of so many prompts, their prefill included."""
    tokens = torch.randint(0, network.config.vocab_size, (batch, PROMPT))
    start = time.perf_counter()
    network.eval().generate(tokens, max_new_tokens=NEW, do_sample=False)
    return batch * NEW / (time.perf_counter() - start)


def fastest(measure: Callable[[DeepseekV3ForCausalLM], float], model: ModelConfig) -> tuple[float, str, torch.dtype]:
    """Tokens/s, implementation and precision of the fastest variant; prints all."""
    found = []
    for implementation in IMPLEMENTATIONS:
        for precision in PRECISIONS:
            name = f"transformers {implementation} {str(precision).removeprefix('torch.')}"
            try:
                rate = measure(build(model, implementation, precision))
            except (NotImplementedError, RuntimeError, ValueError) as error:
                print(f"{name}: not available here ({str(error).splitlines()[0][:80]})", flush=True)
                continue
            print(f"{name}: {rate:,.1f} tokens/s", flush=True)
            found.append((rate, implementation, precision))
    return max(found, key=lambda variant: variant[0])


def training_rate(network: DeepseekV3ForCausalLM, batch: int, sequence: int) -> float:
    train = trainer(network, batch, sequence)
    train(2)
    return train(4)


def decoding_rate(network: DeepseekV3ForCausalLM, batch: int = 1) -> float:
    decode(network, batch)
    return decode(network, batch)


def main() -> None:
    name, mode = sys.argv[1:]
    config = load_config(name)
    shape = config.training.batch_size, config.training.sequence_length
    measure = decoding_rate if mode == "decode" else lambda network: training_rate(network, *shape)
    rate, implementation, precision = fastest(measure, config.model)
    print(f"fastest: {rate:,.1f} tokens/s ({implementation}, {precision})")


if __name__ == "__main__":
    main()
