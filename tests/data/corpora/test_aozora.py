"""Works in the notation of Aozora Bunko, https://www.aozora.gr.jp/annotation/."""

import io
import zipfile

import pytest

from transformer_lm.data import corpora
from transformer_lm.errors import UserError

pytest.importorskip("aozora")

WORK = """吾輩は猫である
夏目漱石

-------------------------------------------------------
【テキスト中に現れる記号について】

《》：ルビ
（例）吾輩《わがはい》

｜：ルビの付く文字列の始まりを特定する記号
（例）一番｜獰悪《どうあく》

［＃］：入力者注　主に外字の説明や、傍点の位置の指定
　　　（数字は、JIS X 0213の面区点番号、または底本のページと行数）
（例）※［＃「言＋墟のつくり」、第4水準2-88-74］
-------------------------------------------------------

［＃８字下げ］一［＃「一」は大見出し］

　吾輩《わがはい》は猫である。名前はまだ無い。
　一番｜獰悪《どうあく》な種族であった※［＃「てへん＋劣」、第3水準1-84-77］《む》しる。
［＃ここから２字下げ］
「※［＃二の字点、1-2-22］［＃「※［＃二の字点、1-2-22］」に傍点］」と云《い》った。
［＃ここで字下げ終わり］
※［＃始め二重山括弧、1-1-52］底本※［＃終わり二重山括弧、1-1-53］を見よ。
［＃改ページ］
　吾輩は死ぬ。


底本：「夏目漱石全集1」ちくま文庫、筑摩書房
　　　1987（昭和62）年9月29日第1刷発行
底本の親本：「筑摩全集類聚版夏目漱石全集」筑摩書房
入力：柴田卓治
2015年5月24日修正
青空文庫作成ファイル：
このファイルは、インターネットの図書館、青空文庫（http://www.aozora.gr.jp/）で作られました。
"""
TEXT = """一

　吾輩は猫である。名前はまだ無い。
　一番獰悪な種族であった挘しる。

「〻」と云った。

《底本》を見よ。

　吾輩は死ぬ。"""


def read(path):
    [text] = corpora.open_documents(f"aozora:{path}", "train")
    return text


@pytest.mark.parametrize("kind", ["shift_jis", "utf-8", "crlf", "zip"])
def test_notation_header_and_colophon_go(tmp_path, kind):
    data = WORK.encode("utf-8" if kind == "utf-8" else "shift_jis")
    if kind == "crlf":
        data = data.replace(b"\n", b"\r\n")
    if kind == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("wagahaiwa_nekodearu.txt", data)
        data = buffer.getvalue()
    path = tmp_path / ("work.zip" if kind == "zip" else "work.txt")
    path.write_bytes(data)
    assert read(path) == TEXT


def test_without_the_explanation_of_the_notation(tmp_path):
    (tmp_path / "poem.txt").write_bytes(
        "春\n某\n\n菜の花や\n月は東に\n\n底本：「句集」\n入力：某\n".encode("shift_jis")
    )
    assert read(tmp_path / "poem.txt") == "菜の花や\n月は東に"


def test_unknown_characters_leave_their_mark(tmp_path):
    (tmp_path / "x.txt").write_bytes("題\n某\n\n※［＃「謎の字」、123-4］と。\n".encode("shift_jis"))
    assert read(tmp_path / "x.txt") == "〓と。"


def test_characters_of_the_plane_that_stands_in_for_others(tmp_path):
    """One of them in a work is not one of the work's unusual characters."""
    (tmp_path / "x.txt").write_bytes("題\n某\n\n※［＃「口＋世」、U+546D］と\U000f0000。\n".encode())
    assert read(tmp_path / "x.txt") == "呭と〓。"
    (tmp_path / "y.txt").write_bytes("題\n某\n\n猫と\U000f0005。\n".encode())
    assert read(tmp_path / "y.txt") == "猫と〓。"


def test_a_file_is_a_document(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_bytes(f"題{i}\n某\n\n本文{i}。\n".encode("shift_jis"))
    documents = corpora.open_documents(f"aozora:{tmp_path}/*.txt", "train[1:]")
    assert list(documents) == ["本文1。", "本文2。"]


@pytest.mark.parametrize("data", [b"\xff\xfe\x00\x80\x81", b"PK\x03\x04broken"])
def test_foreign_files(tmp_path, data):
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(UserError, match=r"x\.txt"):
        read(tmp_path / "x.txt")


@pytest.mark.parametrize("encoding", ["iso2022_jp", "iso2022_jp_3"])
def test_iso_2022_jp_is_refused(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("吾輩は猫である\n\n名前はまだ無い。".encode(encoding))
    with pytest.raises(UserError, match=r"a\.txt: ISO-2022-JP, not UTF-8; .*iconv -f ISO-2022-JP"):
        list(corpora.open_documents(f"aozora:{tmp_path}/a.txt", "train"))
