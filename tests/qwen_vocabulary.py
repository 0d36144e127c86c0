"""The true Qwen1.5 tokenizer, derived from the vocabulary that the dashscope package carries.

    pip install --no-deps dashscope
    python tests/qwen_vocabulary.py FOLDER
"""

import base64
import hashlib
import importlib.util
import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modellink.data.train_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, SPLIT_REGEX

# of vocab.json in every official Qwen1.5 to Qwen2.5 folder
VOCAB_SHA256_START, VOCAB_SHA256_END = "ca10d7e9", "0910"
ABSENT = "the dashscope package, which carries the Qwen vocabulary, is not installed (pip install --no-deps dashscope)"


def source() -> Path | None:
    """The file with the ranks; None when dashscope is not installed."""
    found = importlib.util.find_spec("dashscope")  # finds it without running it, which would need its dependencies
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "resources" / "qwen.tiktoken"
    return path if path.is_file() else None


def _last_merge(word: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """The two parts that byte-pair merging with ranks below `limit` leaves of a word of rank `limit`."""
    parts = [word[i:i + 1] for i in range(len(word))]
    while len(parts) > 2:
        rank, at = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        if rank >= limit:
            break
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts


def write_tokenizer(folder: Path) -> Path:
    """Write tokenizer.json, vocab.json, merges.txt and tokenizer_config.json of Qwen1.5."""
    path = source()
    assert path is not None, ABSENT
    ranks = {base64.b64decode(word): int(rank) for word, rank in
             (line.split() for line in path.read_bytes().splitlines() if line)}
    letters = bytes_to_unicode()

    def shown(word: bytes) -> str:
        return "".join(letters[byte] for byte in word)

    vocab = {shown(word): rank for word, rank in ranks.items()}
    merges = []
    for word, rank in ranks.items():
        if len(word) > 1:
            first, second = _last_merge(word, ranks, rank)
            merges.append((shown(first), shown(second)))
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(vocab, ensure_ascii=False, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest.startswith(VOCAB_SHA256_START) and digest.endswith(VOCAB_SHA256_END), digest
    (folder / "vocab.json").write_text(text, encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_REGEX), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 32768, "bos_token": None, "unk_token": None,
              "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_prefix_space": False, "errors": "replace",
              "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "clean_up_tokenization_spaces": False,
              "split_special_tokens": False, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


if __name__ == "__main__":
    print(write_tokenizer(Path(sys.argv[1])))
