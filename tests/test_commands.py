"""How the words behind a command become its flags."""

from jaxpost.commands import behind


def test_words_without_a_flag_go_behind_one_and_flags_keep_their_values():
    expected = ["--runs", "a", "b", "--output_file", "c"]
    assert behind("--runs", ["a", "--output_file", "c", "b"]) == expected
    assert behind("--runs", ["--output_file", "c", "--runs", "a", "b"]) == expected
    assert behind("--runs", ["--output_file=c", "a"]) == ["--runs", "a", "--output_file=c"]
    assert behind("--runs", ["--help"]) == ["--help"]
