"""Text to int32 ids of fixed length.

Every tokeniser is `(text) -> int32 [length]` with `vocab_size`, `eos_id`, `pad_id` (0) and `decode(ids) -> text`.
One `eos_id` closes the text, also where it was cut; zeros follow. `ids(text)` is all of a text, neither cut nor
padded. Files are read on first use.
"""

import base64
import gzip
import html
import io
import re
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Int32

from ssljax.bounded import read_file, read_json
from ssljax.data.errors import BadSample

T = TypeVar("T")

Ids = Int32[np.ndarray, "length"]

_CLIP_SIZE = 49_408  # entries: 2 * 256 characters, as many merges as fit (the published list is longer), two marks
_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_LARGEST_FILE = 64 * 2**20  # bytes of a vocabulary; the largest in use have 33 MiB
_LARGEST_MERGES = 4 * 2**20  # bytes of a list of merges, unpacked; CLIP's has 3 MiB
_READ = 64  # characters of a text that are read for each token of `length`: normalising is quadratic in some texts


def _layout(ids: Sequence[int], eos_id: int, length: int) -> Ids:
    out = np.zeros(length, np.int32)
    kept = [*ids[: length - 1], eos_id]
    out[: len(kept)] = kept
    return out


def _tokens(encode: Callable[[str], T], text: str, length: int | None) -> T:
    """Of the start of a text that `length` tokens may need, or of the whole."""
    try:
        return _without_panic(encode, text if length is None else text[: _READ * length])
    except MemoryError:
        raise
    except Exception as error:
        raise BadSample(f"the tokenizer cannot encode {text[:40]!r}: {error}") from error


def _without_panic(function: Callable[[str], T], text: str) -> T:
    """`function(text)`. Where the Rust of `tokenizers` panics, which is no Exception in Python, it is a ValueError."""
    try:
        return function(text)
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(str(error)) from error


def _until_end(ids: Sequence[int] | np.ndarray, eos_id: int) -> list[int]:
    ids = [int(i) for i in ids]
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def _check_length(length: int, at_least: int) -> None:
    if length < at_least:
        raise ValueError(f"length={length} leaves no room for text; it must be at least {at_least}")


def _existing(path: str, what: str) -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what}: no file at {path!r}")
    return Path(path)


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids of fixed length, padded with `pad_id`."""

    @property
    def length(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    def __call__(self, text: str, /) -> Ids: ...
    def ids(self, text: str, /) -> list[int]:
        """Start (where there is one), tokens and end of the whole text."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes; needs no file. Pad 0, start 1, byte b is b + 2, end 258 (the largest, for pooling by argmax)."""

    length: int
    vocab_size: ClassVar[int] = 259
    eos_id: ClassVar[int] = 258
    pad_id: ClassVar[int] = 0

    def __post_init__(self):
        _check_length(self.length, 3)

    def __call__(self, text: str) -> Ids:
        return _layout(self.ids(text[: self.length])[:-1], self.eos_id, self.length)

    def ids(self, text: str) -> list[int]:
        return [1, *(byte + 2 for byte in text.encode("utf-8", "replace")), self.eos_id]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(i - 2 for i in _until_end(ids, self.eos_id) if 2 <= i < 258).decode("utf-8", "ignore")


