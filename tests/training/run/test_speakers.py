"""New voices: which id they get, that only their row learns, and that they survive saving; averages of parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from build import widen
from torch import nn

from omni import OmniModel
from omni.packaged.toy import toy_model
from omni.training.objectives.ema import EMA
from omni.training.run.speakers import SpeakerEmbedding, add_speaker, merge_speakers, speaker_parameters

TAKEN = "aiden, chelsie, ethan"


def test_a_voice_takes_a_free_control_id():
    model = toy_model(seed=0)
    config = model.config.talker_config
    vocab = config.text_config.vocab_size
    control = {value for key, value in config.to_dict().items() if key.startswith("codec_")}
    named = set(config.speaker_id.values())
    rows = model.talker.codec_embedding.weight.detach().clone()
    assert add_speaker(model, "First") == max(named) + 1
    assert model.talker.config is model.config.talker_config
    assert model.config.talker_config.speaker_id["first"] == max(named) + 1
    changed = (model.talker.codec_embedding.weight != rows).any(1).nonzero().flatten().tolist()
    assert changed == [max(named) + 1]
    # every id that means nothing yet is given out, and no other
    free = set(range(config.num_codes, vocab)) - control - named - {max(named) + 1}
    assert {add_speaker(model, f"voice {i}") for i in range(len(free))} == free
    with pytest.raises(ValueError, match="all 1024 control ids of the codec vocabulary are taken"):
        add_speaker(model, "one too many")


def test_where_a_voice_starts():
    model = toy_model(seed=0)
    ids = model.config.talker_config.speaker_id
    table = model.talker.codec_embedding.weight
    same = add_speaker(model, "same", like="ETHAN")
    assert torch.equal(table[same], table[ids["ethan"]])
    mean = add_speaker(model, "middle", like="mean")
    torch.testing.assert_close(table[mean], table[[*ids.values(), same]].mean(0))
    torch.manual_seed(1)
    random = table[add_speaker(model, "random")].clone()
    again = toy_model(seed=0)
    torch.manual_seed(1)
    assert torch.equal(again.talker.codec_embedding.weight[add_speaker(again, "random")], random)
    assert 0.01 < random.std() < 0.03  # initializer_range 0.02


def test_names_and_errors():
    model = toy_model(seed=0)
    for name in ("Ethan", "AIDEN"):
        with pytest.raises(ValueError, match=f"exists; names taken: {TAKEN}"):
            add_speaker(model, name)
    for name in ("", " anna", "mean", "Mean", "a\n"):
        with pytest.raises(ValueError, match=f"cannot be used.*names taken: {TAKEN}"):
            add_speaker(model, name)
    with pytest.raises(TypeError, match="is a string, got int"):
        add_speaker(model, 3)
    with pytest.raises(ValueError, match=f"no voice 'anna' to start from; there are {TAKEN}"):
        add_speaker(model, "berta", like="anna")
    with pytest.raises(ValueError, match=f"unknown speaker 'anna'; this model has {TAKEN}; add_speaker"):
        speaker_parameters(model, ["ethan", "anna"])
    assert not isinstance(model.talker.codec_embedding, SpeakerEmbedding)
    with pytest.raises(ValueError, match="no voice of this model is being trained"):
        merge_speakers(model)
    model.talker = None
    with pytest.raises(ValueError, match="talker was not loaded"):
        add_speaker(model, "anna")


def talker_loss(model, speakers):
    """Something that depends on the voices, on their neighbours in the table and on codes."""
    ids = torch.tensor([[*speakers, 3, 5, model.config.talker_config.codec_bos_id]])
    positions = torch.arange(ids.shape[1]).float().expand(3, 1, -1)
    return model.talker(model.talker.codec_embedding(ids), positions).hidden.sin().sum()


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_only_the_chosen_rows_move(optimizer):
    model = toy_model(seed=0)
    new = add_speaker(model, "anna", like="mean")
    ids = model.config.talker_config.speaker_id
    model.requires_grad_(False)
    before = talker_loss(model, [new, ids["ethan"]])
    rows = speaker_parameters(model, "Anna")
    assert torch.equal(talker_loss(model, [new, ids["ethan"]]), before)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [f"talker.codec_embedding.rows.{new}"]
    assert speaker_parameters(model, ["anna"])[0] is rows[0]  # asked again, the same parameter
    table = model.talker.codec_embedding.weight.detach().clone()
    state = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    step = getattr(torch.optim, optimizer)(rows, lr=1e-2, weight_decay=0.1, **options)
    for i in range(4):
        step.zero_grad()
        talker_loss(model, [new, ids["ethan"]] if i < 3 else [ids["chelsie"]]).backward()
        assert rows[0].grad is not None  # also in a batch without the voice
        step.step()
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters() if name in state)
    with torch.no_grad():
        heard = talker_loss(model, [new])
        merge_speakers(model)
        assert torch.equal(talker_loss(model, [new]), heard)
    assert type(model.talker.codec_embedding) is nn.Embedding
    moved = (model.talker.codec_embedding.weight != table).any(1).nonzero().flatten().tolist()
    assert moved == [new]


def test_gradient_of_a_row_is_that_of_the_table():
    model = toy_model(seed=0).double()
    speaker = model.config.talker_config.speaker_id["aiden"]
    talker_loss(model, [speaker, speaker]).backward()
    expected = model.talker.codec_embedding.weight.grad[speaker].clone()
    model.zero_grad()
    (row,) = speaker_parameters(model, "aiden")
    talker_loss(model, [speaker, speaker]).backward()
    torch.testing.assert_close(row.grad, expected)


def test_a_saved_voice_speaks_under_any_case_and_in_transformers(tmp_path):
    from transformers import AutoConfig

    model = widen(toy_model(seed=0), 10)  # so that the most likely codes depend on the voice
    new = add_speaker(model, "Anna", like="chelsie")
    (row,) = speaker_parameters(model, "anna")
    with torch.no_grad():
        row.normal_()
    merge_speakers(model)
    model.save_pretrained(tmp_path)
    loaded = OmniModel.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(loaded.talker.codec_embedding.weight[new], row)
    assert AutoConfig.from_pretrained(tmp_path).talker_config.speaker_id["anna"] == new
    options = dict(max_frames=3, audio_sampling={"temperature": 0}, residual_sampling={"temperature": 0})
    waves = [m.speak("one two three", speaker=name, **options) for m, name in [(model, "anna"), (loaded, "ANNA")]]
    assert torch.equal(*waves)
    assert not torch.equal(waves[0], loaded.speak("one two three", speaker="chelsie", **options))


def test_two_voices_in_bfloat16():
    model = toy_model(seed=0).to(torch.bfloat16)
    ids = [add_speaker(model, name, like="ethan") for name in ("anna", "berta")]
    rows = speaker_parameters(model, ["anna", "berta"])
    assert {row.dtype for row in rows} == {torch.float32}
    talker_loss(model, ids[:1]).backward()
    assert (rows[0].grad != 0).any() and (rows[1].grad == 0).all()


def test_average_follows_its_formula_and_is_applied_and_taken_back():
    model = nn.Linear(3, 2).to(torch.bfloat16)
    model.bias.requires_grad_(False)
    start = model.weight.detach().float()
    ema = EMA(model.named_parameters(), decay=0.9, warm_up=False)
    expected = start.clone()
    for _ in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update()
        expected = 0.9 * expected + 0.1 * model.weight.float()
    assert list(ema.averages) == ["weight"]
    torch.testing.assert_close(ema.averages["weight"], expected.detach())
    live = model.weight.detach().clone()
    with pytest.raises(KeyError), ema.applied():
        assert torch.equal(model.weight, ema.averages["weight"].bfloat16())
        raise KeyError
    assert torch.equal(model.weight, live)


def test_small_steps_are_not_rounded_away():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    ema = EMA(model.named_parameters(), decay=0.999, warm_up=False)
    nn.init.zeros_(model.weight)
    for _ in range(1000):
        ema.update()  # each moves by less than bfloat16 resolves at 1
    torch.testing.assert_close(ema.averages["weight"], torch.tensor([[0.999**1000]]), rtol=1e-4, atol=0)


def test_average_warms_up_and_resumes():
    model = nn.Linear(4, 4)
    ema = EMA(model.named_parameters(), decay=0.99)
    nn.init.ones_(model.weight)
    old = ema.averages["weight"].clone()
    ema.update()
    torch.testing.assert_close(ema.averages["weight"], 0.1 * old + 0.9)
    state = copy.deepcopy(ema.state_dict())
    other = EMA(nn.Linear(4, 4).named_parameters(), decay=0.99)
    other.load_state_dict(state)
    other.parameters = ema.parameters
    for average in (ema, other):
        average.update()
    assert torch.equal(ema.averages["weight"], other.averages["weight"]) and ema.updates == other.updates == 2
    with pytest.raises(ValueError, match="averages are of other parameters: 1 differ, the first is 'bias'"):
        EMA(nn.Linear(4, 4, bias=False).named_parameters()).load_state_dict(state)
    with pytest.raises(ValueError, match=r"decay 1\.0 must lie"):
        EMA([], decay=1.0)
