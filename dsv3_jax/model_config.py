"""The section `model` of a configuration (config.py).

The letters in brackets are the dimension letters used in names and einsums (legend in model/transformer.py).
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of one DeepSeek-V3-family model (V3 section 4.2, V2 section 3.1.2)."""

    vocabulary: int
    """[W] rows of the embedding and the head; a tokenizer may use fewer, the rest is padding."""
    width: int
    """[D] size of the residual stream."""
    layers: int
    """[L] blocks of the main model, dense ones included, MTP modules not."""
    dense_layers: int
    """Leading blocks with a dense feed-forward network instead of experts."""
    dense_ffn_width: int
    """Hidden width of the dense feed-forward network."""

    heads: int
    """[H] attention heads."""
    query_latent: int | None
    """[Q] rank of the query latent; None: one direct query projection, without a norm (V2-Lite)."""
    key_value_latent: int
    """[C] rank of the key-value latent, the part of the cache shared by all heads."""
    nope_head_dim: int
    """[P] per-head query/key dims without rotary position."""
    rope_head_dim: int
    """[R] rotary dims: per head in queries, one vector shared by all heads in keys."""
    value_head_dim: int
    """[V] per-head value dims."""

    experts: int
    """[E] routed experts a MoE block."""
    experts_per_token: int
    """[K] routed experts a token."""
    shared_experts: int
    """Experts every token passes, fused into one network of this many times expert_ffn_width."""
    expert_ffn_width: int
    """[F] hidden width of one expert."""
    expert_groups: int
    """[G] groups of consecutive experts (one a node in V3)."""
    groups_per_token: int
    """Groups a token may choose its experts from."""
    score_function: Literal["sigmoid", "softmax"]
    """Router score of an expert: sigmoid (V3) or softmax over all experts (V2)."""
    group_score: Literal["top2_sum", "max"]
    """Score of a group: sum of its two largest selection scores (V3) or the largest (V2)."""
    normalize_weights: bool
    """Divide the chosen experts' scores by their sum (V3)."""
    routed_scale: float
    """Factor on the routed experts' weights: 2.5 in V3, 16 in V2, 1 in V2-Lite."""
    selection_bias: bool
    """Bias added to the scores for selection only, moved by the counted load (V3 section 2.1.2)."""

    mtp_depth: int
    """Multi-token prediction modules, each predicting one token further (V3 section 2.2)."""
    mtp_input: Literal["final_norm", "residual"] = "final_norm"
    """Hidden state fed to the first MTP module: after the final norm (released weights) or before it."""

    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    yarn_factor: float = 1.0
    """YaRN context extension factor; 1 is plain RoPE and plain softmax scale."""
    yarn_original_length: int = 4096
    """Context length the frequencies were trained at before extension."""
    yarn_beta_fast: float = 32.0
    """Rotations over the original length above which a frequency is left alone."""
    yarn_beta_slow: float = 1.0
    """Rotations over the original length below which a frequency is divided by yarn_factor."""
    yarn_mscale: float = 1.0
    """Scale coefficient of cos and sin, as a ratio to yarn_mscale_all_dim."""
    yarn_mscale_all_dim: float = 1.0
    """Scale coefficient of the whole attention logit, squared."""
    maximum_positions: int = 163840
    """Longest sequence or cache allowed."""

    norm_epsilon: float = 1e-6
    """Epsilon of the block norms and the final norm."""
    latent_norm_epsilon: float = 1e-6
    """Epsilon of the two latent norms, which other code does not always tie to norm_epsilon."""
    initializer_std: float = 0.006
    """Standard deviation of every weight at the start (V3 section 4.2)."""
    precision: Literal["float32", "bfloat16", "fp8"] = "bfloat16"
    """Type the matmuls compute in; parameters, router, norm statistics, softmax and losses stay float32. fp8 is the
    whole recipe of V3 section 3.3: the products of linear layers and experts in FP8, all else in bfloat16, moments in
    bfloat16 whatever optimizer.moments says, and remat at least up_projections."""
    float8_scales: Literal["float32", "power_of_two"] = "float32"
    """Scales of FP8's tiles: amax / 448, or that rounded up to a power of two (UE8M0, V3.1)."""
    float8_tiles: Literal["fine", "gradient_blocks", "tensor"] = "fine"
    """Numbers that share a scale in FP8: 128 of a token's or a channel's, 128 x 128 of weights. The others are
    ablations (V3 appendix B.2): gradients in 128 x 128 as well; one scale for a whole tensor, as a device has it."""
    remat: Literal["none", "up_projections", "block"] = "block"
    """What backward recomputes: nothing; norms, MLA's up-projections and SwiGLU (V3 section 3.2.3), keeping latents,
    attention's output and the inputs of SwiGLU; or everything inside each block."""
    dispatch_factor: float = 2.0
    """Rows of tokens that a device takes in for its experts at one time, as a multiple of what balanced routing would
    send it. Nothing is dropped: what does not fit waits for another round."""
    dispatch_once_a_node: bool = True
    """Send a token once to each node it has experts on, and there on to its experts; otherwise once to each expert."""

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Name of the type of the residual stream, and of products outside of FP8."""
        return "bfloat16" if self.precision == "fp8" else self.precision

    @property
    def to_run(self) -> "ModelConfig":
        """The same model where it is not trained: of FP8's recipe nothing is left but the numbers it led to."""
        return dataclasses.replace(self, precision=self.dtype)

    @property
    def recomputed(self) -> Literal["none", "up_projections", "block"]:
        """`remat`, of which FP8's recipe has at least the norms and MLA's up-projections."""
        return "up_projections" if self.precision == "fp8" and self.remat == "none" else self.remat

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def query_key_head_dim(self) -> int:
        return self.nope_head_dim + self.rope_head_dim

    @property
    def cache_width(self) -> int:
        """Values cached a token a layer: the normed latent and the rotated shared key."""
        return self.key_value_latent + self.rope_head_dim
