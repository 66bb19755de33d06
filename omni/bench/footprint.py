"""How many bytes each unit of work has to touch, from the config: the weights it reads and the cache it attends to.

Activations are left out: at a batch of one they are thousands of times smaller. A share of the roofline is these
bytes, divided by the bandwidth, over the time measured.
"""

from __future__ import annotations

from typing import cast

from omni.config.decoder import DecoderConfig, LanguageConfig, MoEConfig
from omni.config.model import OmniConfig
from omni.config.qwen3_omni import Code2WavConfig, MTPConfig


def attention_values(c: DecoderConfig, qk_norm: bool | None = None) -> int:
    """Parameters of one self-attention with its norms; qk_norm: whether it has those of queries and keys (None: as the
    config says)."""
    query, kv = c.num_attention_heads * c.head_size, c.num_key_value_heads * c.head_size
    bias = (query + 2 * kv) * c.qkv_bias + c.hidden_size * c.output_bias
    norms = 2 * c.head_size * (c.qk_norm if qk_norm is None else qk_norm)
    return c.hidden_size * (2 * query + 2 * kv) + bias + norms


def distinct_experts(c: MoEConfig, tokens: int) -> float:
    """Experts that `tokens` tokens reach on average, if each chooses evenly."""
    missed = 1 - c.num_experts_per_tok / c.num_experts
    return c.num_experts * (1 - missed**tokens)


def moe_values(c: MoEConfig, tokens: int = 1) -> float:
    """Parameters that a block of router, experts and shared expert reads for so many tokens."""
    shared = c.shared_expert_intermediate_size
    experts = distinct_experts(c, tokens) * 3 * c.hidden_size * c.moe_intermediate_size
    return c.num_experts * c.hidden_size + experts + (3 * shared + 1) * c.hidden_size * (shared > 0)


def layer_values(c: DecoderConfig, layer: int, tokens: int = 1) -> float:
    """Parameters that one decoder layer reads."""
    mlp = moe_values(cast("MoEConfig", c), tokens) if c.is_sparse(layer) else 3 * c.hidden_size * c.intermediate_size
    return attention_values(c) + 2 * c.hidden_size + mlp


def cache_values(c: DecoderConfig) -> int:
    """Values that one position keeps in the key-value cache of all layers."""
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_size


def decoder_step_bytes(c: LanguageConfig, value_bytes: int, context: int = 0, batch: int = 1) -> float:
    """Bytes of one step of the Thinker or the Talker: `batch` rows that attend to `context` positions each."""
    layers = sum(layer_values(c, i, batch) for i in range(c.num_hidden_layers))
    head = c.vocab_size * c.hidden_size + c.hidden_size  # and the final norm
    rows = batch * (c.hidden_size + context * cache_values(c))  # an embedding row, and the cache
    return value_bytes * (layers + head + rows)


def residual_codes_bytes(c: MTPConfig, value_bytes: int, batch: int = 1) -> float:
    """Bytes of the residual codes of one frame: every layer once a codebook, and each head once."""
    steps = c.num_code_groups - 1
    layers = sum(layer_values(c, i) for i in range(c.num_hidden_layers)) + c.hidden_size
    return value_bytes * steps * (layers + c.vocab_size * c.hidden_size + batch * c.hidden_size)


def code2wav_bytes(c: Code2WavConfig, value_bytes: int, batch: int = 1) -> float:
    """Bytes of one frame of the codec decoder: all weights that it sounds by, and the embedding rows of the codes."""
    dim = c.hidden_size
    layer = attention_values(c, qk_norm=False) + 3 * dim * c.intermediate_size + 4 * dim  # norms, layer scales
    total = c.num_hidden_layers * layer + dim
    if (source := c.source_filter) is not None:
        width, outputs = source.width, source.settings_a_step * (2 + 2 * source.num_bands)
        block = 8 * width + 2 * width + (4 * width * width + 4 * width) + (4 * width * width + width) + width
        total += (
            dim * width * (c.hop_length // source.period // source.settings_a_step) + width + source.num_layers * block
        )
        return value_bytes * (total + width * outputs + outputs + batch * c.num_quantizers * dim)
    for ratio in c.upsampling_ratios:  # transposed convolution, then ConvNeXt: depthwise 7, norm, x4, back, gamma
        total += dim * dim * ratio + dim + 8 * dim + 2 * dim + (4 * dim * dim + 4 * dim) + (4 * dim * dim + dim) + dim
    channels = c.decoder_dim
    total += 7 * dim * channels + channels
    for rate in c.upsample_rates:
        half = channels // 2
        unit = 2 * 2 * half + (7 * half * half + half) + (half * half + half)
        total += 2 * channels + 2 * rate * channels * half + half + 3 * unit
        channels = half
    total += 2 * channels + 7 * channels + 1
    return value_bytes * (total + batch * c.num_quantizers * dim)


def cache_bytes_per_token(config: OmniConfig, value_bytes: int = 2) -> int:
    """Memory that one position takes in the Thinker's key-value cache, at `value_bytes` a value (2 for bfloat16)."""
    text = config.thinker.text_config
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_size * value_bytes
