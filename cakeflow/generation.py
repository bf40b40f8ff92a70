"""How a model goes on by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cakeflow.batch import plan
from cakeflow.model import LanguageModel


@torch.no_grad()
def continuations(lm: LanguageModel, prompts: Sequence[str], tokens: int = 12, budget: int = 4096) -> list[str]:
    """Greedy continuation of each prompt; prompts of one length share a batch, so that nothing is padded.

    Args:
        lm: The model.
        prompts: n prompts.
        tokens: Most new tokens.
        budget: Most prompt tokens in one batch.

    Returns:
        n texts, special tokens left out.
    """
    ids = [lm.tokenizer(prompt)["input_ids"] for prompt in prompts]
    texts = [""] * len(prompts)
    for group in plan([len(row) for row in ids], budget, slack=0):
        batch = torch.tensor([ids[i] for i in group], device=lm.device)
        output = lm.model.generate(  # type: ignore[operator]
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=lm.tokenizer.eos_token_id,
        )
        for i, new in zip(group, output[:, batch.shape[1] :], strict=True):
            texts[i] = str(lm.tokenizer.decode(new, skip_special_tokens=True))
    return texts
