"""Running parts of a model: tokens, suffixes, prefix trees, keys, Jacobians and text generation."""

from cakeflow.forward.corpus import default_corpus, names, sampled_corpus, token_stream
from cakeflow.forward.fact_tokens import FactBatch, check_tokens, choose_tokens
from cakeflow.forward.generation import continuations, generate_contexts
from cakeflow.forward.jacobian import LinearMap, ModelJacobian
from cakeflow.forward.keys import FactReader, PromptStream, read_keys
from cakeflow.forward.loss import WeightLoss
from cakeflow.forward.packing import GIB, pad, plan
from cakeflow.forward.prefix_tree import predict
from cakeflow.forward.suffix import Recording, Suffixes, cut
from cakeflow.forward.tokens import EditBatch, Row, TextBatch, encode, encode_batch, encode_prompts, encode_texts

__all__ = [
    "GIB", "EditBatch", "FactBatch", "FactReader", "LinearMap", "ModelJacobian", "PromptStream", "Recording", "Row",
    "Suffixes", "TextBatch", "WeightLoss", "check_tokens", "choose_tokens", "continuations", "cut", "default_corpus",
    "encode", "encode_batch", "encode_prompts", "encode_texts", "generate_contexts", "names", "pad", "plan", "predict",
    "read_keys", "sampled_corpus", "token_stream",
]  # fmt: skip
