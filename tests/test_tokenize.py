"""Tokenisers against transformers' CLIP, the libraries' own encoders, and by hand."""

import gzip
import itertools
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import tokenizers

from ssljax.data.tokenize import ByteTokenizer, ClipBPE, SentencePiece, TokenizerFile

TEXTS = (
    "a photo of a cat",
    "A  Photo\tof\n the CAT's  hat!!",
    "it's 1,234 birds; we'll see...",
    "Übergrößenträger, naïve café",
    "日本語 の 猫 🐱 emoji",
    "ﬁne print ½ x² No. 5",
    "",
    "a" * 300,
)
MERGES = (
    ("t", "h"), ("th", "e</w>"), ("c", "a"), ("ca", "t</w>"), ("o", "f</w>"), ("p", "h"), ("o", "t"), ("ph", "ot"),
    ("phot", "o</w>"), ("a", "a"), ("aa", "aa"), ("'", "s</w>"), ("s", "e"), ("se", "e</w>"), ("Ã", "¼"),
    ("!", "!</w>"),
)  # fmt: skip


def merges_file(path, merges=MERGES):
    text = '"bpe_simple_vocab, version 0.2\n' + "\n".join(" ".join(pair) for pair in merges) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


# --- bytes ---------------------------------------------------------------------------------------


def test_bytes_layout():
    tokenizer = ByteTokenizer(8)
    ids = tokenizer("aé")
    assert ids.dtype == np.int32
    assert ids.tolist() == [1, ord("a") + 2, 0xC3 + 2, 0xA9 + 2, 258, 0, 0, 0]
    assert tokenizer("abcdefghij").tolist() == [1, *(ord(c) + 2 for c in "abcdef"), 258]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (259, 258, 0)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_come_back(text):
    tokenizer = ByteTokenizer(400)
    assert tokenizer.decode(tokenizer(text)) == text
    ids = tokenizer(text)
    assert ids.max() == tokenizer.eos_id
    assert ids.argmax() == len(text.encode()) + 1


def test_bytes_cut_inside_a_character():
    tokenizer = ByteTokenizer(5)
    assert tokenizer.decode(tokenizer("é日本")) == "é"
    assert tokenizer("\ud800").tolist() == [1, ord("?") + 2, 258, 0, 0]  # a lone surrogate is no Unicode text


# --- CLIP ----------------------------------------------------------------------------------------


def test_clip_vocabulary(tmp_path):
    """OpenAI's layout: 256 characters, 256 that end a word, one token a merge, start, end."""
    tokenizer = ClipBPE(merges_file(tmp_path / "bpe.txt.gz"), length=12)
    assert tokenizer.vocab_size == 512 + len(MERGES) + 2
    assert tokenizer.eos_id == tokenizer.vocab_size - 1
    start, end = tokenizer.eos_id - 1, tokenizer.eos_id
    cat, the = 512 + 3, 512 + 1
    character = {c: ord(c) - ord("!") for c in "abcdefghijklmnopqrstuvwxyz"}
    assert tokenizer("The cat").tolist() == [start, the, cat, end] + [0] * 8
    bird = [character["b"], character["i"], character["r"], 256 + character["d"]]
    assert tokenizer("a bird").tolist() == [start, 256 + character["a"], *bird, end, *[0] * 5]
    assert tokenizer("cat " * 50).tolist() == [start, *[cat] * 10, end]  # cut, and still closed


