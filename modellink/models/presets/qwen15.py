"""The Qwen1.5 family: one row for each size, with its source.

The published config.json of each base model is the source; the second column of a row's note names what confirms it.
"""

from modellink.config.model import ModelConfig

HF = "https://huggingface.co/Qwen/Qwen1.5-{}/blob/main/config.json"

# name: (hidden, ffn, layers, heads, groups, rows, tied, rope base, epsilon, HF name)
_ROWS: dict[str, tuple[int, int, int, int, int, int, bool, float, float, str]] = {
    "qwen15-0.5b": (1024, 2816, 24, 16, 16, 151936, True, 1e6, 1e-6, "0.5B"),
    "qwen15-1.8b": (2048, 5504, 24, 16, 16, 151936, False, 1e6, 1e-6, "1.8B"),
    "qwen15-4b": (2560, 6912, 40, 20, 20, 151936, False, 5e6, 1e-6, "4B"),  # the family's only other rope base
    "qwen15-7b": (4096, 11008, 32, 32, 32, 151936, False, 1e6, 1e-6, "7B"),
    "qwen15-14b": (5120, 13696, 40, 40, 40, 152064, False, 1e6, 1e-6, "14B"),
    "qwen15-32b": (5120, 27392, 64, 40, 8, 152064, False, 1e6, 1e-6, "32B"),
    "qwen15-72b": (8192, 24576, 80, 64, 64, 152064, False, 1e6, 1e-5, "72B"),  # 72B-Chat has epsilon 1e-6
    "qwen15-110b": (8192, 49152, 80, 64, 8, 152064, False, 1e6, 1e-6, "110B"),
}

SOURCES: dict[str, str] = {name: HF.format(row[-1]) for name, row in _ROWS.items()}

PRESETS: dict[str, ModelConfig] = {
    name: ModelConfig(num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads,
                      num_query_groups=groups, vocab_size=rows, tie_word_embeddings=tied, rope_theta=theta,
                      rms_norm_eps=epsilon)
    for name, (hidden, ffn, layers, heads, groups, rows, tied, theta, epsilon, _) in _ROWS.items()
}