@dataclass(frozen=True)
class ClipBPE:
    """CLIP's lower-cased byte-level BPE (Radford et al. 2021, section 2.4): start, tokens, end, zeros.

    `vocab_path` is OpenAI's list of merges (`bpe_simple_vocab_16e6.txt.gz`, or unpacked), or a `vocab.json` with its
    `merges.txt` beside it. Text is cleaned as in the original: NFC, HTML entities unescaped twice, white space
    collapsed, lower case. Marks such as `<|endoftext|>` inside a text are plain characters. The end is the largest id.
    """

    vocab_path: str
    length: int = 77
    pad_id: ClassVar[int] = 0

    def __post_init__(self):
        _check_length(self.length, 3)

    @cached_property
    def _vocab_and_merges(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        path = _existing(self.vocab_path, "ClipBPE")
        if path.suffix != ".json":
            merges = _read_merges(path)[: _CLIP_SIZE - 2 * 256 - 2]
            characters = _byte_characters()
            words = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges)]
            return {word: i for i, word in enumerate([*words, _CLIP_START, _CLIP_END])}, merges
        try:
            vocab = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} is not a vocab.json: {error}") from error
        if not isinstance(vocab, dict) or not {_CLIP_START, _CLIP_END} <= vocab.keys():
            raise ValueError(f"{path} is not CLIP's vocab.json: it must give ids to {_CLIP_START!r} and {_CLIP_END!r}")
        if {id for id in vocab.values() if type(id) is int} != set(range(len(vocab))):
            raise ValueError(f"{path} is not CLIP's vocab.json: its ids must be 0 to {len(vocab) - 1}, each once")
        return vocab, _read_merges(_existing(str(path.with_name("merges.txt")), "ClipBPE, beside vocab.json"))

    @cached_property
    def _bpe(self) -> tokenizers.Tokenizer:
        vocab, merges = self._vocab_and_merges
        try:
            model = tokenizers.models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>", unk_token=_CLIP_END)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{self.vocab_path} and its merges do not fit: {error}") from error
        bpe = tokenizers.Tokenizer(model)
        words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_CLIP_WORDS), behavior="removed", invert=True)
        to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, to_bytes])  # type: ignore[assignment]
        bpe.decoder = tokenizers.decoders.ByteLevel()  # type: ignore[assignment]
        return bpe

    @property
    def vocab_size(self) -> int:
        return len(self._vocab_and_merges[0])

    @property
    def bos_id(self) -> int:
        return self._vocab_and_merges[0][_CLIP_START]

    @property
    def eos_id(self) -> int:
        return self._vocab_and_merges[0][_CLIP_END]

    def __call__(self, text: str) -> Ids:
        return _layout([self.bos_id, *_tokens(self._encode, text, self.length)], self.eos_id, self.length)

    def ids(self, text: str) -> list[int]:
        return [self.bos_id, *_tokens(self._encode, text, None), self.eos_id]

    def _encode(self, text: str) -> list[int]:
        clean = html.unescape(html.unescape(unicodedata.normalize("NFC", text)))
        clean = re.sub(r"\s+", " ", clean).strip().lower()
        return self._bpe.encode(clean, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        text = self._bpe.decode([i for i in _until_end(ids, self.eos_id) if i != self.bos_id])
        return text.replace("</w>", " ").strip()


def _byte_characters() -> list[str]:
    """GPT-2's visible characters for the 256 bytes, in the order of CLIP's vocabulary (visible bytes first)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in (*visible, *range(256, 512 - len(visible)))]


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Pairs in their order; a first line that starts with `#version` or a quotation mark is a heading."""
    try:
        data = read_file(path, _LARGEST_MERGES)
        if path.suffix == ".gz":
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(_LARGEST_MERGES + 1)
            if len(data) > _LARGEST_MERGES:
                raise ValueError(f"it unpacks to more than {_LARGEST_MERGES >> 20} MiB")
        lines = data.decode("utf-8").strip().split("\n")
        merges = [tuple(line.split()) for line in lines[lines[0].startswith(('"', "#version")) :]]
        if not merges or any(len(pair) != 2 for pair in merges):
            raise ValueError("every line must hold two tokens")
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a list of BPE merges: {error}") from error
    return merges  # type: ignore[return-value]


@dataclass(frozen=True)
class SentencePiece:
    """A SentencePiece model: tokens, end, zeros. The model must have an end-of-sentence piece."""

    model_path: str
    length: int
    pad_id: ClassVar[int] = 0

    def __post_init__(self):
        _check_length(self.length, 2)

    @cached_property
    def _model(self):
        import sentencepiece

        path = _existing(self.model_path, "SentencePiece")
        try:
            model = sentencepiece.SentencePieceProcessor(model_proto=read_file(path, _LARGEST_FILE))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
        if model.eos_id() < 0:
            raise ValueError(f"{path} has no end-of-sentence piece; train the model with one (--eos_id)")
        return model

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size()

    @property
    def eos_id(self) -> int:
        return self._model.eos_id()

    def __call__(self, text: str) -> Ids:
        return _layout(_tokens(self._model.encode, text, self.length), self.eos_id, self.length)

    def ids(self, text: str) -> list[int]:
        return [*_tokens(self._model.encode, text, None), self.eos_id]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode(_until_end(ids, self.eos_id))


def _check_charsmaps(data: bytes) -> None:
    """Raises ValueError where a SentencePiece normaliser is shorter than its first four bytes say: the library takes
    them for the size of an allocation, and where that fails it aborts the process."""
    plain = re.sub(rb"\\u00([2-7][0-9a-fA-F])", lambda match: bytes.fromhex(match[1].decode()), data)
    for match in re.finditer(rb'"precompiled_charsmap"\s*:\s*(?:null|"([^"]*)"|)', plain):
        charsmap = base64.b64decode(match[1] or b"", validate=True)
        if not match[0].endswith(b"null") and int.from_bytes(charsmap[:4], "little") + 4 > len(charsmap):
            raise ValueError("its precompiled_charsmap is cut")


@dataclass(frozen=True)
class TokenizerFile:
    """A `tokenizer.json` of the `tokenizers` library, with the special tokens it adds. `eos` names its end of text."""

    path: str
    length: int
    eos: str = "</s>"
    pad_id: ClassVar[int] = 0

    def __post_init__(self):
        _check_length(self.length, 2)

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        path = _existing(self.path, "TokenizerFile")
        try:
            data = read_file(path, _LARGEST_FILE)
            _check_charsmaps(data)
            tokenizer = _without_panic(tokenizers.Tokenizer.from_str, data.decode())
            ids = [*tokenizer.get_vocab().values(), *_without_panic(tokenizer.encode, "").ids]  # "": what it adds
            if max(ids, default=0) >= 2**31:
                raise ValueError(f"its largest id, {max(ids)}, has more than 31 bits")
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if tokenizer.token_to_id(self.eos) is None:
            special = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values())
            raise ValueError(f"{path} has no token {self.eos!r}; name its end of text with eos=..., one of {special}")
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def eos_id(self) -> int:
        return self._tokenizer.token_to_id(self.eos)  # type: ignore[return-value]  # `_tokenizer` has checked it

    def __call__(self, text: str) -> Ids:
        ids = _tokens(self._tokenizer.encode, text, self.length).ids
        return _layout(_until_end(ids, self.eos_id), self.eos_id, self.length)

    def ids(self, text: str) -> list[int]:
        return [*_until_end(_tokens(self._tokenizer.encode, text, None).ids, self.eos_id), self.eos_id]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(_until_end(ids, self.eos_id))
