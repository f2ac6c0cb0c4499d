"""The lengths, in tokens, to which prompts are padded: a forward takes prompts of one length."""

from __future__ import annotations

PROMPT_TOKEN_BUCKETS = (128, 192, 256)
"""Each is a `max_sequence_length` of the pipeline; with the first, its default, the model was trained."""
TRAINED_PROMPT_TOKENS = PROMPT_TOKEN_BUCKETS[0]
MAX_PROMPT_TOKENS = PROMPT_TOKEN_BUCKETS[-1]


def padded_prompt_tokens(num_tokens: int) -> int:
    """The shortest bucket that holds a prompt, or a prompt and its negative prompt, without cutting it.

    Args:
        num_tokens: the most tokens that any text encoder gets of them, at most `MAX_PROMPT_TOKENS`.
    """
    return next(bucket for bucket in PROMPT_TOKEN_BUCKETS if num_tokens <= bucket)
