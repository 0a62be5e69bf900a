"""Train the small byte-pair vocabulary on the captions. `python tools/emoji64/tokenizer.py`."""

from __future__ import annotations

from pathlib import Path

from sources import WORK
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

VOCABULARY, POSITIONS = 1500, 24
FOLDER = WORK / "tokenizer"
START, END = "<|startoftext|>", "<|endoftext|>"


def load(folder: Path = FOLDER) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder)


def main() -> None:
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, end_of_word_suffix="</w>", special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator((WORK / "captions.txt").read_text().splitlines(), trainer)
    FOLDER.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(FOLDER))
    made = CLIPTokenizer(str(FOLDER / "vocab.json"), str(FOLDER / "merges.txt"), model_max_length=POSITIONS)
    made.save_pretrained(FOLDER)
    again = load()
    words = "a twitter emoji of a horizontal traffic light and a camera with flash on a yellow striped background"
    print(len(again), again.tokenize(words), len(again(words).input_ids))


if __name__ == "__main__":
    main()
