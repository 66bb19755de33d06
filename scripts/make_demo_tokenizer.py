"""Write the small synthetic tokenizer and processor files of `omni/packaged/toy_data` (run from the repository root).

A byte-level BPE of fewer than 640 ids in the shape of Qwen's: ids 0-255 are the bytes, then the control tokens of
`configs/tiny.json`, the three role words as single tokens, and the merges of some common English words.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

FOLDER = Path("omni/packaged/toy_data")
VOCABULARY_LIMIT = 640  # configs/tiny.json: text_config.vocab_size

CONTROL = {  # special: never part of decoded text
    "<|endoftext|>": 256,
    "<|im_start|>": 257,
    "<|im_end|>": 258,
    "<|vision_start|>": 262,
    "<|vision_end|>": 263,
    "<|vision_pad|>": 264,
    "<|image_pad|>": 265,
    "<|video_pad|>": 266,
    "<|audio_start|>": 269,
    "<|audio_end|>": 270,
    "<tts_pad>": 271,
    "<tts_text_bos>": 272,
    "<tts_text_eod>": 273,
    "<tts_text_bos_single>": 274,
    "<|audio_pad|>": 275,
}
MARKUP = {  # added, but not special: the reader sees them
    "<think>": 259,
    "</think>": 260,
    "<tool_response>": 261,
    "<tool_call>": 267,
    "</tool_call>": 268,
    "</tool_response>": 279,
}
ROLES = {"system": 276, "user": 277, "assistant": 278}
WORDS = """ the| a| an| and| of| to| in| is| it| you| that| was| for| on| are| with| as| his| they| at| be| this| have|
 from| or| one| had| by| but| not| what| all| were| we| when| your| can| said| there| use| each| which| she| do| how|
 their| if| will| up| other| about| out| many| then| them| these| so| some| her| would| make| like| him| into| time|
 has| look| two| more| see| no| way| could| people| my| than| first| been| who| its| now|hello|The|What|ing|er|ed|ly|
 speech| sound| voice| hear| picture| image| video| audio""".replace("\n", "").split("|")

# The pre-tokenizer pattern of the Qwen2 tokenizer family.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def build_tokenizer() -> Tokenizer:
    alphabet = byte_characters()
    vocabulary = {character: byte for byte, character in enumerate(alphabet)} | CONTROL | MARKUP | ROLES
    merges: list[tuple[str, str]] = []
    for word in [*ROLES, *WORDS]:
        characters = [alphabet[byte] for byte in word.encode()]
        for i in range(1, len(characters)):
            pair = ("".join(characters[:i]), characters[i])
            if pair not in merges:
                merges.append(pair)
                vocabulary.setdefault("".join(pair), len(vocabulary))
    assert sorted(vocabulary.values()) == list(range(len(vocabulary))), "ids must be dense"
    assert len(vocabulary) <= VOCABULARY_LIMIT, f"{len(vocabulary)} ids exceed {VOCABULARY_LIMIT}"

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    def entry(token: str) -> dict[str, object]:
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        return {"content": token, **flags, "special": token in CONTROL}

    added = sorted((CONTROL | MARKUP).items(), key=lambda item: item[1])
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): entry(token) for token, index in added},
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": {
            "image_token": "<|image_pad|>",
            "audio_token": "<|audio_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
            "audio_bos_token": "<|audio_start|>",
            "audio_eos_token": "<|audio_end|>",
        },
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "processor_class": "Qwen3OmniMoeProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


# The released values (one file for all three variants).
PREPROCESSOR = {
    "chunk_length": 300,
    "dither": 0.0,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "n_fft": 400,
    "n_samples": 4800000,
    "nb_max_frames": 30000,
    "padding_side": "right",
    "padding_value": 0.0,
    "patch_size": 16,
    "processor_class": "Qwen3OmniMoeProcessor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
    "temporal_patch_size": 2,
}
GENERATION = {
    "talker_max_new_tokens": 4096,
    "talker_repetition_penalty": 1.05,
    "talker_temperature": 0.9,
    "talker_top_k": 50,
    "talker_top_p": 1.0,
}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(FOLDER / "tokenizer.json"))
    files = {
        "tokenizer_config.json": tokenizer_config(),
        "preprocessor_config.json": PREPROCESSOR,
        "generation_config.json": GENERATION,
    }
    for name, values in files.items():
        (FOLDER / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
