"""The audio encoder trained alone: losses against closed forms, gradients everywhere, and clips learnt by heart."""

from __future__ import annotations

import itertools

import pytest
import torch
from build import fixed, tiny_config
from torch.nn import functional as F

from omni.encoders.audio import AudioEncoder
from omni.encoders.contract import EncoderOutput
from omni.encoders.mel import LogMel
from omni.layers.init import initialise
from omni.training.objectives.transcription import (
    AttentionDecoder,
    CTCHead,
    EmbeddingHead,
    attention_loss,
    attention_transcribe,
    ctc_length,
    ctc_loss,
    ctc_transcribe,
)

CONFIG = tiny_config().thinker_config.audio_config
WIDTH = CONFIG.output_dim
TONES_HZ = (300, 700, 1500, 3200)
TEXTS = [[0, 1, 2], [3, 3, 1, 0], [2, 0]]


def encoder(seed=0):
    with fixed(seed):
        module = AudioEncoder(CONFIG)
        initialise(module, lambda name: 0.1)
    return module


def clips():
    """Mel features of texts whose letters are tones of 0.4 s with 0.1 s of silence after each."""
    mels = []
    for text in TEXTS:
        tones = [torch.sin(2 * torch.pi * TONES_HZ[letter] * torch.arange(6400) / 16000) for letter in text]
        mels.append(LogMel()(torch.cat([F.pad(0.5 * tone, (0, 1600)) for tone in tones])))
    longest = max(mel.shape[1] for mel in mels)
    return torch.stack([F.pad(mel, (0, longest - mel.shape[1])) for mel in mels]), [mel.shape[1] for mel in mels]


def random_output(lengths, requires_grad=False):
    embeds = torch.randn(sum(lengths), WIDTH, dtype=torch.double, requires_grad=requires_grad)
    return EncoderOutput(embeds, list(lengths), [])


def collapsed(path, blank):
    return [label for label, _ in itertools.groupby(path) if label != blank]


def test_ctc_is_the_sum_over_all_alignments():
    head = CTCHead(WIDTH, 2).double()
    output = random_output((4, 5, 3))
    targets = [[0, 1], [1, 1], []]
    loss = ctc_loss(head, output, targets)
    expected = 0.0
    for rows, text in zip(head(output.embeds).log_softmax(-1).split(output.lengths), targets):
        paths = [p for p in itertools.product(range(3), repeat=len(rows)) if collapsed(p, head.blank) == text]
        expected -= torch.stack([sum(row[label] for row, label in zip(rows, p)) for p in paths]).logsumexp(0)
    torch.testing.assert_close(loss.total, expected)
    assert loss.count == 3
    assert loss.total.dtype == torch.double


def test_attention_loss_is_the_cross_entropy_of_each_text_alone():
    decoder = AttentionDecoder(WIDTH, 5, dim=16, layers=2, heads=2).double()
    output = random_output((4, 7, 2))
    targets = [[0, 4], [1, 1, 2, 3], []]
    loss = attention_loss(decoder, output, targets)
    expected = 0.0
    for embeds, text in zip(output.embeds.split(output.lengths), targets):
        memory = decoder.memory(EncoderOutput(embeds, [len(embeds)], []))
        logits = decoder(torch.tensor([[decoder.end, *text]]), *memory)[0]
        expected += F.cross_entropy(logits, torch.tensor([*text, decoder.end]), reduction="sum")
    torch.testing.assert_close(loss.total, expected)
    assert loss.count == 2 + 4 + 3


def test_the_decoder_sees_no_later_label():
    decoder = AttentionDecoder(WIDTH, 5, dim=16, layers=1, heads=2).double()
    memory = decoder.memory(random_output((4,)))
    a, b = torch.tensor([[5, 1, 2, 3]]), torch.tensor([[5, 1, 4, 0]])
    first, second = decoder(a, *memory), decoder(b, *memory)
    assert torch.equal(first[:, :2], second[:, :2])
    assert not torch.allclose(first[:, 2], second[:, 2])


@pytest.mark.parametrize("kind", ["ctc", "attention"])
def test_gradients_against_finite_differences(kind):
    output = random_output((4, 3), requires_grad=True)
    if kind == "ctc":
        head, loss = CTCHead(WIDTH, 3).double(), ctc_loss
    else:
        head, loss = AttentionDecoder(WIDTH, 3, dim=8, layers=1, heads=2).double(), attention_loss
    targets = [[0, 2], [1]]

    def total(embeds):
        return loss(head, EncoderOutput(embeds, output.lengths, []), targets).total

    if kind == "attention":
        assert torch.autograd.gradcheck(total, (output.embeds,))
        return
    # torch's CTC has its gradient for log-probabilities alone, exact behind a softmax: compare along random directions
    (grad,) = torch.autograd.grad(total(output.embeds), output.embeds)
    for _ in range(4):
        direction = torch.randn_like(output.embeds)
        with torch.no_grad():
            slope = (total(output.embeds + 1e-5 * direction) - total(output.embeds - 1e-5 * direction)) / 2e-5
        torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["ctc", "attention"])
