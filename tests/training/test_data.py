"""Where documents come from and how they become batches."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from memwrap.data.documents import load_documents, long_documents
from memwrap.data.stdlib_corpus import Document, split_of
from memwrap.training.batches import (
    first_tokens,
    last_segment_only,
    left_aligned,
    pieces,
    shifted_labels,
)
from memwrap.training.collating import DocumentCollator, DocumentDataset

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for every word w0..w99; begin and end of text as 1 and 2."""
    words = {"<unk>": 0, "<s>": BOS, "</s>": EOS} | {f"w{i}": i + 3 for i in range(100)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=16,
    )  # fmt: skip


def words(count: int, start: int = 0) -> str:
    return " ".join(f"w{(start + i) % 100}" for i in range(count))


def pdf(text: str) -> bytes:
    """A PDF of one page, the smallest that a reader takes."""
    stream = f"BT /F1 12 Tf 10 100 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + (
        b"xref\n0 6\n0000000000 65535 f \n%strailer\n<< /Size 6 /Root 1 0 R >>\n"
        b"startxref\n%d\n%%%%EOF\n" % (table, len(out))
    )


# Sources


def test_stdlib_gives_the_split() -> None:
    documents = load_documents("stdlib", "test", limit=3)
    assert [d.split for d in documents] == ["test"] * 3
    assert documents[0].text


def test_folder_reads_text_markdown_and_pdf_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("\ufeffalpha", encoding="utf-8")
    (tmp_path / "b" / "b.MD").write_text("beta")
    (tmp_path / "c.pdf").write_bytes(pdf("gamma delta"))
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    documents = load_documents(tmp_path)
    assert [(d.name, d.text.strip()) for d in documents] == [
        ("a.txt", "alpha"), ("b/b.MD", "beta"), ("c.pdf", "gamma delta"),
    ]  # fmt: skip
    assert [d.split for d in documents] == [split_of(d.name) for d in documents]


def test_folder_splits_are_disjoint_and_complete(tmp_path: Path) -> None:
    for index in range(60):
        (tmp_path / f"{index}.txt").write_text(f"text {index}")
    parts = [load_documents(tmp_path, s) for s in ("train", "validation", "test")]
    names = [d.name for part in parts for d in part]
    assert len(names) == len(set(names)) == 60
    assert len(parts[0]) > len(parts[2]) > 0


def test_folder_with_named_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "x.txt").write_text(f"of {split}")
    (document,) = load_documents(tmp_path, "test")
    assert (document.name, document.split, document.text) == ("x.txt", "test", "of test")


def test_single_file_is_cut_by_place(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(200))
    path = tmp_path / "book.txt"
    path.write_text(text)
    parts = [load_documents(path, s)[0].text for s in ("train", "validation", "test")]
    assert "".join(parts) == text
    assert all(part.startswith("line") for part in parts)
    assert 0.84 < len(parts[0]) / len(text) < 0.86
    assert load_documents(str(path))[0].text == text


