"""Which files of a model's folder are worth having beside its weights and its config.json.

One list for what is fetched from the Hub and for what goes from a parent to its conversion.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

TEMPLATES = "additional_chat_templates"
"""Folder with a model's further chat templates, *.jinja, as transformers looks for it."""
SIDE_FILES = (
    "*.json",
    "*.jinja",
    # vocabularies of tokenizers that are no tokenizer.json
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.bpe",
    "*.codes",
    "*.spm",
    "*.vocab",
    "README.md",
    "LICEN[CS]E*",
    "COPYING*",
    "NOTICE*",
    "*[Uu][Ss][Ee]_[Pp][Oo][Ll][Ii][Cc][Yy]*",
)
"""Names of files that a model's folder itself holds: configs, tokenizers, templates, terms."""
NOT_NEEDED = (
    # indexes of weights in forms that are not read, and what trainers leave behind
    "pytorch_model*.json",
    "tf_model*.json",
    "flax_model*.json",
    "*.bin.index.json",
    "*.msgpack.index.json",
    "*.h5.index.json",
    "consolidated*.json",
    "trainer_state.json",
    "requirements*.txt",
    # archives and weights that carry one of the names above
    "*.bin",
    "*.gguf",
    "*.onnx",
    "*.safetensors",
    "*.py",
)
"""Names that are not meant by `SIDE_FILES`, though they look like it."""


def is_side_file(path: str) -> bool:
    """Whether a file that is no weight is needed, by its path inside the model's folder with `/`."""
    folder, _, name = path.rpartition("/")
    if folder:
        return folder == TEMPLATES and name.endswith(".jinja")
    return _any(name, SIDE_FILES) and not _any(name, NOT_NEEDED)


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
