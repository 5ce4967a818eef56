"""Study files are read as meant, or refused with a line number."""

from __future__ import annotations

import math
import re
import resource
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.errors import StudyError
from orchestrator.study_file.yaml_text import MAX_VALUES, parse_yaml, read_yaml, scalar, write_yaml
from tests.support.cpu_time import cpu_seconds


def refusal(text: str) -> str:
    with pytest.raises(StudyError) as caught:
        parse_yaml(text, "study.yaml")
    return str(caught.value)


class TestScalars:
    @pytest.mark.parametrize(
        ("word", "value"),
        [
            ("1e-3", 0.001), ("1E3", 1000.0), ("1.e+2", 100.0), (".5", 0.5), ("-3", -3), ("+7", 7), ("0", 0),
            ("0x1f", 31), ("0o17", 15), (".inf", math.inf), ("-.INF", -math.inf), ("true", True), ("False", False),
            ("null", None), ("~", None), ("", None),
        ],
    )  # fmt: skip
    def test_c2_numbers_and_words_are_those_of_yaml_1_2(self, word: str, value: object) -> None:
        text = scalar(word)
        assert text == value
        assert type(text) is type(value)

    @pytest.mark.parametrize(
        "word", ["no", "No", "off", "on", "yes", "y", "1:30", "1_000", "2026-01-01", "1.5.2", "e3"]
    )
    def test_words_that_only_yaml_1_1_converts_are_texts(self, word: str) -> None:
        assert scalar(word) == word
        # The reason for a loader of our own: PyYAML reads most of these as something else.
        assert word in ("y", "1.5.2", "e3") or yaml.safe_load(word) != word

    def test_pyyaml_reads_1e_minus_3_as_a_string(self) -> None:
        assert yaml.safe_load("1e-3") == "1e-3"

    def test_not_a_number(self) -> None:
        assert math.isnan(scalar(".nan"))

    def test_quoted_numbers_stay_texts(self) -> None:
        assert parse_yaml("a: '12'\nb: \"1e-3\"\nc: |\n  5\n").data == {"a": "12", "b": "1e-3", "c": "5\n"}

    def test_c2_leading_zeros_are_refused(self) -> None:
        assert refusal("search:\n  seed: 012\n") == (
            "study.yaml is not valid: line 2, search.seed: an integer has no leading zero, but got 012 (octal in "
            "YAML 1.1, decimal in YAML 1.2). Write 12 for the number or '012' for the string."
        )

    @given(st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none()))
    def test_what_pyyaml_writes_is_read_back(self, value: object) -> None:
        assert parse_yaml(yaml.safe_dump({"a": [value]})).data == {"a": [value]}

    @given(st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=30))
    @example("0E0")
    @example("1e3")
    @example("012")
    @example("no")
    def test_texts_that_we_write_are_read_back(self, value: str) -> None:
        assert parse_yaml(write_yaml({"a": value})).data == {"a": value}


class TestLines:
    def test_every_key_and_item_has_its_line(self) -> None:
        document = parse_yaml("name: a\ndata:\n  id:\n    - photo\n    - x\n  ood: [p,\n    q]\n")
        assert document.lines == {
            ("name",): 1, ("data",): 2, ("data", "id"): 3, ("data", "id", 0): 4, ("data", "id", 1): 5,
            ("data", "ood"): 6, ("data", "ood", 0): 6, ("data", "ood", 1): 7,
        }  # fmt: skip

    def test_a_missing_key_has_the_line_of_its_parent(self) -> None:
        document = parse_yaml("a: 1\nmodel: {}\n")
        assert document.line(("model", "name")) == 2
        assert document.line(("nothing",)) is None