def test_clip_reads_only_its_own_share_of_the_merges(tmp_path):
    """The published file lists 262,144 merges, of which CLIP uses 48,894."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    triples = ["".join(triple) for triple in itertools.product(letters, repeat=3)]
    pairs = list(itertools.product(letters, repeat=2))
    many = [*pairs, *((t[:2], t[2]) for t in triples), *((t, c) for t in triples for c in letters)][:60_000]
    assert ClipBPE(merges_file(tmp_path / "bpe.txt", many)).vocab_size == 49_408


def test_clip_agrees_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the parity extra brings transformers")
    ours = ClipBPE(merges_file(tmp_path / "bpe.txt.gz"))
    vocab, merges = ours._vocab_and_merges
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges))
    try:
        theirs = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    except TypeError:  # from version 5 on it takes the contents
        theirs = transformers.CLIPTokenizer(vocab=vocab, merges=merges)
    from_json = ClipBPE(str(tmp_path / "vocab.json"))
    for text in TEXTS:
        expected = theirs(text, truncation=True, max_length=77)["input_ids"]
        for tokenizer in (ours, from_json):
            ids = tokenizer(text)
            assert ids[: len(expected)].tolist() == expected, text
            assert (ids[len(expected) :] == 0).all()


def test_clip_cleans_text(tmp_path):
    tokenizer = ClipBPE(merges_file(tmp_path / "bpe.txt"))
    np.testing.assert_array_equal(tokenizer("cat &amp;amp; cat"), tokenizer("CAT  \n & cat "))
    np.testing.assert_array_equal(tokenizer("u\u0308"), tokenizer("ü"))
    marks = tokenizer("<|endoftext|> cat")
    assert (marks == tokenizer.eos_id).sum() == 1
    assert marks[-1] == 0
    assert marks.argmax() > 5


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_clip_comes_back(tmp_path, text):
    tokenizer = ClipBPE(merges_file(tmp_path / "bpe.txt"), length=200)
    back = tokenizer.decode(tokenizer(text))
    assert "".join(back.split()) == "".join(text.lower().split())


def test_clip_files_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ClipBPE: no file at .*none\.txt\.gz"):
        ClipBPE(str(tmp_path / "none.txt.gz"))("a")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(ValueError, match=r"is not CLIP's vocab\.json"):
        ClipBPE(str(tmp_path / "vocab.json"))("a")
    (tmp_path / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    with pytest.raises(FileNotFoundError, match=r"merges\.txt"):
        ClipBPE(str(tmp_path / "vocab.json"))("a")
    (tmp_path / "prose.txt").write_text("this is not a list\nof merges at all\n")
    with pytest.raises(ValueError, match=r"prose\.txt is not a list of BPE merges: every line must hold two tokens"):
        ClipBPE(str(tmp_path / "prose.txt"))("a")
    for name, data in {"plain.gz": b"not gzip", "cut.gz": gzip.compress(b"a b\n" * 1000)[:20]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="is not a list of BPE merges"):
            ClipBPE(str(tmp_path / name))("a")


def test_a_gzip_bomb_is_refused(tmp_path):
    path = tmp_path / "bomb.txt.gz"
    with gzip.GzipFile(path, "wb") as file:
        for _ in range(8):
            file.write(b"a b\n" * 2**18)
    assert path.stat().st_size < 2**20
    with pytest.raises(ValueError, match="unpacks to more than 4 MiB"):
        ClipBPE(str(path))("a")


# --- SentencePiece and tokenizer.json ------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    folder = tmp_path_factory.mktemp("spm")
    (folder / "text.txt").write_text("\n".join(f"the cat sat on mat number {i} and saw a bird" for i in range(200)))
    spm.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "m"), vocab_size=40, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return folder / "m.model"


def test_sentencepiece(sentencepiece_model):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = SentencePiece(str(sentencepiece_model), 16)
    expected = theirs.encode("the cat saw a bird")
    assert tokenizer("the cat saw a bird").tolist() == [*expected, 1, *[0] * (15 - len(expected))]
    assert tokenizer.decode(tokenizer("the cat saw a bird")) == "the cat saw a bird"
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (40, 1)
    long = tokenizer("the cat saw a bird " * 9)
    assert long[-1] == 1
    assert (long[:-1] > 1).all()


def test_sentencepiece_files_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="SentencePiece: no file"):
        SentencePiece(str(tmp_path / "none.model"), 8)("a")
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"bad\.model is not a SentencePiece model"):
        SentencePiece(str(tmp_path / "bad.model"), 8)("a")


@pytest.fixture
def tokenizer_json(tmp_path):
    """Words, with [CLS] before and [SEP] after, and its own truncation, which must not count."""
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def test_tokenizer_file(tokenizer_json):
    tokenizer = TokenizerFile(tokenizer_json, 8, eos="[SEP]")
    assert tokenizer("the cat sat dog").tolist() == [2, 4, 5, 6, 1, 3, 0, 0]
    assert tokenizer("the cat " * 9).tolist() == [2, 4, 5, 4, 5, 4, 5, 3]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (7, 3)
    assert tokenizer.decode(tokenizer("the cat sat")) == "the cat sat"


def test_tokenizer_files_that_do_not_fit(tokenizer_json, tmp_path):
    with pytest.raises(ValueError, match=r"no token '</s>'; name its end of text with eos=\.\.\., one of .*\[SEP\]"):
        TokenizerFile(tokenizer_json, 8)("a")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer\.json"):
        TokenizerFile(str(tmp_path / "bad.json"), 8)("a")
    with pytest.raises(FileNotFoundError, match="TokenizerFile: no file"):
        TokenizerFile(str(tmp_path / "none.json"), 8)("a")


# --- all -----------------------------------------------------------------------------------------


def test_tokenisers_travel_to_worker_processes(tmp_path, sentencepiece_model, tokenizer_json):
    for tokenizer in (
        ByteTokenizer(16),
        ClipBPE(merges_file(tmp_path / "bpe.txt.gz"), 16),
        SentencePiece(str(sentencepiece_model), 16),
        TokenizerFile(tokenizer_json, 16, eos="[SEP]"),
    ):
        expected = tokenizer("the cat")  # also once its files are read
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy == tokenizer
        np.testing.assert_array_equal(copy("the cat"), expected)


def test_ids_are_the_whole_text(tmp_path, sentencepiece_model, tokenizer_json):
    text = "the cat sat on the mat, and so did the bird"
    for tokenizer in (
        ByteTokenizer(200),
        ClipBPE(merges_file(tmp_path / "bpe.txt.gz"), 200),
        SentencePiece(str(sentencepiece_model), 200),
        TokenizerFile(tokenizer_json, 200, eos="[SEP]"),
    ):
        ids, short = tokenizer.ids(text), replace(tokenizer, length=5)
        assert short.ids(text) == ids
        np.testing.assert_array_equal(tokenizer(text), ids + [0] * (200 - len(ids)))
        np.testing.assert_array_equal(short(text), [*ids[:4], ids[-1]])


def test_lengths_are_checked():
    with pytest.raises(ValueError, match="length=2 leaves no room for text; it must be at least 3"):
        ByteTokenizer(2)
    for kind in (ClipBPE, SentencePiece, TokenizerFile):
        with pytest.raises(ValueError, match="length=1 leaves no room for text"):
            kind("x", 1)