def test_every_parameter_learns(kind):
    model = encoder()
    head = CTCHead(WIDTH, 4) if kind == "ctc" else AttentionDecoder(WIDTH, 4, dim=16, layers=2, heads=2)
    features, lengths = clips()
    loss = ctc_loss if kind == "ctc" else attention_loss
    loss(head, model(features, lengths), TEXTS).total.backward()
    for module in (model, head):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            # a bias of the keys shifts all scores of a query alike, which softmax does not see
            if not name.endswith("k_proj.bias"):
                assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("kind", ["ctc", "attention"])
def test_three_clips_are_learnt_by_heart(kind):
    model = encoder()
    ctc = kind == "ctc"
    head = CTCHead(WIDTH, 4) if ctc else AttentionDecoder(WIDTH, 4, dim=32, layers=1, heads=2)
    features, lengths = clips()
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], 3e-3)
    for _ in range(400):
        output = model(features, lengths)
        loss = ctc_loss(head, output, TEXTS) if ctc else attention_loss(head, output, TEXTS)
        if (loss.total / loss.count) < 0.05:
            break
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
    with torch.no_grad():
        output = model(features, lengths)
    assert (ctc_transcribe(head, output) if ctc else attention_transcribe(head, output)) == TEXTS


def test_greedy_ctc_merges_and_drops_blanks():
    head = CTCHead(3, 2)
    with torch.no_grad():
        head.proj.weight.copy_(torch.eye(3))
    path = [0, 0, 2, 0, 1, 1, 2]
    output = EncoderOutput(torch.eye(3)[[*path, 2, 1]], [7, 2], [])
    assert ctc_transcribe(head, output) == [[0, 0, 1], [1]]


def test_attention_transcription_is_bounded_and_of_each_clip_alone():
    decoder = AttentionDecoder(WIDTH, 6, dim=16, layers=1, heads=2).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.7)
    output = random_output((3, 6))
    both = attention_transcribe(decoder, output, max_length=9)
    alone = [
        attention_transcribe(decoder, EncoderOutput(x, [len(x)], []), max_length=9)[0]
        for x in output.embeds.split(output.lengths)
    ]
    assert both == alone
    assert all(len(text) <= 9 and decoder.end not in text for text in both)


def test_errors_name_the_clip():
    head, decoder, output = CTCHead(WIDTH, 4), AttentionDecoder(WIDTH, 4, dim=8, heads=2), random_output((3, 2))
    output = output._replace(embeds=output.embeds.float())
    assert ctc_length([1, 1, 2]) == 4
    with pytest.raises(ValueError, match="clip 1 needs 3 tokens of audio, but the clip has 2; leave"):
        ctc_loss(head, output, [[0], [1, 1]])
    for loss, module in ((ctc_loss, head), (attention_loss, decoder)):
        with pytest.raises(ValueError, match=r"label 4 of clip 0 lies outside 0 \.\. 3"):
            loss(module, output, [[4], []])
        with pytest.raises(ValueError, match="2 clips need as many texts, and at least one; got 1"):
            loss(module, output, [[0]])
    with pytest.raises(ValueError, match="width 9 must be a multiple of twice its 4 heads"):
        AttentionDecoder(WIDTH, 4, dim=9)


def test_an_embedding_head_turns_tokens_towards_the_embeddings_of_their_labels() -> None:
    """Logits are scaled cosines, the blank has its own direction, and tokens that learn end up where words lie."""
    embeddings = torch.randn(6, WIDTH)
    head = EmbeddingHead(embeddings, blank=5, scale=8.0)
    logits = head(3 * embeddings)
    assert logits.shape == (6, 7) and head.blank == 6
    torch.testing.assert_close(logits[:5, :5].diagonal(), torch.full((5,), 8.0))
    torch.testing.assert_close(logits[5, 6], torch.tensor(8.0))
    assert (logits[:, 5] == 0).all(), "the blank's label is none of its own"
    tokens = torch.randn(9, WIDTH, requires_grad=True)
    optimizer = torch.optim.Adam([tokens], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = ctc_loss(head, EncoderOutput(tokens, [9], []), [[0, 3, 3, 1]])
        loss.total.backward()
        optimizer.step()
    assert ctc_transcribe(head, EncoderOutput(tokens, [9], [])) == [[0, 3, 3, 1]]
    cosines = F.cosine_similarity(tokens.detach()[:, None], embeddings[None], dim=2)
    assert (cosines.max(1).values > 0.75).all()
    with pytest.raises(ValueError, match="none of the 6 labels"):
        EmbeddingHead(embeddings, blank=6)
