"""Memory of a forward and a backward pass beside the weights, for decoders in the manner of Llama.

Attention is sdpa in a form that never holds a (tokens x tokens) matrix. h, q, k, f are the sizes of hidden states,
queries, keys and of the feed-forward layer. For each token, a layer keeps for its backward pass:

    each of two norms           its input h and what it scales h, both float32
    inputs of linear layers     h twice in float32; cast by autocast, one copy for each of q, k, v, gate and up
    attention                   q, k, v, its output q, and one float32 number a head
    feed-forward                gate, its activation, up and their product: 4 f
"""

from dataclasses import dataclass

from llmrl.models.heads import CHUNK_TOKENS
from llmrl.sizing.shape import ModelShape

FLOAT32 = 4
BFLOAT16 = 2
CHUNKS_AT_ONCE = 3
"""Tensors of one chunk held at once: its logits, their exponentials, and the logits of the chunk before."""
LORA_LAYERS = 7
"""Number of linear layers in a Llama layer."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A forward pass on one microbatch, and the backward pass through it."""

    rows: int
    num_tokens: int
    """Tokens that the trunk reads, padding included."""
    num_scored: int
    """Tokens whose log-probability is wanted; 0 where there is no LM head."""
    bfloat16: bool
    """Whether autocast computes in bfloat16."""
    learns: bool = True
    """Whether the weights of the model itself learn."""
    rank: int = 0
    """LoRA rank of the trained adapters; 0: no adapters."""
    quantized: bool = False
    """Whether the linear layers are stored in 4 bits."""
    checkpoints: bool = False
    """Whether layers are recomputed in the backward pass (gradient checkpointing)."""

    @property
    def size(self) -> int:
        """Bytes of a number that a linear layer makes."""
        return BFLOAT16 if self.bfloat16 else FLOAT32


def saved_bytes(shape: ModelShape, work: Pass) -> int:
    """Bytes saved by the forward pass through the trunk for its backward pass."""
    hidden, ends = FLOAT32 * shape.hidden_size, 3 if work.learns else 2  # the last norm, and what it returns
    of_layers = hidden if work.checkpoints else of_layer(shape, work)
    cast = 0 if work.checkpoints else _cast(shape, work)
    return work.num_tokens * (hidden * ends + shape.num_layers * of_layers) + cast


def peak_extra_bytes(shape: ModelShape, work: Pass) -> int:
    """Peak bytes beyond the saved ones: at the end of the trunk, in the head, or in a recomputed layer."""
    in_head, in_layer = head(shape, work) + head_gradient(shape, work), _dequantized(shape, work)
    if work.checkpoints:
        in_layer += work.num_tokens * of_layer(shape, work) + _cast(shape, work) // shape.num_layers
    return max(in_head, in_layer)


def _cast(shape: ModelShape, work: Pass) -> int:
    """Bytes of the linear layers cast to the precision of autocast."""
    return BFLOAT16 * shape.num_linear if work.bfloat16 and not work.quantized else 0


def _dequantized(shape: ModelShape, work: Pass) -> int:
    """Bytes of the numbers that the largest layer's 4 bits stand for, in float32 and as it computes with them."""
    return (FLOAT32 + BFLOAT16 * work.bfloat16) * shape.largest_linear if work.quantized else 0


def of_layer(shape: ModelShape, work: Pass) -> int:
    """Bytes per token that a layer saves for its backward pass."""
    hidden, query, key, forward = shape.hidden_size, shape.query_size, shape.key_size, shape.feed_forward_size
    norms = FLOAT32 * hidden * (4 if work.learns else 2)
    inputs = BFLOAT16 * 5 * hidden if work.bfloat16 else FLOAT32 * 2 * hidden
    attention = work.size * (2 * query + 2 * key) + FLOAT32 * shape.num_heads
    adapters = work.size * LORA_LAYERS * work.rank
    again = BFLOAT16 * query if work.rank and work.bfloat16 else 0  # an adapter casts the output of attention anew
    return norms + inputs + attention + work.size * 4 * forward + adapters + again


def head(shape: ModelShape, work: Pass) -> int:
    """Bytes of the LM head while activations are held: states of scored tokens, and logits of one chunk at a time."""
    if not work.num_scored:
        return 0
    chunk = min(CHUNK_TOKENS, work.num_scored) * shape.vocab_size
    states = 2 * FLOAT32 * work.num_scored * shape.hidden_size
    logits = CHUNKS_AT_ONCE * FLOAT32 * chunk + (2 * BFLOAT16 * chunk if work.bfloat16 else 0)
    matrix = shape.vocab_size * shape.hidden_size
    cast = BFLOAT16 * matrix if work.bfloat16 else 0
    return states + logits + cast


def head_gradient(shape: ModelShape, work: Pass) -> int:
    """Bytes of the gradient of the LM head's matrix, padded to all its rows, and of a product that is added to it."""
    matrix = shape.vocab_size * shape.hidden_size
    return matrix * (2 * FLOAT32 + (BFLOAT16 if work.bfloat16 else 0)) if work.num_scored and work.learns else 0


def no_gradient_bytes(shape: ModelShape, work: Pass) -> int:
    """Peak bytes of a forward pass without gradient: in a layer, or in the head."""
    hidden = FLOAT32 * shape.hidden_size * work.num_tokens
    cast = _cast(shape, work) // shape.num_layers if work.learns else 0  # what is frozen is kept in that precision
    cast += _dequantized(shape, work)
    layer = 2 * hidden + work.num_tokens * work.size * (3 * shape.feed_forward_size + shape.hidden_size)
    return max(layer + cast, hidden + head(shape, work))
