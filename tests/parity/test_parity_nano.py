"""The packaged omni-nano in transformers: the checkpoint opens as it is, and answers with the same greedy ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omni.packaged.nano import NANO_DATA, QUESTIONS, nano_model

TYPED = [[{"role": "user", "content": text}] for text in ("what is seven plus five", "say my cat sees the blue house")]


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import Qwen3OmniMoeForConditionalGeneration

    model, report = Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        NANO_DATA, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("number", range(len(TYPED) + 2))
def test_same_greedy_ids(reference: Any, number: int) -> None:
    """Two typed questions, a spoken one, and a picture with a typed one."""
    shown = [{"role": "user", "content": [{"type": "image", "image": str(NANO_DATA / "demo" / "picture.png")},
                                          {"type": "text", "text": "where is the star"}]}]  # fmt: skip
    messages: Any = [*TYPED, QUESTIONS[0].messages(), shown][number]
    ours = nano_model()
    inputs = ours.processor(messages)  # type: ignore[misc]
    out = ours.generate(inputs, max_new_tokens=16, return_audio=False)
    tensors = {name: value for name, value in vars(inputs).items() if torch.is_tensor(value)}
    with torch.no_grad():
        ids = reference.thinker.generate(
            **tensors, max_new_tokens=16, do_sample=False, eos_token_id=ours.config.im_end_token_id,
            pad_token_id=ours.config.im_end_token_id,
        )  # fmt: skip
    assert ids[0, inputs.input_ids.shape[1] :].tolist() == out.replies[0]
