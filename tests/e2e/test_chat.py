"""`jaxpost chat`: what it says, what it remembers, what it shows, and what a user can get wrong."""

import builtins
import io
import json
import shutil
import sys

import numpy as np
import pytest

from jaxpost import from_pretrained, save_pretrained
from jaxpost.chat import Chat, ChatConfig, Conversation, TooLongError
from jaxpost.cli import main
from jaxpost.completer import Completer
from jaxpost.data.sources import load_rows
from jaxpost.rl.generate import generate
from jaxpost.rl.sampling import Sampling
from jaxpost.spoken import Spoken
from tests.conftest import make_noisy_model, make_tokenizer

FLAGS = ["--max_new_tokens", "10", "--temperature", "1.5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talker") / "model"
    save_pretrained(make_noisy_model(4), make_tokenizer(), folder, generation_config={"eos_token_id": 1})
    return folder


def talk(monkeypatch, capsys, folder, text, *flags):
    """A chat by pipes: the exit code, answers and notes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = main(["chat", "--model_name_or_path", str(folder), *FLAGS, *flags])
    out, err = capsys.readouterr()
    return code, out, err


def rendered(messages):
    """What a model reads to answer messages."""
    return make_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def expected(folder, messages, number=1):
    """The answer to messages that are prompt so and so of a chat, by the sampler alone."""
    tokenizer = make_tokenizer()
    prompt = np.array(tokenizer(rendered(messages), add_special_tokens=False)["input_ids"])
    options = {"max_new_tokens": 10, "eos_ids": [1], "sampling": Sampling(temperature=1.5), "first_request": number}
    [completion] = generate(from_pretrained(folder), [prompt], **options)
    return tokenizer.decode(completion.tokens, skip_special_tokens=True)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_what_was_said_before_is_read_and_clear_forgets_it(folder, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "new" / "talk.jsonl"
    asked, real = [], Completer.complete

    def complete(self, prompts, config, **options):
        asked.extend(self.tokenizer.decode(prompt) for prompt in prompts)
        return real(self, prompts, config, **options)

    monkeypatch.setattr(Completer, "complete", complete)
    lines = f"one\n\n  two\r\n/save {saved}\n/clear\ntwo\n/exit\nnever read\n"
    code, out, err = talk(monkeypatch, capsys, folder, lines, "--system", "Be brief.")
    system = {"role": "system", "content": "Be brief."}
    first = expected(folder, [system, user("one")])
    both = [system, user("one"), assistant(first), user("two")]
    second, third = expected(folder, both, 2), expected(folder, [system, user("two")], 3)
    assert code == 0 and asked == [
        rendered(messages) for messages in ([system, user("one")], both, [system, user("two")])
    ]
    assert out == f"{first}\n{second}\n{third}\n"
    assert f"5 messages in {saved}" in err.replace("\n", "")
    assert load_rows(str(saved), "train").column_names == ["messages"]
    messages = json.loads(saved.read_text())["messages"]
    assert messages == [*both, assistant(second)]


def test_the_same_seed_says_the_same_and_each_answer_is_drawn_anew(folder, monkeypatch, capsys):
    lines = "one\n/clear\none\n"
    _, one, _ = talk(monkeypatch, capsys, folder, lines)
    _, again, _ = talk(monkeypatch, capsys, folder, lines)
    _, other, _ = talk(monkeypatch, capsys, folder, lines, "--seed", "1")
    assert one == again != other
    first, second = (expected(folder, [user("one")], number) for number in (1, 2))
    assert one == f"{first}\n{second}\n" and first != second


def test_commands_that_do_not_work_say_so_and_the_chat_goes_on(folder, monkeypatch, capsys):
    lines = "/sav x\n/save\n/save /proc/none/x\n/system\n/etc/passwd\none\n"
    code, out, err = talk(monkeypatch, capsys, folder, lines)
    assert code == 0 and out == expected(folder, [user("one")]) + "\n"
    for text in (
        "no command /sav (did you mean '/save'?)",
        "/save FILE needs a file",
        "/proc/none/x cannot be written",
        "no system prompt",
        "no command /etc/passwd;",
        "cut after 10 tokens",
    ):
        assert text in err


def test_a_full_context_loses_its_oldest_turns_with_a_note(folder, monkeypatch, capsys):
    code, _, err = talk(monkeypatch, capsys, folder, "a" * 100 + "\n" + "b" * 60 + "\n" + "c" * 400 + "\nd\n")
    assert code == 0
    assert "256 tokens are full: it no longer reads the oldest turn]" in err
    assert "that message has" in err and "room for 246; shorten it" in err


class Words:
    """Encodes messages as their words, and remembers what it was asked."""

    def __call__(self, messages):
        self.asked = messages
        return np.arange(sum(len(message["content"].split()) for message in messages))


def test_turns_leave_in_pairs_and_what_does_not_fit_changes_nothing():
    words = Words()
    talk = Conversation(words, 6, has_template=True)
    talk.instruct("always here")
    for text in ("a b", "c", "d"):
        talk.prompt(text)
        talk.answered("yes")
    # The system's two words, and what still fits into the other four: "c yes d".
    assert [message["content"] for message in words.asked] == ["always here", "c", "yes", "d"]
    assert talk.first == 2 and len(talk.whole()) == 7
    kept = list(talk.messages)
    with pytest.raises(TooLongError, match="7 tokens with what stands around it, and there is room for 6"):
        talk.prompt("v w x y z")
    assert talk.messages == kept and talk.first == 2
    talk.prompt("e")
    talk.answered("")  # stopped before the first word
    assert talk.messages == kept


def chat_in_terminal(folder, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    return Chat(ChatConfig(model_name_or_path=str(folder), max_new_tokens=10, temperature=0.0))


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    chat = chat_in_terminal(folder, monkeypatch)
    said, real = make_tokenizer()("half of it")["input_ids"], Completer.complete

    def interrupted(self, prompts, config, **options):
        options["stop"](said)
        raise KeyboardInterrupt

    monkeypatch.setattr(Completer, "complete", interrupted)
    assert chat.take("one")
    assert chat.conversation.messages == [user("one"), assistant("half of it")]
    out, err = capsys.readouterr()
    assert out == "half of it\n" and "[stopped]" in err
    monkeypatch.setattr(Completer, "complete", real)
    assert chat.take("two")
    assert capsys.readouterr().out.endswith("\n")
    assert len(chat.conversation.messages) == 4


def test_ctrl_c_at_the_prompt_goes_on_and_ctrl_d_ends(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    typed = iter([KeyboardInterrupt, "/clear", EOFError])

    def typing(prompt):
        found = next(typed)
        if isinstance(found, str):
            return found
        raise found

    monkeypatch.setattr(builtins, "input", typing)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["chat", "--model_name_or_path", str(folder), *FLAGS]) == 0
    err = capsys.readouterr().err
    assert "Ctrl-D or /exit ends the chat" in err and "forgotten" in err and "reads 256 tokens" in err


def test_a_model_without_a_template_goes_on_with_each_text(folder, tmp_path, monkeypatch, capsys):
    base = shutil.copytree(folder, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    code, out, err = talk(monkeypatch, capsys, base, "one\none\n/system x\n", "--temperature", "0")
    assert code == 0 and "no chat template: it goes on with each text" in err
    half = len(out) // 2
    assert half > 1 and out[:half] == out[half:]
    assert "so a system prompt has no place" in err
    assert talk(monkeypatch, capsys, base, "", "--system", "x")[0] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_new_tokens", "256"], "the model reads 256 tokens, prompt and completion together; lower it"),
        (["--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--top_p", "0"], "top_p is 0.0"),
        (["--model_name_or_path", "./nowhere"], "neither a local folder"),
        (["--sytem", "x"], "did you mean '--system'"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, capsys, flags, message):
    code, out, err = talk(monkeypatch, capsys, folder, "one\n", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_template_that_takes_no_system_prompt_is_an_error(folder, tmp_path, monkeypatch, capsys):
    strict = shutil.copytree(folder, tmp_path / "strict")
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    path = strict / "chat_template.jinja"
    path.write_text(refuses + path.read_text())
    code, out, err = talk(monkeypatch, capsys, strict, "one\n", "--system", "x")
    assert code == 3 and not out and "no system" in err
    code, out, err = talk(monkeypatch, capsys, strict, "/system x\none\n")
    assert code == 0 and "no system" in err and out == expected(folder, [user("one")]) + "\n"


def shown(capsys, texts, is_terminal):
    """What is shown after each of the texts, which a completion is one after the other."""
    spoken, found = Spoken(lambda tokens: texts[tokens[0]], is_terminal), []
    for i in range(len(texts)):
        assert spoken([i]) is None
        found.append(capsys.readouterr().out)
    spoken.close()
    return [*found, capsys.readouterr().out]


def test_half_characters_and_half_words_wait(capsys):
    texts = ["a caf", "a caf\ufffd", "a café", "a café ol", "a café olé."]
    assert shown(capsys, texts, False) == ["a caf", "", "é", " ol", "é.", "\n"]
    assert shown(capsys, texts, True) == ["a", "", "", " café", "", " olé.\n"]


def test_a_terminal_breaks_lines_between_words_and_obeys_nothing(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")
    text = "one two three four\n  five \x1b[31msix seven\n\n日本語 日本語 x"
    lines = "one two\nthree four\n  five\n[31msix\nseven\n\n日本語\n日本語 x\n"
    assert "".join(shown(capsys, [text[:i] for i in range(1, len(text) + 1)], True)) == lines
    assert "".join(shown(capsys, [text], False)) == text + "\n"


def test_save_keeps_one_row_of_json(folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "talk.json"
    talk(monkeypatch, capsys, folder, f"ü\n/save {path}\n")
    row = json.loads(path.read_text(encoding="utf-8"))
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert row["messages"][0]["content"] == "ü" and "ü" in path.read_text(encoding="utf-8")