class TestRefusals:
    def test_repeated_keys_are_all_named(self) -> None:
        assert refusal("a: 1\nb: 2\na: 3\nb: 4\n") == (
            "study.yaml is not valid, 2 problems:\n"
            "  line 3, a: this key is given twice, first on line 1. Keep one of them.\n"
            "  line 4, b: this key is given twice, first on line 2. Keep one of them."
        )

    def test_c3_a_tag_cannot_name_a_python_object(self, tmp_path: Path) -> None:
        witness = tmp_path / "executed"
        assert refusal(f"a: !!python/object/apply:os.system ['touch {witness}']") == (
            "study.yaml is not valid: line 1: tags are not allowed in a study, but got "
            "'tag:yaml.org,2002:python/object/apply:os.system'. Remove it."
        )
        assert not witness.exists()

    def test_c3_an_alias_bomb_is_refused_at_once(self) -> None:
        """Within the CPU time of a few honest files of as many values as are allowed, and their memory."""
        levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
        bomb = "\n".join(["a0: &a0 [x, x]", *levels])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert refusal(bomb) == (
            f"study.yaml is not valid: line 5: a study has at most {MAX_VALUES:,} values with all aliases written "
            "out, but this one has more."
        )
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes
        honest = f"a: [{', '.join(['x'] * (MAX_VALUES - 10))}]"
        assert cpu_seconds(lambda: refusal(bomb)) < 3 * cpu_seconds(lambda: parse_yaml(honest))

    def test_an_alias_is_what_it_stands_for(self) -> None:
        assert parse_yaml("a: &x {lr: 1e-3}\nb: *x\n").data == {"a": {"lr": 0.001}, "b": {"lr": 0.001}}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: &a [*a]", "line 1: the alias *a lies inside itself."),
            ("a: *x", "line 1: the alias *x has no anchor &x before it."),
            ("a: 1\n---\nb: 2", "line 2: a study file holds one document, but a second one starts here."),
            ("1: a", "line 1: a key is a string, but got 1. Quote it if that is meant."),
            ("? [a]\n: b", "line 1: a key is a single word, but here it is a list, a mapping or an alias."),
            ("a: {<<: {}}", "line 1: merge keys (<<) are not allowed in a study. Write the keys out."),
            ("a: " + "[" * 21, "line 1: a study is at most 20 levels deep, but this goes deeper."),
            ("", "line 1: a study file is a mapping that starts with `name: …`, but this one is empty."),
            ("- a", "line 1: a study file is a mapping that starts with `name: …`, but this one contains ['a']."),
            (
                "a: [1,\nb: 2",
                "line 3: this is not YAML: did not find expected ',' or ']'. Check indentation, colons and brackets "
                "near here.",
            ),
        ],
    )
    def test_what_is_not_a_study(self, text: str, message: str) -> None:
        assert refusal(text) == f"study.yaml is not valid: {message}"

    def test_nesting_beyond_the_parsers_own_limit(self) -> None:
        """libyaml has a limit of its own since 0.2.6; older ones leave it to ours."""
        assert re.search("levels deep|nesting depth", refusal("a: " + "[" * 2000))

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(StudyError) as caught:
            read_yaml(tmp_path / "none.yaml")
        assert str(caught.value) == (
            f"{tmp_path}/none.yaml cannot be read: there is no such file. `luthier init` writes one for your data."
        )

    def test_c3_a_data_file_is_not_read_to_its_end(self, tmp_path: Path) -> None:
        file = tmp_path / "big.yaml"
        with file.open("wb") as stream:
            stream.truncate(2**40)  # a hole: it takes no room on the disk, and would not fit into memory
        with pytest.raises(StudyError) as caught:
            read_yaml(file)
        assert str(caught.value) == (
            f"{file} cannot be read: a study file has at most 1,000,000 bytes, but this one has more. Is it a data "
            "file?"
        )

    def test_another_encoding(self, tmp_path: Path) -> None:
        file = tmp_path / "latin.yaml"
        file.write_bytes("name: a\nstorage: fünf\n".encode("latin-1"))
        with pytest.raises(StudyError) as caught:
            read_yaml(file)
        assert str(caught.value) == (
            f"{file} cannot be read: line 2: a study file is UTF-8 text, but a byte here is not. Save it as UTF-8."
        )

    def test_a_byte_order_mark_is_no_problem(self, tmp_path: Path) -> None:
        file = tmp_path / "bom.yaml"
        file.write_bytes(b"\xef\xbb\xbfname: a\n")
        assert read_yaml(file).data == {"name": "a"}
