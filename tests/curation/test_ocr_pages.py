"""Lists of web pages, and lines that are none."""

import json

import pytest

from pangea_jax.curation.ocr_pages import read_pages


def test_lists_of_pages(tmp_path):
    (tmp_path / "hi").mkdir()
    (tmp_path / "hi" / "b.HTML").write_text("x")
    (tmp_path / "a.htm").write_text("x")
    (tmp_path / "skip.txt").write_text("x")
    found = list(read_pages(tmp_path))
    assert [(page.id, page.language, page.is_local) for page in found] == [
        ("a.htm", "", True),
        ("hi/b.HTML", "hi", True),
    ]
    listed = tmp_path / "list.jsonl"
    rows = [{"url": "https://a.example/1", "language": "pt-BR"}, {"file": "a.htm"}]
    listed.write_text("\n".join(map(json.dumps, rows)))
    found = list(read_pages(listed))
    assert [(page.id, page.language) for page in found] == [
        ("https://a.example/1", "pt"),
        ("a.htm", ""),
    ]
    assert found[1].source == str(tmp_path / "a.htm")
    plain = tmp_path / "list.txt"
    plain.write_text("# remark\nhttps://a.example/2\n\na.htm\n")
    assert [page.id for page in read_pages(plain)] == ["https://a.example/2", "a.htm"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", '"url" or "file"'),
        ('{"url": "https://a", "file": "b"}', '"url" or "file"'),
        ('{"url": "file:///etc/passwd"}', "http:// or https://"),
        ('{"url": "https://a", "language": "klingon"}', "unknown language 'klingon'"),
    ],
)
def test_a_line_that_is_no_page_is_named(line, message, tmp_path):
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"file": "a.htm"}\n' + line)
    with pytest.raises(ValueError, match=r"list\.jsonl, line 2: .*" + message):
        list(read_pages(listed))