def test_datasets_from_disk_and_from_files(tmp_path: Path) -> None:
    import datasets

    saved = tmp_path / "saved"
    rows = datasets.Dataset.from_dict({"text": ["one", " ", "two"], "other": ["1", "2", "3"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(str(saved))
    assert [d.text for d in load_documents(f"datasets:{saved}")] == ["one", "two"]
    assert [d.text for d in load_documents(f"datasets:{saved}:train:other", limit=2)] == ["1", "2"]
    with pytest.raises(ValueError, match="no column 'body'; it has text, other"):
        load_documents(f"datasets:{saved}:train:body")
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        load_documents(f"datasets:{saved}", "test")
    with pytest.raises(ValueError, match="names the split 'train'"):
        load_documents(f"datasets:{saved}:train", "test")

    template = "### Instruction:\n{text}\n\n### Response:\n{other}"
    filled = load_documents(f"datasets:{saved}", template=template)
    assert filled[2].text == "### Instruction:\ntwo\n\n### Response:\n3"
    with pytest.raises(ValueError, match="no column 'input'; it has text, other"):
        load_documents(f"datasets:{saved}", template="{input}")
    with pytest.raises(ValueError, match="there is a `template`"):
        load_documents(f"datasets:{saved}:train:other", template=template)
    with pytest.raises(ValueError, match=r"`template` is '\{text'"):
        load_documents(f"datasets:{saved}", template="{text")
    with pytest.raises(ValueError, match="`template` is an option of 'datasets"):
        load_documents("stdlib", template=template)

    files = tmp_path / "files"
    files.mkdir()
    (files / "train.jsonl").write_text('{"text": "three"}\n{"text": "four"}\n')
    options = {"cache_dir": str(tmp_path / "cache")}
    found = load_documents(f"datasets:{files}:train", **options)
    assert [d.text for d in found] == ["three", "four"]
    with pytest.raises(ValueError, match="could not load the split 'nope'"):
        load_documents(f"datasets:{files}:nope", **options)


def test_unusable_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file or folder; give 'stdlib'"):
        load_documents("nowhere")
    with pytest.raises(ValueError, match="holds no files of text, Markdown, HTML, PDF"):
        load_documents(tmp_path)
    with pytest.raises(ValueError, match="allowed: train, validation, test"):
        load_documents("stdlib", "dev")
    with pytest.raises(ValueError, match="takes none"):
        load_documents("stdlib", name="x")
    with pytest.raises(ValueError, match="`limit` is 0"):
        load_documents("stdlib", limit=0)
    with pytest.raises(ValueError, match="NAME"):
        load_documents("datasets::train")
    (tmp_path / "page.htm").write_text("<title>no</title><p>Two<br>lines &amp; more<script>no")
    assert load_documents(tmp_path / "page.htm")[0].text == "Two\nlines & more"
    (tmp_path / "page.htm").unlink()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        load_documents(tmp_path)
    (tmp_path / "latin.txt").write_text(" \n")
    with pytest.raises(ValueError, match="can be read: There is no text in"):
        load_documents(tmp_path)
    (tmp_path / "good.txt").write_text("text")
    with pytest.warns(UserWarning, match="left out: There is no text"):
        assert [d.text for d in load_documents(tmp_path)] == ["text"]
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 not one")
    with pytest.raises(ValueError, match=r"broken\.pdf cannot be read as a PDF"):
        load_documents(tmp_path / "broken.pdf")
    (tmp_path / "x.docx").write_bytes(b"PK\3\4\0\0")
    with pytest.raises(ValueError, match="no file of a kind that is read"):
        load_documents(tmp_path / "x.docx")
    (tmp_path / "LICENSE").write_text("all of it")
    assert [d.text for d in load_documents(tmp_path / "LICENSE")] == ["all of it"]


def test_missing_pypdf_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("text"))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "pypdf" else find(n, *a)
    )
    with pytest.raises(ImportError, match="pip install pypdf"):
        load_documents(tmp_path / "a.pdf")


# Datasets


def test_dataset_cuts_documents_and_drops_short_pieces(tokenizer) -> None:
    documents = [Document("a", "train", words(10)), Document("b", "train", words(3, 50))]
    data = DocumentDataset(documents, tokenizer, max_tokens=5, min_tokens=3, progress=False)
    # a: <s> + 10 words + </s> = 12 tokens = 5 + 5 + 2, the rest of 2 is dropped.
    assert [data[i]["input_ids"].tolist() for i in range(len(data))] == [
        [BOS, 3, 4, 5, 6], [7, 8, 9, 10, 11], [BOS, 53, 54, 55, EOS],
    ]  # fmt: skip
    assert data.names == ["a", "a", "b"]
    assert data.num_tokens == 15
    assert data[0]["input_ids"].dtype == torch.long


def test_dataset_of_whole_documents(tokenizer, recwarn: pytest.WarningsRecorder) -> None:
    data = DocumentDataset([words(90)], tokenizer, progress=False)
    assert len(data) == 1
    assert len(data[0]["input_ids"]) == 92
    assert not recwarn.list


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_tokens": 1}, "at least 2"),
        ({"max_tokens": 4, "min_tokens": 8}, r"`max_tokens` is 4"),
        ({"min_tokens": 50}, "the longest has 12 tokens"),
    ],
)
def test_dataset_refuses(tokenizer, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DocumentDataset([words(10)], tokenizer, progress=False, **settings)


def test_long_documents_join_by_folder_in_name_order(tokenizer) -> None:
    documents = [
        Document("b/3", "test", words(4, 30)),
        Document("a/1", "test", words(6, 10)),
        Document("b/1", "test", words(6, 20)),
        Document("a/big", "test", words(25)),
        Document("a/2", "test", words(3, 40)),
        Document("b/2", "train", words(9, 50)),
        Document("b/4", "test", words(9, 60)),
    ]
    found = long_documents(documents, tokenizer, 10)
    assert [d.name for d in found] == ["a/big", "b/1..b/3"]
    # a/1 + a/2 reach 9 only, and b/2 is of another split: both are dropped, as is b/4.
    assert found[1].text == words(6, 20) + "\n\n" + words(4, 30)
    assert found[1].split == "test"
    assert [d.name for d in long_documents(documents, tokenizer, 9)] == [
        "a/1..a/2", "a/big", "b/1..b/3", "b/2", "b/4",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="min_tokens"):
        long_documents(documents, tokenizer, 0)


# Batches


def test_collator_pads_right() -> None:
    batch = DocumentCollator(pad_token_id=9)(
        [{"input_ids": torch.tensor([1, 2, 3])}, {"input_ids": [4, 5], "labels": [-100, 5]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [-100, 5, -100]]
    wide = DocumentCollator(pad_to_multiple_of=4)([{"input_ids": [1, 2, 3, 4, 5]}])
    assert wide["input_ids"].tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
    with pytest.raises(ValueError, match="needs `input_ids`"):
        DocumentCollator()([{"text": "x"}])
    with pytest.raises(ValueError, match="3 `labels` for 2 `input_ids`"):
        DocumentCollator()([{"input_ids": [1, 2], "labels": [1, 2, 3]}])


def padded() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[0, 0, 5, 6, 7, 0], [1, 2, 3, 4, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.clone()}


def test_left_aligned_rolls_and_is_idempotent() -> None:
    once = left_aligned({**padded(), "name": "kept"})
    assert once["input_ids"].tolist() == [[5, 6, 7, 0], [1, 2, 3, 4]]
    assert once["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert once["labels"].tolist() == [[5, 6, 7, -100], [1, 2, 3, 4]]
    assert once["name"] == "kept"
    again = left_aligned(once)
    assert all(torch.equal(again[k], once[k]) for k in ("input_ids", "attention_mask", "labels"))


def test_left_aligned_refuses_holes_and_wrong_shapes() -> None:
    batch = padded()
    batch["attention_mask"][1] = torch.tensor([1, 0, 1, 1, 0, 0])
    with pytest.raises(ValueError, match="hole"):
        left_aligned(batch)
    batch["attention_mask"] = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        left_aligned(batch)


def test_pieces_lose_no_target() -> None:
    cut = list(pieces(left_aligned(padded()), 3))
    assert [rows.tolist() for rows, _ in cut] == [[0, 1], [1]]
    assert [p["input_ids"].tolist() for _, p in cut] == [[[5, 6, 7], [1, 2, 3]], [[4]]]
    assert [p["shift_labels"].tolist() for _, p in cut] == [[[6, 7, -100], [2, 3, 4]], [[-100]]]
    assert not any("labels" in p for _, p in cut)


def test_first_tokens_drop_targets_beyond() -> None:
    batch = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
    plain = shifted_labels(first_tokens(batch, 3))
    given = {"input_ids": batch["input_ids"], "shift_labels": shifted_labels(batch)}
    assert plain.tolist() == first_tokens(given, 3)["shift_labels"].tolist() == [[1, 2, -100]]
    assert given["shift_labels"][0, 2] == 3


def test_last_segment_only_counts_from_each_rows_end() -> None:
    ids = torch.arange(1, 19).view(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    batch = left_aligned({"input_ids": ids, "attention_mask": mask, "labels": ids.clone()})
    last = shifted_labels(last_segment_only(batch, 4))
    # 9 tokens: the last segment is one token, without a target; 6 tokens: positions 4 and 5.
    assert last.tolist() == [[-100] * 9, [-100] * 4 + [15, -100] + [-100] * 3]
    right = shifted_labels(last_segment_only(batch, 4, "right"))
    assert right[0].tolist() == [-100] * 5 + [7, 8, 9, -100]
    columns = shifted_labels(last_segment_only(batch, 4, by_columns=True))
    assert (columns == -100).all()
    given = {**batch, "shift_labels": shifted_labels(batch)}
    assert torch.equal(last_segment_only(given, 4)["shift_labels"], last)


def test_a_splits_own_folder_is_not_trained_on(tmp_path: Path) -> None:
    """`validation/` without `train/`: its files stay out of training, all others are in."""
    (tmp_path / "validation").mkdir()
    for index in range(40):
        (tmp_path / f"text{index}.md").write_text(f"Text {index}.")
    (tmp_path / "validation" / "held_out.md").write_text("Held out.")
    train = {d.name for d in load_documents(tmp_path, "train")}
    test = {d.name for d in load_documents(tmp_path, "test")}
    held = {d.name for d in load_documents(tmp_path, "validation")}
    assert held == {"held_out.md"} and not train & test
    assert train | test == {f"text{index}.md" for index in range(40)}
